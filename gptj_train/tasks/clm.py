"""Causal language modeling on packed windows."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from gptj_train.data.corpus import FORGETTING
from gptj_train.data.packing import PADDING, Window, Windows
from gptj_train.data.sampler import Sampler, evaluation_batches
from gptj_train.data.tokenizer import Tokenizer
from gptj_train.model.loss import IGNORE, next_token_targets
from gptj_train.tasks.task import Batch, EvaluationBatch


class ComponentLoss(NamedTuple):
    """The loss of an evaluation batch, whose windows all belong to one component.

    Attributes:
        loss: summed over the targets.
        targets: number of predicted tokens.
        bytes: UTF-8 bytes of these tokens.
    """

    component: str
    loss: float
    targets: int
    bytes: int


class CausalLM:
    """Next-token prediction on packed windows.

    Args:
        train: windows by component; None if the task only evaluates.
        sampler: order of the training windows, over the components in the order of ``train``.
        held_out: windows by component; one may be ``FORGETTING``, which the overall metrics leave out.
        tokenizer: for the bytes of each token.
        isolate: documents in a window neither see nor predict each other.
        batch_size: windows of an evaluation batch.
    """

    targets_name = "target_tokens"

    def __init__(
        self,
        *,
        train: Mapping[str, Windows] | None = None,
        sampler: Sampler | None = None,
        held_out: Mapping[str, Windows],
        tokenizer: Tokenizer,
        isolate: bool,
        batch_size: int,
    ) -> None:
        self._train = train or {}
        self._sampler = sampler
        self._held_out = held_out
        self._bytes_per_token = torch.from_numpy(tokenizer.bytes_per_token)
        self._isolate = isolate
        self._batch_size = batch_size

    def training_rows(self, step: int, rank: int, world_size: int) -> list[list[Any]]:
        """Return window numbers, or "component:number" where there are several components."""
        assert self._sampler is not None
        names = list(self._train)
        batches = []
        for batch in self._sampler.micro_batches(step, rank, world_size):
            rows: list[Any] = []
            for number, window in batch:
                # Data without components has a single one, named "".
                rows.append(f"{names[number]}:{window}" if names[number] else window)
            batches.append(rows)
        return batches

    def training_batches(self, step: int, rank: int, world_size: int) -> list[Batch]:
        assert self._sampler is not None
        components = list(self._train.values())
        batches = []
        for rows in self._sampler.micro_batches(step, rank, world_size):
            batches.append(self._batch([components[number][window] for number, window in rows]))
        return batches

    def evaluation_batches(self, rank: int, world_size: int) -> Iterator[EvaluationBatch]:
        for component, windows in self._held_out.items():
            # One component after the other, so that a batch's loss belongs to one.
            padding = _padding_window(windows.length)
            for rows in evaluation_batches(len(windows), self._batch_size, rank, world_size):
                inputs = self._batch([padding if row is None else windows[row] for row in rows])
                yield EvaluationBatch(inputs, source=component)

    def targets(self, batch: Batch) -> int:
        return int((_targets(batch) != IGNORE).sum())

    def records(self, output: Any, batch: EvaluationBatch) -> list[ComponentLoss]:
        targets = _targets(batch.inputs)
        predicted = targets[targets != IGNORE]
        size = int(self._bytes_per_token[predicted].sum())
        return [ComponentLoss(batch.source, output.loss.item(), len(predicted), size)]

    def metrics(self, records: list[ComponentLoss]) -> dict[str, float]:
        """Compute loss in nats per token, perplexity, and bits per UTF-8 byte, which compares across tokenizers.

        The metrics cover all validation data. With several components, ``<metric>/<component>`` covers each.
        """
        by_component: defaultdict[str, list[ComponentLoss]] = defaultdict(list)
        for record in records:
            by_component[record.component].append(record)
        # The forgetting set is other data, whose share would hide what the run improves; alone, it is the validation.
        validation = [record for record in records if record.component != FORGETTING]
        metrics = _loss_metrics(validation or records)
        if len(by_component) > 1:
            for component, own in by_component.items():
                for name, value in _loss_metrics(own).items():
                    metrics[f"{name}/{component}"] = value
        return metrics

    def write_predictions(self, folder: str | Path) -> None:
        """Write no file: the evaluation of a language model has losses but no predictions."""

    def _batch(self, windows: Sequence[Window]) -> Batch:
        """Collate windows into input_ids, labels and document_ids, (B, T) int64."""
        input_ids, document_ids, is_target = (
            torch.from_numpy(np.stack(arrays)) for arrays in zip(*windows, strict=True)
        )
        labels = input_ids.masked_fill(~is_target, IGNORE)
        if not self._isolate:
            # One document for the whole window; padding keeps its own id, so that text does not see it.
            document_ids = (document_ids != PADDING).long()
        return {"input_ids": input_ids, "labels": labels, "document_ids": document_ids}


def _padding_window(length: int) -> Window:
    """Return a window without targets: every rank needs as many batches of the same shape."""
    return Window(
        np.zeros(length, dtype=np.int64),
        np.zeros(length, dtype=np.int64),
        np.zeros(length, dtype=np.bool_),
    )


def _loss_metrics(records: Sequence[ComponentLoss]) -> dict[str, float]:
    # fsum is exact: the result does not depend on how the batches fall on ranks.
    loss_sum = math.fsum(record.loss for record in records)
    targets = sum(record.targets for record in records)
    size = sum(record.bytes for record in records)
    loss = loss_sum / max(targets, 1)  # held-out data may hold no target, such as texts of one token
    return {
        "eval_loss": loss,
        "perplexity": math.exp(min(loss, 700)),  # exp(710) overflows a double
        "bits_per_byte": loss_sum / math.log(2) / max(size, 1),
    }


def _targets(batch: Batch) -> Tensor:
    return next_token_targets(batch["labels"], batch["document_ids"])
