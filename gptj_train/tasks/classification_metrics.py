"""What predictions for texts are judged by, computed by torchmetrics."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from torch import Tensor


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
    from torchmetrics.functional.classification import binary_f1_score, multilabel_f1_score

    probabilities, wanted, count = logits.sigmoid(), labels.long(), labels.shape[1]

    def f1(average: Literal["micro", "macro"], threshold: float) -> float:
        if count == 1:
            return binary_f1_score(probabilities, wanted, threshold).item()
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
