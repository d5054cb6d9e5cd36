"""Write files and folders that appear whole: written aside, flushed to disk, then renamed.

A reader, or a job that was killed at any moment, sees the old content or the new one, never half of it. A rename
alone would not do: after a power cut the new name may stand for data that never reached the disk, so everything is
flushed before it is renamed, and the folder that holds the name afterwards.
"""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

SCRATCH_PATTERN = ".*.tmp"
"""Glob pattern of what a killed process may leave: scratch files and folders, hidden beside their target."""


def write_text(path: Path, text: str) -> None:
    """Write a file, or replace it, in one step."""
    scratch = _scratch_name(path)
    try:
        with scratch.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(scratch, path)
    finally:
        # Only there if something failed before the rename.
        scratch.unlink(missing_ok=True)
    sync_folder(path.parent)


@contextmanager
def new_folder(target: Path) -> Iterator[Path]:
    """Yield a scratch folder that becomes ``target``, or replaces it, when the body ends without an exception."""
    _restore_replaced(target)
    with scratch_folder(target) as scratch:
        yield scratch
        _sync_tree(scratch)
        install_folder(scratch, target)


@contextmanager
def scratch_folder(target: Path) -> Iterator[Path]:
    """Yield an empty folder beside ``target``, on the same file system, and remove it at the end.

    Scratch folders that killed processes left for the same target are removed first: one may be as large as a model.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    for leftover in target.parent.iterdir():
        if leftover.name.startswith(f".{target.name}.") and leftover.name.endswith(".tmp"):
            shutil.rmtree(leftover, ignore_errors=True)
    scratch = _scratch_name(target)
    scratch.mkdir()
    try:
        yield scratch
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def install_folder(finished: Path, target: Path) -> None:
    """Rename a finished folder, whose files are on disk, to ``target``; an earlier ``target`` is then removed.

    No portable call swaps two folders. Between the two renames the earlier one is held as ``.NAME.old``; if the
    process dies there, ``new_folder`` restores it before it writes again.
    """
    replaced = _replaced_name(target)
    sync_folder(finished)
    if target.exists():
        # A leftover of an earlier process, which died after its second rename.
        _discard(replaced)
        target.rename(replaced)
    finished.rename(target)
    sync_folder(target.parent)
    _discard(replaced)


def install_files(finished: Path, target: Path) -> None:
    """Move the files of a finished folder into ``target``, one by one; its other files stay."""
    target.mkdir(exist_ok=True)
    _sync_tree(finished)
    for file in sorted(finished.iterdir()):
        os.replace(file, target / file.name)
    sync_folder(target)


def remove_folder(folder: Path) -> None:
    """Remove a folder, renamed first so that half of it never bears its name."""
    removed = folder.with_name(f".{folder.name}.removed")
    shutil.rmtree(removed, ignore_errors=True)
    folder.rename(removed)
    shutil.rmtree(removed)


def _discard(path: Path) -> None:
    """Remove a folder, or whatever else bears its name; errors are ignored."""
    if path.is_symlink() or (path.exists() and not path.is_dir()):
        # rmtree would open a pipe, and wait for a writer forever.
        with suppress(OSError):
            path.unlink()
    else:
        shutil.rmtree(path, ignore_errors=True)


def sync_folder(folder: Path) -> None:
    """Flush a folder's list of names to disk."""
    _sync(folder)


def _sync_tree(folder: Path) -> None:
    for path in folder.rglob("*"):
        _sync(path)
    _sync(folder)


def _sync(path: Path) -> None:
    # fsync takes any descriptor of the file or folder, also one that may only read.
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _scratch_name(target: Path) -> Path:
    # Random: a child process that outlives its killed parent may still write into the parent's scratch folder.
    return target.with_name(f".{target.name}.{secrets.token_hex(4)}.tmp")


def _replaced_name(target: Path) -> Path:
    return target.with_name(f".{target.name}.old")


def _restore_replaced(target: Path) -> None:
    """Undo the first rename of an ``install_folder`` that died before its second one."""
    replaced = _replaced_name(target)
    if replaced.exists() and not target.exists():
        replaced.rename(target)
