"""status.json of a run folder: whether the run is done, and whether its attempts make progress.

An attempt is one start of the run. A scheduler starts a preempted run again; after some attempts in a row that saved
no checkpoint, it must not.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import socket
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from gptj_train.launch.exit_codes import EXIT_PREEMPTED
from gptj_train.launch.preemption import Preempted

STATUS_FILE = "status.json"
MOST_FRUITLESS = 3
"""Attempts in a row that may be preempted without a new checkpoint, before the run is not to be queued again."""
_LARGEST = 100_000  # bytes


class RunStatus:
    """A context manager that writes status.json: running at its start; done, stopped or failed at its end.

    A run that was killed leaves "running" there, with its host and process id. Only rank 0 writes.

    Attributes:
        current: the status of this process's run, once there is one.
        attempt: number of this attempt, from 1.
    """

    current: RunStatus | None = None

    def __init__(self, output_dir: str | Path, rank: int, request: Mapping[str, Any]) -> None:
        """``request`` is the run's config."""
        self._path = Path(output_dir) / STATUS_FILE
        self._enabled = rank == 0
        self._request = _hash(request)
        before = _read(self._path)
        self.attempt = _count(before, "attempt") + 1
        self._fruitless = _count(before, "fruitless_attempts")
        self._preempted = False
        self.step: Callable[[], int] = lambda: 0
        """Returns the optimizer steps done."""
        self.reason: str | None = None
        """Why a run that is done ended before its last step."""
        self.progressed: Callable[[], bool] = lambda: False
        """Returns whether this attempt saved a checkpoint newer than the one it began with."""
        RunStatus.current = self

    def __enter__(self) -> RunStatus:
        self._write("running", None)
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if error is None:
            self._fruitless = 0
            self._write("done", self.reason)
        elif isinstance(error, Preempted):
            self.preempted(str(error))
        elif isinstance(error, SystemExit) and error.code == EXIT_PREEMPTED:
            self.preempted("before or after training")
        elif isinstance(error, SystemExit | KeyboardInterrupt):
            self._write("stopped", "before or after training")
        else:
            self._write("failed", " ".join(f"{type(error).__name__}: {error}".split())[:1000])

    def preempted(self, reason: str) -> None:
        """Note that this attempt was preempted, also before the run has a folder; a second call changes nothing."""
        if self._preempted:
            return
        self._preempted = True
        self._fruitless = 0 if self.progressed() else self._fruitless + 1
        if self._enabled:
            with contextlib.suppress(OSError):
                self._path.parent.mkdir(parents=True, exist_ok=True)
        self._write("stopped", reason)

    @property
    def is_stuck(self) -> bool:
        """Whether so many attempts in a row were preempted without a new checkpoint that another would be in vain."""
        return self._preempted and self._fruitless >= MOST_FRUITLESS

    def _write(self, state: str, reason: str | None) -> None:
        if not self._enabled:
            return
        status = {
            "state": state,
            "reason": reason,
            "step": self.step(),
            "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "request": self._request,
            "attempt": self.attempt,
            "fruitless_attempts": self._fruitless,
        }
        scratch = self._path.with_name(f".{STATUS_FILE}.tmp")
        try:
            scratch.write_text(json.dumps(status, indent=1) + "\n")
            os.replace(scratch, self._path)
        except OSError:
            # The folder is gone or the disk is full: whatever ends the run says so.
            return


def is_done(output_dir: str | Path, request: Mapping[str, Any]) -> int | None:
    """Return the last step of a run that is done and was asked for exactly this; otherwise None."""
    status = _read(Path(output_dir) / STATUS_FILE)
    is_same = status.get("state") == "done" and status.get("request") == _hash(request)
    step = status.get("step")
    return step if is_same and isinstance(step, int) else None


def _read(path: Path) -> dict[str, Any]:
    """Return what a status file holds; {} if it is absent or damaged, since it is a record and not state."""
    try:
        if not path.is_file() or path.stat().st_size > _LARGEST:
            return {}
        status = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError):
        return {}
    return status if isinstance(status, dict) else {}


def _count(status: Mapping[str, Any], name: str) -> int:
    value = status.get(name)
    return value if isinstance(value, int) else 0


def _hash(request: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(request, sort_keys=True, default=str).encode()).hexdigest()
