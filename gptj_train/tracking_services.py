"""Where a run is followed besides its folder: Weights & Biases and TensorBoard, behind one small interface."""

from __future__ import annotations

import os
import secrets
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

from gptj_train.errors import UserError

_ID_FILE = "wandb_id.txt"
_ANSWER_WITHIN = 30.0  # seconds, of the server at the start
_UPLOAD_WITHIN = 60.0  # seconds, at the end, for what is not uploaded yet
# Names in metrics.jsonl and in charts, which are grouped by what stands before the slash.
_CHART_NAMES = {
    "loss": "train/loss",
    "grad_norm": "train/grad_norm",
    "lr": "train/lr",
    "tokens": "train/tokens",
    "target_tokens": "train/target_tokens",
    "epoch": "train/epoch",
    "tokens_per_second": "perf/tokens_per_s",
    "step_seconds": "perf/step_seconds",
    "memory_gib": "mem/peak_gib",
    "skipped_steps": "train/skipped_steps",
    "loss_scale": "train/loss_scale",
}


class Service(Protocol):
    """Takes the numbers of a run.

    Attributes:
        name: for messages.
    """

    name: str

    def log(self, charts: Mapping[str, float], step: int) -> None:
        """Record values of charts at a step."""

    def finish(self) -> str | None:
        """Close the service; return a line for the user, if there is one."""


def training_charts(line: Mapping[str, Any]) -> dict[str, float]:
    """Return the values of a train line of metrics.jsonl by the names of their charts."""
    return {chart: line[name] for name, chart in _CHART_NAMES.items() if name in line}


def evaluation_charts(line: Mapping[str, Any], results: Mapping[str, float]) -> dict[str, float]:
    """Return the results of an eval line of metrics.jsonl by the names of their charts.

    Tokens are the x axis of W&B's charts. The evaluation before step 1 has no train line to give them.
    """
    charts = {f"eval/{name.removeprefix('eval_')}": value for name, value in results.items()}
    charts[_CHART_NAMES["tokens"]] = line["tokens"]
    return charts


class Wandb:
    """A W&B run, new or resumed. Without a key or a server that answers it is logged offline.

    Args:
        folder: the run folder, which keeps the id of the W&B run: a resumed job continues the same one.
        config: settings and facts of the run.
        run_id: of the W&B run to resume if the folder names none; None starts a new one.
        note: called with a line for the user.
    """

    name = "Weights & Biases"

    def __init__(
        self,
        folder: Path,
        config: Mapping[str, Any],
        *,
        mode: str,
        project: str,
        run_name: str | None,
        run_id: str | None,
        note: Callable[[str], None],
    ) -> None:
        import wandb  # slow to import, and most runs have it disabled

        self._folder = folder
        id_file = folder / _ID_FILE
        if not id_file.exists():
            id_file.write_text(run_id or secrets.token_hex(4))

        def init(mode: str) -> Any:
            return wandb.init(
                mode=mode,  # type: ignore[arg-type]
                project=os.environ.get("WANDB_PROJECT", project),
                name=os.environ.get("WANDB_NAME", run_name),
                id=id_file.read_text(),
                resume="allow",
                dir=folder,
                config=dict(config),
                settings=wandb.Settings(silent=True, init_timeout=_ANSWER_WITHIN),
            )

        try:
            self._run = init(mode)
        except wandb.errors.Error as error:  # no key, a wrong one, or a server that cannot be reached
            reason = str(error).splitlines()[0]
            note(f"cannot reach {self.name} ({reason}); logging offline")
            # The service process still holds the run's id for the attempt that failed.
            wandb.teardown()
            self._run = init("offline")
        self._run.define_metric("*", step_metric=_CHART_NAMES["tokens"], step_sync=False)

    @property
    def id(self) -> str:
        return str(self._run.id)

    @property
    def url(self) -> str | None:
        """Where the run can be seen; None offline."""
        if self._run.settings.mode == "offline":
            return None  # asking for it would warn
        return self._run.url or None

    def log(self, charts: Mapping[str, float], step: int) -> None:
        self._run.log(dict(charts), step=step)

    def finish(self) -> str | None:
        is_offline = self._run.settings.mode == "offline"
        # All attempts of this run: each has written a folder of its own.
        upload = f"wandb sync --id {self.id} {self._folder}/wandb/*-{self.id}"
        report = self._folder / "report.html"
        if report.exists():
            import wandb

            self._run.log({"report": wandb.Html(report.read_text(), inject=False)})
        # In a thread: without a server it would try again for minutes, while the job holds its GPUs.
        failure: list[BaseException] = []
        ending = threading.Thread(target=_finish, args=(self._run, failure), daemon=True)
        ending.start()
        ending.join(_UPLOAD_WITHIN)
        if ending.is_alive() or failure:
            return f"{self.name} does not answer; upload the rest with: {upload}"
        return f"upload this run with: {upload}" if is_offline else None


def _finish(run: Any, failure: list[BaseException]) -> None:
    try:
        run.finish()
    except Exception as error:  # whatever its service process died of
        failure.append(error)


def forget_wandb_run(folder: Path) -> None:
    """Let the next W&B run of a folder be a new one."""
    (folder / _ID_FILE).unlink(missing_ok=True)


class TensorBoard:
    """Event files in the run folder's ``tensorboard``.

    Args:
        step: the step that the run starts or resumes from; TensorBoard hides what an earlier start wrote after it.

    Raises:
        UserError: the package tensorboard is not installed.
    """

    name = "TensorBoard"

    def __init__(self, folder: Path, config: Mapping[str, Any], *, step: int) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            raise UserError("tracking=tensorboard needs a package: pip install 'gptj_train[tensorboard]'") from None
        self._writer = SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1 if step > 0 else None)
        self._writer.add_text("config", "\n".join(f"    {line}" for line in _lines(config)), step)
        self._folder = folder

    def log(self, charts: Mapping[str, float], step: int) -> None:
        for name, value in charts.items():
            self._writer.add_scalar(name, value, step)

    def finish(self) -> str | None:
        self._writer.close()
        return f"see this run with: tensorboard --logdir {self._folder / 'tensorboard'}"


def _lines(config: Mapping[str, Any], prefix: str = "") -> list[str]:
    lines = []
    for name, value in config.items():
        if isinstance(value, Mapping):
            lines += _lines(value, f"{prefix}{name}.")
        else:
            lines.append(f"{prefix}{name}: {value}")
    return lines
