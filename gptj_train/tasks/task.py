"""What the trainer and the evaluation need from a task."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from torch import Tensor

Batch = dict[str, Tensor]
"""Keyword arguments of the model's forward, on the CPU; (B, T) each."""


class EvaluationBatch(NamedTuple):
    """A batch of held-out data, and where its rows come from; the task alone reads ``source``."""

    inputs: Batch
    source: Any


class Task(Protocol):
    """What differs between recipes: batches, targets and metrics."""

    def training_batches(self, step: int, rank: int, world_size: int) -> list[Batch]:
        """Return this rank's micro-batches of an optimizer step, a pure function of the arguments."""

    def training_rows(self, step: int, rank: int, world_size: int) -> list[list[Any]]:
        """Return the names of the training samples in each of these micro-batches, for messages."""

    def evaluation_batches(self, rank: int, world_size: int) -> Iterable[EvaluationBatch]:
        """Yield this rank's share of the held-out data, as many batches on every rank; none without such data."""

    def targets(self, batch: Batch) -> int:
        """Return the number of terms in the batch's loss sum."""

    def records(self, output: Any, batch: EvaluationBatch) -> list[Any]:
        """Return what the metrics need from an evaluation batch, as picklable rows; ``output.loss`` is a sum."""

    def metrics(self, records: list[Any]) -> dict[str, Any]:
        """Compute the metrics of the records of all batches and ranks, as JSON values, ``eval_loss`` among them."""

    def write_predictions(self, folder: str | Path) -> None:
        """Write the predictions of the last evaluation to files; tasks without predictions write none."""
