"""Tell what a file is that should hold weights, a tokenizer or data, and is the trace of a download instead."""

from __future__ import annotations

from pathlib import Path

LFS_POINTER = b"version https://git-lfs"
"""The first bytes of the small file that stands for a large one in a Git LFS repository."""


def what_it_is(head: bytes) -> str | None:
    """Return what the first bytes of a file say it is, and what to do; None if they say nothing."""
    start = head.lstrip()[:200].lower()
    if head.startswith(LFS_POINTER):
        return (
            "a Git LFS pointer, not the file itself; run 'git lfs pull' in its repository, or download the file again"
        )
    if start.startswith((b"<!doctype html", b"<html")):
        return "an HTML page, such as a login or error page, not the file itself; download the file again"
    if not head:
        return "an empty file; download it again"
    return None


def failed_download(path: Path) -> str | None:
    """Return ``what_it_is`` of a file; None as well if it cannot be opened: who reads it then says why."""
    try:
        with path.open("rb") as file:
            return what_it_is(file.read(1024))
    except OSError:
        return None
