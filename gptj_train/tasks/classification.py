"""Sequence classification: one label, several labels, or numbers for each text."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from gptj_train.data.labelled import LabelledRows
from gptj_train.data.sampler import Sampler, evaluation_batches
from gptj_train.errors import UserError
from gptj_train.model.gptj_config import GPTJConfig
from gptj_train.schema import schema
from gptj_train.tasks.classification_metrics import classification_metrics
from gptj_train.tasks.task import Batch, EvaluationBatch


class LabelledLogits(NamedTuple):
    """An evaluation batch without its padding: summed loss, row numbers, logits (R, L) fp32, labels."""

    loss: float
    rows: list[int]
    logits: Tensor
    labels: Tensor


@schema
class ClassificationTaskConfig:
    """What is asked of a text."""

    problem_type: Literal["single_label_classification", "multi_label_classification", "regression"]
    labels: list[Any] | None
    class_weights: Literal["balanced"] | dict[str | int, float] | None

    def __post_init__(self) -> None:
        if self.class_weights is not None and self.problem_type == "regression":
            raise UserError("task.class_weights: regression has no classes to weigh; set it to null")
        for label in self.labels or ():
            if type(label) not in (str, int):
                raise UserError(f'task.labels: {label!r} is neither a name nor a number; put names in quotes: "true"')
        if isinstance(self.class_weights, dict) and min(self.class_weights.values(), default=0) < 0:
            raise UserError(f"task.class_weights must not be negative, got {self.class_weights}")


def names_of(model: GPTJConfig) -> list[str]:
    """A model's labels in the order of their ids; as Transformers calls them where they have no names."""
    names = model.id2label or {label: f"LABEL_{label}" for label in range(model.num_labels)}
    return [names[label] for label in sorted(names)]


def known_labels(config: ClassificationTaskConfig, init_from: str | None) -> list[str] | None:
    """The names asked for; else those of the head that the initial weights come with, which keeps its order."""
    asked = None if config.labels is None else [str(label) for label in config.labels]
    if init_from is None or "GPTJForSequenceClassification" not in GPTJConfig.from_pretrained(init_from).architectures:
        return asked
    known = names_of(GPTJConfig.from_pretrained(init_from))
    if asked is not None and len(asked) != len(known):
        raise UserError(f"task.labels names {len(asked)} labels, the head of {init_from} has {len(known)}")
    return asked or known


def class_weights(config: ClassificationTaskConfig, names: Sequence[str], labels: np.ndarray) -> np.ndarray:
    """(L) float32: factor of the loss where a label applies.

    ``balanced`` gives every class the same sum, or for several labels as much to the texts that have one as
    to those that have not. Named weights are as given, 1 for the others.

    Args:
        labels: of the training data, as in ``LabelledRows``.
    """
    given = config.class_weights
    if given == "balanced" and config.problem_type == "single_label_classification":
        counts = np.bincount(labels, minlength=len(names)).clip(min=1)
        return (len(labels) / len(names) / counts).astype(np.float32)
    if given == "balanced":
        positive = labels.sum(axis=0).clip(min=1)
        return ((len(labels) - positive) / positive).astype(np.float32)
    named = {str(name): weight for name, weight in given.items()} if isinstance(given, dict) else {}
    if unknown := named.keys() - set(names):
        raise UserError(
            f"task.class_weights: no label named {', '.join(sorted(unknown))}; there are {', '.join(names)}"
        )
    return np.array([named.get(name, 1.0) for name in names], dtype=np.float32)


