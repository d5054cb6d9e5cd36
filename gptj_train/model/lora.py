"""LoRA (Hu et al., arXiv 2106.09685): frozen weights plus the product of two thin trained matrices."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gptj_train.errors import UserError
from gptj_train.model.layers import Linear
from gptj_train.schema import schema
from gptj_train.weights.stored import is_adapter

TARGETS = ("q_proj", "k_proj", "v_proj", "out_proj", "fc_in", "fc_out")
"""Matrices of each block that may be adapted."""

M = TypeVar("M", bound=nn.Module)


@schema
class LoraConfig:
    """Thin matrices beside frozen weights; with ``rank`` 0 there are none and all weights are trained."""

    rank: int
    alpha: float
    dropout: float
    targets: list[str]

    def __post_init__(self) -> None:
        if self.rank < 0:
            raise UserError(f"lora.rank must be 0 (all weights are trained) or more, got {self.rank}")
        if not 0 <= self.dropout < 1:
            raise UserError(f"lora.dropout must be in [0, 1), got {self.dropout}")


class LoRALinear(nn.Module):
    """A linear map whose weight stays, plus ``scale * B A``; B starts at zero, so that nothing changes at first.

    The frozen parameters keep their names; ``lora_A.weight`` is (rank, in), ``lora_B.weight`` (out, rank).
    """

    def __init__(self, base: Linear, rank: int, scale: float, dropout: float) -> None:
        super().__init__()
        self.weight, self.bias = base.weight, base.bias
        self.scale, self.dropout = scale, dropout
        # The standard deviation of PEFT's uniform start, U(-1/sqrt(in), 1/sqrt(in)).
        self.lora_A = Linear(base.in_features, rank, 1 / math.sqrt(3 * base.in_features), bias=False)
        self.lora_B = Linear(rank, base.out_features, 0.0, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out)."""
        adapted = self.lora_B(self.lora_A(F.dropout(x, self.dropout, self.training)))
        return F.linear(x, self.weight, self.bias) + self.scale * adapted


def with_lora(model: M, lora: LoraConfig) -> M:
    """Add adapters to the target matrices of every block, in place; unchanged if ``lora.rank`` is 0.

    Everything else is frozen, except a new head.

    Raises:
        UserError: names that are no targets, or none.
    """
    if not lora.rank:
        return model
    wanted = set(lora.targets)
    if not wanted or not wanted <= set(TARGETS):
        raise UserError(f"lora.targets must be some of {', '.join(TARGETS)}; got {', '.join(sorted(wanted)) or 'none'}")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.startswith(new_heads(model)))
    scale = lora.alpha / lora.rank
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if name in wanted and isinstance(child, Linear):
                setattr(parent, name, LoRALinear(child, lora.rank, scale, lora.dropout))
    return model


def new_heads(model: nn.Module) -> tuple[str, ...]:
    """Prefixes of the parameters that no pretrained folder has, such as ``score.``."""
    fresh = getattr(model, "new_head_allowed", False)
    return tuple(f"{name}." for name, _ in model.named_children() if fresh and name != "transformer")


def merged(
    parameters: Iterable[tuple[str, Tensor]], adapters: Mapping[str, Tensor], scale: float
) -> Iterator[tuple[str, Tensor]]:
    """The parameters with each product added to its weight, in fp32, and without the adapters.

    Args:
        parameters: (name, tensor) of the whole model.
        adapters: its A and B by name.
    """
    for name, tensor in parameters:
        if is_adapter(name):
            continue
        module = name.removesuffix(".weight")
        down, up = (adapters.get(f"{module}.lora_{side}.weight") for side in "AB")
        if down is not None and up is not None:
            tensor = torch.addmm(tensor.float(), up.float(), down.float(), alpha=scale)
        yield name, tensor
