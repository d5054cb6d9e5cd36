"""Losses and gradients that are not as they should be: said, counted, and at last a reason to stop."""

from __future__ import annotations

import math
import statistics
from collections import deque

from gptj_train.errors import UserError
from gptj_train.training.checkpoint import TrainState

_WINDOW = 50  # steps whose losses a new one is compared with
_ENOUGH = 25  # of them to compare with at all
_SPREADS = 10  # times the median deviation from the median; noise of a batch stays below 5
_LEAST_RISE = 0.5  # nats, where losses hardly differ


class Health:
    """Judges a run's steps. The engine has by then left out the updates that were not finite."""

    def __init__(self, max_skipped_steps: int) -> None:
        self._max_skipped_steps = max_skipped_steps
        self._losses: deque[float] = deque(maxlen=_WINDOW)
        self._high = False

    def judge(self, state: TrainState, loss: float, grad_norm: float, loss_scale: float) -> str | None:
        """What to say of the step that ``state`` now counts, whose numbers these are; None of a good one.

        Raises:
            UserError: too many skipped steps in a row, with what to do.
        """
        if math.isfinite(grad_norm):
            state.skipped_in_a_row = 0
            return self._spike(state.step, loss)
        state.skipped += 1
        if math.isfinite(loss) and loss_scale > 1:
            return f"step {state.step}: fp16 overflow, no update; the loss scale goes down to {loss_scale:g}"
        state.skipped_in_a_row += 1
        found = f"loss {loss:g}, gradient norm {grad_norm:g}"
        if state.skipped_in_a_row >= self._max_skipped_steps:
            raise UserError(
                f"step {state.step}: {found}, and so for {state.skipped_in_a_row} steps in a row (max_skipped_steps): "
                f"no update since step {state.step - state.skipped_in_a_row}; lower optim.lr, raise "
                "optim.warmup_steps, set engine.precision to bf16 or fp32, or correct the data named above, and the "
                "same command goes on from the last checkpoint"
            )
        return f"step {state.step}: {found}: no update"

    def _spike(self, step: int, loss: float) -> str | None:
        """A loss far above the last ones, told once until they are down again."""
        was_high, self._high = self._high, False
        median = spread = 0.0
        if len(self._losses) >= _ENOUGH:
            median = statistics.median(self._losses)
            spread = statistics.median(abs(one - median) for one in self._losses)
            self._high = loss > median + max(_SPREADS * spread, _LEAST_RISE)
        self._losses.append(loss)
        return f"step {step}: the loss jumped to {loss:.4f} from about {median:.4f}" if self._high > was_high else None
