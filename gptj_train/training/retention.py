"""Which checkpoints of a run there are, which stay, and whether the disk has room for them."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path

import torch

from gptj_train.errors import UserError
from gptj_train.weights.manifest import KINDS, MANIFEST, Manifest


def step_folder(output_dir: str | Path, step: int) -> Path:
    """Where the checkpoint of a step is."""
    return Path(output_dir) / "checkpoints" / f"step_{step:08}"


def resumable(output_dir: str | Path, resume: str) -> list[Path]:
    """Checkpoints to resume from, newest first, of which the first that verifies counts; none: begin anew.

    ``auto`` offers all of ``output_dir``, ``never`` none, anything else is the path of one.

    Raises:
        UserError: no whole checkpoint where there should be one.
    """
    if resume == "never":
        return []
    if resume != "auto":
        if wrong := complaint(Path(resume)):
            raise UserError(
                f"resume={resume}: no complete checkpoint there; "
                f"give a checkpoints/step_... folder, or resume=auto ({wrong})"
            )
        return [Path(resume)]
    folders = _steps(Path(output_dir) / "checkpoints")[::-1]
    wrongs = [wrong for folder in folders if (wrong := complaint(folder))]
    if folders and len(wrongs) == len(folders):
        raise UserError(f"none of the checkpoints can be used: {wrongs[0]}; resume=never starts over")
    return folders


def newest_whole(run: str | Path) -> Path:
    """The newest complete checkpoint of a run, or ``run`` itself if it is one.

    Raises:
        UserError: there is none.
    """
    if (Path(run) / MANIFEST).exists():
        return Path(run)
    wrong = "there is no checkpoints/step_... in it; give the output_dir of a run, or one of its checkpoints"
    for folder in _steps(Path(run) / "checkpoints")[::-1]:
        wrong = complaint(folder)
        if not wrong:
            return folder
    raise UserError(f"{run}: {wrong}")


def complaint(folder: Path) -> str:
    """Why a checkpoint is not complete; empty for one whose files have the sizes that its manifest says."""
    try:
        Manifest.read(folder)
    except ValueError as error:
        return str(error)
    return ""


def retire(newest: Path, keep: int, keep_every: int) -> None:
    """Remove what need not stay beside a new checkpoint that is known to be good."""
    steps = _steps(newest.parent)
    complete = [folder for folder in steps if folder.name <= newest.name and not complaint(folder)]
    old = [folder for folder in complete[:-keep] if not _stays(folder, keep_every)]
    # Later steps than the newest are of a run that was given up: resume=never, or from an earlier step.
    later = [folder for folder in steps if folder.name > newest.name and not _stays(folder, keep_every)]
    for folder in old + later:
        with contextlib.suppress(OSError):
            remove(folder)


def remove(folder: Path) -> None:
    """In two steps, so that half a checkpoint never bears its name."""
    leftover = folder.with_name(f".{folder.name}.old")
    folder.rename(leftover)
    shutil.rmtree(leftover)


def check_space(
    output_dir: str | Path,
    shapes: Mapping[str, torch.Size],
    steps: range,
    save_every: int,
    keep: int,
    keep_every: int,
) -> None:
    """Before a run begins: will the disk hold its checkpoints?

    Args:
        steps: that are still to be done, from 0.

    Raises:
        UserError: it will not.
    """
    folder = Path(output_dir) / "checkpoints"
    trained = sum(shape.numel() for shape in shapes.values())
    going = [path for path in _steps(folder) if not _stays(path, keep_every)]
    size, most = disk_needed(trained, steps, save_every, keep, keep_every, len(going))
    place = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    leftover = [*going, *folder.glob(".step_*")]
    freed = sum(file.stat().st_size for path in leftover for file in path.rglob("*") if file.is_file())
    there = shutil.disk_usage(place).free + freed
    if most * size > there:
        raise UserError(
            f"{output_dir}: {most} checkpoints of {size / 1e9:.1f} GB need {most * size / 1e9:.1f} GB of disk, "
            f"{there / 1e9:.1f} GB are there; lower keep_checkpoints, raise keep_every, or give another output_dir"
        )


def disk_needed(
    trained: int, steps: range, save_every: int, keep: int, keep_every: int, there: int = 0
) -> tuple[int, int]:
    """Bytes of a checkpoint of so many trained parameters, and how many there are at most at one time.

    Args:
        steps: that are still to be done, from 0.
        there: checkpoints that are there already and will make room.
    """
    size = 4 * len(KINDS) * trained
    saves = {step for step in range(steps.start + 1, steps.stop + 1) if save_every and step % save_every == 0}
    saves |= {steps.stop} if steps else set()
    staying = {step for step in saves if keep_every and step % keep_every == 0}
    if not saves:
        return size, 0
    # While one more than ``keep`` is written the others are still there.
    return size, min(there + len(saves - staying), keep + 1) + len(staying)


def later_than(output_dir: str | Path, step: int) -> list[Path]:
    """Checkpoints of steps beyond this one."""
    return [folder for folder in _steps(Path(output_dir) / "checkpoints") if _step_of(folder) > step]


def _stays(folder: Path, keep_every: int) -> bool:
    return keep_every > 0 and _step_of(folder) % keep_every == 0


def _steps(folder: Path) -> list[Path]:
    try:
        names = os.listdir(folder)
    except FileNotFoundError:
        return []
    except OSError as error:  # not to be taken for a folder without any
        raise UserError(f"{folder} cannot be looked into: {error.strerror}") from None
    return sorted(folder / name for name in names if re.fullmatch(r"step_\d+", name))


def _step_of(folder: Path) -> int:
    return int(folder.name.removeprefix("step_"))
