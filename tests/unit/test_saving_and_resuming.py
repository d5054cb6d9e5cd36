"""What the trainer does about a save that fails, and about a checkpoint that other data belong to."""

from __future__ import annotations

import errno
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from fake_ranks import CONFIG, TOKENIZER, on_ranks

from gptj_train.tracking import Tracker, TrackingConfig
from gptj_train.training.checkpoint import Checkpoints, SaveFailedError
from gptj_train.training.deepspeed_internals import OptimizerState
from gptj_train.training.model_files import ModelFiles
from gptj_train.training.optimizer import OptimConfig
from gptj_train.training.retention import resumable
from gptj_train.training.trainer import Trainer, TrainerConfig
from gptj_train.weights.slices import SliceWriter

OPTIM = OptimConfig(
    lr=1e-3,
    betas=(0.9, 0.95),
    eps=1e-8,
    weight_decay=0.1,
    clip_norm=1.0,
    schedule="constant",
    warmup_steps=0,
    decay_steps=0,
    final_lr_ratio=0.1,
)


class Numbers:
    """A task of which only the data are asked for."""

    def __init__(self, first: int = 0) -> None:
        self.first = first

    def training_batches(self, step: int, rank: int, world_size: int) -> list[dict[str, torch.Tensor]]:
        return [{"input_ids": torch.tensor([[self.first + step, rank, world_size]])}]


def trainer(folder: Path, rank: Any, task: Any = None, **settings: Any) -> Trainer:
    config = TrainerConfig(
        output_dir=str(folder),
        seed=0,
        max_steps=10,
        global_batch_size=1,
        micro_batch_size=1,
        eval_every=0,
        save_every=5,
        keep_checkpoints=2,
        keep_every=0,
        failed_save="continue",
        resume="auto",
        max_hours=None,
        max_skipped_steps=3,
        hang_timeout=0,
        optim=OPTIM,
    )
    checkpoints = Checkpoints(folder, 2, 0, ModelFiles(CONFIG, "GPTJForCausalLM", TOKENIZER))
    tracker = Tracker(TrackingConfig(wandb="disabled", project="tests", run_name=None), folder, {}, rank.rank)
    return Trainer(replace(config, **settings), rank, task or Numbers(), checkpoints, tracker)


def no_space(*_: Any) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def test_a_failed_save_is_told_and_the_run_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(SliceWriter, "add", no_space)
    on_ranks(2, lambda rank: trainer(tmp_path, rank).save())
    (line,) = capsys.readouterr().out.splitlines()
    assert line == (
        f"step 0 was not saved: {tmp_path}/checkpoints/step_00000000: No space left on device; "
        "going on, earlier checkpoints are intact"
    )
    assert list((tmp_path / "checkpoints").iterdir()) == []


def test_a_failed_save_ends_the_run_if_so_wished(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(SliceWriter, "add", no_space)
    with pytest.raises(SaveFailedError, match="No space left on device"):
        on_ranks(1, lambda rank: trainer(tmp_path, rank, failed_save="stop").save())


def test_other_data_are_an_error(tmp_path: Path) -> None:
    on_ranks(2, lambda rank: trainer(tmp_path, rank).save())
    found = resumable(tmp_path, "auto")
    on_ranks(3, lambda rank: trainer(tmp_path, rank).resume(found))
    with pytest.raises(ValueError, match=r"step 0 would see other data .* restore data .*tokenizer, seed"):
        on_ranks(1, lambda rank: trainer(tmp_path, rank, Numbers(1)).resume(found))


def test_other_settings_are_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    on_ranks(1, lambda rank: trainer(tmp_path, rank).save())
    found = resumable(tmp_path, "auto")
    on_ranks(1, lambda rank: trainer(tmp_path, rank, resume=str(found[0])).resume(found))
    assert "changed since" not in capsys.readouterr().out
    on_ranks(1, lambda rank: trainer(tmp_path, rank, max_steps=20).resume(found))
    assert "changed since the checkpoint: max_steps 10 -> 20" in capsys.readouterr().out


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
