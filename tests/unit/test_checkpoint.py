"""Which checkpoint folders count, and which go."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from gptj_train.training.checkpoint import Checkpoints, TrainState


class FakeRank:
    """An engine of one rank whose state is one small file."""

    rank, world_size = 0, 1

    def wait(self) -> None: ...

    def save(self, folder: Path) -> None:
        (folder / "state").write_text("tensors")


def saved(folder: Path, *steps: int, keep: int = 2) -> Checkpoints:
    checkpoints = Checkpoints(folder, keep)
    for step in steps:
        checkpoints.save(FakeRank(), TrainState(step=step, tokens=10 * step))  # type: ignore[arg-type]
    return checkpoints


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "checkpoints").iterdir())


def test_the_newest_stay(tmp_path: Path) -> None:
    checkpoints = saved(tmp_path, 5, 10, 15)
    assert names(tmp_path) == ["step_00000010", "step_00000015"]
    found = checkpoints.find("auto", world_size=1)
    assert found is not None
    assert found.name == "step_00000015"
    assert json.loads((found / "manifest.json").read_text())["state"] == asdict(TrainState(15, 150))


def test_a_run_begun_anew_replaces_the_later_steps_of_the_one_given_up(tmp_path: Path) -> None:
    saved(tmp_path, 100, 200)
    saved(tmp_path, 10)
    assert names(tmp_path) == ["step_00000010"]


def test_never_resumes_nothing(tmp_path: Path) -> None:
    assert saved(tmp_path, 5).find("never", world_size=1) is None


@pytest.mark.parametrize("damage", ["no manifest", "no JSON", "no files", "missing", "cut"])
def test_an_incomplete_checkpoint_is_not_offered(tmp_path: Path, damage: str) -> None:
    checkpoints = saved(tmp_path, 5, 10)
    newest = tmp_path / "checkpoints" / "step_00000010"
    manifest: Any = json.loads((newest / "manifest.json").read_text())
    if damage == "no manifest":
        (newest / "manifest.json").unlink()
    elif damage == "no JSON":
        (newest / "manifest.json").write_text("{")
    elif damage == "no files":
        (newest / "manifest.json").write_text(json.dumps(manifest | {"files": {}}))
    elif damage == "missing":
        (newest / "state").unlink()
    else:
        (newest / "state").write_text("tens")
    found = checkpoints.find("auto", world_size=1)
    assert found is not None
    assert found.name == "step_00000005"
    with pytest.raises(ValueError, match="no complete checkpoint there"):
        checkpoints.find(str(newest), world_size=1)


def test_another_world_is_told(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"written by 1 ranks, this job has 8; start it with 1"):
        saved(tmp_path, 5).find("auto", world_size=8)
