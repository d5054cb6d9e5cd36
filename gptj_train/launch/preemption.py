"""Requests to end a run early, by a signal, a file or a deadline. Each rank notes them; the trainer makes all agree."""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

import psutil

from gptj_train.launch.launchers import launcher_has_exited
from gptj_train.launch.stacks import remove_stacks_file, stacks_file

SIGNALS = signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT, signal.SIGQUIT, signal.SIGHUP
"""Requests to stop. SIGINT is Ctrl-C, SIGQUIT Ctrl-\\; SIGHUP comes when an ssh session is closed."""
STOP_FILE = "STOP"

_KEYS = {signal.SIGINT: "Ctrl-C", signal.SIGQUIT: "Ctrl-\\"}
# Seconds. The terminal and the launcher both pass a key on: one press arrives twice. On a busy host the second comes
# late, and taken for a second press it would cost the save.
_SAME_KEY_PRESS = 1.0
_MARGIN = 60  # seconds, the safety margin before Slurm kills the job


class Preempted(Exception):  # noqa: N818 (it ends the run in good order)
    """The run was preempted before its last step; rerun the same command to resume."""


class StopRequest:
    """A context manager that notes requests to end the run, as far as this rank sees them.

    Signals reach single ranks and do not interrupt: the handler only notes them. Rank 0 looks for the stop file.
    Every rank checks the deadlines and, under a launcher, that the launcher still runs.
    """

    in_charge = False
    """Whether this process is in a training loop, which answers requests after its step."""
    has_trained = False
    """Whether this process has ended a training loop in good order: what follows it can be repeated."""

    def __init__(self, output_dir: str | Path, max_hours: float | None, rank: int) -> None:
        """``max_hours`` count from the start of this process."""
        # Only rank 0 looks: on a shared disk other ranks may see the file later, or after its removal.
        self._stop_file = Path(output_dir) / STOP_FILE if rank == 0 else None
        self._stacks = stacks_file(output_dir, rank)
        self._max_hours = max_hours
        self.progressed = False
        """Whether this process has done a step: a shorter ``max_hours`` than the start-up must not end every job."""
        self._deadline = float("inf")
        if max_hours is not None:
            # From the process's start, since loading 6B takes part of the hours that a queue grants. Monotonic: a clock
            # that is set while the run trains must not end it.
            age = time.time() - psutil.Process().create_time()
            self._deadline = time.monotonic() - age + max_hours * 3600
        self._killed_at = float(os.environ.get("SLURM_JOB_END_TIME") or "inf")
        self._rank = rank
        self._signal: int | None = None
        self._interrupted_at: float | None = None
        self._old_handlers: dict[int, Any] = {}

    def __enter__(self) -> StopRequest:
        StopRequest.in_charge = True
        for number in handled_signals():
            self._old_handlers[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for number, handler in self._old_handlers.items():
            signal.signal(number, handler)
        StopRequest.in_charge = False
        StopRequest.has_trained = error is None

    def _note(self, number: int, frame: FrameType | None) -> None:
        if number in _KEYS:
            self._interrupted(_KEYS[signal.Signals(number)])
        if self._signal is None or number in _KEYS:
            # The launcher answers a key by SIGTERM, which may come first: the user pressed a key.
            self._signal = number

    def _interrupted(self, key: str) -> None:
        """Explain the first press of a key that interrupts; end at once on the second."""
        now = time.monotonic()
        if self._interrupted_at is None:
            self._interrupted_at = now
            if self._rank == 0:
                print(f"\n{key}: finishing the step and saving; once more ends at once", file=sys.stderr, flush=True)
        elif now - self._interrupted_at > _SAME_KEY_PRESS:
            # Everything on disk is whole at any moment: there is nothing to tidy up but the watchdog's file.
            remove_stacks_file(self._stacks)
            os._exit(128 + signal.SIGINT)

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
        if self.progressed and time.monotonic() > self._deadline:
            return f"max_hours={self._max_hours} have passed"
        if self._seconds_left() < 2 * (step_seconds + save_seconds) + _MARGIN:
            return f"the Slurm job ends in {self._seconds_left():.0f} s"
        if launcher_has_exited():
            # A killed launcher leaves its ranks to the init process: without this they would train on unseen.
            return f"the launcher of rank {self._rank} has exited"
        return None

    def leaves_time_for(self, save_seconds: float) -> bool:
        """Return whether a save that starts now ends before Slurm kills the job."""
        return self._seconds_left() > save_seconds

    def _seconds_left(self) -> float:
        return self._killed_at - time.time()


def handled_signals() -> list[signal.Signals]:
    """Return the signals to handle: not those that nohup or a shell's background job asks to ignore."""
    return [number for number in SIGNALS if signal.getsignal(number) != signal.SIG_IGN]
