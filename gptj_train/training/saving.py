"""When a run saves its state, and what a failed save does."""

from __future__ import annotations

import time

from gptj_train.errors import UserError
from gptj_train.launch.watchdog import Watchdog
from gptj_train.tracking import Tracker
from gptj_train.training.checkpoint import Checkpoints, SaveFailedError
from gptj_train.training.disk_space import check_space
from gptj_train.training.engine import Engine
from gptj_train.training.retention import later_than, way_back
from gptj_train.training.state import TrainState
from gptj_train.training.trainer_config import TrainerConfig


class Saving:
    """The saves of a run.

    Attributes:
        saved: step of the last checkpoint; None before the first.
        seconds: the longest save so far; None before the first.
        best_is_new: the last evaluation was the best so far, and its model is not saved yet.
    """

    def __init__(
        self, *, config: TrainerConfig, engine: Engine, checkpoints: Checkpoints, tracker: Tracker, watchdog: Watchdog
    ) -> None:
        self.saved: int | None = None
        self.seconds: float | None = None
        self.best_is_new = False
        self._config = config
        self._engine = engine
        self._checkpoints = checkpoints
        self._tracker = tracker
        self._watchdog = watchdog
        self._last_attempt = 0  # step of the last save, failed or not
        self._saved_best: tuple[int, float | None] = -1, None  # step and value of the best evaluation on disk

    def begin(self, state: TrainState) -> None:
        """Check before the first step that the disk has room for all checkpoints.

        Args:
            state: from which the run resumes.

        Raises:
            UserError: it has not.
        """
        config = self._config
        self._last_attempt = state.step
        self._saved_best = state.best_step, state.best_value
        check_space(
            config.output_dir,
            self._engine.trained,
            steps=range(state.step, config.steps),
            save_every=config.save_every,
            keep=config.keep_checkpoints,
            keep_every=config.keep_every,
            best_every=config.saves_best_every,
        )

    def announce_abandoned(self, step: int) -> None:
        """Name the checkpoints of later steps than the one that a run resumes from."""
        later = later_than(self._config.output_dir, step)
        if later:
            names = ", ".join(folder.name for folder in later)
            self._tracker.note(f"the next checkpoint replaces {names}, of an abandoned run")

    def is_due(self, state: TrainState) -> bool:
        """Return whether the state after a step, and after its evaluation, is to be saved."""
        config = self._config
        if state.step == config.steps or self.best_is_new:
            return True
        if not config.save_every or state.skipped_in_a_row:
            # After a skipped step weights may have exploded: the save waits for the next step that counts.
            return False
        return state.step // config.save_every > self._last_attempt // config.save_every

    def save(self, state: TrainState) -> None:
        """Write a checkpoint; a failed one is reported, and ends the run only with ``failed_save=stop``. Collective.

        Raises:
            UserError: non-finite weights or moments, which no checkpoint may hold.
        """
        self._last_attempt = state.step
        self.best_is_new = False
        if not self._engine.holds_only_finite():
            raise UserError(
                f"step {state.step}: weights or moments are non-finite and were not saved; lower optim.lr or set "
                f"optim.clip_norm; {way_back(self._config.output_dir)}"
            )
        began = time.monotonic()
        try:
            with self._watchdog.paused():
                folder = self._checkpoints.save(self._engine, state)
        except SaveFailedError as error:
            if self._config.failed_save == "stop" or self.saved is None:  # the first one: this disk may take none
                raise
            self._tracker.note(f"step {state.step} was not saved: {error}; continuing, earlier checkpoints are intact")
            # What is not on disk cannot be exported, and the next save would remove the best that is.
            if state.best_step == state.step:
                state.best_step, state.best_value = self._saved_best
            return
        self.saved = state.step
        self._saved_best = state.best_step, state.best_value
        self.seconds = max(self.seconds or 0.0, time.monotonic() - began)
        best = f", the best so far: {state.best_metric} {state.best_value:.4f}" if state.best_step == state.step else ""
        self._tracker.note(f"saved {folder}{best}")
        if state.skipped_in_a_row:
            self._tracker.note("its last step was skipped, so that it does not count as good: no other was removed")
