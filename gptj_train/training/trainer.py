"""The training loop: one step function for every task, rank count and offload mode."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import torch

from gptj_train.counted import counted
from gptj_train.errors import UserError
from gptj_train.launch.preemption import Preempted, StopRequest
from gptj_train.launch.run_folder import RunFolder
from gptj_train.launch.watchdog import Watchdog
from gptj_train.tasks.task import Task, count_tokens
from gptj_train.tracking import Tracker
from gptj_train.training.best import count_evaluation
from gptj_train.training.checkpoint import Checkpoints, load_weights
from gptj_train.training.engine import Engine
from gptj_train.training.health import Health, non_finite_rows
from gptj_train.training.prefetch import PrefetchedBatches
from gptj_train.training.resuming import next_batch, resumed_state
from gptj_train.training.retention import step_folder
from gptj_train.training.saving import Saving
from gptj_train.training.schedule import lr_in
from gptj_train.training.state import TrainState
from gptj_train.training.trainer_config import TrainerConfig, is_due

_UNTIMED_SAVE = 300.0  # seconds to reserve for a save before the first has been timed


class Trainer:
    """Trains a task's model to ``max_steps``, with evaluations and checkpoints in between.

    Attributes:
        ended: why the run ended before ``max_steps``, though not by a request to stop; None if it did not.
    """

    def __init__(
        self,
        *,
        config: TrainerConfig,
        engine: Engine,
        task: Task,
        checkpoints: Checkpoints,
        tracker: Tracker,
        folder: RunFolder | None = None,
        data: Mapping[str, Any] | None = None,
        held_out: str = "",
    ) -> None:
        """Set up a run.

        Args:
            data: what decides the batches, by name (``data.identity``); rank 0's counts.
            held_out: ``resuming.held_out_hash`` of the task.
        """
        self.config = config
        self.engine = engine
        self.task = task
        self.tracker = tracker
        self.state = TrainState(schedule=[[0, config.steps]])
        self.ended: str | None = None
        self._batches = PrefetchedBatches(task, engine.rank, engine.world_size)
        self._data = dict(data or {})
        self._held_out = held_out
        self._folder = folder
        self._health = Health(config.max_skipped_steps, config.output_dir)
        self._watchdog = Watchdog(config.output_dir, config.hang_timeout, engine.rank, engine.world_size)
        self._request = StopRequest(config.output_dir, config.max_hours, engine.rank)
        self._stopping = False  # the same on all ranks
        self._step_seconds = 0.0
        self._saving = Saving(
            config=config, engine=engine, checkpoints=checkpoints, tracker=tracker, watchdog=self._watchdog
        )

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
                self._saving.saved = self.state.step
            self._saving.begin(self.state)
            evaluated = self.state.evaluated == self.state.step
            self.tracker.start(self.state.step, config.steps, self.state.wandb_id, evaluated=evaluated)
            self._saving.announce_abandoned(self.state.step)
            # Before the first step, for a baseline; after a resume, if the evaluation of this step was cut short.
            if self._evaluation_due():
                self.evaluate()
                if self._saving.best_is_new:
                    self.save()  # the checkpoint of this step was saved before its evaluation
            self._check_patience()
            while self.state.step < config.steps and not self._stopping and not self.ended:
                self.tracker.step(self.train_step())
                # Evaluate before saving, so that a checkpoint knows that its evaluation is done.
                if self._evaluation_due():
                    self.evaluate()
                    self._check_patience()
                if not self._stopping and (self.ended or self._saving.is_due(self.state)):
                    self.save()
            if self._stopping:
                self._end_early()

    def _check_patience(self) -> None:
        state, config = self.state, self.config
        if config.patience is None or state.evaluations_since_best < config.patience or state.step == config.steps:
            return
        self.ended = (
            f"patience={config.patience}: no better {config.best_metric} in "
            f"{counted(state.evaluations_since_best, 'evaluation')} since step {state.best_step}"
        )
        self.tracker.note(f"{self.ended}; ended after step {state.step} of {config.steps}")

    def take_best(self) -> int:
        """Put the weights to export into the engine: those of the best evaluation with ``export_of=best``. Collective.

        Returns:
            The step that the weights are of. They are the last ones if there was no evaluation, or if the best
            checkpoint cannot be used, which is printed.
        """
        state = self.state
        if self.config.export_of == "last" or state.best_step in (-1, state.step):
            return state.step
        damage = load_weights(self.engine, step_folder(self.config.output_dir, state.best_step))
        if damage:
            self.tracker.note(f"the best checkpoint cannot be exported: {damage}; exporting step {state.step} instead")
            return state.step
        return state.best_step

    def resume(self, folders: Sequence[Path]) -> None:
        """Load the first intact checkpoint of some. Collective.

        Raises:
            UserError: none is intact, or the next batch is not the one that the checkpoint expects.
        """
        self.state = resumed_state(
            self.engine,
            folders,
            config=self.config,
            task=self.task,
            data=self._data,
            held_out=self._held_out,
            note=self.tracker.note,
        )

    def train_step(self) -> dict[str, float]:
        """Run one optimizer step over the global batch; return its line for metrics.jsonl. Collective.

        The loss is the mean over all target tokens of the global batch, however they are split over ranks and
        micro-batches.
        """
        began = time.perf_counter()
        engine, task, step = self.engine, self.task, self.state.step

        # Count the targets of all micro-batches and ranks first: every loss is a sum divided by that count. A mean
        # per micro-batch would give the tokens of short ones more weight.
        batches = self._batches.at(step)
        targets, tokens = engine.summed(
            [sum(task.targets(batch) for batch in batches), sum(count_tokens(batch) for batch in batches)]
        )
        if not targets:
            raise UserError(f"step {step + 1}: no token of the global batch is a training target; check the data")

        # Learning rate and dropout are functions of the step: a resumed run restores no random state.
        lr = lr_in(self.state.schedule, step, self.config.optim)
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
        is_best = count_evaluation(self.state, metrics, self.config.best_metric)
        self._saving.best_is_new = is_best and self.config.export_of == "best"
        # Of the model that will be exported, as far as that is known.
        is_exported = is_best or self.config.export_of == "last" or self.state.best_step < 0
        if is_exported and self.engine.rank == 0:
            try:
                self.task.write_predictions(self.config.output_dir)
            except OSError as error:
                self.tracker.note(f"the predictions were not written: {error}")
        self.tracker.evaluation({"step": self.state.step, "tokens": self.state.tokens, **metrics})
        return metrics

    def _evaluation_due(self) -> bool:
        step, config = self.state.step, self.config
        due = step in (0, config.steps) or is_due(step, config.eval_every)
        return due and self.state.evaluated != step and not self._stopping

    def save(self) -> None:
        """Write a checkpoint. Collective. See ``Saving.save``."""
        state = self.state
        state.next_batch = next_batch(self.task, state.step)
        state.held_out = self._held_out
        state.settings = self.config.numeric_settings()
        state.data = self._data
        state.wandb_id = self.tracker.wandb_id or state.wandb_id
        self._saving.save(state)

    # --- preemption ---

    def _reason(self) -> str | None:
        """Return why this rank would end the run now, or None."""
        save_seconds = _UNTIMED_SAVE if self._saving.seconds is None else self._saving.seconds
        return self._request.reason(self._step_seconds, save_seconds)

    def _end_early(self) -> NoReturn:
        """Save, if there is something to save and time for it, and raise Preempted. Collective."""
        answers = self.engine.gathered([(self._reason(), self._request.leaves_time_for(self._saving.seconds or 0.0))])
        # The ranks' clocks differ: they save only if all of them have the time, or some would wait for the others.
        in_time = all(leaves_time for _, leaves_time in answers)
        saved = self._saving.saved
        if (saved or 0) < self.state.step and in_time:
            self.save()
            saved = self._saving.saved
        self.tracker.finish()
        self.engine.wait()
        reason = next((reason for reason, _ in answers if reason), "a request to stop")
        outcome = "saved"
        if saved != self.state.step:
            outcome = "not saved" if in_time else "no time to save"
            outcome += "; there is no checkpoint" if saved is None else f"; last checkpoint: step {saved}"
        raise Preempted(f"{reason}: preempted after step {self.state.step} of {self.config.steps}, {outcome}")
