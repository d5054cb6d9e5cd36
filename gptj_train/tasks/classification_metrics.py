"""Metrics of sequence classification, computed by torchmetrics."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from torch import Tensor


def classification_metrics(
    problem_type: str, loss: float, logits: Tensor, labels: Tensor, names: Sequence[str]
) -> dict[str, Any]:
    """Compute the mean loss and the usual metrics of the problem, as JSON values.

    Args:
        problem_type: one of ``ClassificationTaskConfig.problem_type``.
        loss: summed over all rows.
        logits: (R, L) fp32.
        labels: (R) int64 class ids, or (R, L) fp32.
        names: of the L labels.
    """
    metrics: dict[str, Any] = {"eval_loss": loss / labels.numel()}
    if problem_type == "single_label_classification":
        metrics |= _single_label(logits.argmax(dim=1), labels, names)
    elif problem_type == "multi_label_classification":
        metrics |= _multi_label(logits, labels)
    else:
        metrics |= _regression(logits, labels, names)
    return metrics


# Each function imports torchmetrics itself: the import takes seconds, and only this task needs it.


def _single_label(predicted: Tensor, labels: Tensor, names: Sequence[str]) -> dict[str, Any]:
    from torchmetrics.functional.classification import (
        multiclass_accuracy,
        multiclass_confusion_matrix,
        multiclass_f1_score,
        multiclass_matthews_corrcoef,
    )

    count = len(names)
    # Without the zeros: with hundreds of labels almost all cells are 0.
    confusion: dict[str, dict[str, int]] = {}
    matrix = multiclass_confusion_matrix(predicted, labels, count).tolist()
    for true, row in zip(names, matrix, strict=True):
        confusion[true] = {name: texts for name, texts in zip(names, row, strict=True) if texts}
    return {
        "accuracy": multiclass_accuracy(predicted, labels, count, average="micro").item(),
        "macro_f1": multiclass_f1_score(predicted, labels, count, average="macro").item(),
        # One class too many: with two classes, torchmetrics takes another path, which does not give 0 where one
        # of them is never predicted. A class without texts changes nothing.
        "mcc": multiclass_matthews_corrcoef(predicted, labels, count + 1).item(),
        "confusion_matrix": confusion,
    }


def _multi_label(logits: Tensor, labels: Tensor) -> dict[str, float]:
    """Compute F1 at a threshold of 0.5, and at the best threshold.

    The best threshold is the multiple of 0.01 with the largest micro-F1 on the same data, so its scores flatter.
    """
    from torchmetrics.functional.classification import binary_f1_score, multilabel_f1_score

    probabilities = logits.sigmoid()
    targets = labels.long()
    count = labels.shape[1]

    def f1(average: Literal["micro", "macro"], threshold: float) -> float:
        if count == 1:  # torchmetrics refuses a multi-label problem of one label
            return binary_f1_score(probabilities, targets, threshold).item()
        return multilabel_f1_score(probabilities, targets, count, threshold, average).item()

    thresholds = [hundredth / 100 for hundredth in range(1, 100)]
    best = max(thresholds, key=lambda threshold: f1("micro", threshold))
    return {
        "micro_f1": f1("micro", 0.5),
        "macro_f1": f1("macro", 0.5),
        "best_threshold": best,
        "best_micro_f1": f1("micro", best),
        "best_macro_f1": f1("macro", best),
    }


def _regression(predicted: Tensor, labels: Tensor, names: Sequence[str]) -> dict[str, float]:
    """Compute the mean squared error and the correlations: of each number of a row, and their mean.

    Correlations need two rows, and are NaN where the labels or the predictions are constant.
    """
    from torchmetrics.functional import mean_squared_error, pearson_corrcoef, spearman_corrcoef

    # torchmetrics wants (R), not (R, 1), for a single number; squeeze leaves (R, L) alone.
    predicted = predicted.squeeze(1)
    labels = labels.squeeze(1)
    pearson = pearson_corrcoef(predicted, labels)
    spearman = spearman_corrcoef(predicted, labels)
    metrics = {
        "mse": mean_squared_error(predicted, labels).item(),
        "pearson": pearson.mean().item(),
        "spearman": spearman.mean().item(),
    }
    if len(names) > 1:
        # The mean may hide that one number is not learned at all.
        for name, linear, ranked in zip(names, pearson.tolist(), spearman.tolist(), strict=True):
            metrics |= {f"pearson/{name}": linear, f"spearman/{name}": ranked}
    return metrics
