"""Each kind of damage to each file is found before a weight is touched, and the previous checkpoint is used."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from fake_ranks import on_ranks, save

from gptj_train import GPTJForCausalLM
from gptj_train.errors import UserError
from gptj_train.training.checkpoint import load
from gptj_train.training.retention import resume_candidates
from gptj_train.weights.manifest import Manifest, _hash_of
from gptj_train.weights.safetensors_file import Written

FILES = [
    *(f"{kind}-0000{rank}-of-00002.safetensors" for kind in ("master", "exp_avg", "exp_avg_sq") for rank in (1, 2)),
    "config.json",
    "tokenizer.json",
    "manifest.json",
]
STATES = [file for file in FILES if file.endswith(".safetensors")]


def truncate(kept: float) -> Callable[[Path], None]:
    def damage(path: Path) -> None:
        size = path.stat().st_size
        os.truncate(path, int(size * kept) if isinstance(kept, float) else kept % size)

    return damage


def flip(place: float) -> Callable[[Path], None]:
    """One bit, at a fraction of the file's length."""

    def damage(path: Path) -> None:
        content = bytearray(path.read_bytes())
        content[int(place * (len(content) - 1))] ^= 1
        path.write_bytes(content)

    return damage


def zero_the_tail(path: Path) -> None:
    size = path.stat().st_size
    tail = min(4096, size // 2)
    os.truncate(path, size - tail)
    os.truncate(path, size)


def swap_ranks(path: Path) -> None:
    one, two = "00001-of", "00002-of"
    other = path.with_name(path.name.replace(one, "#").replace(two, one).replace("#", two))
    aside = path.with_name("aside")
    path.rename(aside)
    other.rename(path)
    aside.rename(other)


def link_to_a_copy(path: Path) -> None:
    copy = path.parents[2] / path.name
    shutil.copy(path, copy)
    path.unlink()
    path.symlink_to(copy)


def pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def of_the_step_before(path: Path) -> None:
    shutil.copy(path.parent.with_name("step_00000005") / path.name, path)


DAMAGES: dict[str, tuple[Callable[[Path], None], list[str]]] = {
    "missing": (Path.unlink, FILES),
    "a byte short": (truncate(-1), FILES),
    "half": (truncate(0.5), FILES),
    "empty": (truncate(0), FILES),
    "a bit flipped at the start": (flip(0.0), FILES),
    "a bit flipped in the middle": (flip(0.5), FILES),
    "a bit flipped near the end": (flip(0.97), FILES),
    "tail of zeros": (zero_the_tail, FILES),
    "files of two ranks swapped": (swap_ranks, [file for file in STATES if "00001-of" in file]),
    "of another step": (of_the_step_before, STATES),
    "symbolic link": (link_to_a_copy, FILES),
    "pipe": (pipe, FILES),
    "folder": (folder, FILES),
}
CASES = [(kind, file) for kind, (_, files) in DAMAGES.items() for file in files]


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 2 ranks with checkpoints of steps 5 and 10."""
    run = tmp_path_factory.mktemp("good")
    save(run, 5, 10, world_size=2)
    return run


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> list[torch.Tensor]:
    """The weights after step 5."""
    (rank, *_) = save(tmp_path_factory.mktemp("straight"), 5)
    return [parameter.detach() for parameter in rank.model.parameters()]


@pytest.fixture
def run(good: Path, tmp_path: Path) -> Path:
    shutil.copytree(good, tmp_path / "run")
    return tmp_path / "run"


def check(run: Path, file: str, straight: list[torch.Tensor]) -> None:
    damaged = run / "checkpoints" / "step_00000010"
    lines: list[str] = []

    def resume(rank: Any) -> Any:
        before = [parameter.detach().clone() for parameter in rank.model.parameters()]
        with pytest.raises(ValueError, match=damaged.name) as caught:
            load(rank, resume_candidates(run, str(damaged)), print)
        assert file in str(caught.value)
        assert "\n" not in str(caught.value)
        assert all(map(torch.equal, before, rank.model.parameters())), "a weight was touched"

        assert load(rank, resume_candidates(run, "auto"), lines.append if rank.rank == 0 else lambda _: None).step == 5
        return rank

    for rank in on_ranks(2, resume, seed=1):
        assert all(map(torch.equal, straight, rank.model.parameters()))
    passed_over, resumed = lines
    assert passed_over.startswith(str(damaged / file))
    assert passed_over.endswith("; trying step_00000005")
    assert resumed == f"resuming from {damaged.with_name('step_00000005')}"


@pytest.mark.parametrize(("kind", "file"), CASES, ids=[f"{kind}: {file}" for kind, file in CASES])
def test_damage_is_found_and_the_step_before_taken(
    run: Path, straight: list[torch.Tensor], kind: str, file: str
) -> None:
    DAMAGES[kind][0](run / "checkpoints" / "step_00000010" / file)
    check(run, file, straight)


@pytest.mark.parametrize("file", FILES)
def test_permission_denied(run: Path, straight: list[torch.Tensor], monkeypatch: pytest.MonkeyPatch, file: str) -> None:
    """Raised by a patched os.open: a file mode would not stop root, who may run these tests."""
    forbidden, opened = run / "checkpoints" / "step_00000010" / file, os.open

    def refuse(path: Any, *arguments: Any, **more: Any) -> int:
        if path == forbidden:
            raise PermissionError(13, "Permission denied", str(path))
        return opened(path, *arguments, **more)

    monkeypatch.setattr(os, "open", refuse)
    check(run, file, straight)


@pytest.mark.parametrize("kind", [kind for kind in DAMAGES if kind not in ("of another step",)])
def test_a_damaged_model_is_not_handed_out(run: Path, kind: str) -> None:
    checkpoint = run / "checkpoints" / "step_00000010"
    DAMAGES[kind][0](checkpoint / STATES[0])
    with pytest.raises(ValueError, match=STATES[0]):
        GPTJForCausalLM.from_pretrained(checkpoint)


def test_when_none_is_whole(run: Path) -> None:
    for step in (5, 10):
        (run / "checkpoints" / f"step_{step:08}" / STATES[3]).unlink()
    with pytest.raises(ValueError, match=r"none of the checkpoints can be used: .*; resume=never starts over"):
        resume_candidates(run, "auto")


def test_when_none_has_the_right_content(run: Path) -> None:
    for step in (5, 10):
        flip(0.9)(run / "checkpoints" / f"step_{step:08}" / STATES[3])

    def resume(rank: Any) -> None:
        load(rank, resume_candidates(run, "auto"), print)

    with pytest.raises(ValueError, match=r"step_00000005.*sha256; resume=never starts over"):
        on_ranks(2, resume)


def test_a_name_that_leaves_the_folder(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Even in a manifest that is otherwise as we write it."""
    checkpoint = run / "checkpoints" / "step_00000010"
    manifest = Manifest.read(checkpoint)
    (checkpoint / "manifest.json").unlink()
    manifest.files["../step_00000005/config.json"] = Written(1, "0")
    manifest.write(checkpoint)
    with pytest.raises(ValueError, match=r"names '\.\./step_00000005/config.json', which is not a file of its folder"):
        Manifest.read(checkpoint)


@pytest.mark.parametrize(
    ("block", "key", "value"),
    [
        ("state", "step", "x"),
        ("state", "step", {}),
        ("state", "step", True),
        ("state", "step", -2),
        ("state", "step", 10**30),
        ("state", "tokens", 1.5),
        ("state", "skipped", None),
        ("state", "skipped_in_a_row", [1]),
        ("state", "evaluated", "a"),
        ("state", "settings", 5),
        ("state", "next_batch", []),
        ("state", "wandb_id", 7),
        ("optimizer", "steps", None),
        ("optimizer", "steps", -1),
        ("optimizer", "loss_scale", "x"),
        (None, "state", None),
        (None, "optimizer", 0),
        (None, "optimizer", {}),
        (None, "version", -1),
        (None, "world_size", 10**12),
        (None, "unknown", 1),
        (None, "parameters", {"a": "b"}),
    ],
)
def test_a_manifest_edited_by_hand(tmp_path: Path, block: str | None, key: str, value: Any) -> None:
    """Its hash is right; the checkpoint before it is used."""
    save(tmp_path, 5, 10, world_size=1)
    path = tmp_path / "checkpoints" / "step_00000010" / "manifest.json"
    body = json.loads(path.read_text())
    del body["sha256"]
    (body if block is None else body[block])[key] = value
    path.write_text(json.dumps(body | {"sha256": _hash_of(body)}))
    with pytest.raises(UserError, match=r"manifest\.json: not a valid manifest") as caught:
        Manifest.read(path.parent)
    assert "\n" not in str(caught.value)
    state = on_ranks(1, lambda rank: load(rank, resume_candidates(tmp_path, "auto"), lambda _: None), seed=1)[0]
    assert state.step == 5
