"""What is in a checkpoint, which ones count, which go, and what a save that fails leaves behind."""

from __future__ import annotations

import errno
import json
import os
import resource
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from fake_ranks import CONFIG, MODEL_FILES, on_ranks, save
from safetensors.torch import load_file

import gptj_train.weights.manifest as manifest_file
from gptj_train import GPTJForCausalLM, atomic_write
from gptj_train.data.tokenizer import Tokenizer
from gptj_train.training import checkpoint
from gptj_train.training.checkpoint import Checkpoints, SaveFailedError, load
from gptj_train.training.disk_space import check_space
from gptj_train.training.retention import last_good, later_than, resume_candidates, way_back
from gptj_train.training.state import TrainState
from gptj_train.weights.checkpoint_weights import CheckpointWeights
from gptj_train.weights.manifest import KINDS, Manifest, state_file
from gptj_train.weights.slices import SliceWriter


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "checkpoints").iterdir())


def newest(folder: Path) -> Path:
    return max((folder / "checkpoints").glob("step_*"))


# --- what is in it ---


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_safetensors_by_name_and_slice(tmp_path: Path, world_size: int) -> None:
    """Read by the library, the slices of all ranks make up the parameters, and the moments beside them."""
    (rank, *_) = save(tmp_path, 3, world_size=world_size)
    for kind in KINDS:
        found: dict[str, list[tuple[int, torch.Tensor]]] = {}
        for number in range(world_size):
            stored = load_file(newest(tmp_path) / f"{kind}-{number + 1:05}-of-{world_size:05}.safetensors")
            for key, tensor in stored.items():
                name, _, start = key.rpartition(":")
                found.setdefault(name, []).append((int(start), tensor))
        for name, parameter in rank.model.named_parameters():
            expected = parameter if kind == "master" else rank.adam.state[parameter][kind]
            pieces = [tensor for _, tensor in sorted(found.pop(name), key=lambda pair: pair[0])]
            assert torch.equal(torch.cat(pieces), expected.flatten()), name
        assert not found


def test_the_manifest_says_what_it_is(tmp_path: Path) -> None:
    save(tmp_path, 3, world_size=2)
    manifest = Manifest.read(newest(tmp_path))
    files = {path.name: path.stat().st_size for path in newest(tmp_path).iterdir() if path.name != "manifest.json"}
    assert {name: entry.bytes for name, entry in manifest.files.items()} == files
    assert manifest.world_size == 2
    assert manifest.state["step"] == 3
    assert manifest.state["tokens"] == 30
    assert manifest.optimizer == {"steps": 3, "loss_scale": {}}
    assert manifest.parameters["transformer.wte.weight"] == [31, 16]


def test_the_folder_is_a_model(tmp_path: Path) -> None:
    (rank, *_) = save(tmp_path, 3, world_size=4)
    model = GPTJForCausalLM.from_pretrained(newest(tmp_path))
    for name, parameter in rank.model.named_parameters():
        assert torch.equal(model.get_parameter(name), parameter), name
    assert model.config.n_embd == CONFIG.n_embd
    assert Tokenizer.load(newest(tmp_path)).eos_id == 0
    half = GPTJForCausalLM.from_pretrained(newest(tmp_path), dtype=torch.bfloat16)
    assert half.lm_head.weight.dtype == torch.bfloat16


def test_one_parameter_at_a_time(tmp_path: Path) -> None:
    (rank, *_) = save(tmp_path, 1, world_size=2)
    with CheckpointWeights(newest(tmp_path)) as weights:
        assert weights.names() == list(rank.shapes)
        assert weights.shape_and_dtype("lm_head.weight") == ((31, 16), "F32")
        assert torch.equal(weights.tensor("lm_head.weight"), rank.model.lm_head.weight)


def test_ranks_share_the_verification_of_initial_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path, 1, world_size=2)
    hashed: list[list[str]] = []
    monkeypatch.setattr(Manifest, "damage", lambda self, folder, names: hashed.append(list(names)) or [])
    needed = set(Manifest.read(newest(tmp_path)).files) - {
        state_file(kind, rank, 2) for kind in KINDS[1:] for rank in range(2)
    }
    for ranks in (1, 2, 3):
        hashed.clear()
        for rank in range(ranks):
            CheckpointWeights(newest(tmp_path), share=(rank, ranks)).close()
        found = [name for names in hashed for name in names]
        assert sorted(found) == sorted(needed)
        assert max(map(len, hashed)) <= min(map(len, hashed)) + 1