class Classification:
    """Batches, padded on the right, and metrics of ``GPTJForSequenceClassification``.

    Args:
        train: None: the task only evaluates.
        sampler: order of the training rows.
        names: of the labels, in the order of their ids.
        pad_id: token id that fills up rows.
        batch_size: rows of an evaluation batch.

    Attributes:
        predictions: of the last evaluation, one for each held-out row in their order.
    """

    def __init__(
        self,
        *,
        train: LabelledRows | None = None,
        sampler: Sampler | None = None,
        validation: LabelledRows | None,
        names: Sequence[str],
        config: ClassificationTaskConfig,
        pad_id: int,
        batch_size: int,
    ) -> None:
        self._train, self._validation = train, validation
        self._sampler = sampler
        self._names = names
        self._problem_type = config.problem_type
        self._pad_id = pad_id
        self._batch_size = batch_size
        self._unweighted = np.ones(len(names), dtype=np.float32)
        self._weights = self._unweighted
        if train is not None:
            self._weights = class_weights(config, names, train.labels)
        self.predictions: list[dict[str, Any]] = []

    def training_rows(self, step: int, rank: int, world_size: int) -> list[list[int]]:
        assert self._sampler is not None
        return self._sampler.windows(step, rank, world_size)

    def training_batches(self, step: int, rank: int, world_size: int) -> list[Batch]:
        assert self._train is not None
        batches = []
        for rows in self.training_rows(step, rank, world_size):
            batches.append(_collate(self._train, rows, self._weights, self._pad_id))
        return batches

    def evaluation_batches(self, rank: int, world_size: int) -> Iterator[EvaluationBatch]:
        if self._validation is None:
            return
        for rows in evaluation_batches(len(self._validation), self._batch_size, rank, world_size):
            inputs = _collate(self._validation, rows, self._unweighted, self._pad_id)
            yield EvaluationBatch(inputs, source=rows)

    def targets(self, batch: Batch) -> int:
        return batch["labels"][_is_real(batch)].numel()

    def records(self, output: Any, batch: EvaluationBatch) -> list[LabelledLogits]:
        real = _is_real(batch.inputs)
        rows = [row for row in batch.source if row is not None]
        logits = output.logits.float().cpu()[real]
        return [LabelledLogits(output.loss.item(), rows, logits, batch.inputs["labels"][real])]

    def metrics(self, records: list[LabelledLogits]) -> dict[str, Any]:
        order = torch.tensor([row for record in records for row in record.rows]).argsort()
        logits = torch.cat([record.logits for record in records])[order]
        labels = torch.cat([record.labels for record in records])[order]
        self.predictions = list(predictions(self._problem_type, logits, labels, self._names))
        loss = sum(record.loss for record in records)
        return classification_metrics(self._problem_type, loss, logits, labels, self._names)

    def write_predictions(self, folder: str | Path) -> None:
        """Write predictions.jsonl, a line for each held-out row in their order; nothing without an evaluation."""
        if self.predictions:
            lines = [json.dumps(prediction, ensure_ascii=False) + "\n" for prediction in self.predictions]
            (Path(folder) / "predictions.jsonl").write_text("".join(lines), encoding="utf-8")


def _collate(data: LabelledRows, rows: Sequence[int | None], weights: np.ndarray, pad_id: int) -> Batch:
    """Collate rows into a batch.

    Args:
        rows: None stands for padding: a row without a real token and without weight in the loss.
        weights: (L) float32, factor of the loss where a label applies.

    Returns:
        input_ids and attention_mask (B, T) int64, padded on the right; labels and loss_weights (B) or (B, L).
    """
    known = [0 if row is None else row for row in rows]
    padding = torch.tensor([row is None for row in rows])
    lengths = torch.tensor([len(data.token_ids[row]) for row in known]).masked_fill(padding, 0)
    # At least one column, so that a batch of padding alone is a valid input of the model.
    columns = max(1, int(lengths.max()))
    input_ids = torch.full((len(rows), columns), pad_id)
    for ids, row, length in zip(input_ids, known, lengths, strict=True):
        ids[:length] = torch.from_numpy(data.token_ids[row][:length])
    labels = data.labels[known]
    factors = weights[labels] if labels.ndim == 1 else np.where(labels == 1, weights, 1)
    loss_weights = torch.from_numpy(factors.astype(np.float32))
    loss_weights[padding] = 0
    return {
        "input_ids": input_ids,
        "attention_mask": (torch.arange(columns) < lengths[:, None]).long(),
        "labels": torch.from_numpy(labels),
        "loss_weights": loss_weights,
    }


def _is_real(batch: Batch) -> Tensor:
    """(B) bool: False for the rows that fill up a batch."""
    return batch["attention_mask"].any(dim=1)


def predictions(problem_type: str, logits: Tensor, labels: Tensor, names: Sequence[str]) -> Iterator[dict[str, Any]]:
    """For each row its number from 1, what it is labelled, what is predicted, and each label's score.

    Scores are probabilities, of several labels each for itself and predicted above one half; numbers have none.
    Arguments as of ``classification_metrics``.
    """
    single, regression = problem_type.startswith("single"), problem_type == "regression"
    scores = logits if regression else logits.softmax(dim=1) if single else logits.sigmoid()
    for number, (row, told) in enumerate(zip(scores.tolist(), labels.tolist(), strict=True), start=1):
        scored = dict(zip(names, row, strict=True))
        if regression:
            yield {"row": number, "label": dict(zip(names, told, strict=True)), "predicted": scored}
        elif single:
            best = max(scored, key=lambda name: scored[name])
            yield {"row": number, "label": names[told], "predicted": best, "scores": scored}
        else:
            given = [name for name, flag in zip(names, told, strict=True) if flag]
            likely = [name for name, score in scored.items() if score > 0.5]
            yield {"row": number, "label": given, "predicted": likely, "scores": scored}
