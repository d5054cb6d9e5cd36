"""The learning rate as a pure function of the step, so that resuming restores one integer."""

from __future__ import annotations

import math

from gptj_train.training.optimizer import OptimConfig


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
