"""Find a run's checkpoints, remove the old ones, and check the disk for room."""

from __future__ import annotations

import contextlib
import math
import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path

import torch

from gptj_train.atomic_write import remove_folder
from gptj_train.counted import counted
from gptj_train.errors import UserError
from gptj_train.weights.manifest import KINDS, MANIFEST, Manifest


def step_folder(output_dir: str | Path, step: int) -> Path:
    """Return the folder of a step's checkpoint."""
    return Path(output_dir) / "checkpoints" / f"step_{step:08}"


# --- find ---


def resume_candidates(output_dir: str | Path, resume: str) -> list[Path]:
    """Return checkpoints to resume from, newest first; the first that verifies will be used, none starts a new run.

    Args:
        resume: "auto" returns all checkpoints of ``output_dir``, "never" none; anything else is the path of one.

    Raises:
        UserError: no complete checkpoint at the path, or none of those in ``output_dir`` is complete.
    """
    if resume == "never":
        return []
    if resume != "auto":
        reason = why_incomplete(Path(resume))
        if reason:
            raise UserError(
                f"resume={resume}: no complete checkpoint there; "
                f"give a checkpoints/step_... folder, or resume=auto ({reason})"
            )
        return [Path(resume)]
    newest_first = _step_folders(Path(output_dir) / "checkpoints")[::-1]
    reasons = [why_incomplete(folder) for folder in newest_first]
    # Starting over by itself would overwrite what may yet be rescued: only the user may decide that.
    if newest_first and all(reasons):
        raise UserError(f"none of the checkpoints can be used: {reasons[0]}; resume=never starts over")
    # Incomplete ones stay in the list: whoever loads them says why each was passed over.
    return newest_first


def newest_complete(run: str | Path) -> Path:
    """Return the newest complete checkpoint of a run, or ``run`` itself if it is one.

    Raises:
        UserError: there is none.
    """
    if (Path(run) / MANIFEST).exists():
        return Path(run)
    reason = "there is no checkpoints/step_... in it; give the output_dir of a run, or one of its checkpoints"
    for folder in _step_folders(Path(run) / "checkpoints")[::-1]:
        reason = why_incomplete(folder)
        if not reason:
            return folder
    raise UserError(f"{run}: {reason}")


def best_complete(run: str | Path) -> Path:
    """Return the checkpoint of a run's best evaluation, or the newest one if it has no evaluation.

    Raises:
        UserError: there is none, or it is damaged.
    """
    newest = newest_complete(run)
    best_step = Manifest.read(newest).state.get("best_step", -1)
    if best_step < 0 or newest == Path(run):
        return newest
    best = step_folder(run, best_step)
    reason = why_incomplete(best)
    if reason:
        raise UserError(f"the best checkpoint cannot be used: {reason}; name another one: {newest}")
    return best


def why_incomplete(folder: Path) -> str:
    """Return why a checkpoint is incomplete; empty if all files have the sizes in its manifest."""
    try:
        Manifest.read(folder)
    except (OSError, ValueError) as error:
        return str(error)
    return ""


def _is_good(folder: Path) -> bool:
    try:
        return bool(Manifest.read(folder).state.get("skipped_in_a_row", 0) == 0)
    except (OSError, ValueError):
        return False


def last_good(output_dir: str | Path) -> Path | None:
    """Return the newest good checkpoint of a run, or None: complete, and its last step was not skipped."""
    for folder in _step_folders(Path(output_dir) / "checkpoints")[::-1]:
        if _is_good(folder):
            return folder
    return None


def way_back(output_dir: str | Path) -> str:
    """Return the advice that leads a run with non-finite numbers back to its last good checkpoint."""
    folder = last_good(output_dir)
    if folder is None:
        return "no checkpoint is good; resume=never starts over"
    return f"the last good checkpoint is of step {_step_of(folder)}: rerun the same command with resume={folder}"


def later_than(output_dir: str | Path, step: int) -> list[Path]:
    """Return the checkpoints of later steps, oldest first."""
    return [folder for folder in _step_folders(Path(output_dir) / "checkpoints") if _step_of(folder) > step]


# --- remove ---


def prune(newest: Path, keep: int, keep_every: int, best_step: int = -1) -> None:
    """Remove the checkpoints that need not stay beside a new one, which has been verified.

    A checkpoint whose last step was skipped removes no good one: its weights may have exploded.

    Args:
        keep: newest checkpoints that stay.
        keep_every: checkpoints of every so many steps stay as well; 0 for none.
        best_step: step of the best evaluation, whose checkpoint stays; -1 for none.
    """
    folders = _step_folders(newest.parent)
    # Only complete ones count: a damaged checkpoint must not push out a good one.
    complete = [folder for folder in folders if folder.name <= newest.name and not why_incomplete(folder)]
    good = [folder for folder in complete if _is_good(folder)]
    removable = [folder for folder in complete if folder not in good and folder != newest]
    if newest in good:
        removable += good[:-keep]
        # Later steps than the newest belong to a run that was given up: resume=never, or from an earlier step.
        removable += [folder for folder in folders if folder.name > newest.name]
    for folder in removable:
        if not _is_permanent(folder, keep_every) and _step_of(folder) != best_step:
            # A folder that cannot be removed costs disk space; it is no reason to end the run.
            with contextlib.suppress(OSError):
                remove_folder(folder)


# --- disk space ---


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
    removable = [path for path in _step_folders(folder) if not _is_permanent(path, keep_every)]
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
            f"{output_dir}: {counted(most, 'checkpoint')} of {size / 1e9:.1f} GB need {most * size / 1e9:.1f} GB of "
            f"disk, {available / 1e9:.1f} GB are there; lower keep_checkpoints, raise keep_every, or "
            "give another output_dir"
        )


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


# --- step folders ---


def _is_permanent(folder: Path, keep_every: int) -> bool:
    return keep_every > 0 and _step_of(folder) % keep_every == 0


def _step_folders(checkpoints: Path) -> list[Path]:
    """Return the step folders, oldest first, complete or not."""
    try:
        names = os.listdir(checkpoints)
    except FileNotFoundError:
        return []
    except OSError as error:
        # Taken for an empty folder, it would make the run start over.
        raise UserError(f"{checkpoints} cannot be read: {error.strerror}") from None
    # A file or pipe of such a name is no checkpoint. A folder that may not be read is one: it is reported later.
    folders = [checkpoints / name for name in names if re.fullmatch(r"step_\d+", name)]
    # Steps are padded to eight digits, so that the order of names is that of steps.
    return sorted(folder for folder in folders if folder.is_dir())


def _step_of(folder: Path) -> int:
    return int(folder.name.removeprefix("step_"))
