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
    """The logits of an evaluation batch, without its padding rows.

    Attributes:
        loss: summed over the batch.
        rows: row numbers in the held-out data.
        logits: (R, L) fp32.
        labels: (R) int64 class ids, or (R, L) fp32.
    """

    loss: float
    rows: list[int]
    logits: Tensor
    labels: Tensor


@schema
class ClassificationTaskConfig:
    """What the model predicts for a text."""

    problem_type: Literal["single_label_classification", "multi_label_classification", "regression"]
    labels: list[Any] | None
    class_weights: Literal["balanced"] | dict[str | int, float] | None

    def __post_init__(self) -> None:
        if self.class_weights is not None and self.problem_type == "regression":
            raise UserError("task.class_weights: regression has no classes to weight; set it to null")
        for label in self.labels or ():
            # Not isinstance: YAML reads yes, no, true and false as bool, a subclass of int.
            if type(label) not in (str, int):
                raise UserError(f'task.labels: {label!r} is neither a name nor a number; put names in quotes: "true"')
        if isinstance(self.class_weights, dict) and min(self.class_weights.values(), default=0) < 0:
            raise UserError(f"task.class_weights must not be negative, got {self.class_weights}")


def label_names(model_config: GPTJConfig) -> list[str]:
    """Return a model's label names in the order of their ids; unnamed labels get Transformers' default names."""
    names = model_config.id2label
    if not names:
        return [f"LABEL_{label}" for label in range(model_config.num_labels)]
    return [names[label] for label in sorted(names)]


def known_labels(config: ClassificationTaskConfig, init_from: str | None) -> list[str] | None:
    """Return the label names in the order of their ids, or None if only the training data can tell.

    ``task.labels`` comes first, then the classification head of ``init_from``: its rows keep their meaning.

    Raises:
        UserError: ``task.labels`` and the head of ``init_from`` differ in number.
    """
    requested = None if config.labels is None else [str(label) for label in config.labels]
    if init_from is None:
        return requested
    initial = GPTJConfig.from_pretrained(init_from)
    if "GPTJForSequenceClassification" not in initial.architectures:
        return requested
    names = label_names(initial)
    if requested is not None and len(requested) != len(names):
        raise UserError(f"task.labels names {len(requested)} labels, the head of {init_from} has {len(names)}")
    return requested or names


def class_weights(config: ClassificationTaskConfig, names: Sequence[str], labels: np.ndarray) -> np.ndarray:
    """Return the loss weight of each label, (L) float32.

    ``balanced`` weights single labels as scikit-learn's ``compute_class_weight("balanced")`` does, and several
    labels by negatives / positives (torch's ``pos_weight``). Labels that a mapping leaves out get 1.

    Args:
        labels: of the training data, as in ``LabelledRows``.

    Raises:
        UserError: a weight for a label that does not exist.
    """
    given = config.class_weights
    if given == "balanced" and config.problem_type == "single_label_classification":
        # A named label may be absent from the data: clip, so that its weight stays finite.
        counts = np.bincount(labels, minlength=len(names)).clip(min=1)
        return (len(labels) / len(names) / counts).astype(np.float32)
    if given == "balanced":
        positive = labels.sum(axis=0).clip(min=1)
        negative = len(labels) - positive
        return np.asarray(negative / positive, dtype=np.float32)
    weights: dict[str, float] = {}
    if isinstance(given, dict):
        # Integer labels are keys without quotes in YAML.
        weights = {str(name): weight for name, weight in given.items()}
    unknown = sorted(weights.keys() - set(names))
    if unknown:
        raise UserError(f"task.class_weights: no label named {', '.join(unknown)}; there are {', '.join(names)}")
    return np.array([weights.get(name, 1.0) for name in names], dtype=np.float32)


