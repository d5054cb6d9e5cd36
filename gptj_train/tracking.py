"""Progress bar, metrics.jsonl, W&B and TensorBoard logging, all on rank 0.

Every line of metrics.jsonl is a JSON object with

* ``kind``: "train" after an optimizer step, "eval" after an evaluation;
* ``step``: optimizer steps done; ``epoch``: passes over the training data, a fraction;
* ``time``: Unix time in seconds;
* ``tokens``: tokens that the model has read in training so far, without padding, whatever the task.

A train line has also ``loss``, ``lr``, ``grad_norm``, ``skipped_steps``, ``loss_scale``, ``tokens_per_second``,
``step_seconds``, ``memory_gib`` (peak of rank 0), and the terms of the loss so far: ``target_tokens`` in language
modeling, ``labels`` in classification, ``windows`` in question answering. An eval line has the task's metrics,
``eval_loss`` among them. NaN and infinity are null.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, TextIO

from omegaconf import OmegaConf
from tqdm import tqdm

from gptj_train.atomic_write import write_text
from gptj_train.metrics_file import ends_with_newline, metrics_line, read_lines, results_of
from gptj_train.schema import schema
from gptj_train.tracking_services import (
    Service,
    TensorBoard,
    Wandb,
    evaluation_charts,
    forget_wandb_run,
    training_charts,
)

_SECONDS_BETWEEN_LINES = 10  # without a terminal, a step is printed at most so often
# With the metrics of a step this fits a terminal of 80 columns up to a million steps.
_BAR = "|{bar:8}| {n}/{total}{postfix} {remaining} left"


@schema
class TrackingConfig:
    """W&B and TensorBoard; the environment variables WANDB_MODE, WANDB_PROJECT and WANDB_NAME override the keys."""

    tensorboard: bool
    wandb: Literal["disabled", "offline", "online"]
    project: str
    run_name: str | None


class Tracker:
    """Log a run to its folder, the screen, W&B and TensorBoard. On ranks other than 0 every method does nothing.

    Args:
        output_dir: the run folder, created by ``start``.
        run_config: the resolved config, written to config.yaml, W&B and TensorBoard.
        steps_per_epoch: optimizer steps in which all training data is seen once; None: unknown.
        write_report: called after each evaluation and at the end, so that a stopped run has a report, too.
    """

    def __init__(
        self,
        config: TrackingConfig,
        output_dir: str | Path,
        run_config: dict[str, Any],
        rank: int,
        *,
        steps_per_epoch: float | None = None,
        write_report: Callable[[], object] = lambda: None,
    ) -> None:
        self._config = config
        self._folder = Path(output_dir)
        self._run_config = run_config
        self._enabled = rank == 0
        self._write_report = write_report
        self._metrics: TextIO | None = None
        self._bar: tqdm | None = None
        self._steps_per_epoch = steps_per_epoch
        self._facts: dict[str, Any] = {}
        self._wandb: Wandb | None = None
        self._services: list[Service] = []
        self._last_line = 0.0  # time of the last printed step
        self._seconds_per_step = 0.0  # moving average

    def describe(self, facts: Mapping[str, Any]) -> None:
        """Set the facts of environment.json, such as versions and parameters; W&B and TensorBoard show them too."""
        self._facts |= facts

    def start(self, step: int, max_steps: int, wandb_id: str | None = None, evaluated: bool = True) -> None:
        """Open the files of the run folder, and drop lines of metrics.jsonl after ``step``.

        A run that crashed may have logged steps after its last checkpoint; the resumed run logs them again.

        Args:
            step: the step to resume from; 0 for a fresh run.
            wandb_id: W&B run to resume if the folder names none; a checkpoint stores it.
            evaluated: the evaluation of ``step`` is done; otherwise it is repeated, and its lines are dropped.

        Raises:
            UserError: TensorBoard that is not installed.
        """
        if not self._enabled:
            return
        self._folder.mkdir(parents=True, exist_ok=True)
        OmegaConf.save(OmegaConf.create(self._run_config), self._folder / "config.yaml")
        if self._facts:
            write_text(self._folder / "environment.json", json.dumps(self._facts, indent=2) + "\n")
        path = self._folder / "metrics.jsonl"
        lines, bad = read_lines(path)
        if bad:
            self.note(f"{path}: {bad} unreadable lines are dropped")
        kept = []
        for line in lines:
            repeated = line["step"] == step and "loss" not in line and not evaluated
            # A fresh run drops everything, the evaluation before the first step too.
            if 0 < step >= line["step"] and not repeated:
                kept.append(line)
        if bad or len(kept) < len(lines) or not ends_with_newline(path):
            write_text(path, "".join(metrics_line(entry) for entry in kept))
        self._metrics = path.open("a", buffering=1)
        self._start_services(step, wandb_id)
        if _screen_columns() > 0:
            self._bar = tqdm(total=max_steps, initial=step, dynamic_ncols=True, smoothing=0.1, bar_format=_BAR)
        self._max_steps = max_steps

    def _start_services(self, step: int, wandb_id: str | None) -> None:
        shown = {**self._run_config, **self._facts}
        if step == 0:
            forget_wandb_run(self._folder)  # a fresh run is a new W&B run
        mode = os.environ.get("WANDB_MODE", self._config.wandb)
        if mode != "disabled":
            self._start_wandb(mode, shown, wandb_id)
        if self._config.tensorboard:
            self._services.append(TensorBoard(self._folder, shown, step=step))

    def _start_wandb(self, mode: str, shown: Mapping[str, Any], wandb_id: str | None) -> None:
        try:
            self._wandb = Wandb(
                self._folder,
                shown,
                mode=mode,
                project=self._config.project,
                run_name=self._config.run_name,
                run_id=wandb_id,
                note=self.note,
            )
        except Exception as error:  # not even offline: no fault of a tracker may end a run
            self.note(f"no Weights & Biases ({_first_line(error)}); metrics.jsonl has everything")
            return
        self._services.append(self._wandb)
        if self._wandb.url is not None:
            self.note(f"follow this run at {self._wandb.url}")

    def _log(self, charts: Mapping[str, float], step: int) -> None:
        """Pass values to the services; one that fails is given up, and the run continues."""
        for service in list(self._services):
            try:
                service.log(charts, step)
            except Exception as error:  # a service process that died, a full disk
                self._services.remove(service)
                self.note(
                    f"{service.name} failed ({_first_line(error)}); its charts end before step {step}, metrics.jsonl "
                    "continues"
                )

    @property
    def wandb_id(self) -> str | None:
        """The id of the W&B run, or None without W&B."""
        return None if self._wandb is None else self._wandb.id

    def step(self, metrics: dict[str, float]) -> None:
        """Log a finished optimizer step."""
        if self._metrics is None:
            return
        line = self._write("train", metrics)
        step = int(metrics["step"])
        self._log(training_charts(line), step)
        text = (
            f"loss {metrics['loss']:.4f}  lr {metrics['lr']:.2e}  "
            f"{metrics['tokens_per_second']:,.0f} tokens/s  {metrics['memory_gib']:.1f} GiB"
        )
        seconds = metrics["step_seconds"]
        self._seconds_per_step = 0.9 * (self._seconds_per_step or seconds) + 0.1 * seconds
        if self._bar is not None:
            self._bar.set_postfix_str(_short(metrics), refresh=False)
            self._bar.update(step - self._bar.n)
        elif step == self._max_steps or time.monotonic() - self._last_line > _SECONDS_BETWEEN_LINES:
            self._last_line = time.monotonic()
            left = tqdm.format_interval(self._seconds_per_step * (self._max_steps - step))
            print(f"step {step}/{self._max_steps}  {text}  {left} left", flush=True)

    def evaluation(self, metrics: dict[str, Any]) -> None:
        """Log the held-out metrics after a step; values other than numbers go to metrics.jsonl only."""
        if self._metrics is None:
            return
        line = self._write("eval", metrics)
        results = results_of(metrics)
        self._log(evaluation_charts(line, results), int(metrics["step"]))
        # The metrics of components, such as eval_loss/NAME, would be too many for a line.
        shown = [f"{name} {value:.4f}" for name, value in results.items() if "/" not in name]
        self.note(f"step {metrics['step']}: " + "  ".join(shown))
        self._report()

    def _report(self) -> None:
        try:
            self._write_report()
        except OSError as error:
            self.note(f"report.html was not written: {error.strerror}")

    def _write(self, kind: str, metrics: Mapping[str, Any]) -> dict[str, Any]:
        """Write a line of metrics.jsonl, and return it. A full disk costs the line, not the run."""
        assert self._metrics is not None
        line: dict[str, Any] = {"kind": kind, "time": round(time.time(), 3)}
        if self._steps_per_epoch:
            line["epoch"] = metrics["step"] / self._steps_per_epoch
        line |= metrics
        try:
            self._metrics.write(metrics_line(line))
        except OSError as error:
            self.note(f"metrics.jsonl lacks step {metrics['step']}: {error.strerror}")
        return line

    def note(self, text: str) -> None:
        """Print a line, above the progress bar if there is one."""
        if self._enabled:
            tqdm.write(text)
            sys.stdout.flush()

    def finish(self) -> None:
        """Close files, progress bar and W&B; for an offline W&B run, print how to upload it."""
        if self._bar is not None:
            self._bar.close()
        if self._metrics is not None:
            with contextlib.suppress(OSError):  # lines lost to a full disk were reported when they were written
                self._metrics.close()
            self._report()
        for service in self._services:
            try:
                message = service.finish()
            except Exception as error:  # a service process that died, a full disk
                message = f"{service.name} failed ({_first_line(error)}); metrics.jsonl has everything"
            if message is not None:
                self.note(message)


def _screen_columns() -> int:
    """Return the columns of the terminal; 0 without one, or where it does not know them and a bar would be empty."""
    try:
        return os.get_terminal_size(sys.stderr.fileno()).columns
    except (OSError, ValueError):  # no terminal, or a stream without a file
        return 0


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]


def _short(metrics: Mapping[str, float]) -> str:
    """Return the metrics of a step for the progress bar, in at most 40 characters."""
    speed = metrics["tokens_per_second"]
    rate = f"{speed / 1000:.3g}k" if speed >= 10_000 else f"{speed:.0f}"
    return f"loss {metrics['loss']:#.4g} lr {metrics['lr']:.1e} {rate} tok/s {metrics['memory_gib']:.3g}G"