def test_a_written_file_leaves_the_page_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[int, int, int]] = []
    monkeypatch.setattr(os, "posix_fadvise", lambda _, *how: calls.append(how))
    save(tmp_path, 1, world_size=2)
    assert calls == [(0, 0, os.POSIX_FADV_DONTNEED)] * len(KINDS) * 2


@pytest.mark.parametrize("readers", [1, 3, 4])
@pytest.mark.parametrize("writers", [1, 2, 4])
def test_any_number_of_ranks_reads_it(tmp_path: Path, writers: int, readers: int) -> None:
    (wrote, *_) = save(tmp_path, 3, world_size=writers)
    lines: list[str] = []

    def resume(rank: Any) -> Any:
        state = load(rank, resume_candidates(tmp_path, "auto"), lines.append)
        assert state.step == 3
        return rank

    for rank in on_ranks(readers, resume, seed=1):
        for ours, theirs in zip(rank.model.parameters(), wrote.model.parameters(), strict=True):
            assert torch.equal(ours, theirs)
            for moment in KINDS[1:]:
                assert torch.equal(rank.adam.state[ours][moment], wrote.adam.state[theirs][moment])
            assert rank.adam.state[ours]["step"] == 3
    assert lines == [f"resuming from {newest(tmp_path)}"] * readers


def test_another_model_s_checkpoint(tmp_path: Path) -> None:
    save(tmp_path, 3)

    def resume(rank: Any) -> None:
        rank.shapes["lm_head.bias"] = torch.Size([32])
        load(rank, resume_candidates(tmp_path, "auto"), print)

    with pytest.raises(ValueError, match=r"step_00000003 is of another model: lm_head.bias differs"):
        on_ranks(1, resume)


# --- which count, and which go ---


def test_the_newest_stay(tmp_path: Path) -> None:
    save(tmp_path, 5, 10, 15)
    assert names(tmp_path) == ["step_00000010", "step_00000015"]
    assert resume_candidates(tmp_path, "auto") == [newest(tmp_path), newest(tmp_path).with_name("step_00000010")]


def test_every_nth_stays_for_good(tmp_path: Path) -> None:
    save(tmp_path, *range(1, 10), keep=1, keep_every=4)
    assert names(tmp_path) == ["step_00000004", "step_00000008", "step_00000009"]


def test_a_run_begun_anew_replaces_the_later_steps_of_the_one_given_up(tmp_path: Path) -> None:
    save(tmp_path, 10, 20)
    save(tmp_path, 1)
    assert names(tmp_path) == ["step_00000001"]


