"""Files and folders appear whole: a process is killed before each call that changes the disk."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path
from typing import Any

import pytest

from gptj_train.atomic_write import new_folder, remove_folder, scratch_folder, write_text
from gptj_train.weights.hf_writer import install_model

CALLS: list[tuple[Any, str]] = [
    (os, "fsync"),
    (os, "replace"),
    (Path, "mkdir"),
    (Path, "rename"),
    (Path, "unlink"),
    (shutil, "rmtree"),
]
KILLED = 9


def killed_at_each_step(work: Callable[[], None], prepare: Callable[[], None]) -> Iterator[int]:
    """Run ``prepare``, then ``work`` in a child that dies before its first call of CALLS; again with the second, ..."""
    for step in count():
        prepare()
        child = os.fork()
        if child == 0:
            try:
                die_before(step)
                work()
                os._exit(0)
            finally:  # an error must not leave two processes running these tests
                os._exit(1)
        _, status = os.waitpid(child, 0)
        if os.waitstatus_to_exitcode(status) == 0:
            assert step > 1, "the calls are not seen"
            return
        assert os.waitstatus_to_exitcode(status) == KILLED
        yield step


def die_before(step: int) -> None:
    calls = count()

    def watched(real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **more: Any) -> Any:
            if next(calls) == step:
                os._exit(KILLED)
            return real(*args, **more)

        return call

    for owner, name in CALLS:
        setattr(owner, name, watched(getattr(owner, name)))


def write_model(folder: Path, content: str) -> None:
    (folder / "sub").mkdir()
    for name in ("a", "b", "sub/c"):
        (folder / name).write_text(content)


def content(folder: Path) -> dict[str, str]:
    return {str(file.relative_to(folder)): file.read_text() for file in folder.rglob("*") if file.is_file()}


OLD = dict.fromkeys(("a", "b", "sub/c"), "old")
NEW = dict.fromkeys(OLD, "new")


@pytest.fixture
def target(tmp_path: Path) -> Path:
    return tmp_path / "runs" / "export"


def begin_with_old(target: Path) -> Callable[[], None]:
    def prepare() -> None:
        shutil.rmtree(target.parent, ignore_errors=True)
        target.mkdir(parents=True)
        write_model(target, "old")

    return prepare


def replace_by_new(target: Path) -> None:
    with new_folder(target) as scratch:
        write_model(scratch, "new")


def test_a_folder_is_never_lost(target: Path) -> None:
    absent = []
    found = []
    for step in killed_at_each_step(lambda: replace_by_new(target), begin_with_old(target)):
        if not target.exists():
            absent.append(step)
        # Even a next attempt that fails leaves a whole folder: what was moved away is put back first.
        with pytest.raises(OSError, match="full"), new_folder(target):
            raise OSError("disk full")
        found.append(content(target))
        assert found[-1] in (OLD, NEW)
        replace_by_new(target)
        assert content(target) == NEW
        assert [path.name for path in target.parent.iterdir()] == ["export"]
    assert len(absent) == 1  # between the two renames
    assert found[0] == OLD
    assert found[-1] == NEW


def test_a_body_that_fails_leaves_the_old_folder(target: Path) -> None:
    begin_with_old(target)()

    def fail() -> None:
        with new_folder(target) as scratch:
            write_model(scratch, "new")
            raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        fail()
    assert content(target) == OLD
    assert [path.name for path in target.parent.iterdir()] == ["export"]


def test_a_first_folder_makes_its_parents(target: Path) -> None:
    replace_by_new(target)
    assert content(target) == NEW
    assert target.stat().st_mode == target.parent.stat().st_mode  # as the umask says, not private


def test_all_is_flushed_before_the_rename(target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Contents, names, then the new name; the order that a power cut asks for."""
    begin_with_old(target)()
    events: list[str] = []
    fsync, rename = os.fsync, Path.rename

    def seen_fsync(descriptor: int) -> None:
        events.append(Path(os.readlink(f"/proc/self/fd/{descriptor}")).name)
        fsync(descriptor)

    def seen_rename(path: Path, to: Path) -> Path:
        events.append(f"rename to {to.name}")
        return rename(path, to)

    monkeypatch.setattr(os, "fsync", seen_fsync)
    monkeypatch.setattr(Path, "rename", seen_rename)
    replace_by_new(target)
    renamed = events.index("rename to export")
    assert {"a", "b", "c", "sub"} < set(events[:renamed])
    assert any(name.startswith(".export.") and name.endswith(".tmp") for name in events[:renamed])
    assert events[renamed + 1 :] == ["runs"]


def test_a_file_has_the_old_text_or_the_new(tmp_path: Path) -> None:
    path = tmp_path / "report.json"

    def prepare() -> None:
        path.write_text("old")

    steps = killed_at_each_step(lambda: write_text(path, "new"), prepare)
    assert {path.read_text() for _ in steps} == {"old", "new"}


def test_a_file_that_cannot_be_written_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: int) -> None:
        raise OSError("No space left on device")

    path = tmp_path / "report.json"
    path.write_text("old")
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        write_text(path, "new")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_half_a_removed_folder_does_not_bear_its_name(target: Path) -> None:
    for _ in killed_at_each_step(lambda: remove_folder(target), begin_with_old(target)):
        assert not target.exists() or content(target) == OLD


def test_weights_are_never_missing_while_a_model_is_saved_over_another(tmp_path: Path) -> None:
    """Their files replace each other one by one: other files of the folder stay."""
    model = tmp_path / "model"

    def prepare() -> None:
        shutil.rmtree(model, ignore_errors=True)
        model.mkdir()
        for name in ("pytorch_model.bin", "model.safetensors", "tokenizer.json"):
            (model / name).write_text("old")

    def save() -> None:
        with scratch_folder(model) as scratch:
            for name in ("model-00001-of-00001.safetensors", "model.safetensors.index.json"):
                (scratch / name).write_text("new")
            install_model(scratch, model)

    for _ in killed_at_each_step(save, prepare):
        found = content(model)
        complete = {"model-00001-of-00001.safetensors", "model.safetensors.index.json"} <= found.keys()
        assert complete or found["model.safetensors"] == "old"
        assert found["tokenizer.json"] == "old"
    save()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model"]
