"""Compile DeepSpeed's extensions: one process at a time, with progress, and never behind the lock of a dead process.

torch marks a build by a file named ``lock``, which a killed process leaves behind: every later start would wait for it
without end and without a word. Here a build runs under the kernel's lock (fcntl), which ends with its process.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TextIO

import psutil

_LOCK_FILE = ".gptj_train.lock"
_TORCH_LOCK_FILE = "lock"
_POLL = 0.5  # seconds
_SAYS_EVERY = 10.0  # seconds
# Seconds. On a disk without locks only age tells: an extension takes about a minute on a free core.
_LONGEST_COMPILATION = 1800


def compile_under_lock(builder: Any, folder_of: Callable[[str], Path] | None = None) -> None:
    """Make a class of builders, DeepSpeed's ``OpBuilder``, compile and load under our lock; once per process.

    Args:
        folder_of: returns the build folder of an extension by its name; None asks torch.
    """
    compile_and_load = builder.jit_load
    if hasattr(compile_and_load, "__wrapped__"):
        return

    @functools.wraps(compile_and_load)
    def jit_load(self: Any, *args: Any, **more: Any) -> Any:
        folder = (folder_of or _torch_folder)(self.name)
        with alone_in(folder, self.name), _progress(f"compiling DeepSpeed's {self.name}"):
            if not any(folder.glob("*.so")):
                _say(f"Compiling DeepSpeed's {self.name}; once per installation, about a minute ...")
            return compile_and_load(self, *args, **more)

    builder.jit_load = jit_load


def _torch_folder(extension: str) -> Path:
    # Here: it imports torch. It is torch's own choice, for which there is no public name, and makes the folder.
    from torch.utils.cpp_extension import _get_build_directory

    return Path(_get_build_directory(extension, verbose=False))


@contextlib.contextmanager
def alone_in(folder: Path, extension: str) -> Iterator[None]:
    """Hold the lock of a build folder; while another process holds it, wait and say so."""
    with open(folder / _LOCK_FILE, "a+") as file:
        try:
            with _progress(f"waiting for DeepSpeed's {extension}", lambda: _owner(file)):
                while not _acquire(file):
                    time.sleep(_POLL)
        except OSError:  # a disk without locks
            _remove_old_lock(folder / _TORCH_LOCK_FILE)
            yield
            return
        file.truncate(0)
        file.write(json.dumps({"host": socket.gethostname(), "pid": os.getpid()}) + "\n")
        file.flush()
        # The compilers of a killed process still write into the folder, and a program without our lock may build there.
        # Both leave torch's lock: without it there is no need to look through the processes.
        torch_lock = folder / _TORCH_LOCK_FILE
        with _progress(f"waiting for DeepSpeed's {extension}", lambda: _other_build(folder)):
            while torch_lock.exists() and _user_of(folder) is not None:
                time.sleep(_POLL)
        torch_lock.unlink(missing_ok=True)
        yield


def _acquire(file: TextIO) -> bool:
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        return False
    return True


def _owner(file: TextIO) -> str:
    file.seek(0)
    try:
        owner = json.loads(file.read(1000))
        return f"process {owner['pid']} on {owner['host']} compiles it"
    except (ValueError, KeyError, TypeError):
        return "another process compiles it"


def _other_build(folder: Path) -> str:
    # Whoever waits for long must be able to end it: a shell that was left in the folder looks like a compiler.
    user = _user_of(folder)
    return f"another build in {folder}" + (f": {user}" if user is not None else "")


def _user_of(folder: Path) -> str | None:
    """Return the name and the number of a process that works in the folder or holds torch's lock; on this host."""
    lock = str((folder / _TORCH_LOCK_FILE).resolve())
    for process in psutil.process_iter():
        # A process that ends meanwhile, or is another user's, does not build here.
        with contextlib.suppress(psutil.Error, OSError):
            if process.pid == os.getpid():
                continue
            is_compiler = process.cwd() == str(folder.resolve()) and process.status() != psutil.STATUS_ZOMBIE
            if is_compiler or any(file.path == lock for file in process.open_files()):
                return f"{process.name()}, process {process.pid}"
    return None


def _remove_old_lock(lock: Path) -> None:
    with contextlib.suppress(OSError):  # another rank was faster
        if time.time() - lock.stat().st_mtime > _LONGEST_COMPILATION:
            lock.unlink()


@contextlib.contextmanager
def _progress(what: str, detail: Callable[[], str] | None = None) -> Iterator[None]:
    """Say every few seconds what goes on, while the body runs."""
    done = threading.Event()
    began = time.monotonic()

    def report() -> None:
        while not done.wait(_SAYS_EVERY):
            reason = f" ({detail()})" if detail is not None else ""
            _say(f"{what}{reason} ... {time.monotonic() - began:.0f} s")

    thread = threading.Thread(target=report, name="compilation progress", daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def _say(line: str) -> None:
    # The real stdout: while DeepSpeed builds its engine, sys.stdout collects what DeepSpeed prints.
    if os.environ.get("LOCAL_RANK", "0") == "0" and sys.__stdout__ is not None:
        print(line, file=sys.__stdout__, flush=True)