def test_what_stays_for_good_is_set_aside_when_a_run_is_begun_anew(tmp_path: Path) -> None:
    """Under its own name resume=auto would take an abandoned checkpoint for the newest of the new run."""
    save(tmp_path, 10, 20, 25, keep_every=10)
    save(tmp_path, 1, keep_every=10)
    assert names(tmp_path) == ["abandoned_1_step_00000010", "abandoned_1_step_00000020", "step_00000001"]
    assert resume_candidates(tmp_path, "auto") == [newest(tmp_path)]
    assert later_than(tmp_path, 1) == []
    aside = tmp_path / "checkpoints" / "abandoned_1_step_00000020"
    assert resume_candidates(tmp_path, str(aside)) == [aside]
    save(tmp_path, 10, keep_every=10)
    save(tmp_path, 2, keep_every=10)
    assert names(tmp_path)[:2] == ["abandoned_1_step_00000010", "abandoned_1_step_00000020"]
    assert names(tmp_path)[2:] == ["abandoned_2_step_00000010", "step_00000001", "step_00000002"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may look into every folder")
def test_a_folder_that_cannot_be_looked_into_is_no_empty_one(tmp_path: Path) -> None:
    save(tmp_path, 1)
    (tmp_path / "checkpoints").chmod(0)
    with pytest.raises(ValueError, match="checkpoints cannot be read: Permission denied"):
        resume_candidates(tmp_path, "auto")


def test_checkpoints_that_are_no_folder(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").touch()
    with pytest.raises(ValueError, match="checkpoints cannot be read: Not a directory"):
        resume_candidates(tmp_path, "auto")


def test_the_same_step_again(tmp_path: Path) -> None:
    save(tmp_path, 1, 2)
    (rank, *_) = save(tmp_path, 2, 2, world_size=2)
    assert Manifest.read(newest(tmp_path)).world_size == rank.world_size == 2
    assert names(tmp_path) == ["step_00000001", "step_00000002"]


def test_what_a_killed_job_left_goes(tmp_path: Path) -> None:
    for leftover in (".step_00000005.tmp", ".step_00000001.old"):
        (tmp_path / "checkpoints" / leftover).mkdir(parents=True)
        (tmp_path / "checkpoints" / leftover / "master-00001-of-00001.safetensors").touch()
    assert resume_candidates(tmp_path, "auto") == []
    save(tmp_path, 10)
    assert names(tmp_path) == ["step_00000010"]


def test_never_resumes_nothing(tmp_path: Path) -> None:
    save(tmp_path, 5)
    assert resume_candidates(tmp_path, "never") == []


# --- a save that fails ---


def no_space(*_: Any) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def input_output_error(*_: Any) -> None:
    raise OSError(errno.EIO, os.strerror(errno.EIO))


FAILURES: dict[str, tuple[Any, str, Callable[..., None]]] = {
    "disk full in the first bytes": (SliceWriter, "__init__", no_space),
    "disk full in the middle": (SliceWriter, "add", no_space),
    "I/O error in the flush": (SliceWriter, "finish", input_output_error),
    "disk full in the manifest": (Manifest, "write", no_space),
    "I/O error in the folder's flush": (atomic_write, "sync_folder", input_output_error),
    "read-only folder": (checkpoint, "_make_scratch", no_space),
}


@pytest.mark.parametrize("case", FAILURES)
@pytest.mark.parametrize("world_size", [1, 2])
def test_the_last_good_state_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: str, world_size: int) -> None:
    save(tmp_path, 5, world_size=world_size)
    owner, attribute, failure = FAILURES[case]
    with monkeypatch.context() as patched:
        patched.setattr(owner, attribute, failure)
        with pytest.raises(SaveFailedError, match=r"step_00000010: (No space left on device|Input/output error)$"):
            save(tmp_path, 10, world_size=world_size)
    assert names(tmp_path) == ["step_00000005"]
    assert not any(newest(tmp_path).glob("*.tmp"))
    save(tmp_path, 15, world_size=world_size)
    assert names(tmp_path) == ["step_00000005", "step_00000015"]


def test_a_file_that_may_not_grow(tmp_path: Path) -> None:
    """The kernel itself refuses, in the middle of a file."""
    save(tmp_path, 5)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, before[1]))
    try:
        with pytest.raises(SaveFailedError, match="File too large"):
            save(tmp_path, 10)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert names(tmp_path) == ["step_00000005"]


def test_what_was_written_wrong_is_noticed_before_an_old_one_goes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(tmp_path, 5)
    write = Manifest.write

    def spoil(manifest: Manifest, folder: Path) -> None:
        write(manifest, folder)
        with next(folder.glob("exp_avg-*")).open("r+b") as file:
            file.seek(-1, os.SEEK_END)
            file.write(b"?")

    monkeypatch.setattr(Manifest, "write", spoil)
    with pytest.raises(SaveFailedError, match=r"sha256, just after it was written"):
        save(tmp_path, 10, keep=1)
    assert names(tmp_path) == ["step_00000005"]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_no_state_with_values_that_are_not_finite(tmp_path: Path, value: float) -> None:
    (rank, *_) = save(tmp_path, 5)
    rank.adam.state[rank.model.lm_head.bias]["exp_avg_sq"][3] = value
    checkpoints = checkpoint.Checkpoints(tmp_path, keep=2, keep_every=0, model_files=MODEL_FILES)
    with pytest.raises(SaveFailedError, match=r"lm_head.bias contains NaN or infinity"):
        checkpoints.save(rank, checkpoint.TrainState(step=6))
    assert names(tmp_path) == ["step_00000005"]


@pytest.mark.parametrize(
    "lie",
    [{"world_size": "x"}, {"world_size": None}, {"world_size": 10**10}, {"world_size": 2}, {"parameters": {"a": "b"}}],
)
def test_a_manifest_is_data_of_a_stranger(tmp_path: Path, lie: dict[str, Any]) -> None:
    """Its own hash proves nothing: whoever wrote it can compute one."""
    save(tmp_path, 5)
    path = newest(tmp_path) / "manifest.json"
    body = json.loads(path.read_text()) | lie
    del body["sha256"]
    path.write_text(json.dumps(body | {"sha256": manifest_file._hash_of(body)}))
    with pytest.raises(ValueError, match="not a valid manifest"):
        Manifest.read(newest(tmp_path))


