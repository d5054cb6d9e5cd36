"""The training state that is not in tensors."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass
class TrainState:
    """What a checkpoint stores beside tensors. Random numbers need none: they follow from seed, step and rank.

    Attributes:
        step: optimizer steps done.
        tokens: tokens that the model has read, without padding.
        targets: terms of the loss: predicted tokens, labels or windows.
        skipped: steps with non-finite numbers, which changed no weight.
        skipped_in_a_row: of these, the ones since the last good step; above 0, the checkpoint does not count as good.
        evaluated: the step of the last evaluation.
        next_batch: as of the last save, a hash of the batch that comes next.
        settings: as of the last save, the config.
        wandb_id: as of the last save, the id of the Weights & Biases run.
        schedule: start and end of each cycle of the learning rate (``schedule.Cycles``).
        data: as of the last save, what decides the batches: settings, tokenizer and files.
        held_out: as of the last save, a hash of the first held-out batch.
        best_metric: what ``best_value`` is a value of.
        best_value: the best of all evaluations after step 0; None before the first.
        best_step: its step; -1 before the first.
        evaluations_since_best: evaluations that were no better.
    """

    step: int = 0
    tokens: int = 0
    targets: int = 0
    skipped: int = 0
    skipped_in_a_row: int = 0
    evaluated: int = -1
    next_batch: str = ""
    settings: dict[str, Any] = field(default_factory=dict)
    wandb_id: str | None = None
    schedule: list[list[int]] = field(default_factory=list)
    data: dict[str, Any] = field(default_factory=dict)
    held_out: str = ""
    best_metric: str = ""
    best_value: float | None = None
    best_step: int = -1
    evaluations_since_best: int = 0
