"""What the trainer asks of a task."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

Batch = dict[str, Tensor]
"""Keyword arguments of the model's forward, on the CPU; (B, T) each."""


class Task(Protocol):
    """What differs between recipes."""

    def training_batches(self, step: int, rank: int, world_size: int) -> list[Batch]:
        """This rank's micro-batches of an optimizer step, a pure function of its arguments."""

    def training_rows(self, step: int, rank: int, world_size: int) -> list[list[int]]:
        """The rows of the training data that each of these micro-batches is made of, to name it by."""

    def evaluation_batches(self, rank: int, world_size: int) -> Iterable[Batch]:
        """This rank's share of the held-out data, as many batches on every rank; none without such data."""

    def targets(self, batch: Batch) -> int:
        """Terms of the batch's loss sum."""

    def records(self, output: Any, batch: Batch) -> list[Any]:
        """What the metrics need of an evaluation batch, where ``output.loss`` is a sum: picklable rows."""

    def metrics(self, records: list[Any]) -> dict[str, Any]:
        """What to report for the rows of all batches and ranks, as JSON values; ``eval_loss`` among it."""

    def write_predictions(self, folder: str | Path) -> None:
        """What the last metrics were computed from, as files; nothing where nothing is predicted."""
