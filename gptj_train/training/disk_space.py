"""Check before a run begins that the disk will hold its checkpoints."""

from __future__ import annotations

import math
import shutil
from collections.abc import Mapping
from pathlib import Path

import torch

from gptj_train.counted import counted
from gptj_train.errors import UserError
from gptj_train.training.retention import is_permanent, step_folders
from gptj_train.weights.manifest import KINDS


def check_space(
    output_dir: str | Path,
    shapes: Mapping[str, torch.Size],
    *,
    steps: range,
    save_every: int,
    keep: int,
    keep_every: int,
    best_every: int = 0,
) -> None:
    """Check before a run begins that the disk will hold its checkpoints.

    Args:
        shapes: of the trained parameters.
        steps: that are still to be done, counted from 0.
        best_every: steps between evaluations that may save the best; 0 for none.

    Raises:
        UserError: it will not.
    """
    folder = Path(output_dir) / "checkpoints"
    removable = [path for path in step_folders(folder) if not is_permanent(path, keep_every)]
    size, most = disk_needed(
        sum(shape.numel() for shape in shapes.values()),
        steps=steps,
        save_every=save_every,
        keep=keep,
        keep_every=keep_every,
        best_every=best_every,
        existing=len(removable),
    )
    # What the run will remove counts as free: existing checkpoints, and what killed jobs left.
    freed = sum(_size_of(path) for path in [*removable, *folder.glob(".step_*")])
    # The output folder may not exist yet: its nearest parent that does is on the same disk.
    existing_parent = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    available = shutil.disk_usage(existing_parent).free + freed
    if most * size > available:
        raise UserError(
            f"{output_dir}: {counted(most, 'checkpoint')} of {_size_text(size)} need {_size_text(most * size)} of "
            f"disk, {_size_text(available)} are there; lower keep_checkpoints, raise keep_every, or "
            "give another output_dir"
        )


def _size_text(size: int) -> str:
    """Write bytes in the largest unit of which there is at least one."""
    for unit, count in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if size >= count:
            return f"{size / count:.1f} {unit}"
    return f"{size} bytes"


def disk_needed(
    trained: int,
    *,
    steps: range,
    save_every: int,
    keep: int,
    keep_every: int,
    best_every: int = 0,
    existing: int = 0,
) -> tuple[int, int]:
    """Return the bytes of a checkpoint, and how many checkpoints are on disk at most at a time.

    Args:
        trained: number of trained parameters.
        steps: that are still to be done, counted from 0.
        best_every: steps between evaluations that may save the best; 0 for none.
        existing: checkpoints that are there already and may be removed.
    """
    size = 4 * len(KINDS) * trained
    if not steps:
        return size, 0
    # By arithmetic, since a long run has millions of steps. The end of a run is always saved.
    ends_between = not any(every and steps.stop % every == 0 for every in (save_every, best_every))
    saves = _multiples_of_either(save_every, best_every, steps) + ends_between
    permanent = 0
    if keep_every:
        # lcm with 0 is 0, which has no multiples.
        of_saves, of_best = math.lcm(save_every, keep_every), math.lcm(best_every, keep_every)
        permanent = _multiples_of_either(of_saves, of_best, steps)
        permanent += ends_between and steps.stop % keep_every == 0
    # keep + 1: the oldest is removed only after the new one has been verified. The best stays beside them.
    most = keep + 1 + (best_every > 0)
    return size, min(existing + saves - permanent, most) + permanent


def _multiples_of_either(first: int, second: int, steps: range) -> int:
    return _multiples(first, steps) + _multiples(second, steps) - _multiples(math.lcm(first, second), steps)


def _multiples(number: int, steps: range) -> int:
    """Count the multiples of a number among steps that are counted from 1; none for number 0."""
    return steps.stop // number - steps.start // number if number else 0


def _size_of(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
