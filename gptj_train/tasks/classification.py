"""Sequence classification: one label, several labels, or numbers for each text."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from gptj_train.data.labelled import LabelledRows
from gptj_train.data.loader import evaluation_batches, micro_batches_at
from gptj_train.schema import schema

Record = tuple[float, Tensor, Tensor]
"""An evaluation batch without its padding rows: summed loss, logits (R, L) fp32, labels."""


@schema
class ClassificationTaskConfig:
    """What is asked of a text."""

    problem_type: Literal["single_label_classification", "multi_label_classification", "regression"]
    labels: list[str | int] | None
    class_weights: Literal["balanced"] | dict[str | int, float] | None

    def __post_init__(self) -> None:
        if self.class_weights is not None and self.problem_type == "regression":
            raise ValueError("task.class_weights: regression has no classes to weigh; set it to null")
        if isinstance(self.class_weights, dict) and min(self.class_weights.values(), default=0) < 0:
            raise ValueError(f"task.class_weights must not be negative, got {self.class_weights}")


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
        raise ValueError(
            f"task.class_weights: no label named {', '.join(sorted(unknown))}; there are {', '.join(names)}"
        )
    return np.array([named.get(name, 1.0) for name in names], dtype=np.float32)


class Classification:
    """Batches, padded on the right, and metrics of ``GPTJForSequenceClassification``."""

    def __init__(
        self,
        train: LabelledRows,
        validation: LabelledRows | None,
        names: Sequence[str],
        config: ClassificationTaskConfig,
        pad_id: int,
        seed: int,
        global_batch_size: int,
        micro_batch_size: int,
    ) -> None:
        self._train, self._validation, self._names = train, validation, names
        self._problem_type = config.problem_type
        self._weights = class_weights(config, names, train.labels)
        self._pad_id, self._seed = pad_id, seed
        self._global_batch_size, self._micro_batch_size = global_batch_size, micro_batch_size

    def training_rows(self, step: int, rank: int, world_size: int) -> list[list[int]]:
        return micro_batches_at(
            step, len(self._train), self._seed, self._global_batch_size, self._micro_batch_size, rank, world_size
        )

    def training_batches(self, step: int, rank: int, world_size: int) -> list[dict[str, Tensor]]:
        return [self._batch(self._train, rows) for rows in self.training_rows(step, rank, world_size)]

    def evaluation_batches(self, rank: int, world_size: int) -> Iterable[dict[str, Tensor]]:
        if self._validation is None:
            return
        for rows in evaluation_batches(len(self._validation), self._micro_batch_size, rank, world_size):
            yield self._batch(self._validation, rows)

    def targets(self, batch: dict[str, Tensor]) -> int:
        return batch["labels"][_real(batch)].numel()

    def records(self, output: Any, batch: dict[str, Tensor]) -> list[Record]:
        real = _real(batch)
        return [(output.loss.item(), output.logits.float().cpu()[real], batch["labels"][real])]

    def metrics(self, records: list[Record]) -> dict[str, Any]:
        losses, logits, labels = zip(*records, strict=True)
        return classification_metrics(
            self._problem_type, sum(losses), torch.cat(logits), torch.cat(labels), self._names
        )

    def _batch(self, data: LabelledRows, rows: Sequence[int | None]) -> dict[str, Tensor]:
        """input_ids and attention_mask, (B, T) int64; labels and loss_weights, (B) or (B, L).

        A row of None has no real token, and no weight in the loss.
        """
        known = [0 if row is None else row for row in rows]
        padding = torch.tensor([row is None for row in rows])
        lengths = torch.tensor([len(data.token_ids[row]) for row in known]).masked_fill(padding, 0)
        input_ids = torch.full((len(rows), max(1, int(lengths.max()))), self._pad_id)
        for ids, row, length in zip(input_ids, known, lengths, strict=True):
            ids[:length] = torch.from_numpy(data.token_ids[row][:length])
        labels = data.labels[known]
        weights = self._weights[labels] if labels.ndim == 1 else np.where(labels == 1, self._weights, 1)
        loss_weights = torch.from_numpy(weights.astype(np.float32))
        loss_weights[padding] = 0
        return {
            "input_ids": input_ids,
            "attention_mask": (torch.arange(input_ids.shape[1]) < lengths[:, None]).long(),
            "labels": torch.from_numpy(labels),
            "loss_weights": loss_weights,
        }


def _real(batch: dict[str, Tensor]) -> Tensor:
    return batch["attention_mask"].any(dim=1)


def classification_metrics(
    problem_type: str, loss: float, logits: Tensor, labels: Tensor, names: Sequence[str]
) -> dict[str, Any]:
    """The loss a term and what the problem is commonly judged by.

    Args:
        loss: summed.
        logits: (R, L) fp32.
        labels: (R) int64 class ids, or (R, L) fp32.
        names: of the L labels.
    """
    found: dict[str, Any] = {"eval_loss": loss / labels.numel()}
    if problem_type == "single_label_classification":
        return found | _single_label(logits.argmax(dim=1), labels, names)
    return found | (_multi_label(logits, labels) if problem_type.startswith("multi") else _regression(logits, labels))


# torchmetrics is imported where it is used: it takes seconds, which no other recipe need spend.


def _single_label(predicted: Tensor, labels: Tensor, names: Sequence[str]) -> dict[str, Any]:
    from torchmetrics.functional.classification import (
        multiclass_accuracy,
        multiclass_confusion_matrix,
        multiclass_f1_score,
        multiclass_matthews_corrcoef,
    )

    count = len(names)
    matrix = multiclass_confusion_matrix(predicted, labels, count).tolist()
    return {
        "accuracy": multiclass_accuracy(predicted, labels, count, average="micro").item(),
        "macro_f1": multiclass_f1_score(predicted, labels, count, average="macro").item(),
        # One class more than there are: torchmetrics does not give 0 where one of just two is never predicted.
        "mcc": multiclass_matthews_corrcoef(predicted, labels, count + 1).item(),
        "confusion_matrix": {
            true: {name: times for name, times in zip(names, row, strict=True) if times}
            for true, row in zip(names, matrix, strict=True)
        },
    }


def _multi_label(logits: Tensor, labels: Tensor) -> dict[str, float]:
    """F1 at a probability of one half, and at the hundredth that makes micro-F1 largest on this very data."""
    from torchmetrics.functional.classification import multilabel_f1_score

    probabilities, wanted, count = logits.sigmoid(), labels.long(), labels.shape[1]

    def f1(average: Literal["micro", "macro"], threshold: float) -> float:
        return multilabel_f1_score(probabilities, wanted, count, threshold, average).item()

    best = max((hundredth / 100 for hundredth in range(1, 100)), key=lambda threshold: f1("micro", threshold))
    return {
        "micro_f1": f1("micro", 0.5),
        "macro_f1": f1("macro", 0.5),
        "best_threshold": best,
        "best_micro_f1": f1("micro", best),
        "best_macro_f1": f1("macro", best),
    }


def _regression(predicted: Tensor, labels: Tensor) -> dict[str, float]:
    """Correlations are means over the numbers of a row; they need two rows, and are NaN for constants."""
    from torchmetrics.functional import mean_squared_error, pearson_corrcoef, spearman_corrcoef

    predicted, labels = predicted.squeeze(1), labels.squeeze(1)
    return {
        "mse": mean_squared_error(predicted, labels).item(),
        "pearson": pearson_corrcoef(predicted, labels).mean().item(),
        "spearman": spearman_corrcoef(predicted, labels).mean().item(),
    }
