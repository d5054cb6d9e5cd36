"""The activations that a GPT-J config.json may name, under Transformers' names (its ACT2FN).

GPT-J 6B uses ``gelu_new``. Fine-tuned and tiny models on disk name others; each is a few lines.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F


def _gelu_tanh(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


def _gelu_fast(x: Tensor) -> Tensor:
    # 0.7978845608 is sqrt(2 / pi), with the digits of Transformers.
    # 0.5 * x comes first as it does there: the order decides how the gradients of x add up, to the bit.
    half = 0.5 * x
    inner = x * 0.7978845608 * (1.0 + 0.044715 * x * x)
    return half * (1.0 + torch.tanh(inner))


def _gelu_accurate(x: Tensor) -> Tensor:
    half = 0.5 * x
    inner = math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)
    return half * (1 + torch.tanh(inner))


def _gelu_10(x: Tensor) -> Tensor:
    return F.gelu(x).clip(-10, 10)


def _quick_gelu(x: Tensor) -> Tensor:
    return x * torch.sigmoid(1.702 * x)


def _relu2(x: Tensor) -> Tensor:
    return F.relu(x).square()


def _laplace(x: Tensor) -> Tensor:
    # The constants make it approximate relu2 (Mega, arXiv 2209.10655).
    mu = 0.707107
    sigma = 0.282095
    standardized = (x - mu) / (sigma * math.sqrt(2.0))
    return 0.5 * (1.0 + torch.erf(standardized))


def _linear(x: Tensor) -> Tensor:
    return x


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_10": _gelu_10,
    "gelu_accurate": _gelu_accurate,
    "gelu_fast": _gelu_fast,
    "gelu_new": _gelu_tanh,
    "gelu_python": F.gelu,
    "gelu_python_tanh": _gelu_tanh,
    "gelu_pytorch_tanh": _gelu_tanh,
    "hardswish": F.hardswish,
    "laplace": _laplace,
    "leaky_relu": F.leaky_relu,
    "linear": _linear,
    "mish": F.mish,
    "quick_gelu": _quick_gelu,
    "relu": F.relu,
    "relu2": _relu2,
    "relu6": F.relu6,
    "sigmoid": torch.sigmoid,
    "silu": F.silu,
    "swish": F.silu,
    "tanh": torch.tanh,
}
