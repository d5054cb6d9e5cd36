"""Progress bar, metrics.jsonl and W&B logging, all on rank 0."""

from __future__ import annotations

import contextlib
import json
import math
import os
import secrets
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, TextIO

from omegaconf import OmegaConf
from tqdm import tqdm

from gptj_train.atomic_write import write_text
from gptj_train.errors import UserError
from gptj_train.schema import schema

_SECONDS_BETWEEN_LINES = 10  # without a terminal, a step is printed at most so often
_BAR = "{percentage:3.0f}% |{bar:20}| step {n}/{total}{postfix}  {remaining} left"
_ID_FILE = "wandb_id.txt"
# Names in metrics.jsonl and in W&B, which groups its charts by what stands before the slash.
_WANDB_NAMES = {
    "loss": "train/loss",
    "grad_norm": "train/grad_norm",
    "lr": "train/lr",
    "tokens": "train/tokens",
    "tokens_per_second": "perf/tokens_per_s",
    "step_seconds": "perf/step_seconds",
    "memory": "mem/peak_gib",
    "skipped_steps": "train/skipped_steps",
    "loss_scale": "train/loss_scale",
}


@schema
class TrackingConfig:
    """W&B settings; the environment variables WANDB_MODE, WANDB_PROJECT and WANDB_NAME override them."""

    wandb: Literal["disabled", "offline", "online"]
    project: str
    run_name: str | None


class Tracker:
    """Log a run to its folder, the screen and W&B. On ranks other than 0 every method does nothing.

    Args:
        output_dir: the run folder, created by ``start``.
        run_config: the resolved config, written to config.yaml and W&B.
    """

    def __init__(self, config: TrackingConfig, output_dir: str | Path, run_config: dict[str, Any], rank: int) -> None:
        self._config = config
        self._folder = Path(output_dir)
        self._run_config = run_config
        self._enabled = rank == 0
        self._metrics: TextIO | None = None
        self._bar: tqdm | None = None
        self._wandb: Any = None
        self._last_line = 0.0  # time of the last printed step
        self._seconds_per_step = 0.0  # moving average

    def start(self, step: int, max_steps: int, wandb_id: str | None = None, evaluated: bool = True) -> None:
        """Open the files of the run folder, and drop lines of metrics.jsonl after ``step``.

        A run that crashed may have logged steps after its last checkpoint; the resumed run logs them again.

        Args:
            step: the step to resume from; 0 for a fresh run.
            wandb_id: W&B run to resume if the folder names none; a checkpoint stores it.
            evaluated: the evaluation of ``step`` is done; otherwise it is repeated, and its lines are dropped.

        Raises:
            UserError: W&B without an API key.
        """
        if not self._enabled:
            return
        self._folder.mkdir(parents=True, exist_ok=True)
        OmegaConf.save(OmegaConf.create(self._run_config), self._folder / "config.yaml")
        path = self._folder / "metrics.jsonl"
        lines, bad = _read_lines(path)
        if bad:
            self.note(f"{path}: {bad} unreadable lines are dropped")
        kept = []
        for line in lines:
            repeated = line["step"] == step and "loss" not in line and not evaluated
            # A fresh run drops everything, the evaluation before the first step too.
            if 0 < step >= line["step"] and not repeated:
                kept.append(line)
        if bad or len(kept) < len(lines) or not _ends_with_newline(path):
            write_text(path, "".join(_line(entry) for entry in kept))
        self._metrics = path.open("a", buffering=1)
        if step == 0:
            (self._folder / _ID_FILE).unlink(missing_ok=True)  # a fresh run is a new W&B run
        self._wandb = _start_wandb(self._config, self._folder, self._run_config, wandb_id)
        if sys.stderr.isatty():
            self._bar = tqdm(total=max_steps, initial=step, dynamic_ncols=True, smoothing=0.1, bar_format=_BAR)
        self._max_steps = max_steps

    @property
    def wandb_id(self) -> str | None:
        """The id of the W&B run, or None without W&B."""
        return None if self._wandb is None else self._wandb.id

    def step(self, metrics: dict[str, float]) -> None:
        """Log a finished optimizer step."""
        if self._metrics is None:
            return
        self._write(metrics)
        step = int(metrics["step"])
        if self._wandb is not None:
            logged = {wandb_name: metrics[name] for name, wandb_name in _WANDB_NAMES.items()}
            self._wandb.log(logged, step=step)
        text = (
            f"loss {metrics['loss']:.4f}  lr {metrics['lr']:.2e}  "
            f"{metrics['tokens_per_second']:,.0f} tokens/s  {metrics['memory']:.1f} GiB"
        )
        seconds = metrics["step_seconds"]
        self._seconds_per_step = 0.9 * (self._seconds_per_step or seconds) + 0.1 * seconds
        if self._bar is not None:
            self._bar.set_postfix_str(f" {text}", refresh=False)
            self._bar.update(step - self._bar.n)
        elif step == self._max_steps or time.monotonic() - self._last_line > _SECONDS_BETWEEN_LINES:
            self._last_line = time.monotonic()
            left = tqdm.format_interval(self._seconds_per_step * (self._max_steps - step))
            print(f"step {step}/{self._max_steps}  {text}  {left} left", flush=True)

    def evaluation(self, metrics: dict[str, Any]) -> None:
        """Log the held-out metrics after a step; values other than numbers go to metrics.jsonl only."""
        if self._metrics is None:
            return
        self._write(metrics)
        results = results_of(metrics)
        if self._wandb is not None:
            logged = {f"eval/{name.removeprefix('eval_')}": value for name, value in results.items()}
            # Tokens are the x axis of W&B's charts. The evaluation before step 1 has no training metrics to give them.
            logged[_WANDB_NAMES["tokens"]] = metrics["tokens"]
            self._wandb.log(logged, step=int(metrics["step"]))
        # The metrics of components, such as eval_loss/NAME, would be too many for a line.
        shown = [f"{name} {value:.4f}" for name, value in results.items() if "/" not in name]
        self.note(f"step {metrics['step']}: " + "  ".join(shown))

    def _write(self, metrics: Mapping[str, Any]) -> None:
        """Write a line of metrics.jsonl. A full disk costs the line, not the run."""
        assert self._metrics is not None
        try:
            self._metrics.write(_line(metrics))
        except OSError as error:
            self.note(f"metrics.jsonl lacks step {metrics['step']}: {error.strerror}")

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
        if self._wandb is not None:
            is_offline = self._wandb.settings.mode == "offline"
            folder = Path(self._wandb.dir).parent
            self._wandb.finish()
            if is_offline:
                self.note(f"upload this run with: wandb sync {folder}")


