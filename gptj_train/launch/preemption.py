"""Requests to end a run early, by a signal, a file or a deadline. Each rank notes them; the trainer makes all agree."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

import psutil

SIGNALS = signal.SIGTERM, signal.SIGUSR1
STOP_FILE = "STOP"

_MARGIN = 60  # seconds, the safety margin before Slurm kills the job


class Preempted(Exception):  # noqa: N818 (it ends the run in good order)
    """The run was preempted before its last step; rerun the same command to resume."""


class StopRequest:
    """A context manager that notes requests to end the run, as far as this rank sees them.

    Signals reach single ranks and do not interrupt: the handler only notes them. Rank 0 looks for the stop file.
    Every rank checks the deadlines and, under a launcher, that the launcher still runs.
    """

    def __init__(self, output_dir: str | Path, max_hours: float | None, rank: int) -> None:
        """``max_hours`` count from the start of this process."""
        # Only rank 0 looks: on a shared disk other ranks may see the file later, or after its removal.
        self._stop_file = Path(output_dir) / STOP_FILE if rank == 0 else None
        self._max_hours = max_hours
        self._deadline = float("inf")
        if max_hours is not None:
            # From the process's start, since loading 6B takes part of the hours that a queue grants.
            self._deadline = psutil.Process().create_time() + max_hours * 3600
        self._killed_at = float(os.environ.get("SLURM_JOB_END_TIME") or "inf")
        self._rank = rank
        self._launchers = _launchers()
        self._signal: int | None = None
        self._old_handlers: dict[int, Any] = {}

    def __enter__(self) -> StopRequest:
        for number in SIGNALS:
            self._old_handlers[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for number, handler in self._old_handlers.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._signal = number

    def reason(self, step_seconds: float, save_seconds: float) -> str | None:
        """Return why to end now, or None.

        Args:
            step_seconds, save_seconds: expected time of the next step and of a save. Before Slurm's end there must
                be time for both twice, since either may be slower than the last.
        """
        if self._signal is not None:
            return f"{signal.Signals(self._signal).name} reached rank {self._rank}"
        if self._stop_file is not None and self._stop_file.exists():
            return f"found {self._stop_file}; remove it before you rerun"
        if time.time() > self._deadline:
            return f"max_hours={self._max_hours} have passed"
        if self._seconds_left() < 2 * (step_seconds + save_seconds) + _MARGIN:
            return f"the Slurm job ends in {self._seconds_left():.0f} s"
        if _launchers() != self._launchers:
            # A killed launcher leaves its ranks to the init process: without this they would train on unseen.
            return f"the launcher of rank {self._rank} has exited"
        return None

    def leaves_time_for(self, save_seconds: float) -> bool:
        """Return whether a save that starts now ends before Slurm kills the job."""
        return self._seconds_left() > save_seconds

    def _seconds_left(self) -> float:
        return self._killed_at - time.time()


def _launchers() -> tuple[int, ...]:
    """Return the process ids of this rank's launcher; empty without one."""
    if "TORCHELASTIC_RUN_ID" in os.environ:  # torchrun, the parent
        return (os.getppid(),)
    if "CROSS_RANK" in os.environ:  # deepspeed: its launch.py is the parent, the command itself the grandparent
        return (os.getppid(), psutil.Process(os.getppid()).ppid())
    return ()
