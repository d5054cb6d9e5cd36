"""The training loop: one step function for every task, rank count and offload mode."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal, NoReturn

import torch
from torch import Tensor

from gptj_train.data.sampler import fingerprint
from gptj_train.errors import UserError
from gptj_train.launch.preemption import Preempted, StopRequest
from gptj_train.launch.watchdog import Watchdog
from gptj_train.schema import schema
from gptj_train.tasks.task import Task
from gptj_train.tracking import Tracker
from gptj_train.training.checkpoint import Checkpoints, SaveFailedError, TrainState, load
from gptj_train.training.engine import Engine
from gptj_train.training.health import Health
from gptj_train.training.optimizer import OptimConfig
from gptj_train.training.retention import check_space, later_than
from gptj_train.training.schedule import lr_at

_UNKNOWN_SAVE = 300.0  # seconds to reserve for a save before one has been timed


@schema
class TrainerConfig:
    """What every training run says at the top level of its config."""

    output_dir: str
    seed: int
    max_steps: int
    global_batch_size: int
    micro_batch_size: int
    eval_every: int
    save_every: int
    keep_checkpoints: int
    keep_every: int
    failed_save: Literal["continue", "stop"]
    max_hours: float | None
    max_skipped_steps: int
    hang_timeout: float
    optim: OptimConfig

    def __post_init__(self) -> None:
        for name in ("global_batch_size", "micro_batch_size", "keep_checkpoints", "max_skipped_steps"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("max_steps", "seed"):
            if getattr(self, name) < 0:
                raise UserError(f"{name} must be 0 or more, got {getattr(self, name)}")
        for name in ("eval_every", "save_every"):
            if getattr(self, name) < 0:
                raise UserError(f"{name} must be 0 (only at the end) or more, got {getattr(self, name)}")
        if self.keep_every < 0:
            raise UserError(f"keep_every must be 0 (none) or more, got {self.keep_every}")
        if self.max_hours is not None and self.max_hours <= 0:
            raise UserError(f"max_hours must be above 0, or null for no limit, got {self.max_hours}")
        if self.hang_timeout < 0:
            raise UserError(f"hang_timeout must be 0 (never) or more, got {self.hang_timeout}")


class Trainer:
    """Trains a task's model to ``max_steps``, evaluating and saving on the way."""

    def __init__(
        self, config: TrainerConfig, engine: Engine, task: Task, checkpoints: Checkpoints, tracker: Tracker
    ) -> None:
        self.config, self.engine, self.task = config, engine, task
        self.checkpoints, self.tracker = checkpoints, tracker
        self.state = TrainState()
        self._health = Health(config.max_skipped_steps)
        self._watchdog = Watchdog(config.output_dir, config.hang_timeout, engine.rank)
        self._request = StopRequest(config.output_dir, config.max_hours, engine.rank)
        self._stopping = False  # agreed on by all ranks
        self._step_seconds = 0.0
        self._saved: int | None = None  # step of the last checkpoint
        self._save_seconds: float | None = None

    def train(self, resume_from: Sequence[Path] = ()) -> None:
        """Run to ``max_steps`` from the beginning, or from the first of some checkpoints that is whole. Collective.

        Raises:
            Preempted: asked to end before that.
            UserError: too many steps in a row whose numbers are not finite, or weights that are not.
        """
        config = self.config
        with self._request, self._watchdog:
            # A shared disk may not show every rank the same yet: rank 0 decides.
            (resume_from, *_) = self.engine.gathered([list(resume_from)])
            if resume_from:
                with self._watchdog.paused():
                    self.resume(resume_from)
                self._saved = self.state.step
            self._check_space()
            self.tracker.start(self.state.step, config.max_steps, self.state.wandb_id)
            if later := later_than(config.output_dir, self.state.step):
                names = ", ".join(folder.name for folder in later)
                self.tracker.note(f"the next checkpoint takes the place of {names}, of a run that is given up")
            if self._evaluation_due():
                self.evaluate()
            while self.state.step < config.max_steps and not self._stopping:
                self.tracker.step(self.train_step())
                if self._evaluation_due():
                    self.evaluate()
                last = self.state.step == config.max_steps
                if not self._stopping and (last or _due(self.state.step, config.save_every)):
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

    def resume(self, folders: Sequence[Path]) -> None:
        """Go on from the first of some checkpoints that is whole. Collective.

        Raises:
            UserError: none is whole, or the data are not those it was trained on.
        """
        self.state = load(self.engine, list(folders), self.tracker.note)
        if self.state.next_batch != self._next_batch():
            raise UserError(
                f"step {self.state.step} would see other data than the checkpoint says; restore data (files, weights, "
                "packing, isolate), tokenizer, seed, sequence_length and global_batch_size, or begin a new run with "
                "init_from=<that checkpoint> and another output_dir"
            )
        then, now = self.state.settings, _settings(self.config)
        if changed := [f"{name} {then.get(name)} -> {value}" for name, value in now.items() if then.get(name) != value]:
            self.tracker.note(f"changed since the checkpoint: {', '.join(changed)}")

    def _next_batch(self) -> str:
        """Hash of the next global batch, the same on any number of ranks."""
        return fingerprint(self.task.training_batches(self.state.step, rank=0, world_size=1))

    def train_step(self) -> dict[str, float]:
        """One optimizer step over the global batch; returns what metrics.jsonl records of it.

        The loss is the mean over all target tokens of the global batch, however they fall on ranks and
        micro-batches: they are counted before the first forward, and every loss is a sum over that count.
        """
        began = time.perf_counter()
        engine, task, step = self.engine, self.task, self.state.step
        batches = task.training_batches(step, engine.rank, engine.world_size)
        (targets,) = engine.summed([sum(task.targets(batch) for batch in batches)])
        if not targets:
            raise UserError(f"step {step}: no token of the whole batch is a training target; check the data")
        lr = lr_at(step, self.config.max_steps, self.config.optim)
        # Dropout as a function of the step: a resumed run needs no random state.
        torch.manual_seed(hash((self.config.seed, step, engine.rank)))
        loss_sum = torch.zeros((), device=engine.device)
        losses = []
        for batch in batches:
            # DeepSpeed averages gradients over ranks; the division by ranks here makes that a sum.
            output = engine.forward(batch, targets / engine.world_size)
            engine.backward(output.loss)
            engine.step(lr)
            losses.append(output.loss.detach())
            loss_sum += losses[-1]
            self._watchdog.beat()
        loss, asked = engine.summed([loss_sum.item() / engine.world_size, self._asked()])
        self._stopping = asked > 0
        self._step_seconds = seconds = time.perf_counter() - began
        self.state.step += 1
        self.state.tokens += int(targets)
        if not math.isfinite(engine.grad_norm):
            self._name_bad(step, losses)
        if said := self._health.judge(self.state, loss, engine.grad_norm, engine.loss_scale):
            self.tracker.note(said)
        return {
            "step": self.state.step,
            "loss": loss,
            "lr": lr,
            "grad_norm": engine.grad_norm,
            "skipped_steps": self.state.skipped,
            "loss_scale": engine.loss_scale,
            "tokens": self.state.tokens,
            "tokens_per_second": targets / seconds,
            "step_seconds": seconds,
            "memory": engine.peak_memory(),
        }

    def evaluate(self) -> dict[str, Any]:
        """Metrics over all held-out data, recorded; empty without such data, or if cut short. Collective."""
        records: list[Any] = []
        with self.engine.evaluating():
            for batch in self.task.evaluation_batches(self.engine.rank, self.engine.world_size):
                output = self.engine.forward(batch.inputs, 1.0)
                records += self.task.records(output, batch)
                self._watchdog.beat()
                (asked,) = self.engine.summed([self._asked()])
                if asked > 0:
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
        """Also after a resume, where the evaluation of this step was cut short."""
        step, config = self.state.step, self.config
        due = step in (0, config.max_steps) or _due(step, config.eval_every)
        return due and self.state.evaluated != step and not self._stopping

    def save(self) -> None:
        """Write a checkpoint; one that fails is told, and is the end only if the config says so. Collective.

        Raises:
            UserError: weights or moments that are not finite: no checkpoint holds such.
        """
        state = self.state
        if not self.engine.holds_only_finite():
            raise UserError(
                f"step {state.step}: weights or moments are no longer finite, so that they are not saved; lower "
                "optim.lr or set optim.clip_norm, and the same command goes on from the last checkpoint"
            )
        state.next_batch, state.settings = self._next_batch(), _settings(self.config)
        state.wandb_id = self.tracker.wandb_id or state.wandb_id
        began = time.monotonic()
        try:
            with self._watchdog.paused():
                folder = self.checkpoints.save(self.engine, state)
        except SaveFailedError as error:
            if self.config.failed_save == "stop":
                raise
            self.tracker.note(f"step {state.step} was not saved: {error}; going on, earlier checkpoints are intact")
            return
        self._saved = state.step
        self._save_seconds = max(self._save_seconds or 0.0, time.monotonic() - began)
        self.tracker.note(f"saved {folder}")

    # --- asked to end early ---

    def _asked(self) -> bool:
        return self._reason() is not None

    def _reason(self) -> str | None:
        save_seconds = _UNKNOWN_SAVE if self._save_seconds is None else self._save_seconds
        return self._request.reason(self._step_seconds, save_seconds)

    def _end_early(self) -> NoReturn:
        """Save what is not, if there is time for it, and leave. Collective."""
        answers = self.engine.gathered([(self._reason(), self._request.leaves_time_for(self._save_seconds or 0.0))])
        in_time = all(in_time for _, in_time in answers)
        if (self._saved or 0) < self.state.step and in_time:
            self.save()
        self.tracker.finish()
        self.engine.wait()
        reason = next((reason for reason, _ in answers if reason), "asked to end")
        last = "there is no checkpoint" if self._saved is None else f"the last checkpoint is of step {self._saved}"
        unsaved = f"{'not saved' if in_time else 'no time to save'}; {last}"
        left = "saved" if self._saved == self.state.step else unsaved
        raise Preempted(f"{reason}: ended after step {self.state.step} of {self.config.max_steps}, {left}")

    def _name_bad(self, step: int, losses: list[Tensor]) -> None:
        """Say which micro-batches of the step have a loss that is not finite. Collective."""
        rank, world_size = self.engine.rank, self.engine.world_size
        rows = self.task.training_rows(step, rank, world_size)
        bad = [(rank, of, loss.item()) for of, loss in zip(rows, losses, strict=True) if not loss.isfinite()]
        for where, of, loss in self.engine.gathered(bad):
            self.tracker.note(f"step {step + 1}: loss {loss:g} on rank {where} in rows {of} of the training data")


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


def _settings(config: TrainerConfig) -> dict[str, Any]:
    """What decides the numbers of a run, as JSON gives it back."""
    values = {name: getattr(config, name) for name in ("seed", "max_steps", "global_batch_size", "micro_batch_size")}
    return json.loads(json.dumps(values | {f"optim.{name}": value for name, value in asdict(config.optim).items()}))
