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
from gptj_train.model.quantized import linear
from gptj_train.schema import schema
from gptj_train.weights.stored import is_adapter

TARGETS = ("q_proj", "k_proj", "v_proj", "out_proj", "fc_in", "fc_out")
"""Matrices of each block that can have adapters."""

ALL_LINEAR = "all-linear"
"""All of them, by PEFT's name."""

ModelT = TypeVar("ModelT", bound=nn.Module)


@schema
class LoraConfig:
    """Which matrices have adapters, and of what size; ``rank`` 0 trains all weights without adapters.

    ``init_from`` is an adapter folder that PEFT or our export wrote, to start from.
    """

    rank: int
    alpha: float
    dropout: float
    targets: str | list[str]
    rslora: bool
    init_from: str | None

    def __post_init__(self) -> None:
        if self.rank < 0:
            raise UserError(f"lora.rank must be 0 (all weights are trained) or more, got {self.rank}")
        if self.alpha <= 0:
            # With 0 the adapters would add nothing, and never learn.
            raise UserError(f"lora.alpha must be above 0, got {self.alpha}")
        if not 0 <= self.dropout < 1:
            raise UserError(f"lora.dropout must be in [0, 1), got {self.dropout}")
        if self.rank:
            _check_targets(self.matrices)

    @property
    def matrices(self) -> tuple[str, ...]:
        """The names of the matrices that have adapters."""
        if self.targets in (ALL_LINEAR, [ALL_LINEAR]):
            return TARGETS
        return (self.targets,) if isinstance(self.targets, str) else tuple(self.targets)

    @property
    def scale(self) -> float:
        """The factor of the adapters' products."""
        return adapter_scale(self.rank, self.alpha, self.rslora)


def adapter_scale(rank: int, alpha: float, rslora: bool) -> float:
    """Return alpha / rank, or alpha / sqrt(rank) with rank-stabilized LoRA (arXiv 2312.03732)."""
    return alpha / math.sqrt(rank) if rslora else alpha / rank


def _check_targets(names: tuple[str, ...]) -> None:
    if not names or not set(names) <= set(TARGETS):
        given = ", ".join(sorted(names)) or "none"
        raise UserError(f"lora.targets must be {ALL_LINEAR}, or some of {', '.join(TARGETS)}; got {given}")


class LoRALinear(nn.Module):
    """A frozen linear layer plus ``scale * B A x``.

    Attributes:
        weight, bias: those of the frozen layer, under its names, so that its checkpoints still match.
        lora_A: Linear with weight (rank, in_features).
        lora_B: Linear with weight (out_features, rank), zero at first: training starts from the frozen model.
    """

    def __init__(self, base: Linear, *, rank: int, scale: float, dropout: float) -> None:
        super().__init__()
        self.weight = base.weight
        self.bias = base.bias
        self.scale = scale
        self.dropout = dropout
        # PEFT draws A from U(-1/sqrt(in), 1/sqrt(in)); a normal draw with its standard deviation learns alike.
        std = 1 / math.sqrt(3 * base.in_features)
        self.lora_A = Linear(base.in_features, rank, std, bias=False)
        self.lora_B = Linear(rank, base.out_features, 0.0, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(..., in_features) -> (..., out_features)."""
        # Before the frozen product: the order decides how the gradients of x add up, to the bit.
        dropped = F.dropout(x, self.dropout, self.training)
        adapted: Tensor = self.lora_B(self.lora_A(dropped))
        frozen = linear(x, self.weight, self.bias)
        return frozen + self.scale * adapted


def with_lora(model: ModelT, lora: LoraConfig) -> ModelT:
    """Add adapters to the target matrices of every block, in place, and freeze all else but a new head.

    Return the model, unchanged if ``lora.rank`` is 0.
    """
    if not lora.rank:
        return model
    heads = new_heads(model)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.startswith(heads))
    # Lists, because the loop replaces children of the modules that it visits.
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if name in lora.matrices and isinstance(child, Linear):
                adapter = LoRALinear(child, rank=lora.rank, scale=lora.scale, dropout=lora.dropout)
                setattr(parent, name, adapter)
    return model


def new_heads(model: nn.Module) -> tuple[str, ...]:
    """Return prefixes of the parameters that no pretrained folder has, such as ``("score.",)``."""
    if not getattr(model, "new_head_allowed", False):
        return ()
    return tuple(f"{name}." for name, _ in model.named_children() if name != "transformer")


def merged(
    parameters: Iterable[tuple[str, Tensor]],
    adapters: Mapping[str, Tensor],
    scale: float,
) -> Iterator[tuple[str, Tensor]]:
    """Yield the parameters without adapters, each adapter's product added to its weight.

    Args:
        parameters: (name, tensor) of the whole model, adapters included.
        adapters: the matrices A and B by name.
        scale: factor of the products, ``LoraConfig.scale``.

    Yields:
        (name, tensor): fp32 where a product was added, else the given tensor.
    """
    for name, tensor in parameters:
        if is_adapter(name):
            continue
        module = name.removesuffix(".weight")
        lora_a = adapters.get(f"{module}.lora_A.weight")
        lora_b = adapters.get(f"{module}.lora_B.weight")
        if lora_a is not None and lora_b is not None:
            # In fp32: a small update added in bf16 would round away.
            tensor = torch.addmm(tensor.float(), lora_b.float(), lora_a.float(), alpha=scale)
        yield name, tensor
