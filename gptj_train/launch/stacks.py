"""The ``stacks/`` folder of a run: a file per rank, for the stacks of one that hangs or crashes."""

from __future__ import annotations

import contextlib
from pathlib import Path


def stacks_file(output_dir: str | Path, rank: int) -> Path:
    """Return the path of a rank's file."""
    return Path(output_dir) / "stacks" / f"rank_{rank}.txt"


def remove_stacks_file(path: Path) -> None:
    """Remove a rank's file, and the folder after the last one."""
    with contextlib.suppress(OSError):  # the disk is gone; whatever ends the run says so
        path.unlink(missing_ok=True)
        path.parent.rmdir()
