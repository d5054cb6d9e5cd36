"""What a person sees of a run: progress, metrics.jsonl, Weights & Biases. Rank 0 speaks, the others are silent."""

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

_LINE_SECONDS = 10
_BAR = "{percentage:3.0f}% |{bar:20}| step {n}/{total}{postfix}  {remaining} left"
_ID_FILE = "wandb_id.txt"
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
    """Weights & Biases settings; the WANDB_MODE, WANDB_PROJECT and WANDB_NAME of the environment win."""

    wandb: Literal["disabled", "offline", "online"]
    project: str
    run_name: str | None


class Tracker:
    """Records and shows a run in its folder. On ranks other than 0 every method does nothing."""

    def __init__(self, config: TrackingConfig, output_dir: str | Path, run_config: dict[str, Any], rank: int) -> None:
        self._config, self._folder, self._run_config = config, Path(output_dir), run_config
        self._speaks = rank == 0
        self._metrics: TextIO | None = None
        self._bar: tqdm | None = None
        self._wandb: Any = None
        self._last_line = 0.0
        self._pace = 0.0

    def start(self, step: int, max_steps: int, wandb_id: str | None = None) -> None:
        """Open the run folder's files, going on after ``step``: lines of later steps, from a run cut off, go.

        ``wandb_id`` is that of the run to go on with, where the folder does not say.
        """
        if not self._speaks:
            return
        self._folder.mkdir(parents=True, exist_ok=True)
        OmegaConf.save(OmegaConf.create(self._run_config), self._folder / "config.yaml")
        path = self._folder / "metrics.jsonl"
        known = read_metrics(self._folder)
        kept = [line for line in known if 0 < line["step"] <= step or step > 0 == line["step"]]
        if len(kept) < len(known) or not _ends_whole(path):
            write_text(path, "".join(_line(entry) for entry in kept))
        self._metrics = path.open("a", buffering=1)
        if step == 0:
            (self._folder / _ID_FILE).unlink(missing_ok=True)  # of a run that was given up
        self._wandb = _start_wandb(self._config, self._folder, self._run_config, wandb_id)
        if sys.stderr.isatty():
            self._bar = tqdm(total=max_steps, initial=step, dynamic_ncols=True, smoothing=0.1, bar_format=_BAR)
        self._max_steps = max_steps

    @property
    def wandb_id(self) -> str | None:
        """Of the Weights & Biases run, where there is one."""
        return None if self._wandb is None else self._wandb.id

    def step(self, metrics: dict[str, float]) -> None:
        """A finished optimizer step."""
        if self._metrics is None:
            return
        self._record(metrics)
        if self._wandb is not None:
            self._wandb.log({_WANDB_NAMES[name]: metrics[name] for name in _WANDB_NAMES}, step=int(metrics["step"]))
        shown = (
            f"loss {metrics['loss']:.4f}  lr {metrics['lr']:.2e}  "
            f"{metrics['tokens_per_second']:,.0f} tokens/s  {metrics['memory']:.1f} GiB"
        )
        step = int(metrics["step"])
        self._pace = 0.9 * (self._pace or metrics["step_seconds"]) + 0.1 * metrics["step_seconds"]
        if self._bar is not None:
            self._bar.set_postfix_str(f" {shown}", refresh=False)
            self._bar.update(step - self._bar.n)
        elif step == self._max_steps or time.monotonic() - self._last_line > _LINE_SECONDS:
            self._last_line = time.monotonic()
            left = tqdm.format_interval(self._pace * (self._max_steps - step))
            print(f"step {step}/{self._max_steps}  {shown}  {left} left", flush=True)

    def evaluation(self, metrics: dict[str, Any]) -> None:
        """The held-out metrics after a step; what is no number is recorded and not shown."""
        if self._metrics is None:
            return
        self._record(metrics)
        results = results_of(metrics)
        if self._wandb is not None:
            logged = {f"eval/{name.removeprefix('eval_')}": value for name, value in results.items()}
            # Before the first step no training metrics say where on the tokens' axis this belongs.
            self._wandb.log(logged | {_WANDB_NAMES["tokens"]: metrics["tokens"]}, step=int(metrics["step"]))
        # Those of components, as in eval_loss/NAME, are too many for a line.
        shown = {name: value for name, value in results.items() if "/" not in name}
        self.note(f"step {metrics['step']}: " + "  ".join(f"{k} {v:.4f}" for k, v in shown.items()))

    def _record(self, metrics: Mapping[str, Any]) -> None:
        """A line of metrics.jsonl; a disk that takes none is no reason to end the run."""
        assert self._metrics is not None
        try:
            self._metrics.write(_line(metrics))
        except OSError as error:
            self.note(f"metrics.jsonl lacks step {metrics['step']}: {error.strerror}")

    def note(self, text: str) -> None:
        """A line of its own on the screen."""
        if self._speaks:
            tqdm.write(text)
            sys.stdout.flush()

    def finish(self) -> None:
        """Close everything; says how to upload an offline Weights & Biases run."""
        if self._bar is not None:
            self._bar.close()
        if self._metrics is not None:
            with contextlib.suppress(OSError):  # what a full disk did not take has been told
                self._metrics.close()
        if self._wandb is not None:
            offline_folder = Path(self._wandb.dir).parent if self._wandb.settings.mode == "offline" else None
            self._wandb.finish()
            if offline_folder is not None:
                self.note(f"upload this run with: wandb sync {offline_folder}")


def _ends_whole(path: Path) -> bool:
    return not path.exists() or path.read_bytes()[-1:] in (b"\n", b"")


def _line(metrics: Mapping[str, Any]) -> str:
    return json.dumps(_without_nan(metrics), allow_nan=False) + "\n"


def _without_nan(value: Any) -> Any:
    """JSON knows no NaN or infinity: they become null."""
    if isinstance(value, Mapping):
        return {key: _without_nan(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_without_nan(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def results_of(evaluation: Mapping[str, Any]) -> dict[str, float]:
    """The numbers that an evaluation line of metrics.jsonl reports."""
    counters = ("step", "tokens")
    return {name: value for name, value in evaluation.items() if name not in counters and isinstance(value, float)}


def read_metrics(folder: str | Path) -> list[dict[str, Any]]:
    """The lines of a run's metrics.jsonl; a last line cut off by a crash is left out."""
    lines = []
    try:
        text = (Path(folder) / "metrics.jsonl").read_text()
    except FileNotFoundError:
        return []
    for line in text.splitlines():
        try:
            lines.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return lines


def _start_wandb(config: TrackingConfig, folder: Path, run_config: dict[str, Any], wandb_id: str | None) -> Any:
    mode = os.environ.get("WANDB_MODE", config.wandb)
    if mode == "disabled":
        return None
    import wandb

    # The id is made once and kept, so that a resumed job goes on in the same run.
    id_file = folder / _ID_FILE
    if not id_file.exists():
        id_file.write_text(wandb_id or secrets.token_hex(4))

    def begin(mode: str) -> Any:
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
        run = begin(mode)
    except wandb.errors.UsageError as error:  # no API key
        raise UserError(f"tracking.wandb={mode}: {error} Or set tracking.wandb=offline.") from None
    except wandb.errors.CommError as error:  # a run is not to end for want of a network
        print(f"Weights & Biases cannot be reached ({error}); it is written offline", file=sys.stderr, flush=True)
        run = begin("offline")
    run.define_metric("*", step_metric="train/tokens", step_sync=False)
    return run
