"""Resumable training state: written aside, renamed when whole, verified down to the last byte before use."""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from gptj_train.errors import UserError
from gptj_train.training.deepspeed_internals import Section
from gptj_train.training.engine import Engine
from gptj_train.training.model_files import ModelFiles
from gptj_train.training.retention import remove, retire, step_folder
from gptj_train.weights.manifest import KINDS, Manifest, state_file
from gptj_train.weights.slices import SliceReader, SliceWriter, Written

T = TypeVar("T")


class SaveFailedError(UserError):
    """A checkpoint could not be written; those before it are as they were."""


@dataclass
class TrainState:
    """What a run is besides its tensors.

    Optimizer steps done and target tokens seen; ``skipped`` steps had numbers that are not finite and changed no
    weight; ``evaluated`` is the step whose evaluation came last. As of the last save: a hash of the batch that comes
    next, the settings, and the id of the W&B run. Random numbers are a function of seed, step and rank.
    """

    step: int = 0
    tokens: int = 0
    skipped: int = 0
    skipped_in_a_row: int = 0
    evaluated: int = -1
    next_batch: str = ""
    settings: dict[str, Any] = field(default_factory=dict)
    wandb_id: str | None = None


class Checkpoints:
    """``checkpoints/step_00000100`` folders; the newest ``keep`` stay, and those of every ``keep_every``-th step.

    A folder holds fp32 master weights and AdamW's moments by parameter name and slice, a file of each kind from
    each rank, for any number of ranks to read; beside them config and tokenizer. Its manifest alone makes it count.
    """

    def __init__(self, output_dir: str | Path, keep: int, keep_every: int, model_files: ModelFiles) -> None:
        self._output_dir, self._keep, self._keep_every = output_dir, keep, keep_every
        self._model_files = model_files

    def save(self, engine: Engine, state: TrainState) -> Path:
        """Collective. The folder gets its name once every rank's part is on disk; old ones go once it verifies.

        Raises:
            SaveFailedError: on all ranks, when one could not write; what was written is gone again.
        """
        target = step_folder(self._output_dir, state.step)
        scratch = target.with_name(f".{target.name}.tmp")
        try:
            _together(engine, target, lambda: _make_room(scratch) if engine.rank == 0 else None)
            parts = _together(engine, target, lambda: _write_part(engine, scratch))
            files = {name: written for part in parts for name, written in part.items()}
            _together(engine, target, lambda: self._commit(engine, state, files, target) if engine.rank == 0 else None)
            if damage := _damage(engine, target):
                if engine.rank == 0:
                    with contextlib.suppress(OSError):
                        remove(target)
                raise SaveFailedError(f"{damage}, just after it was written")
        except SaveFailedError:
            if engine.rank == 0:
                shutil.rmtree(scratch, ignore_errors=True)
            raise
        if engine.rank == 0:
            retire(target, self._keep, self._keep_every)
        engine.wait()
        return target

    def _commit(self, engine: Engine, state: TrainState, files: dict[str, Written], target: Path) -> None:
        scratch = target.with_name(f".{target.name}.tmp")
        self._model_files.save(scratch, torch.float32)
        files |= {path.name: _made_durable(path) for path in scratch.iterdir() if path.name not in files}
        Manifest(
            state=asdict(state),
            optimizer=engine.optimizer_state().counters(),
            world_size=engine.world_size,
            parameters={name: list(shape) for name, shape in engine.trained.items()},
            files=files,
            version=version("gptj_train"),
        ).write(scratch)
        _sync_folder(scratch)
        if target.exists():  # damaged, or of a run that was given up
            remove(target)
        scratch.rename(target)
        _sync_folder(target.parent)


def _make_room(scratch: Path) -> None:
    scratch.parent.mkdir(parents=True, exist_ok=True)
    for leftover in scratch.parent.glob(".step_*"):  # of a job that was killed
        shutil.rmtree(leftover)
    scratch.mkdir()
    _sync_folder(scratch.parent.parent)


