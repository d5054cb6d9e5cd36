"""A rank that makes no progress ends itself, and leaves on disk where it was stuck."""

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

from gptj_train.launch.preemption import Preempted

_TICK = 0.5  # seconds


class Watchdog:
    """Wants to hear a ``beat`` every ``limit`` seconds while in its ``with`` block, from a thread of its own.

    The stacks of all threads go to ``stacks/rank_N.txt`` in the run folder: when the limit is over, and when
    SIGTERM comes, with which launchers end the ranks beside one that failed. So does an error that ends the
    block. After an orderly end the file is gone.

    It counts its own ticks and not the clock: a job that was suspended as a whole is not hung.
    """

    def __init__(self, output_dir: str | Path, limit: float, rank: int) -> None:
        """A ``limit`` of 0 waits without end."""
        self._path = Path(output_dir) / "stacks" / f"rank_{rank}.txt"
        self._limit, self._rank = limit, rank
        self._ticks = 0
        self._paused = False
        self._done = threading.Event()

    def beat(self) -> None:
        """There was progress."""
        self._ticks = 0

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """No limit inside, for what takes as long as it takes."""
        self._paused = True
        try:
            yield
        finally:
            self.beat()
            self._paused = False

    def __enter__(self) -> Watchdog:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._file = self._path.open("w")
        # After the handlers of signals, which it goes on to call.
        faulthandler.register(signal.SIGTERM, self._file, all_threads=True, chain=True)
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._done.set()
        self._thread.join()
        faulthandler.unregister(signal.SIGTERM)
        if isinstance(error, Exception) and not isinstance(error, Preempted | ValueError):
            traceback.print_exception(error, file=self._file)
        else:
            self._path.unlink(missing_ok=True)
            with contextlib.suppress(OSError):  # another rank's file is still there
                self._path.parent.rmdir()
        self._file.close()

    def _watch(self) -> None:
        while not self._done.wait(_TICK):
            self._ticks += not self._paused
            if 0 < self._limit < self._ticks * _TICK:
                self._end()

    def _end(self) -> None:
        faulthandler.dump_traceback(self._file, all_threads=True)
        print(
            f"error: rank {self._rank} made no progress for {self._limit:g} s (hang_timeout); "
            f"where it was: {self._path}; ending the job",
            file=sys.stderr,
            flush=True,
        )
        os._exit(1)