# --- room on the disk ---


@pytest.mark.parametrize(
    ("save_every", "keep", "keep_every", "count"),
    [(0, 2, 0, 1), (10, 1, 0, 2), (10, 3, 0, 4), (50, 3, 0, 2), (10, 2, 20, 8), (30, 2, 0, 3)],
)
def test_room_is_counted_before_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, save_every: int, keep: int, keep_every: int, count: int
) -> None:
    """100 steps of a model of 1 million parameters: 12 MB each time, and one more while it is written."""
    shapes = {"weight": torch.Size([1000, 1000])}

    def check(free: int) -> None:
        monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": free}))
        check_space(tmp_path / "run", shapes, steps=range(100), save_every=save_every, keep=keep, keep_every=keep_every)

    check(count * 12_000_000)
    with pytest.raises(
        ValueError, match=rf"{count} checkpoints? of 12.0 MB need {count * 12}.0 MB of disk, .* lower keep_checkpoints"
    ):
        check(count * 12_000_000 - 1)
    assert not (tmp_path / "run").exists()


def test_checkpoints_that_will_go_count_as_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (rank, *_) = save(tmp_path, 5, 10)
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": 0}))
    size = sum(file.stat().st_size for file in (tmp_path / "checkpoints").rglob("*"))
    assert size > 2 * 12 * sum(shape.numel() for shape in rank.shapes.values())
    check_space(tmp_path, rank.shapes, steps=range(10, 10), save_every=5, keep=2, keep_every=0)
    with pytest.raises(ValueError, match="3 checkpoints"):
        check_space(tmp_path, rank.shapes, steps=range(10, 20), save_every=5, keep=2, keep_every=0)


def test_the_manifest_is_plain_data(tmp_path: Path) -> None:
    save(tmp_path, 1)
    assert json.loads((newest(tmp_path) / "manifest.json").read_text())["format"] == 1


# --- good ones ---


def save_skipped(folder: Path, step: int) -> None:
    """Save a state whose last step was skipped."""

    def work(rank: Any) -> None:
        checkpoints = Checkpoints(folder, keep=1, keep_every=0, model_files=MODEL_FILES)
        checkpoints.save(rank, TrainState(step=step, skipped_in_a_row=2))

    on_ranks(1, work)


def test_a_checkpoint_of_a_skipped_step_removes_no_good_one(tmp_path: Path) -> None:
    save(tmp_path, 10, 20)
    save_skipped(tmp_path, 30)
    assert names(tmp_path) == ["step_00000010", "step_00000020", "step_00000030"]
    assert last_good(tmp_path) == tmp_path / "checkpoints" / "step_00000020"
    assert way_back(tmp_path).endswith(f"rerun the same command with resume={last_good(tmp_path)}")
    save_skipped(tmp_path, 40)  # replaces the other that does not count
    assert names(tmp_path) == ["step_00000010", "step_00000020", "step_00000040"]
    save(tmp_path, 50)
    assert names(tmp_path) == ["step_00000020", "step_00000050"]


def test_pipes_and_files_named_like_a_step_are_no_checkpoints(tmp_path: Path) -> None:
    save(tmp_path, 1)
    os.mkfifo(tmp_path / "checkpoints" / "step_00000009")
    (tmp_path / "checkpoints" / "step_00000008").write_text("")
    assert resume_candidates(tmp_path, "auto") == [tmp_path / "checkpoints" / "step_00000001"]
    save(tmp_path, 8, 9, 10)  # replaces both
    assert names(tmp_path) == ["step_00000009", "step_00000010"]


def test_auto_steps_past_a_folder_that_may_not_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path, 1, 2)
    read = Manifest.read

    def refuse(folder: Path) -> Manifest:
        if folder.name == "step_00000002":
            raise PermissionError(13, "Permission denied", str(folder))
        return read(folder)

    monkeypatch.setattr(Manifest, "read", refuse)
    lines: list[str] = []
    on_ranks(1, lambda rank: load(rank, resume_candidates(tmp_path, "auto"), lines.append))
    assert "Permission denied" in lines[0]
    assert lines[1] == f"resuming from {tmp_path}/checkpoints/step_00000001"
