"""AdamW's settings and parameter groups."""

from __future__ import annotations

from typing import Any, Literal

from torch import nn

from gptj_train.errors import UserError
from gptj_train.schema import schema
from gptj_train.training.deepspeed_internals import full_shape

# CPUAdam computes in fp32, in which a larger beta is 1 and a smaller eps is 0: both would divide by zero.
_LARGEST_BETA = 1 - 2**-24
_LEAST_EPS = 1e-37


@schema
class OptimConfig:
    """AdamW (arXiv 1711.05101) on fp32 master weights, and its learning-rate schedule.

    Steps are optimizer steps. ``warmup_steps`` replaces ``warmup_ratio``, a share of the run. ``decay_steps`` belongs
    to ``wsd``: the length of its final decay.
    """

    lr: float
    betas: tuple[float, float]
    eps: float
    weight_decay: float
    clip_norm: float
    schedule: Literal["cosine", "linear", "constant", "wsd"]
    warmup_ratio: float
    warmup_steps: int | None
    decay_steps: int
    final_lr_ratio: float

    def __post_init__(self) -> None:
        if self.lr <= 0:
            raise UserError(f"lr must be above 0, got {self.lr}")
        if not all(0 <= beta <= _LARGEST_BETA for beta in self.betas):
            raise UserError(f"betas must be in [0, 1), got {self.betas}")
        if self.eps < _LEAST_EPS:
            raise UserError(f"eps must be above 0 (at least {_LEAST_EPS:g}), got {self.eps}")
        for name in ("warmup_steps", "decay_steps", "clip_norm", "weight_decay", "final_lr_ratio"):
            value = getattr(self, name)
            if value is not None and value < 0:
                raise UserError(f"{name} must be 0 or more, got {value}")
        if not 0 <= self.warmup_ratio < 1:
            raise UserError(f"warmup_ratio must be at least 0 and below 1, got {self.warmup_ratio}")


def decay_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Return AdamW's parameter groups: weight decay for matrices, none for one-dimensional norms and biases."""
    matrices: list[nn.Parameter] = []
    vectors: list[nn.Parameter] = []
    for parameter in model.parameters():
        if not parameter.requires_grad:
            continue
        if len(full_shape(parameter)) > 1:
            matrices.append(parameter)
        else:
            vectors.append(parameter)
    return [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]
