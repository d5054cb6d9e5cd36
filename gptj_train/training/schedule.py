"""Learning rate as a pure function of the step, and the settings of the optimizer."""

from __future__ import annotations

import math
from typing import Any, Literal

from torch import nn

from gptj_train.schema import schema


@schema
class OptimConfig:
    """AdamW (arXiv 1711.05101) on fp32 master weights, and its learning-rate schedule.

    Steps are optimizer steps. ``decay_steps`` belongs to ``wsd``: the length of its final decay.
    """

    lr: float
    betas: tuple[float, float]
    eps: float
    weight_decay: float
    clip_norm: float
    schedule: Literal["cosine", "linear", "constant", "wsd"]
    warmup_steps: int
    decay_steps: int
    final_lr_ratio: float

    def __post_init__(self) -> None:
        if self.lr <= 0:
            raise ValueError(f"lr must be above 0, got {self.lr}")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas must be in [0, 1), got {self.betas}")
        for name in ("warmup_steps", "decay_steps", "clip_norm", "weight_decay", "final_lr_ratio"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must be 0 or more, got {getattr(self, name)}")


def lr_at(step: int, max_steps: int, optim: OptimConfig) -> float:
    """Learning rate of optimizer step ``step`` (from 0) of ``max_steps``.

    Linear warm-up reaches ``lr`` at step ``warmup_steps - 1``; then cosine or linear descent to
    ``lr * final_lr_ratio`` at the last step, or a constant, or warm-up-stable-decay (``wsd``,
    arXiv 2404.06395): constant, then a linear descent over the last ``decay_steps``.
    """
    if step < optim.warmup_steps:
        return optim.lr * (step + 1) / optim.warmup_steps
    if optim.schedule == "constant":
        return optim.lr
    last = max_steps - 1
    first = max(optim.warmup_steps, max_steps - optim.decay_steps) if optim.schedule == "wsd" else optim.warmup_steps
    progress = min(max((step - first) / max(last - first, 1), 0.0), 1.0)
    remaining = (1 + math.cos(math.pi * progress)) / 2 if optim.schedule == "cosine" else 1 - progress
    return optim.lr * (optim.final_lr_ratio + (1 - optim.final_lr_ratio) * remaining)


def decay_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """What is trained, with weight decay for matrices only: norms and biases are one-dimensional."""
    matrices: list[nn.Parameter] = []
    vectors: list[nn.Parameter] = []
    for parameter in (parameter for parameter in model.parameters() if parameter.requires_grad):
        shape = getattr(parameter, "ds_shape", parameter.shape)
        (matrices if len(shape) > 1 else vectors).append(parameter)
    return [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]
