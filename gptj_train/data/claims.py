"""Locks in the cache: which process makes which folder. A lock ends with its process, also on another host."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout


def lock_of(folder: Path) -> FileLock:
    """Return the lock of a folder that is to be made."""
    return _lock(folder.parent, folder.name)


def lock_of_host(cache: Path) -> FileLock:
    """Return the lock of this host's preparation: one process keeps all cores busy."""
    return _lock(cache, f"host-{socket.gethostname()}")


@contextmanager
def claim(folder: Path) -> Iterator[bool]:
    """Try to lock a folder for the body; yield whether that worked, or another process has it."""
    lock = lock_of(folder)
    try:
        lock.acquire(blocking=False)
    except Timeout:
        yield False
        return
    try:
        yield True
    finally:
        lock.release()


def _lock(cache: Path, name: str) -> FileLock:
    # In a folder of their own: locks stay, since removing one that another process waits for would break it.
    folder = cache / "locks"
    folder.mkdir(parents=True, exist_ok=True)
    return FileLock(folder / f"{name}.lock")
