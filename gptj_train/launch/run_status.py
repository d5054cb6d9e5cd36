"""status.json of a run folder: whether the run is done, for schedulers and scripts that cannot trust an exit code."""

from __future__ import annotations

import hashlib
import json
import os
import socket
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from gptj_train.launch.preemption import Preempted

STATUS_FILE = "status.json"
_LARGEST = 100_000  # bytes


class RunStatus:
    """A context manager that writes status.json: running at its start; done, stopped or failed at its end.

    A run that was killed leaves "running" there, with its host and process id. Only rank 0 writes.
    """

    def __init__(self, output_dir: str | Path, rank: int, request: Mapping[str, Any]) -> None:
        """``request`` is the run's config."""
        self._path = Path(output_dir) / STATUS_FILE
        self._enabled = rank == 0
        self._request = _hash(request)
        self.step: Callable[[], int] = lambda: 0
        """Returns the optimizer steps done."""
        self.reason: str | None = None
        """Why a run that is done ended before its last step."""

    def __enter__(self) -> RunStatus:
        self._write("running", None)
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if error is None:
            self._write("done", self.reason)
        elif isinstance(error, Preempted | SystemExit | KeyboardInterrupt):
            self._write("stopped", str(error) if isinstance(error, Preempted) else "before or after training")
        else:
            self._write("failed", " ".join(f"{type(error).__name__}: {error}".split())[:1000])

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
    path = Path(output_dir) / STATUS_FILE
    try:
        if not path.is_file() or path.stat().st_size > _LARGEST:
            return None
        status = json.loads(path.read_text())
        is_same = status["state"] == "done" and status["request"] == _hash(request)
        return int(status["step"]) if is_same else None
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None  # a record, not state: a damaged one costs a second export


def _hash(request: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(request, sort_keys=True, default=str).encode()).hexdigest()
