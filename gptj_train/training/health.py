"""Detect non-finite steps and loss spikes: report them, count them, and stop a run that no longer learns."""

from __future__ import annotations

import math
import statistics
from collections import deque
from pathlib import Path

from torch import Tensor

from gptj_train.counted import counted
from gptj_train.errors import UserError
from gptj_train.tasks.task import Task
from gptj_train.training.engine import Engine
from gptj_train.training.retention import way_back
from gptj_train.training.state import TrainState

_WINDOW = 50  # steps whose losses a new loss is compared with
_LEAST_LOSSES = 25  # of these before any comparison: the median of fewer is itself noise
_SPREADS = 10  # times the median absolute deviation; the noise of small batches stays below 5
_LEAST_RISE = 0.5  # nats, for runs whose losses hardly differ


class Health:
    """Judges a run's steps by their numbers. The engine has already skipped the update of a non-finite step."""

    def __init__(self, max_skipped_steps: int, output_dir: str | Path) -> None:
        """``output_dir`` holds the checkpoints that the advice names."""
        self._max_skipped_steps = max_skipped_steps
        self._output_dir = output_dir
        self._losses: deque[float] = deque(maxlen=_WINDOW)
        self._in_spike = False

    def judge(self, state: TrainState, *, loss: float, grad_norm: float, loss_scale: float) -> str | None:
        """Count the step that ``state`` has just reached; return a line for the user, None for a good step.

        Raises:
            UserError: ``max_skipped_steps`` non-finite steps in a row.
        """
        if math.isfinite(grad_norm):
            state.skipped_in_a_row = 0
            return self._spike(state.step, loss)
        state.skipped += 1
        if math.isfinite(loss) and loss_scale > 1:
            # Part of fp16 training: the dynamic loss scale rises until gradients overflow.
            return f"step {state.step}: fp16 overflow, update skipped; the loss scale is now {loss_scale:g}"
        state.skipped_in_a_row += 1
        found = f"loss {loss:g}, gradient norm {grad_norm:g}"
        if state.skipped_in_a_row < self._max_skipped_steps:
            return f"step {state.step}: {found}: non-finite, update skipped"
        last_update = state.step - state.skipped_in_a_row
        raise UserError(
            f"step {state.step}: {found}: non-finite for {counted(state.skipped_in_a_row, 'step')} in a row "
            f"(max_skipped_steps), no update since step {last_update}; lower optim.lr, "
            "raise optim.warmup_steps, set engine.precision to bf16 or fp32, or correct the data named above; "
            f"{way_back(self._output_dir, suspect=last_update)}"
        )

    def _spike(self, step: int, loss: float) -> str | None:
        """Return a line for a loss far above the last ones; once, until losses are down again."""
        was_in_spike = self._in_spike
        self._in_spike = False
        median = 0.0
        if len(self._losses) >= _LEAST_LOSSES:
            median = statistics.median(self._losses)
            # Median and median deviation, since a mean would follow the spike itself.
            spread = statistics.median(abs(one - median) for one in self._losses)
            self._in_spike = loss > median + max(_SPREADS * spread, _LEAST_RISE)
        self._losses.append(loss)
        if self._in_spike and not was_in_spike:
            return f"step {step}: loss spike: {loss:.4f} after a median of {median:.4f}"
        return None


def non_finite_rows(engine: Engine, task: Task, step: int, losses: list[Tensor]) -> list[str]:
    """Return a line for each micro-batch of any rank whose loss is non-finite, with its training rows. Collective."""
    rows = task.training_rows(step, engine.rank, engine.world_size)
    found = []
    for rows_of_batch, loss in zip(rows, losses, strict=True):
        if not loss.isfinite():
            found.append((engine.rank, rows_of_batch, loss.item()))
    lines = []
    for rank, rows_of_batch, value in engine.gathered(found):
        lines.append(f"step {step + 1}: loss {value:g} on rank {rank} in rows {rows_of_batch} of the training data")
    return lines
