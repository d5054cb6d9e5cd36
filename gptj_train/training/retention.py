"""Find a run's checkpoints, and remove the old ones."""

from __future__ import annotations

import contextlib
import itertools
import os
import re
from collections.abc import Iterator
from pathlib import Path

from gptj_train.atomic_write import remove_folder
from gptj_train.errors import UserError
from gptj_train.near_name import near_name
from gptj_train.weights.manifest import MANIFEST, Manifest


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
                f"resume={resume}: {near_name(resume)}no complete checkpoint there; "
                f"give a checkpoints/step_... folder, or resume=auto ({reason})"
            )
        return [Path(resume)]
    newest_first = step_folders(Path(output_dir) / "checkpoints")[::-1]
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
    for folder in step_folders(Path(run) / "checkpoints")[::-1]:
        reason = why_incomplete(folder)
        if not reason:
            return folder
    raise UserError(f"{run}: {near_name(run)}{reason}")


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
    return next(_good_ones(output_dir), None)


def _good_ones(output_dir: str | Path) -> Iterator[Path]:
    """Yield the good checkpoints of a run, newest first."""
    for folder in step_folders(Path(output_dir) / "checkpoints")[::-1]:
        if _is_good(folder):
            yield folder


def way_back(output_dir: str | Path, suspect: int | None = None) -> str:
    """Return the advice that leads a run with non-finite numbers back to its last good checkpoint.

    Args:
        suspect: step whose finite weights gave the first non-finite loss: an earlier checkpoint is preferred.
    """
    earlier = (folder for folder in _good_ones(output_dir) if suspect is None or _step_of(folder) < suspect)
    folder = next(earlier, None) or last_good(output_dir)
    if folder is None:
        return "no checkpoint is good; resume=never starts over"
    return f"the last good checkpoint is of step {_step_of(folder)}: rerun the same command with resume={folder}"


def later_than(output_dir: str | Path, step: int) -> list[Path]:
    """Return the checkpoints of later steps, oldest first."""
    return [folder for folder in step_folders(Path(output_dir) / "checkpoints") if _step_of(folder) > step]


# --- remove ---


def prune(newest: Path, keep: int, keep_every: int, best_step: int = -1) -> None:
    """Remove the checkpoints that need not stay beside a new one, which has been verified.

    A checkpoint whose last step was skipped removes no good one: its weights may have exploded.

    Args:
        keep: newest checkpoints that stay.
        keep_every: checkpoints of every so many steps stay as well; 0 for none.
        best_step: step of the best evaluation, whose checkpoint stays; -1 for none.
    """
    folders = step_folders(newest.parent)
    # Only complete ones count: a damaged checkpoint must not push out a good one.
    complete = [folder for folder in folders if folder.name <= newest.name and not why_incomplete(folder)]
    good = [folder for folder in complete if _is_good(folder)]
    removable = [folder for folder in complete if folder not in good and folder != newest]
    if newest in good:
        removable += good[:-keep]
        # Later steps than the newest belong to a run that was given up: resume=never, or from an earlier step. None may
        # keep its name, by which resume=auto would take it for the newest.
        for folder in folders:
            if folder.name > newest.name:
                _set_aside_or_remove(folder, keep_every)
    for folder in removable:
        if not is_permanent(folder, keep_every) and _step_of(folder) != best_step:
            # A folder that cannot be removed costs disk space; it is no reason to end the run.
            with contextlib.suppress(OSError):
                remove_folder(folder)


def _set_aside_or_remove(folder: Path, keep_every: int) -> None:
    """Remove a checkpoint of an abandoned run, or rename one that ``keep_every`` keeps."""
    with contextlib.suppress(OSError):
        if not is_permanent(folder, keep_every):
            remove_folder(folder)
            return
        names = (folder.with_name(f"abandoned_{number}_{folder.name}") for number in itertools.count(1))
        folder.rename(next(name for name in names if not name.exists()))


# --- step folders ---


def is_permanent(folder: Path, keep_every: int) -> bool:
    return keep_every > 0 and _step_of(folder) % keep_every == 0


def step_folders(checkpoints: Path) -> list[Path]:
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
