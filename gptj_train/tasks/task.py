"""The interface between a task and the code that trains and evaluates it."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from torch import Tensor

from gptj_train.data.packing import PADDING

Batch = dict[str, Tensor]
"""Keyword arguments of the model's forward, on the CPU; (B, T) each."""


class EvaluationBatch(NamedTuple):
    """A batch of held-out data.

    Attributes:
        inputs: keyword arguments of the model's forward.
        source: where the rows come from; only the task that built the batch reads it.
    """

    inputs: Batch
    source: Any


def count_tokens(batch: Batch) -> int:
    """Count the tokens of a batch without its padding, which is masked or belongs to no document."""
    if "attention_mask" in batch:
        return int(batch["attention_mask"].sum())
    if "document_ids" in batch:
        return int((batch["document_ids"] != PADDING).sum())
    return batch["input_ids"].numel()


class Task(Protocol):
    """What differs between recipes: batches, targets and metrics.

    Attributes:
        targets_name: what ``targets`` counts, as metrics.jsonl names it.
    """

    targets_name: str

    def training_batches(self, step: int, rank: int, world_size: int) -> list[Batch]:
        """Return this rank's micro-batches of an optimizer step, a pure function of the arguments."""

    def training_rows(self, step: int, rank: int, world_size: int) -> list[list[Any]]:
        """Return a name for each row of these micro-batches, so that a message can name the bad samples."""

    def evaluation_batches(self, rank: int, world_size: int) -> Iterable[EvaluationBatch]:
        """Yield this rank's share of the held-out data; nothing if there is no held-out data.

        Every rank yields the same number of batches, since forward is a collective call under ZeRO-3.
        """

    def targets(self, batch: Batch) -> int:
        """Count the terms of the batch's loss sum; the trainer divides by their number over all ranks."""

    def records(self, output: Any, batch: EvaluationBatch) -> list[Any]:
        """Return what ``metrics`` needs from an evaluation batch, as picklable values without tensors on a GPU.

        ``output.loss`` is the sum over the batch.
        """

    def metrics(self, records: list[Any]) -> dict[str, Any]:
        """Compute the metrics, as JSON values with ``eval_loss`` among them, from the records of all ranks."""

    def write_predictions(self, folder: str | Path) -> None:
        """Write the predictions of the last evaluation to files in an existing folder, if there are any."""
