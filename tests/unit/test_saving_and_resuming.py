"""The trainer's reaction to a save that fails, and to a checkpoint of other data."""

from __future__ import annotations

import errno
from pathlib import Path
from typing import Any

import pytest
import torch
from fake_ranks import MODEL_FILES, on_ranks
from typed_configs import config

from gptj_train.config import ClmConfig
from gptj_train.data.identity import data_identity
from gptj_train.errors import UserError
from gptj_train.tracking import Tracker
from gptj_train.training.checkpoint import Checkpoints, SaveFailedError
from gptj_train.training.deepspeed_internals import OptimizerState
from gptj_train.training.retention import resume_candidates
from gptj_train.training.trainer import Trainer
from gptj_train.weights.slices import SliceWriter


class Numbers:
    """A task that only serves training batches."""

    def __init__(self, first: int) -> None:
        self.first = first

    def training_batches(self, step: int, rank: int, world_size: int) -> list[dict[str, torch.Tensor]]:
        return [{"input_ids": torch.tensor([[self.first + step, rank, world_size]])}]


def settings(folder: Path, *overrides: str) -> ClmConfig:
    """Compose once, before the ranks' threads start: Hydra keeps its state in globals."""
    sizes = ("max_steps=10", "global_batch_size=1", "micro_batch_size=1", "save_every=5", "hang_timeout=0")
    return config("clm", ClmConfig, *sizes, f"output_dir={folder}", *overrides)


def trainer(cfg: ClmConfig, rank: Any, first_batch: int = 0, data: dict[str, Any] | None = None) -> Trainer:
    checkpoints = Checkpoints(cfg.output_dir, keep=2, keep_every=0, model_files=MODEL_FILES)
    tracker = Tracker(cfg.tracking, cfg.output_dir, {}, rank.rank)
    task = Numbers(first_batch)
    return Trainer(config=cfg, engine=rank, task=task, checkpoints=checkpoints, tracker=tracker, data=data)


