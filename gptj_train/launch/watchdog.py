"""A watchdog for ranks that hang: it leaves their stacks on disk and ends them."""

from __future__ import annotations

import contextlib
import faulthandler
import os
import signal
import sys
import threading
import traceback
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType

from gptj_train.errors import UserError
from gptj_train.launch.preemption import Preempted
from gptj_train.launch.stacks import remove_stacks_file, remove_stacks_of_other_ranks, stacks_file

_TICK = 0.5  # seconds


class Watchdog:
    """A context manager that exits the process unless ``beat()`` is called within the limit.

    It writes the stacks of all threads to ``stacks/rank_N.txt`` in the run folder when the limit passes, and on
    SIGTERM, which launchers send to the other ranks when one fails. A crash inside the block leaves its traceback
    there. Otherwise the file is removed at the end.

    A thread counts its own ticks instead of reading the clock: a job that was suspended as a whole does not hang.
    """

    def __init__(self, output_dir: str | Path, limit: float, rank: int, ranks: int) -> None:
        """``limit`` is in seconds; 0 sets no limit. ``ranks`` is their number."""
        self._output_dir = output_dir
        self._ranks = ranks
        self._path = stacks_file(output_dir, rank)
        self._limit = limit
        self._rank = rank
        self._ticks = 0
        self._paused = False
        self._done = threading.Event()

    def beat(self) -> None:
        """Report progress."""
        self._ticks = 0

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Suspend the limit, for work whose time depends on the disk."""
        self._paused = True
        try:
            yield
        finally:
            self.beat()
            self._paused = False

    def __enter__(self) -> Watchdog:
        if self._rank == 0:
            remove_stacks_of_other_ranks(self._output_dir, self._ranks)
        # The file is opened now: a process that hangs on a dead disk could not open it later.
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._file = self._path.open("w")
        # With chain=True the SIGTERM handler registered before this one is called next.
        faulthandler.register(signal.SIGTERM, self._file, all_threads=True, chain=True)
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._done.set()
        self._thread.join()
        faulthandler.unregister(signal.SIGTERM)
        if isinstance(error, Exception) and not isinstance(error, Preempted | UserError):
            traceback.print_exception(error, file=self._file)
        else:
            remove_stacks_file(self._path)
        self._file.close()

    def _watch(self) -> None:
        while not self._done.wait(_TICK):
            if not self._paused:
                self._ticks += 1
            if 0 < self._limit < self._ticks * _TICK:
                self._end()

    def _end(self) -> None:
        faulthandler.dump_traceback(self._file, all_threads=True)
        print(
            f"error: rank {self._rank} made no progress for {self._limit:g} s (hang_timeout); "
            f"its stacks: {self._path}; ending the job",
            file=sys.stderr,
            flush=True,
        )
        # Not sys.exit: the main thread may hang in a call that never returns to Python.
        os._exit(1)
