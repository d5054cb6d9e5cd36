"""The learning rate as a pure function of the step, so that resuming restores one integer."""

from __future__ import annotations

import math

from gptj_train.training.optimizer import OptimConfig


def lr_at(step: int, max_steps: int, optim: OptimConfig) -> float:
    """Return the learning rate of optimizer step ``step`` (from 0) of ``max_steps``.

    Linear warm-up reaches ``lr`` at step ``warmup_steps - 1``. Then follows a cosine or linear decay to
    ``lr * final_lr_ratio`` at the last step, or a constant, or warm-up-stable-decay (``wsd``,
    arXiv 2404.06395): constant, then a linear decay over the last ``decay_steps``.
    """
    if step < optim.warmup_steps:
        # step + 1: the first step already learns something.
        return optim.lr * (step + 1) / optim.warmup_steps
    if optim.schedule == "constant":
        return optim.lr
    first = optim.warmup_steps  # of the decay
    if optim.schedule == "wsd":
        first = max(first, max_steps - optim.decay_steps)
    last = max_steps - 1
    # The least length of 1 avoids a division by zero in runs of a single step.
    progress = (step - first) / max(last - first, 1)
    progress = min(max(progress, 0.0), 1.0)
    remaining = 1 - progress
    if optim.schedule == "cosine":
        remaining = (1 + math.cos(math.pi * progress)) / 2
    return optim.lr * (optim.final_lr_ratio + (1 - optim.final_lr_ratio) * remaining)