def no_space(*_: Any) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def test_a_failed_save_prints_a_line_and_the_run_continues(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    cfg = settings(tmp_path)

    def save_twice(rank: Any) -> None:
        run = trainer(cfg, rank)
        run.save()
        rank.gathered([])  # no rank fills the disk while another still writes
        monkeypatch.setattr(SliceWriter, "add", no_space)
        run.state.step = 5
        run.save()

    on_ranks(2, save_twice)
    saved, line = capsys.readouterr().out.splitlines()
    assert saved == f"saved {tmp_path}/checkpoints/step_00000000"
    reason = f"{tmp_path}/checkpoints/step_00000005: No space left on device"
    assert line.startswith(f"step 5 was not saved: {reason}; ")
    assert line.endswith("earlier checkpoints are intact")
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step_00000000"]


def test_the_best_that_could_not_be_saved_does_not_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cfg = settings(tmp_path)
    best: list[tuple[int, float | None]] = []

    def save_twice(rank: Any) -> None:
        run = trainer(cfg, rank)
        run.state.best_step, run.state.best_value = 0, 3.0
        run.save()
        monkeypatch.setattr(SliceWriter, "add", no_space)
        run.state.step = run.state.best_step = 5
        run.state.best_value = 2.0
        run.save()
        best.append((run.state.best_step, run.state.best_value))

    on_ranks(1, save_twice)
    assert best == [(0, 3.0)]


def test_a_failed_first_save_ends_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that could save nothing would otherwise train to its end for nothing."""
    monkeypatch.setattr(SliceWriter, "add", no_space)
    cfg = settings(tmp_path)
    with pytest.raises(SaveFailedError, match="No space left on device"):
        on_ranks(2, lambda rank: trainer(cfg, rank).save())
    assert list((tmp_path / "checkpoints").iterdir()) == []


def test_a_failed_save_ends_the_run_with_failed_save_stop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cfg = settings(tmp_path, "failed_save=stop")
    on_ranks(1, lambda rank: trainer(cfg, rank).save())
    monkeypatch.setattr(SliceWriter, "add", no_space)
    with pytest.raises(SaveFailedError, match="No space left on device"):
        on_ranks(1, lambda rank: trainer(cfg, rank).save())


def test_other_data_are_an_error(tmp_path: Path) -> None:
    cfg = settings(tmp_path)
    on_ranks(2, lambda rank: trainer(cfg, rank).save())
    found = resume_candidates(tmp_path, "auto")
    on_ranks(3, lambda rank: trainer(cfg, rank).resume(found))
    with pytest.raises(ValueError, match=r"step 0 would see other data .* restore data .*tokenizer, seed"):
        on_ranks(1, lambda rank: trainer(cfg, rank, first_batch=1).resume(found))


def test_a_refused_resume_names_what_differs(tmp_path: Path) -> None:
    cfg = settings(tmp_path)
    was = {"seed": 0, "data.packing": "contiguous", "file a.jsonl": "10 bytes, sha256 12", "file b.jsonl": "5 bytes"}
    on_ranks(2, lambda rank: trainer(cfg, rank, data=was).save())
    found = resume_candidates(tmp_path, "auto")
    now = {"seed": 7, "data.packing": "contiguous", "file a.jsonl": "12 bytes, sha256 34", "file c.jsonl": "5 bytes"}
    with pytest.raises(UserError) as caught:
        # Rank 1 has not read the files.
        on_ranks(2, lambda rank: trainer(cfg, rank, first_batch=1, data=now if rank.rank == 0 else {}).resume(found))
    assert str(caught.value) == (
        "step 0 would see other data than the checkpoint expects: seed 0 -> 7; file a.jsonl 10 bytes, sha256 12 -> "
        "12 bytes, sha256 34; file b.jsonl is not there any more; file c.jsonl is new; restore that, or start a new "
        "run with init_from=<that checkpoint> and another output_dir"
    )
    # What differs does not matter where the next batch is the same: files may have been moved.
    on_ranks(1, lambda rank: trainer(cfg, rank, data=now).resume(found))


def test_what_decides_the_batches(tmp_path: Path) -> None:
    for name, text in (("a.jsonl", "one\n"), ("b.jsonl", "two, which is longer\n")):
        (tmp_path / name).write_text(text)
    data = {"train": f"{tmp_path}/*.jsonl", "validation": "v", "packing": "best_fit", "weights": None, "cache_dir": "c"}

    def identity() -> dict[str, Any]:
        settings = {"seed": 3, "global_batch_size": 8, "sequence_length": 16, "add_tokens": [], "max_steps": 5}
        settings["validation_share"] = None
        return data_identity({**settings, "data": data, "task": {"doc_stride": 8}}, "0123456789abcdef")

    first = identity()
    files = [f"file {tmp_path}/{name}" for name in ("a.jsonl", "b.jsonl")]
    settings = ["seed", "global_batch_size", "sequence_length", "add_tokens", "validation_share", "tokenizer"]
    expected = [*settings, "data.packing", "data.weights", "task.doc_stride", *files]
    assert list(first) == expected
    assert first[files[0]].startswith("4 bytes, sha256 ")
    (tmp_path / "b.jsonl").write_text("two, which is LONGER\n")  # as long as before
    second = identity()
    assert [name for name in first if first[name] != second[name]] == [files[1]]


def test_changed_settings_are_printed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cfg = settings(tmp_path)
    on_ranks(1, lambda rank: trainer(cfg, rank).save())
    found = resume_candidates(tmp_path, "auto")
    on_ranks(1, lambda rank: trainer(cfg, rank).resume(found))
    assert "changed since" not in capsys.readouterr().out
    longer = settings(tmp_path, "max_steps=20")
    on_ranks(1, lambda rank: trainer(longer, rank).resume(found))
    assert "changed since the checkpoint: max_steps 10 -> 20" in capsys.readouterr().out


def test_another_base_below_the_adapters_is_printed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bases = [tmp_path / "one", tmp_path / "other"]
    for number, base in enumerate(bases):
        base.mkdir()
        (base / "model.safetensors").write_bytes(bytes([number]))
    cfg = settings(tmp_path, "lora=adapters", "lora.alpha=16", f"init_from={bases[0]}")
    on_ranks(1, lambda rank: trainer(cfg, rank).save())
    found = resume_candidates(tmp_path, "auto")
    on_ranks(1, lambda rank: trainer(cfg, rank).resume(found))
    assert "changed since" not in capsys.readouterr().out
    changed = settings(tmp_path, "lora=adapters", "lora.alpha=32", f"init_from={bases[1]}")
    on_ranks(1, lambda rank: trainer(changed, rank).resume(found))
    out = capsys.readouterr().out
    assert "lora.alpha 16.0 -> 32.0, the files of init_from " in out
    # Without adapters a checkpoint holds all weights: what it began with is of no account.
    assert "the files of init_from" not in settings(tmp_path, f"init_from={bases[0]}").numeric_settings()


class Scaler:
    """fp16's dynamic loss scale, as ZeRO has it."""

    dynamic = True

    def __init__(self) -> None:
        self.cur_scale, self.cur_iter, self.last_overflow_iter, self.cur_hysteresis = 65536.0, 7, 3, 2


def test_the_loss_scale_goes_with_the_counters() -> None:
    def state_of(scaler: Any) -> OptimizerState:
        adam: Any = torch.optim.AdamW([torch.nn.Parameter(torch.ones(3))])
        adam.loss_scaler = scaler
        return OptimizerState(adam, {adam.param_groups[0]["params"][0]: "weight"}, 0)

    counters = state_of(Scaler()).counters()
    scale = {"cur_scale": 65536.0, "cur_iter": 7, "last_overflow_iter": 3, "cur_hysteresis": 2}
    assert counters == {"steps": 0, "loss_scale": scale}
    other = Scaler()
    other.cur_scale, other.cur_iter = 1.0, 0
    state_of(other).set_counters(counters)
    assert vars(other) == scale

    static = type("Static", (), {"dynamic": False, "cur_scale": 1.0})()
    assert state_of(static).counters() == {"steps": 0, "loss_scale": {}}
    state_of(static).set_counters(counters)
    assert static.cur_scale == 1.0
