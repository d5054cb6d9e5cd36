"""The ``stacks/`` folder of a run: a file per rank, for the stacks of one that hangs or crashes."""

from __future__ import annotations

import contextlib
from pathlib import Path


def stacks_file(output_dir: str | Path, rank: int) -> Path:
    """Return the path of a rank's file."""
    return Path(output_dir) / "stacks" / f"rank_{rank}.txt"


def remove_stacks_of_other_ranks(output_dir: str | Path, ranks: int) -> None:
    """Remove what an earlier start left for ranks that this one, on ``ranks`` ranks, does not have.

    A rank overwrites its own file when it starts. Nobody would remove the file of rank 3 of a run that is now on two.
    """
    known = {stacks_file(output_dir, rank) for rank in range(ranks)}
    for path in (Path(output_dir) / "stacks").glob("rank_*.txt"):
        if path not in known:
            # The folder stays: another rank may be about to open its file there.
            with contextlib.suppress(OSError):
                path.unlink()


def remove_stacks_file(path: Path) -> None:
    """Remove a rank's file, and the folder after the last one."""
    with contextlib.suppress(OSError):  # the disk is gone; whatever ends the run says so
        path.unlink(missing_ok=True)
        path.parent.rmdir()
