"""The training loop: one step function for every task, rank count and offload mode."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from gptj_train.data.loader import fingerprint
from gptj_train.schema import schema
from gptj_train.tracking import Tracker
from gptj_train.training.checkpoint import Checkpoints, SaveFailedError, TrainState, load
from gptj_train.training.engine import Engine
from gptj_train.training.retention import check_space
from gptj_train.training.schedule import OptimConfig, lr_at

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
    keep_every: int
    failed_save: Literal["continue", "stop"]
    resume: str
    optim: OptimConfig

    def __post_init__(self) -> None:
        for name in ("global_batch_size", "micro_batch_size", "keep_checkpoints"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("max_steps", "seed"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must be 0 or more, got {getattr(self, name)}")
        for name in ("eval_every", "save_every"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must be 0 (only at the end) or more, got {getattr(self, name)}")
        if self.keep_every < 0:
            raise ValueError(f"keep_every must be 0 (none) or more, got {self.keep_every}")


class Task(Protocol):
    """What differs between recipes."""

    def training_batches(self, step: int, rank: int, world_size: int) -> list[Batch]:
        """This rank's micro-batches of an optimizer step, a pure function of its arguments."""

    def evaluation_batches(self, rank: int, world_size: int) -> Iterable[Batch]:
        """This rank's share of the held-out data, as many batches on every rank; none without such data."""

    def targets(self, batch: Batch) -> int:
        """Terms of the batch's loss sum."""

    def records(self, output: Any, batch: Batch) -> list[Any]:
        """What the metrics need of an evaluation batch, where ``output.loss`` is a sum: picklable rows."""

    def metrics(self, records: list[Any]) -> dict[str, Any]:
        """What to report for the rows of all batches and ranks, as JSON values; ``eval_loss`` among it."""

    def write_predictions(self, folder: str | Path) -> None:
        """What the last metrics were computed from, as files; nothing where nothing is predicted."""


class Trainer:
    """Trains a task's model to ``max_steps``, evaluating and saving on the way."""

    def __init__(
        self, config: TrainerConfig, engine: Engine, task: Task, checkpoints: Checkpoints, tracker: Tracker
    ) -> None:
        self.config, self.engine, self.task = config, engine, task
        self.checkpoints, self.tracker = checkpoints, tracker
        self.state = TrainState()

    def train(self, resume_from: Sequence[Path] = ()) -> None:
        """Run to ``max_steps`` from the beginning, or from the first of some checkpoints that is whole. Collective."""
        config = self.config
        if resume_from:
            self.resume(resume_from)
        steps = range(self.state.step, config.max_steps)
        check_space(
            config.output_dir, self.engine.trained, steps, config.save_every, config.keep_checkpoints, config.keep_every
        )
        self.tracker.start(self.state.step, config.max_steps, self.state.wandb_id)
        if self.state.step == 0:
            self.evaluate()
        while self.state.step < config.max_steps:
            self.tracker.step(self.train_step())
            last = self.state.step == config.max_steps
            if last or _due(self.state.step, config.eval_every):
                self.evaluate()
            if last or _due(self.state.step, config.save_every):
                self.save()

    def save(self) -> None:
        """Write a checkpoint; one that fails is told, and is the end only if the config says so. Collective."""
        self.state.next_batch = self._next_batch()
        self.state.settings = _settings(self.config)
        self.state.wandb_id = self.tracker.wandb_id or self.state.wandb_id
        try:
            self.tracker.note(f"saved {self.checkpoints.save(self.engine, self.state)}")
        except SaveFailedError as error:
            if self.config.failed_save == "stop":
                raise
            self.tracker.note(
                f"step {self.state.step} was not saved: {error}; going on, earlier checkpoints are intact"
            )

    def resume(self, folders: Sequence[Path]) -> None:
        """Go on from the first of some checkpoints that is whole. Collective.

        Raises:
            ValueError: none is whole, or the data are not those it was trained on.
        """
        self.state = load(self.engine, list(folders), self.tracker.note)
        if self.state.next_batch != self._next_batch():
            raise ValueError(
                f"step {self.state.step} would see other data than the checkpoint says; restore data, tokenizer, seed, "
                "sequence_length and global_batch_size, or begin a new run with init_from=<that checkpoint> and "
                "another output_dir"
            )
        if self.state.settings != _settings(self.config):
            self.tracker.note("some settings are not those that the checkpoint was written with")

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
            raise ValueError(f"step {step}: no token of the whole batch is a training target; check the data")
        lr = lr_at(step, self.config.max_steps, self.config.optim)
        # Dropout as a function of the step: a resumed run needs no random state.
        torch.manual_seed(hash((self.config.seed, step, engine.rank)))
        loss_sum = torch.zeros((), device=engine.device)
        for batch in batches:
            # DeepSpeed averages gradients over ranks; the division by ranks here makes that a sum.
            output = engine.forward(batch, targets / engine.world_size)
            engine.backward(output.loss)
            engine.step(lr)
            loss_sum += output.loss.detach()
        (loss,) = engine.summed([loss_sum.item() / engine.world_size])
        seconds = time.perf_counter() - began
        self.state.step += 1
        self.state.tokens += int(targets)
        return {
            "step": self.state.step,
            "loss": loss,
            "lr": lr,
            "grad_norm": engine.grad_norm,
            "tokens": self.state.tokens,
            "tokens_per_second": targets / seconds,
            "step_seconds": seconds,
            "memory": engine.peak_memory(),
        }

    def evaluate(self) -> dict[str, Any]:
        """Metrics over all held-out data, recorded; empty without such data. Collective."""
        records: list[Any] = []
        with self.engine.evaluating():
            for batch in self.task.evaluation_batches(self.engine.rank, self.engine.world_size):
                records += self.task.records(self.engine.forward(batch, 1.0), batch)
        records = self.engine.gathered(records)
        if not records:
            return {}
        metrics = self.task.metrics(records)
        if self.engine.rank == 0:
            self.task.write_predictions(self.config.output_dir)
        self.tracker.evaluation({"step": self.state.step, "tokens": self.state.tokens, **metrics})
        return metrics


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


def _settings(config: TrainerConfig) -> str:
    values = asdict(config)
    del values["output_dir"], values["resume"]
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()