def _write_part(engine: Engine, scratch: Path) -> dict[str, Written]:
    """This rank's files, durable; the kinds side by side, since hashing takes longer than writing."""
    state = engine.optimizer_state()
    shares = [list(section.share(engine.rank, engine.world_size)) for section in state.sections]
    slices = [piece for share in shares for piece, _ in share]
    names = {kind: state_file(kind, engine.rank, engine.world_size) for kind in KINDS}
    with contextlib.ExitStack() as stack:
        writers = {kind: stack.enter_context(SliceWriter(scratch / name, slices)) for kind, name in names.items()}
        threads = stack.enter_context(ThreadPoolExecutor(len(KINDS)))
        for section, share in zip(state.sections, shares, strict=True):
            with section.buffers() as buffers:
                done, _ = wait([threads.submit(_write, writers[kind], buffers[kind], share) for kind in KINDS])
                for future in done:
                    future.result()
        finished = threads.map(SliceWriter.finish, writers.values())
        written = dict(zip(names.values(), finished, strict=True))
    _sync_folder(scratch)
    return written


def _write(writer: SliceWriter, buffer: Tensor, share: list[tuple[Any, int]]) -> None:
    for piece, offset in share:
        writer.add(buffer.narrow(0, offset, piece.numel))


def load(engine: Engine, folders: list[Path], note: Callable[[str], None]) -> TrainState:
    """Restore the engine from the first of some checkpoints that is whole. Collective.

    Whatever number of ranks, ZeRO stage and place of offload wrote it.

    Args:
        note: takes a line for the user.

    Raises:
        UserError: none of them is whole, or it is of another model.
    """
    (folders, *_) = engine.gathered([folders])
    for folder, next_best in zip(folders, [*folders[1:], None], strict=True):
        damage = _damage(engine, folder)
        if not damage:
            break
        if next_best is None:
            raise UserError(f"cannot resume: {damage}; resume=never starts over")
        note(f"{damage}; trying {next_best.name}")
    manifest = Manifest.read(folder)
    shapes = {name: list(shape) for name, shape in engine.trained.items()}
    if manifest.parameters != shapes:
        other = min(name for name in shapes | manifest.parameters if shapes.get(name) != manifest.parameters.get(name))
        raise UserError(f"{folder} is of another model: {other} differs; give another output_dir")
    state = engine.optimizer_state()
    with contextlib.ExitStack() as stack:
        readers = {
            kind: stack.enter_context(SliceReader(folder / file for file in manifest.of_kind(kind))) for kind in KINDS
        }
        stack.enter_context(state.changing())
        for section in state.sections:
            _fill(section, readers)
    state.set_counters(manifest.optimizer)
    note(f"resuming from {folder}")
    return TrainState(**manifest.state)


def _fill(section: Section, readers: dict[str, SliceReader]) -> None:
    with section.buffers(changing=True) as buffers:
        for (name, start, numel), offset in zip(section.slices, section.offsets, strict=True):
            for kind, reader in readers.items():
                reader.read(name, start, buffers[kind].narrow(0, offset, numel))


def _together(engine: Engine, folder: Path, work: Callable[[], T]) -> list[T]:
    """What ``work`` returns on each rank; where it fails on one, SaveFailedError is raised on all."""
    outcome: tuple[Any, str]
    try:
        outcome = work(), ""
    except (OSError, ValueError) as error:
        reason = (isinstance(error, OSError) and error.strerror) or error
        outcome = None, f"{folder}: {reason}"
    outcomes = engine.gathered([outcome])
    if failures := [failure for _, failure in outcomes if failure]:
        raise SaveFailedError(failures[0])
    return [result for result, _ in outcomes]


def _damage(engine: Engine, folder: Path) -> str:
    """What is wrong with a checkpoint, empty if nothing. Each file is read once, by a rank that did not write it."""
    try:
        manifest = Manifest.read(folder)
        of_kinds = [manifest.of_kind(kind) for kind in KINDS]
        mine = [
            file for files in of_kinds for file in files[(engine.rank - 1) % engine.world_size :: engine.world_size]
        ]
        if engine.rank == 0:
            mine += manifest.files.keys() - {file for files in of_kinds for file in files}
        found = manifest.damage(folder, mine)
    except ValueError as error:
        found = [str(error)]
    return next(iter(engine.gathered(found)), "")


def _made_durable(path: Path) -> Written:
    with path.open("rb") as file:
        os.fsync(file.fileno())
        return Written(path.stat().st_size, hashlib.file_digest(file, "sha256").hexdigest())


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
