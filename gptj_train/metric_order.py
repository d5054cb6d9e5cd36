"""Which of two values of a held-out metric is better."""

from __future__ import annotations

import math

from gptj_train.errors import UserError

LOWER_IS_BETTER = ("eval_loss", "perplexity", "bits_per_byte", "mse")
HIGHER_IS_BETTER = (
    *("accuracy", "macro_f1", "micro_f1", "best_macro_f1", "best_micro_f1", "mcc", "pearson", "spearman"),
    *("exact_match", "f1", "has_answer_exact_match", "has_answer_f1", "no_answer_exact_match"),
)


def check_metric(name: str) -> None:
    """Refuse a metric of which it is not known whether lower or higher is better."""
    if _base(name) not in (*LOWER_IS_BETTER, *HIGHER_IS_BETTER):
        known = ", ".join((*LOWER_IS_BETTER, *HIGHER_IS_BETTER))
        raise UserError(f"best_metric={name}: choose one of {known}, or one of a component, such as eval_loss/NAME")


def is_better(metric: str, value: float, than: float) -> bool:
    """Return whether a value is better than another one. NaN and infinity are never better, and worse than a number."""
    if not math.isfinite(value):
        return False
    if not math.isfinite(than):
        return True
    return value < than if _base(metric) in LOWER_IS_BETTER else value > than


def _base(metric: str) -> str:
    """Return the metric of all held-out data whose value for one component this is: eval_loss of eval_loss/NAME."""
    return metric.partition("/")[0]
