"""The training loop: one step function for every task, rank count and offload mode."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import torch

from gptj_train.data.sampler import fingerprint
from gptj_train.errors import UserError
from gptj_train.launch.preemption import Preempted, StopRequest
from gptj_train.launch.run_folder import RunFolder
from gptj_train.launch.watchdog import Watchdog
from gptj_train.tasks.task import Task, count_tokens
from gptj_train.tracking import Tracker
from gptj_train.training.checkpoint import Checkpoints, SaveFailedError, load
from gptj_train.training.engine import Engine
from gptj_train.training.health import Health, non_finite_rows
from gptj_train.training.retention import check_space, later_than, way_back
from gptj_train.training.schedule import lr_at
from gptj_train.training.state import TrainState
from gptj_train.training.trainer_config import TrainerConfig, changed_settings, check_not_past, is_due, numeric_settings

_UNTIMED_SAVE = 300.0  # seconds to reserve for a save before the first has been timed


class Trainer:
    """Trains a task's model to ``max_steps``, with evaluations and checkpoints in between."""

    def __init__(
        self,
        *,
        config: TrainerConfig,
        engine: Engine,
        task: Task,
        checkpoints: Checkpoints,
        tracker: Tracker,
        folder: RunFolder | None = None,
    ) -> None:
        self.config = config
        self.engine = engine
        self.task = task
        self.checkpoints = checkpoints
        self.tracker = tracker
        self.state = TrainState()
        self._folder = folder
        self._health = Health(config.max_skipped_steps, config.output_dir)
        self._watchdog = Watchdog(config.output_dir, config.hang_timeout, engine.rank)
        self._request = StopRequest(config.output_dir, config.max_hours, engine.rank)
        self._stopping = False  # the same on all ranks
        self._step_seconds = 0.0
        self._saved: int | None = None  # step of the last checkpoint
        self._last_attempt = 0  # step of the last save, failed or not
        self._save_seconds: float | None = None  # the longest save so far

    def train(self, resume_from: Sequence[Path] = ()) -> None:
        """Run to ``max_steps``, from scratch or from the first intact checkpoint of some. Collective.

        Raises:
            Preempted: a request to end came before that.
            UserError: too many non-finite steps in a row, or non-finite weights.
        """
        config = self.config
        with self._request, self._watchdog:
            # A shared disk may show the ranks different folders for a while: rank 0 decides.
            (resume_from, *_) = self.engine.gathered([list(resume_from)])
            if resume_from:
                with self._watchdog.paused():
                    self.resume(resume_from)
                self._saved = self.state.step
            self._last_attempt = self.state.step
            self._check_space()
            evaluated = self.state.evaluated == self.state.step
            self.tracker.start(self.state.step, config.max_steps, self.state.wandb_id, evaluated=evaluated)
            self._announce_abandoned()
            # Before the first step, for a baseline; after a resume, if the evaluation of this step was cut short.
            if self._evaluation_due():
                self.evaluate()
            while self.state.step < config.max_steps and not self._stopping:
                self.tracker.step(self.train_step())
                # Evaluate before saving, so that a checkpoint knows that its evaluation is done.
                if self._evaluation_due():
                    self.evaluate()
                if not self._stopping and self._save_due():
                    self.save()
            if self._stopping:
                self._end_early()

    def _check_space(self) -> None:
        config, steps = self.config, range(self.state.step, self.config.max_steps)
        check_space(
            config.output_dir,
            self.engine.trained,
            steps=steps,
            save_every=config.save_every,
            keep=config.keep_checkpoints,
            keep_every=config.keep_every,
        )

    def _announce_abandoned(self) -> None:
        later = later_than(self.config.output_dir, self.state.step)
        if later:
            names = ", ".join(folder.name for folder in later)
            self.tracker.note(f"the next checkpoint replaces {names}, of an abandoned run")

    def resume(self, folders: Sequence[Path]) -> None:
        """Load the first intact checkpoint of some. Collective.

        Raises:
            UserError: none is intact, or the next batch is not the one that the checkpoint expects.
        """
        self.state = load(self.engine, list(folders), self.tracker.note)
        check_not_past(self.state.step, self.config.max_steps)
        # Config or data may have been corrected: the run gets all its attempts again.
        self.state.skipped_in_a_row = 0
        # A resumed run must continue the straight one: other data or another order is never silent.
        if self.state.next_batch != self._next_batch():
            raise UserError(
                f"step {self.state.step} would see other data than the checkpoint expects; restore data (files, "
                "weights, packing, isolate), tokenizer, seed, sequence_length and global_batch_size, or start a new "
                "run with init_from=<that checkpoint> and another output_dir"
            )
        changed = changed_settings(self.state.settings, self.config)
        if changed:
            self.tracker.note(f"changed since the checkpoint: {', '.join(changed)}")

    def _next_batch(self) -> str:
        """Return the hash of the next global batch, the same on any number of ranks."""
        return fingerprint(self.task.training_batches(self.state.step, rank=0, world_size=1))

    def train_step(self) -> dict[str, float]:
        """Run one optimizer step over the global batch; return its line for metrics.jsonl. Collective.

        The loss is the mean over all target tokens of the global batch, however they are split over ranks and
        micro-batches.
        """
        began = time.perf_counter()
        engine, task, step = self.engine, self.task, self.state.step

        # Count the targets of all micro-batches and ranks first: every loss is a sum divided by that count. A mean
        # per micro-batch would give the tokens of short ones more weight.
        batches = task.training_batches(step, engine.rank, engine.world_size)
        targets, tokens = engine.summed(
            [sum(task.targets(batch) for batch in batches), sum(count_tokens(batch) for batch in batches)]
        )
        if not targets:
            raise UserError(f"step {step + 1}: no token of the global batch is a training target; check the data")

        # Learning rate and dropout are functions of the step: a resumed run restores no random state.
        lr = lr_at(step, self.config.max_steps, self.config.optim)
        torch.manual_seed(hash((self.config.seed, step, engine.rank)))

        # Forward and backward of each micro-batch; the last engine.step() clips and updates.
        loss_sum = torch.zeros((), device=engine.device)
        losses = []
        for batch in batches:
            # DeepSpeed averages gradients over ranks: dividing by fewer targets turns that into a sum.
            output = engine.forward(batch, targets / engine.world_size)
            engine.backward(output.loss)
            engine.step(lr)
            loss = output.loss.detach()
            losses.append(loss)
            loss_sum += loss
            self._watchdog.beat()

        # One exchange for all: the global loss, and whether any rank has a request to stop, so that all stop at once.
        folder_lost = self._folder is not None and not self._folder.is_same()
        self._request.progressed = True
        loss_part = loss_sum.item() / engine.world_size
        mean_loss, requests, lost = engine.summed([loss_part, self._reason() is not None, folder_lost])
        if lost > 0:
            raise UserError(f"{self.config.output_dir} was removed, or its disk is gone; restore it and rerun")
        self._stopping = requests > 0
        self._step_seconds = time.perf_counter() - began
        self.state.step += 1
        self.state.targets += int(targets)
        self.state.tokens += int(tokens)

        # Report non-finite steps, whose update the engine has skipped, and loss spikes; raises if too many.
        grad_norm, loss_scale = engine.grad_norm, engine.loss_scale
        if not math.isfinite(grad_norm):
            for line in non_finite_rows(engine, task, step, losses):
                self.tracker.note(line)
        warning = self._health.judge(self.state, loss=mean_loss, grad_norm=grad_norm, loss_scale=loss_scale)
        if warning:
            self.tracker.note(warning)
        return {
            "step": self.state.step,
            "loss": mean_loss,
            "lr": lr,
            "grad_norm": grad_norm,
            "skipped_steps": self.state.skipped,
            "loss_scale": loss_scale,
            "tokens": self.state.tokens,
            task.targets_name: self.state.targets,
            "tokens_per_second": tokens / self._step_seconds,
            "step_seconds": self._step_seconds,
            "memory_gib": engine.peak_memory(),
        }

    def evaluate(self) -> dict[str, Any]:
        """Compute and record the metrics of all held-out data. Collective.

        Returns an empty dict without such data, or if a request to stop cut it short.
        """
        records: list[Any] = []
        with self.engine.evaluating():
            for batch in self.task.evaluation_batches(self.engine.rank, self.engine.world_size):
                output = self.engine.forward(batch.inputs, 1.0)
                records += self.task.records(output, batch)
                self._watchdog.beat()
                # After each batch, since an evaluation may take longer than the grace period of a preemption.
                (requests,) = self.engine.summed([self._reason() is not None])
                if requests > 0:
                    self._stopping = True
                    return {}
        records = self.engine.gathered(records)
        self.state.evaluated = self.state.step
        if not records:
            return {}
        metrics = self.task.metrics(records)
        if self.engine.rank == 0:
            try:
                self.task.write_predictions(self.config.output_dir)
            except OSError as error:
                self.tracker.note(f"the predictions were not written: {error}")
        self.tracker.evaluation({"step": self.state.step, "tokens": self.state.tokens, **metrics})
        return metrics

    def _evaluation_due(self) -> bool:
        step, config = self.state.step, self.config
        due = step in (0, config.max_steps) or is_due(step, config.eval_every)
        return due and self.state.evaluated != step and not self._stopping

    def _save_due(self) -> bool:
        step, config = self.state.step, self.config
        if step == config.max_steps:
            return True
        if not config.save_every or self.state.skipped_in_a_row:
            # After a skipped step weights may have exploded: the save waits for the next step that counts.
            return False
        return step // config.save_every > self._last_attempt // config.save_every

    def save(self) -> None:
        """Write a checkpoint; a failed one is reported, and ends the run only with ``failed_save=stop``. Collective.

        Raises:
            UserError: non-finite weights or moments, which no checkpoint may hold.
        """
        state = self.state
        self._last_attempt = state.step
        if not self.engine.holds_only_finite():
            raise UserError(
                f"step {state.step}: weights or moments are non-finite and were not saved; lower optim.lr or set "
                f"optim.clip_norm; {way_back(self.config.output_dir)}"
            )
        state.next_batch = self._next_batch()
        state.settings = numeric_settings(self.config)
        state.wandb_id = self.tracker.wandb_id or state.wandb_id
        began = time.monotonic()
        try:
            with self._watchdog.paused():
                folder = self.checkpoints.save(self.engine, state)
        except SaveFailedError as error:
            if self.config.failed_save == "stop" or self._saved is None:  # the first one: this disk may take none
                raise
            self.tracker.note(f"step {state.step} was not saved: {error}; continuing, earlier checkpoints are intact")
            return
        self._saved = state.step
        self._save_seconds = max(self._save_seconds or 0.0, time.monotonic() - began)
        self.tracker.note(f"saved {folder}")
        if state.skipped_in_a_row:
            self.tracker.note("its last step was skipped, so that it does not count as good: no other was removed")

    # --- preemption ---

    def _reason(self) -> str | None:
        """Return why this rank would end the run now, or None."""
        save_seconds = _UNTIMED_SAVE if self._save_seconds is None else self._save_seconds
        return self._request.reason(self._step_seconds, save_seconds)

    def _end_early(self) -> NoReturn:
        """Save, if there is something to save and time for it, and raise Preempted. Collective."""
        answers = self.engine.gathered([(self._reason(), self._request.leaves_time_for(self._save_seconds or 0.0))])
        # The ranks' clocks differ: they save only if all of them have the time, or some would wait for the others.
        in_time = all(leaves_time for _, leaves_time in answers)
        if (self._saved or 0) < self.state.step and in_time:
            self.save()
        self.tracker.finish()
        self.engine.wait()
        reason = next((reason for reason, _ in answers if reason), "a request to stop")
        outcome = "saved"
        if self._saved != self.state.step:
            outcome = "not saved" if in_time else "no time to save"
            outcome += "; there is no checkpoint" if self._saved is None else f"; last checkpoint: step {self._saved}"
        raise Preempted(f"{reason}: preempted after step {self.state.step} of {self.config.max_steps}, {outcome}")
