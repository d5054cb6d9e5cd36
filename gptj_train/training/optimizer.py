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
    lora_lr_ratio: float
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
        if self.lora_lr_ratio <= 0:
            raise UserError(f"lora_lr_ratio must be above 0, got {self.lora_lr_ratio}")
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


def decay_groups(model: nn.Module, weight_decay: float, lora_lr_ratio: float = 1.0) -> list[dict[str, Any]]:
    """Return AdamW's parameter groups: weight decay for matrices, none for one-dimensional norms and biases.

    Args:
        lora_lr_ratio: learning rate of LoRA's B matrices over that of all others (LoRA+, arXiv 2402.12354). Unless it
            is 1 they have a group of their own, with ``lr_ratio``, which whoever sets ``lr`` multiplies by.
    """
    matrices: list[nn.Parameter] = []
    vectors: list[nn.Parameter] = []
    faster: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        if lora_lr_ratio != 1 and name.endswith("lora_B.weight"):
            faster.append(parameter)
        elif len(full_shape(parameter)) > 1:
            matrices.append(parameter)
        else:
            vectors.append(parameter)
    groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    if faster:
        groups.append({"params": faster, "weight_decay": weight_decay, "lr_ratio": lora_lr_ratio})
    return groups
