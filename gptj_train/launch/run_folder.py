"""The run folder: checked before a run starts, locked while it runs, and watched for disks that disappear."""

from __future__ import annotations

import fcntl
import json
import os
import socket
import time
from pathlib import Path
from typing import TextIO

from gptj_train.errors import UserError
from gptj_train.launch.preemption import STOP_FILE

LOCK_FILE = ".lock"


class RunFolder:
    """A run's ``output_dir``. Construct it on every rank; only rank 0 locks it.

    Two runs in one folder would remove each other's checkpoints. The lock is the kernel's (fcntl): it ends with its
    process, however that ends, and works on network disks that pass fcntl locks on. The file only says who holds it.
    """

    def __init__(self, output_dir: str, rank: int) -> None:
        """Check that a run can write to this folder; nothing is written yet.

        Raises:
            UserError: it cannot; a link in its path leads nowhere; another run holds it; or it holds a stop file,
                since a scheduler would restart a stopped run forever.
        """
        self._path = Path(output_dir)
        self._is_first_rank = rank == 0
        self._lock: TextIO | None = None
        self._identity: tuple[int, int] | None = None
        self._checkpoints_device: int | None = None
        check_run_folder(output_dir)
        if self._path.is_dir():
            self._acquire()

    def create(self) -> None:
        """Make the folder, lock it, and remember which one it is.

        Raises:
            UserError: another run holds it.
        """
        if not self._is_first_rank:
            return
        self._path.mkdir(parents=True, exist_ok=True)
        self._acquire()
        self._identity = _identity(self._path)
        self.is_same()  # notes the checkpoints' disk

    def is_same(self) -> bool:
        """Return whether the path still leads to the folder that ``create`` locked; True on other ranks than 0.

        So must the checkpoints' disk, which may be another one: once it is gone, its mount point is an empty folder.
        """
        if self._identity is None:
            return True
        return _identity(self._path) == self._identity and self._has_checkpoints_disk()

    def _has_checkpoints_disk(self) -> bool:
        checkpoints = self._path / "checkpoints"
        device = (_identity(checkpoints) or (None, None))[0]
        if device is None and not checkpoints.is_symlink():
            return True  # not there yet, or removed by the user: the next save makes it
        if self._checkpoints_device is None:
            self._checkpoints_device = device
        return device is not None and device == self._checkpoints_device

    def _acquire(self) -> None:
        if self._lock is not None or not self._is_first_rank:
            return
        path = self._path / LOCK_FILE
        if os.path.lexists(path) and (path.is_symlink() or not path.is_file()):
            raise UserError(f"{path} is not an ordinary file; remove it")
        # Not "w": the content belongs to the holder until the lock is ours. O_NONBLOCK: a pipe of this name must not
        # block.
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK, 0o644)
        file = os.fdopen(descriptor, "r+")
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            holder = _holder(file)
            file.close()
            raise UserError(
                f"output_dir={self._path} is in use by another run ({holder}); wait for it, end it, or give another "
                "output_dir"
            ) from None
        except OSError:
            # A disk without locks: the run is as safe as it was before there were any.
            file.close()
            return
        file.truncate(0)
        started = time.strftime("%Y-%m-%d %H:%M:%S")
        file.write(json.dumps({"host": socket.gethostname(), "pid": os.getpid(), "started": started}) + "\n")
        file.flush()
        self._lock = file


def _holder(file: TextIO) -> str:
    try:
        holder = json.loads(file.read(1000))
        return f"process {holder['pid']} on {holder['host']}, since {holder['started']}"
    except (ValueError, KeyError, TypeError):
        return "it has not written its name yet"


def _identity(path: Path) -> tuple[int, int] | None:
    try:
        status = path.stat()
    except OSError:
        return None
    # The device too: a disk that is mounted again, or not at all, is another place.
    return status.st_dev, status.st_ino


def check_run_folder(output_dir: str) -> None:
    """Check that a run can write to this folder, without writing anything.

    Raises:
        UserError: as ``RunFolder``.
    """
    folder = Path(output_dir)
    try:
        # A link to a disk that is not mounted looks like an empty place: the run would start over, and save nothing.
        for path in (folder / "checkpoints", folder, *folder.absolute().parents):
            if path.is_symlink() and not path.exists():
                raise UserError(f"{path} is a link to {os.readlink(path)}, which does not exist; is its disk mounted?")
        if (folder / STOP_FILE).exists():
            raise UserError(f"{folder / STOP_FILE} stops this run; remove it to resume")
        checkpoints = folder / "checkpoints"
        if checkpoints.exists() and not os.access(checkpoints, os.R_OK | os.W_OK | os.X_OK):
            raise UserError(f"{checkpoints} cannot be read and written; correct its permissions")
        # The folder may not exist yet: what counts is the nearest parent that does.
        existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
        usable = bool(output_dir.strip()) and existing.is_dir() and os.access(existing, os.W_OK | os.X_OK)
    except OSError as error:
        raise UserError(f"output_dir={output_dir[:100]}: {error.strerror}") from None
    if not usable:
        raise UserError(f"output_dir={output_dir}: not a writable folder; give another one")