class Classification:
    """Batches, padded on the right, and metrics of ``GPTJForSequenceClassification``.

    Args:
        train: training rows; None if the task only evaluates.
        sampler: order of the training rows.
        validation: held-out rows.
        names: label names in the order of their ids.
        pad_id: token id of the padding.
        batch_size: rows of an evaluation batch.

    Attributes:
        predictions: of the last evaluation, one for each held-out row, in the order of the rows.
    """

    targets_name = "labels"

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
        # Evaluation is unweighted: its loss must equal that of an export, which does not know the training data.
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
        # Records arrive rank by rank; metrics and predictions need the order of the held-out data.
        rows: list[int] = []
        for record in records:
            rows += record.rows
        order = torch.tensor(rows).argsort()
        logits = torch.cat([record.logits for record in records])[order]
        labels = torch.cat([record.labels for record in records])[order]
        self.predictions = list(predictions(self._problem_type, logits, labels, self._names))
        loss = sum(record.loss for record in records)
        return classification_metrics(self._problem_type, loss, logits, labels, self._names)

    def write_predictions(self, folder: str | Path) -> None:
        """Write predictions.jsonl, one line for each held-out row; write no file before the first evaluation."""
        if not self.predictions:
            return
        lines = [json.dumps(prediction, ensure_ascii=False) + "\n" for prediction in self.predictions]
        (Path(folder) / "predictions.jsonl").write_text("".join(lines), encoding="utf-8")


def _collate(data: LabelledRows, rows: Sequence[int | None], weights: np.ndarray, pad_id: int) -> Batch:
    """Collate rows into a batch.

    Args:
        rows: row numbers; None stands for a padding row, with no real token and no weight in the loss.
        weights: (L) float32, loss weight of each label.

    Returns:
        input_ids and attention_mask (B, T) int64, padded on the right; labels and loss_weights (B) or (B, L).
    """
    # A padding row borrows row 0's label, which its loss weight of 0 cancels, and none of its tokens.
    known = [0 if row is None else row for row in rows]
    padding = torch.tensor([row is None for row in rows])
    lengths = torch.tensor([len(data.token_ids[row]) for row in known])
    lengths[padding] = 0
    # At least one column, so that a batch of padding alone is a valid input of the model.
    columns = max(1, int(lengths.max()))
    input_ids = torch.full((len(rows), columns), pad_id)
    for ids, row, length in zip(input_ids, known, lengths, strict=True):
        ids[:length] = torch.from_numpy(data.token_ids[row][:length])
    labels = data.labels[known]
    # Of several labels only the positive terms are weighted, as by torch's pos_weight.
    label_weights = weights[labels] if labels.ndim == 1 else np.where(labels == 1, weights, 1)
    loss_weights = torch.from_numpy(label_weights.astype(np.float32))
    loss_weights[padding] = 0
    return {
        "input_ids": input_ids,
        "attention_mask": (torch.arange(columns) < lengths[:, None]).long(),
        "labels": torch.from_numpy(labels),
        "loss_weights": loss_weights,
    }


def _is_real(batch: Batch) -> Tensor:
    """Return a mask of the rows that are no padding, (B) bool."""
    return batch["attention_mask"].any(dim=1)


def predictions(problem_type: str, logits: Tensor, labels: Tensor, names: Sequence[str]) -> Iterator[dict[str, Any]]:
    """Yield a dict for each row: its number from 1, its label, the prediction, and a score for each label.

    Scores are probabilities. A single label is the likeliest one, several are those above one half. Regression
    predicts the numbers themselves and has no scores. The arguments are those of ``classification_metrics``.
    """
    if problem_type == "regression":
        scores = logits
    elif problem_type == "single_label_classification":
        scores = logits.softmax(dim=1)
    else:
        scores = logits.sigmoid()
    for number, (row_scores, label) in enumerate(zip(scores.tolist(), labels.tolist(), strict=True), start=1):
        score_of = dict(zip(names, row_scores, strict=True))
        if problem_type == "regression":
            yield {"row": number, "label": dict(zip(names, label, strict=True)), "predicted": score_of}
        elif problem_type == "single_label_classification":
            likeliest = max(score_of, key=score_of.__getitem__)
            yield {"row": number, "label": names[label], "predicted": likeliest, "scores": score_of}
        else:
            actual = [name for name, flag in zip(names, label, strict=True) if flag]
            predicted = [name for name in names if score_of[name] > 0.5]
            yield {"row": number, "label": actual, "predicted": predicted, "scores": score_of}
