"""The training loop: one step function for every task, rank count and offload mode."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NoReturn, Protocol

import torch
from torch import Tensor

from gptj_train.schema import schema
from gptj_train.tracking import Tracker
from gptj_train.training.checkpoint import Checkpoints, TrainState
from gptj_train.training.engine import Engine
from gptj_train.training.health import Health
from gptj_train.training.preemption import STOP_FILE, Preempted, StopRequest
from gptj_train.training.schedule import OptimConfig, lr_at
from gptj_train.training.watchdog import Watchdog

_UNKNOWN_SAVE = 300.0  # seconds to reserve for a save before one has been timed

Batch = dict[str, Tensor]
"""Keyword arguments of the model's forward, on the CPU; (B, T) each."""


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
    resume: str
    max_hours: float | None
    max_skipped_steps: int
    hang_timeout: float
    optim: OptimConfig

    def __post_init__(self) -> None:
        for name in ("max_steps", "global_batch_size", "micro_batch_size", "keep_checkpoints", "max_skipped_steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.seed < 0:
            raise ValueError(f"seed must be 0 or more, got {self.seed}")
        for name in ("eval_every", "save_every"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must be 0 (only at the end) or more, got {getattr(self, name)}")
        if self.max_hours is not None and self.max_hours <= 0:
            raise ValueError(f"max_hours must be above 0, or null for no limit, got {self.max_hours}")
        if self.hang_timeout < 0:
            raise ValueError(f"hang_timeout must be 0 (never) or more, got {self.hang_timeout}")


def check_run_folder(output_dir: str) -> None:
    """Find out before anything is loaded whether a run can be in this folder; writes nothing.

    Raises:
        ValueError: it cannot be written to, or holds a stop file: a scheduler would start what is to stop again
            and again.
    """
    folder = Path(output_dir)
    try:
        if (folder / STOP_FILE).exists():
            raise ValueError(f"{folder / STOP_FILE} says that this run is to stop; remove it to go on")
        there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
        usable = bool(output_dir.strip()) and there.is_dir() and os.access(there, os.W_OK | os.X_OK)
    except OSError as error:
        raise ValueError(f"output_dir={output_dir[:100]}: {error.strerror}") from None
    if not usable:
        raise ValueError(f"output_dir={output_dir}: not a folder that can be written to; give another one")


class Task(Protocol):
    """What differs between recipes."""

    def training_batches(self, step: int, rank: int, world_size: int) -> list[Batch]:
        """This rank's micro-batches of an optimizer step, a pure function of its arguments."""

    def training_rows(self, step: int, rank: int, world_size: int) -> list[list[int]]:
        """The rows of the training data that each of these micro-batches is made of, to name it by."""

    def evaluation_batches(self, rank: int, world_size: int) -> Iterable[Batch]:
        """This rank's share of the held-out data, as many batches on every rank; none without such data."""

    def targets(self, batch: Batch) -> int:
        """Terms of the batch's loss sum."""

    def records(self, output: Any, batch: Batch) -> list[Any]:
        """What the metrics need of an evaluation batch, where ``output.loss`` is a sum: picklable rows."""

    def metrics(self, records: list[Any]) -> dict[str, Any]:
        """What to report for the rows of all batches and ranks, as JSON values; ``eval_loss`` among it."""


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
        self._save_seconds: float | None = None

    def train(self, resume_from: Path | None = None) -> None:
        """Run to ``max_steps`` from the beginning, or from a checkpoint folder. Collective.

        Raises:
            Preempted: asked to end before that.
            ValueError: too many steps in a row whose numbers are not finite, or weights that are not.
        """
        config = self.config
        with self._request, self._watchdog:
            if resume_from is not None:
                with self._watchdog.paused():
                    self.state = self.checkpoints.load(self.engine, resume_from)
                self.tracker.note(f"resuming from {resume_from}")
            saved = self.state.step
            self.tracker.start(saved, config.max_steps)
            if self._evaluation_due():
                self.evaluate()
            while self.state.step < config.max_steps and not self._stopping:
                self.tracker.step(self.train_step())
                if self._evaluation_due():
                    self.evaluate()
                last = self.state.step == config.max_steps
                if not self._stopping and (last or _due(self.state.step, config.save_every)):
                    saved = self._save()
            if self._stopping:
                self._end_early(saved)

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
            raise ValueError(f"step {step}: no token of the whole batch is a training target; check the data")
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
                records += self.task.records(self.engine.forward(batch, 1.0), batch)
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
        self.tracker.evaluation({"step": self.state.step, "tokens": self.state.tokens, **metrics})
        return metrics

    def _evaluation_due(self) -> bool:
        """Also after a resume, where the evaluation of this step was cut short."""
        step, config = self.state.step, self.config
        due = step in (0, config.max_steps) or _due(step, config.eval_every)
        return due and self.state.evaluated != step and not self._stopping

    def _save(self) -> int:
        """Write a checkpoint and return its step. Collective."""
        if not self.engine.holds_only_finite():
            raise ValueError(
                f"step {self.state.step}: weights or moments are no longer finite, so that they are not saved; lower "
                "optim.lr or set optim.clip_norm, and the same command goes on from the last checkpoint"
            )
        began = time.monotonic()
        with self._watchdog.paused():
            folder = self.checkpoints.save(self.engine, self.state)
        self._save_seconds = max(self._save_seconds or 0.0, time.monotonic() - began)
        self.tracker.note(f"saved {folder}")
        return self.state.step

    # --- asked to end early ---

    def _asked(self) -> bool:
        return self._reason() is not None

    def _reason(self) -> str | None:
        save_seconds = _UNKNOWN_SAVE if self._save_seconds is None else self._save_seconds
        return self._request.reason(self._step_seconds, save_seconds)

    def _end_early(self, saved: int) -> NoReturn:
        """Save what is not, if there is time for it, and leave. Collective."""
        answers = self.engine.gathered([(self._reason(), self._request.leaves_time_for(self._save_seconds or 0.0))])
        if saved < self.state.step and all(in_time for _, in_time in answers):
            saved = self._save()
        self.tracker.finish()
        self.engine.wait()
        reason = next((reason for reason, _ in answers if reason), "asked to end")
        left = "saved" if saved == self.state.step else f"no time to save; the last checkpoint is of step {saved}"
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
