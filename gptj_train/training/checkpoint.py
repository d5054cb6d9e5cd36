"""Resumable training state in a run folder: written aside, renamed when whole, verified before use."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path

from gptj_train.training.engine import Engine

MANIFEST = "manifest.json"


@dataclass
class TrainState:
    """What a run is besides its tensors: optimizer steps done and target tokens seen. All else follows from these.

    ``skipped`` steps had numbers that are not finite and changed no weight; ``evaluated`` is the step whose
    evaluation came last.
    """

    step: int = 0
    tokens: int = 0
    skipped: int = 0
    skipped_in_a_row: int = 0
    evaluated: int = -1


class Checkpoints:
    """``checkpoints/step_00000100`` folders of a run; the newest ``keep`` stay.

    The tensors are in DeepSpeed's own format, for as many ranks as wrote them. A folder without a manifest
    that agrees with its files does not count.
    """

    def __init__(self, output_dir: str | Path, keep: int) -> None:
        self.folder = Path(output_dir) / "checkpoints"
        self.keep = keep

    def save(self, engine: Engine, state: TrainState) -> Path:
        """Collective. The folder gets its name only when every rank has written its part."""
        target = self.folder / f"step_{state.step:08}"
        scratch = self.folder / f".{target.name}.tmp"
        if engine.rank == 0:
            shutil.rmtree(scratch, ignore_errors=True)
            scratch.mkdir(parents=True)
        engine.wait()
        engine.save(scratch)
        engine.wait()
        if engine.rank == 0:
            files = {str(file.relative_to(scratch)): file.stat().st_size for file in _files(scratch)}
            manifest = {"state": asdict(state), "world_size": engine.world_size, "files": files}
            (scratch / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n")
            shutil.rmtree(target, ignore_errors=True)
            scratch.rename(target)
            # Later steps than this one are of a run that was given up: resume=never, or from an earlier step.
            complete = self._complete()
            abandoned = [folder for folder in complete if folder.name > target.name]
            for old in abandoned + complete[: -self.keep - len(abandoned)]:
                shutil.rmtree(old, ignore_errors=True)
        engine.wait()
        return target

    def find(self, resume: str, world_size: int) -> Path | None:
        """The checkpoint to resume: the newest for ``auto``, none for ``never``, else the one at this path.

        Raises:
            ValueError: a path without a complete checkpoint, or one of another world size.
        """
        if resume == "never":
            return None
        if resume == "auto":
            complete = self._complete()
            folder = complete[-1] if complete else None
        else:
            folder = Path(resume)
            if not _is_complete(folder):
                raise ValueError(
                    f"resume={resume}: no complete checkpoint there; give a checkpoints/step_... folder, or resume=auto"
                )
        if folder is not None and (saved := _manifest(folder)["world_size"]) != world_size:
            raise ValueError(
                f"{folder} was written by {saved} ranks, this job has {world_size}; "
                f"start it with {saved}, or set resume=never or another output_dir"
            )
        return folder

    @staticmethod
    def load(engine: Engine, folder: Path) -> TrainState:
        """Collective. Restores the engine and returns the rest of the state."""
        engine.load(folder)
        return TrainState(**_manifest(folder)["state"])

    def _complete(self) -> list[Path]:
        return [folder for folder in sorted(self.folder.glob("step_*")) if _is_complete(folder)]


def _files(folder: Path) -> list[Path]:
    return sorted(file for file in folder.rglob("*") if file.is_file())


def _manifest(folder: Path) -> dict:
    return json.loads((folder / MANIFEST).read_text())


def _is_complete(folder: Path) -> bool:
    try:
        files = _manifest(folder)["files"]
        return bool(files) and all((folder / file).stat().st_size == size for file, size in files.items())
    except (OSError, ValueError, KeyError, TypeError):
        return False
