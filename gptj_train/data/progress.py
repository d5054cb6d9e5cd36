"""Progress of preparing data, counted in bytes of the files read."""

from __future__ import annotations

import sys
import time
from threading import Lock

from tqdm import tqdm

_LINE_SECONDS = 10


class Progress:
    """A progress bar on a terminal; elsewhere, such as in a job's log, a line every ten seconds.

    Call it with the number of bytes read since the last call; any thread may.
    """

    def __init__(self, total: int) -> None:
        """``total``: bytes of all files."""
        self._bar = tqdm(
            total=total,
            desc="preparing data",
            unit="B",
            unit_scale=True,
            disable=not sys.stderr.isatty(),
            leave=False,
        )
        self._total = total
        self._read = 0
        self._lock = Lock()
        self._began = time.monotonic()
        self._last_line = self._began

    def __call__(self, read: int) -> None:
        with self._lock:
            self._read += read
            self._bar.update(read)
            now = time.monotonic()
            if not self._bar.disable or now - self._last_line <= _LINE_SECONDS:
                return
            self._last_line = now
            share = self._read / max(self._total, 1)
            seconds_left = (now - self._began) * (self._total / max(self._read, 1) - 1)
            size = f"{self._total / 1e9:.2f} GB"
            print(f"preparing data: {share:.0%} of {size}, {tqdm.format_interval(seconds_left)} left", flush=True)

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()
