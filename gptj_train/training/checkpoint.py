"""Save and load resumable training state: written aside, renamed when complete, verified byte by byte before use."""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from gptj_train.atomic_write import install_folder, remove_folder, sync_folder
from gptj_train.errors import UserError
from gptj_train.training.deepspeed_internals import Section
from gptj_train.training.engine import Engine
from gptj_train.training.model_files import ModelFiles
from gptj_train.training.retention import prune, step_folder
from gptj_train.training.state import TrainState
from gptj_train.weights.manifest import KINDS, Manifest, state_file
from gptj_train.weights.safetensors_file import Written
from gptj_train.weights.slices import Slice, SliceReader, SliceWriter

T = TypeVar("T")


class SaveFailedError(UserError):
    """A checkpoint could not be written; earlier ones are unchanged."""


class Checkpoints:
    """A run's ``checkpoints/step_00000100`` folders.

    Each holds fp32 master weights and AdamW's moments by parameter name and slice, one file of each kind per rank, for
    any number of ranks to read; beside them config and tokenizer. A folder without a valid manifest does not count.

    Args:
        keep: newest checkpoints that stay.
        keep_every: checkpoints of every so many steps stay as well; 0 for none.
    """

    def __init__(self, output_dir: str | Path, *, keep: int, keep_every: int, model_files: ModelFiles) -> None:
        self._output_dir, self._keep, self._keep_every = output_dir, keep, keep_every
        self._model_files = model_files
        self.has_saved = False
        """Whether this process has written a checkpoint."""

    def save(self, engine: Engine, state: TrainState) -> Path:
        """Write a checkpoint and remove old ones. Collective.

        The folder gets its name after every rank's part is on disk; old ones go after the new one has been verified.

        Raises:
            SaveFailedError: on all ranks, when one could not write; what was written is removed.
        """
        target = step_folder(self._output_dir, state.step)
        scratch = target.with_name(f".{target.name}.tmp")  # without a random part: all ranks write into it
        first_rank = engine.rank == 0

        def make_scratch() -> None:
            if first_rank:
                _make_scratch(scratch)

        def write_part() -> dict[str, Written]:
            return _write_part(engine, scratch)

        def commit() -> None:
            if first_rank:
                self._commit(engine, state, files, scratch=scratch, target=target)

        try:
            _all_or_none(engine, target, make_scratch)
            files: dict[str, Written] = {}
            for part in _all_or_none(engine, target, write_part):
                files |= part
            _all_or_none(engine, target, commit)
            # Read again: a disk may take bytes and lose them, and the old checkpoints are about to go.
            damage = _find_damage(engine, target)
            if damage:
                if first_rank:
                    with contextlib.suppress(OSError):
                        remove_folder(target)
                raise SaveFailedError(f"{damage}, just after it was written")
        except SaveFailedError:
            if first_rank:
                shutil.rmtree(scratch, ignore_errors=True)
            raise
        if first_rank:
            prune(target, self._keep, self._keep_every, state.best_step)
        # No rank may train on, and perhaps save again, while rank 0 removes folders.
        engine.wait()
        self.has_saved = True
        return target

    def _commit(
        self, engine: Engine, state: TrainState, files: dict[str, Written], *, scratch: Path, target: Path
    ) -> None:
        """Add the model files and the manifest, and rename the folder. On rank 0 only."""
        self._model_files.save(scratch, torch.float32)
        for path in scratch.iterdir():
            if path.name not in files:
                files[path.name] = _sync_and_hash(path)
        manifest = Manifest(
            state=asdict(state),
            optimizer=engine.optimizer_state().counters(),
            world_size=engine.world_size,
            parameters={name: list(shape) for name, shape in engine.trained.items()},
            files=files,
            version=version("gptj_train"),
        )
        # After all other files: a manifest must not vouch for what is not on disk.
        manifest.write(scratch)
        # A folder of this name is damaged, or of a run that was given up.
        install_folder(scratch, target)


def _make_scratch(scratch: Path) -> None:
    scratch.parent.mkdir(parents=True, exist_ok=True)
    for leftover in scratch.parent.glob(".step_*"):  # of a job that was killed
        if leftover.is_dir() and not leftover.is_symlink():
            shutil.rmtree(leftover)
        else:
            leftover.unlink()  # a file or pipe that had a step's name
    scratch.mkdir()
    # "checkpoints" may be new: its own name must be on disk too.
    sync_folder(scratch.parent.parent)


def _write_part(engine: Engine, scratch: Path) -> dict[str, Written]:
    """Write this rank's files and flush them to disk; return file name -> size and hash."""
    state = engine.optimizer_state()
    shares = [list(section.share(engine.rank, engine.world_size)) for section in state.sections]
    slices = [piece for share in shares for piece, _ in share]
    files = {kind: state_file(kind, engine.rank, engine.world_size) for kind in KINDS}
    with contextlib.ExitStack() as stack:
        writers = {kind: stack.enter_context(SliceWriter(scratch / file, slices)) for kind, file in files.items()}
        # A thread per kind: hashing takes longer than writing, and releases the GIL.
        threads = stack.enter_context(ThreadPoolExecutor(len(KINDS)))

        # Section by section: with NVMe offload only one is in memory at a time.
        for section, share in zip(state.sections, shares, strict=True):
            with section.buffers() as buffers:
                writing = [threads.submit(_add_slices, writers[kind], buffers[kind], share) for kind in KINDS]
                # All of them, before an error may close the buffers under a thread that still reads.
                wait(writing)
                for future in writing:
                    future.result()
        written = dict(zip(files.values(), threads.map(SliceWriter.finish, writers.values()), strict=True))
    sync_folder(scratch)
    return written


