"""The best evaluation of a run, and how many evaluations ago it was; both are part of the training state."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from gptj_train.errors import UserError
from gptj_train.metric_order import is_better
from gptj_train.training.state import TrainState


def count_evaluation(state: TrainState, metrics: Mapping[str, Any], metric: str) -> bool:
    """Take an evaluation into account; return whether its model is the best so far.

    Args:
        metric: the key ``best_metric``.

    Raises:
        UserError: the evaluation has no such metric.
    """
    if not isinstance(metrics.get(metric), float):
        there_are = ", ".join(name for name, value in metrics.items() if isinstance(value, float))
        raise UserError(f"best_metric={metric}: the evaluation has no such number; it has {there_are}")
    if state.best_metric != metric:  # values of another metric cannot be compared
        forget_best(state)
        state.best_metric = metric
    # Step 0 is what a run is compared with, not its result. After a skipped step weights may have exploded: such a
    # state is not saved.
    if state.step == 0 or state.skipped_in_a_row:
        return False
    value = metrics[metric]
    if is_better(metric, value, than=float("nan") if state.best_value is None else state.best_value):
        state.best_value, state.best_step = value, state.step
        state.evaluations_since_best = 0
        return True
    state.evaluations_since_best += 1
    return False


def forget_best(state: TrainState) -> None:
    """Let the next evaluation be the first that counts."""
    state.best_metric, state.best_value, state.best_step = "", None, -1
    state.evaluations_since_best = 0


def best_text(state: TrainState, exported: int) -> str | None:
    """Describe the best evaluation and the step that the export is of; None without an evaluation."""
    if state.best_value is None:
        return None
    of = "it" if exported == state.best_step else f"step {exported}, the last"
    return f"step {state.best_step}, {state.best_metric} {state.best_value:.4f}; the export is of {of}"
