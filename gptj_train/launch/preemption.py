"""Asked to end early, by a signal, a file or a deadline: a rank takes note, and the trainer makes the ranks agree."""

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

_MARGIN = 60  # seconds before Slurm's end that are nobody's


class Preempted(Exception):  # noqa: N818 (no error: the run did as it was told)
    """The run has ended before its last step because it was asked to: the same command goes on from there."""


class StopRequest:
    """Whether this rank has been asked to end the run, while in its ``with`` block, and by what.

    A signal only leaves its name here. Rank 0 looks for the stop file; every rank keeps an eye on the deadline
    and, under a launcher, on whether that is still there.
    """

    def __init__(self, output_dir: str | Path, max_hours: float | None, rank: int) -> None:
        """``max_hours`` count from the start of this process."""
        self._stop_file = Path(output_dir) / STOP_FILE if rank == 0 else None
        self._max_hours = max_hours
        self._ends = psutil.Process().create_time() + max_hours * 3600 if max_hours is not None else float("inf")
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
        """Why to end now, or None.

        Args:
            step_seconds, save_seconds: what the next step and a save may take; before Slurm's end there must be
                time for each of them twice.
        """
        if self._signal is not None:
            return f"{signal.Signals(self._signal).name} reached rank {self._rank}"
        if self._stop_file is not None and self._stop_file.exists():
            return f"{self._stop_file} is there; remove it before you start again"
        if time.time() > self._ends:
            return f"max_hours={self._max_hours} are over"
        if self._seconds_left() < 2 * (step_seconds + save_seconds) + _MARGIN:
            return f"the Slurm job ends in {self._seconds_left():.0f} s"
        if _launchers() != self._launchers:
            return f"the launcher of rank {self._rank} has gone"
        return None

    def leaves_time_for(self, save_seconds: float) -> bool:
        """Whether a save begun now ends before Slurm kills the job."""
        return self._seconds_left() > save_seconds

    def _seconds_left(self) -> float:
        return self._killed_at - time.time()


def _launchers() -> tuple[int, ...]:
    """Process ids of what started this rank. torchrun is its parent; deepspeed has one more process above that."""
    levels = 1 if "TORCHELASTIC_RUN_ID" in os.environ else 2 if "CROSS_RANK" in os.environ else 0
    pids: list[int] = []
    for _ in range(levels):
        pids.append(psutil.Process(pids[-1]).ppid() if pids else os.getppid())
    return tuple(pids)