def _add_slices(writer: SliceWriter, buffer: Tensor, share: Iterable[tuple[Slice, int]]) -> None:
    for piece, offset in share:
        writer.add(buffer.narrow(0, offset, piece.numel))


def load(engine: Engine, folders: list[Path], note: Callable[[str], None]) -> TrainState:
    """Restore the engine from the first checkpoint that is complete and undamaged. Collective.

    The checkpoint may come from another number of ranks, ZeRO stage or place of offload.

    Args:
        folders: candidates, in order of preference; rank 0's count.
        note: called with a line for the user.

    Raises:
        UserError: none of them is usable, or the checkpoint is of another model.
    """
    # Ranks may see different folders on a slow network disk; all must take the same one.
    folders = engine.gathered([folders])[0]
    folder = _first_undamaged(engine, folders, note)
    train_state = _restore(engine, folder)
    note(f"resuming from {folder}")
    return train_state


def load_weights(engine: Engine, folder: Path) -> str:
    """Restore the engine from one checkpoint, for its weights; return why it cannot be used, or "". Collective."""
    damage = _find_damage(engine, folder)
    if not damage:
        _restore(engine, folder)
    return damage


def _restore(engine: Engine, folder: Path) -> TrainState:
    manifest = Manifest.read(folder)
    _check_same_model(engine, manifest, folder)
    train_state = _train_state(manifest, folder)
    state = engine.optimizer_state()
    with contextlib.ExitStack() as stack:
        readers = {}
        for kind in KINDS:
            files = [folder / file for file in manifest.of_kind(kind)]
            readers[kind] = stack.enter_context(SliceReader(files))
        # The low-precision weights follow from the masters when this block ends.
        stack.enter_context(state.changing())
        for section in state.sections:
            _fill_section(section, readers)
    state.set_counters(manifest.optimizer)
    return train_state


def _first_undamaged(engine: Engine, folders: list[Path], note: Callable[[str], None]) -> Path:
    for folder, next_folder in zip(folders, [*folders[1:], None], strict=True):
        damage = _find_damage(engine, folder)
        if not damage:
            return folder
        if next_folder is None:
            raise UserError(f"cannot resume: {damage}; resume=never starts over")
        note(f"{damage}; trying {next_folder.name}")
    raise AssertionError("load needs at least one folder")


def _check_same_model(engine: Engine, manifest: Manifest, folder: Path) -> None:
    shapes = {name: list(shape) for name, shape in engine.trained.items()}
    if manifest.parameters != shapes:
        names = sorted(shapes | manifest.parameters)
        other = next(name for name in names if shapes.get(name) != manifest.parameters.get(name))
        raise UserError(f"{folder} is of another model: {other} differs; give another output_dir")


def _train_state(manifest: Manifest, folder: Path) -> TrainState:
    try:
        return TrainState(**manifest.state)
    except TypeError as error:  # keys of a later version
        raise UserError(f"{folder}: state that gptj_train {manifest.version} wrote cannot be read ({error})") from None


def _fill_section(section: Section, readers: dict[str, SliceReader]) -> None:
    with section.buffers(changing=True) as buffers:
        for piece, views in section.pieces(buffers):
            for kind, reader in readers.items():
                reader.read(piece.name, piece.start, views[kind])


def _all_or_none(engine: Engine, folder: Path, work: Callable[[], T]) -> list[T]:
    """Run ``work`` on each rank and return the results of all; where it fails on one, it fails on all. Collective.

    Raises:
        SaveFailedError: with the first rank's reason. A rank that raised alone would leave the others waiting.
    """
    outcome: tuple[Any, str]
    try:
        outcome = work(), ""
    except (OSError, ValueError) as error:
        reason = (isinstance(error, OSError) and error.strerror) or error
        outcome = None, f"{folder}: {reason}"
    outcomes = engine.gathered([outcome])
    failures = [failure for _, failure in outcomes if failure]
    if failures:
        raise SaveFailedError(failures[0])
    return [result for result, _ in outcomes]


def _find_damage(engine: Engine, folder: Path) -> str:
    """Read every file of a checkpoint once, shared among the ranks; return the first fault, or "". Collective."""
    try:
        manifest = Manifest.read(folder)
        found = manifest.damage(folder, _files_to_verify(engine, manifest))
    except (OSError, ValueError) as error:  # OSError: a folder that may not be read
        found = [str(error)]
    faults = engine.gathered(found)
    return faults[0] if faults else ""


def _files_to_verify(engine: Engine, manifest: Manifest) -> list[str]:
    # The files of the rank before: what this rank wrote itself may still be in its host's cache, not on the disk.
    first = (engine.rank - 1) % engine.world_size
    mine: list[str] = []
    others = set(manifest.files)
    for kind in KINDS:
        files = manifest.of_kind(kind)
        mine += files[first :: engine.world_size]
        others -= set(files)
    # Config and tokenizer are small: rank 0 reads them too.
    return [*mine, *others] if engine.rank == 0 else mine


def _sync_and_hash(path: Path) -> Written:
    with path.open("rb") as file:
        os.fsync(file.fileno())
        return Written(path.stat().st_size, hashlib.file_digest(file, "sha256").hexdigest())