def _ends_with_newline(path: Path) -> bool:
    """Return whether a file is absent, empty, or ends with a whole line."""
    return not path.exists() or (path.is_file() and path.read_bytes()[-1:] in (b"\n", b""))


def _line(metrics: Mapping[str, Any]) -> str:
    return json.dumps(_without_nan(metrics), allow_nan=False) + "\n"


def _without_nan(value: Any) -> Any:
    """Replace NaN and infinity, which JSON does not have, with null."""
    if isinstance(value, Mapping):
        return {key: _without_nan(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_without_nan(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def results_of(evaluation: Mapping[str, Any]) -> dict[str, float]:
    """Return the numeric results in an evaluation line of metrics.jsonl, without its counters."""
    results = {}
    for name, value in evaluation.items():
        if isinstance(value, float) and name not in ("step", "tokens"):
            results[name] = value
    return results


def read_metrics(folder: str | Path) -> list[dict[str, Any]]:
    """Return the lines of a run's metrics.jsonl, without those that cannot be read; [] if there is no file.

    The file is a record, not state: a flipped bit in it costs a line, never a run.
    """
    lines, _ = _read_lines(Path(folder) / "metrics.jsonl")
    return lines


def _read_lines(path: Path) -> tuple[list[dict[str, Any]], int]:
    """Return the good lines of a metrics.jsonl, and how many others there are; a crash may cut off the last one."""
    if not path.is_file():
        # A pipe of this name would never end: it counts as one bad line, so that a file replaces it.
        return [], int(path.exists())
    lines, bad = [], 0
    for text in path.read_bytes().splitlines():
        try:
            line = json.loads(text)
        except (ValueError, RecursionError):  # ValueError: no JSON, or no UTF-8
            bad += 1
            continue
        if _is_record(line):
            lines.append(line)
        else:
            bad += 1
    return lines, bad


def _is_record(line: Any) -> bool:
    if not isinstance(line, dict) or type(line.get("step")) is not int or type(line.get("tokens")) is not int:
        return False
    is_training = "loss" in line
    numbers = ("loss", "lr", "grad_norm", "skipped_steps") if is_training else ("eval_loss",)
    return all(isinstance(line.get(name), int | float | None) for name in numbers)


def _start_wandb(config: TrackingConfig, folder: Path, run_config: dict[str, Any], wandb_id: str | None) -> Any:
    """Start or resume the W&B run of a folder; return None if W&B is disabled."""
    mode = os.environ.get("WANDB_MODE", config.wandb)
    if mode == "disabled":
        return None
    import wandb  # slow to import, and most runs have it disabled

    # The id is created once and kept in the run folder, so that a resumed job continues the same W&B run.
    id_file = folder / _ID_FILE
    if not id_file.exists():
        id_file.write_text(wandb_id or secrets.token_hex(4))

    def init(mode: str) -> Any:
        return wandb.init(
            mode=mode,  # type: ignore[arg-type]
            project=os.environ.get("WANDB_PROJECT", config.project),
            name=os.environ.get("WANDB_NAME", config.run_name),
            id=id_file.read_text(),
            resume="allow",
            dir=folder,
            config=run_config,
            settings=wandb.Settings(silent=True),
        )

    try:
        run = init(mode)
    except wandb.errors.UsageError as error:  # no API key
        raise UserError(f"tracking.wandb={mode}: {error} Or set tracking.wandb=offline.") from None
    except wandb.errors.CommError as error:  # an unreachable server must not end a training run
        print(f"cannot reach Weights & Biases ({error}); logging offline", file=sys.stderr, flush=True)
        run = init("offline")
    run.define_metric("*", step_metric="train/tokens", step_sync=False)
    return run
