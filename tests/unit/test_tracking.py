"""metrics.jsonl over starts and resumes, no output on other ranks, and W&B without a network."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pandas
import pytest
import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from gptj_train.metrics_file import read_metrics
from gptj_train.tracking import Tracker, TrackingConfig

RUN_CONFIG = {"max_steps": 4, "optim": {"lr": 1e-3}, "init_from": None}


def step(number: int, **changes: float) -> dict[str, float]:
    return {
        "step": number,
        "loss": 5.0 - number,
        "lr": 1e-3,
        "grad_norm": 0.5,
        "tokens": 100 * number,
        "tokens_per_second": 1234.5,
        "step_seconds": 0.25,
        "skipped_steps": 0,
        "loss_scale": 1.0,
        "memory_gib": 1.5,
    } | changes


def evaluated(number: int) -> dict[str, float]:
    return {"step": number, "tokens": 100 * number, "eval_loss": 4.0, "perplexity": 54.6, "bits_per_byte": 1.25}


def tracker(folder: Path, rank: int = 0, wandb: str = "disabled", **config: Any) -> Tracker:
    settings = TrackingConfig(**{"tensorboard": False, "wandb": wandb, "project": "tests", "run_name": None} | config)
    return Tracker(settings, folder, RUN_CONFIG, rank)


def write(folder: Path, start: int, *lines: dict[str, float], **options: Any) -> None:
    """A run from ``start`` that records these lines."""
    made = tracker(folder, **options)
    made.start(start, 4)
    for line in lines:
        (made.evaluation if "eval_loss" in line else made.step)(line)
    made.finish()


def recorded(folder: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl as they were given; what the tracker adds is checked here."""
    lines = read_metrics(folder)
    for line in lines:
        assert abs(time.time() - line.pop("time")) < 600
        assert line.pop("kind") == ("eval" if "eval_loss" in line else "train")
    return lines


@pytest.fixture(autouse=True)
def _no_wandb_of_the_user(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("WANDB_MODE", "WANDB_PROJECT", "WANDB_NAME", "WANDB_API_KEY", "WANDB_RUN_ID", "WANDB_ENTITY"):
        monkeypatch.delenv(name, raising=False)
    for name in ("HOME", "WANDB_DIR", "WANDB_CONFIG_DIR", "WANDB_CACHE_DIR", "WANDB_DATA_DIR", "NETRC"):
        monkeypatch.setenv(name, str(tmp_path / "home"))


def test_a_line_for_every_step_and_evaluation(tmp_path: Path) -> None:
    lines = [evaluated(0), step(1), step(2), evaluated(2)]
    write(tmp_path / "runs" / "a", 0, *lines)
    assert recorded(tmp_path / "runs" / "a") == lines
    assert (tmp_path / "runs" / "a" / "metrics.jsonl").read_text().count("\n") == 4
    assert yaml.safe_load((tmp_path / "runs" / "a" / "config.yaml").read_text()) == RUN_CONFIG


def test_lines_are_on_disk_at_once(tmp_path: Path) -> None:
    running = tracker(tmp_path)
    running.start(0, 4)
    running.step(step(1))
    assert recorded(tmp_path) == [step(1)]
    running.finish()


def test_a_fresh_start_begins_anew(tmp_path: Path) -> None:
    write(tmp_path, 0, evaluated(0), step(1), step(2))
    write(tmp_path, 0, evaluated(0))
    assert recorded(tmp_path) == [evaluated(0)]


def test_resuming_keeps_lines_up_to_the_checkpoint_and_no_later_ones(tmp_path: Path) -> None:
    lines = [evaluated(0), step(1), step(2), evaluated(2), step(3), step(4), evaluated(4)]
    write(tmp_path, 0, *lines[:5])  # cut off at step 3; the checkpoint is of step 2
    write(tmp_path, 2, *lines[4:])
    assert recorded(tmp_path) == lines


def test_resuming_twice_from_the_same_checkpoint_doubles_nothing(tmp_path: Path) -> None:
    lines = [evaluated(0), step(1), step(2), evaluated(2), step(3)]
    write(tmp_path, 0, *lines)
    write(tmp_path, 2, step(3))
    write(tmp_path, 2, step(3))
    assert recorded(tmp_path) == lines


@pytest.mark.parametrize("cut", [1, 10, 30])
def test_a_line_cut_off_by_a_crash_is_dropped(tmp_path: Path, cut: int) -> None:
    write(tmp_path, 0, step(1), step(2))
    path = tmp_path / "metrics.jsonl"
    path.write_text(path.read_text() + json.dumps(step(3))[:cut])
    assert recorded(tmp_path) == [step(1), step(2)]
    write(tmp_path, 2, step(3))
    assert recorded(tmp_path) == [step(1), step(2), step(3)]


def test_a_full_disk_costs_a_line_and_not_the_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recording = tracker(tmp_path)
    recording.start(0, 3)
    recording._metrics = open("/dev/full", "w", buffering=1)  # noqa: SIM115
    recording.step(step(1))
    recording.finish()
    assert "metrics.jsonl lacks step 1: No space left on device" in capsys.readouterr().out


def test_no_metrics_yet(tmp_path: Path) -> None:
    assert read_metrics(tmp_path) == []


def test_nan_becomes_null_and_is_printed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path, 0, step(4, loss=math.nan, grad_norm=math.inf))
    (line,) = read_metrics(tmp_path)
    assert line["loss"] is line["grad_norm"] is None  # JSON knows no NaN
    assert "loss nan" in capsys.readouterr().out


def test_other_ranks_write_nothing(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    silent = tracker(tmp_path / "run", rank=1, wandb="online")
    silent.note("before")
    silent.start(0, 4)
    silent.evaluation(evaluated(0))
    silent.step(step(4))
    silent.note("after")
    silent.finish()
    assert not (tmp_path / "run").exists()
    assert capfd.readouterr() == ("", "")


def test_rank_0_writes_nothing_before_its_start(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tracker(tmp_path / "run").note("batch 32")
    assert capsys.readouterr().out == "batch 32\n"
    assert not (tmp_path / "run").exists()


def test_printed_lines(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path, 0, evaluated(0), step(1), step(2), step(4))
    assert capsys.readouterr().out.splitlines() == [
        "step 0: eval_loss 4.0000  perplexity 54.6000  bits_per_byte 1.2500",
        "step 1/4  loss 4.0000  lr 1.00e-03  1,234 tokens/s  1.5 GiB  00:00 left",
        # step 2 comes too soon after step 1; the last step is always shown
        "step 4/4  loss 1.0000  lr 1.00e-03  1,234 tokens/s  1.5 GiB  00:00 left",
    ]


def wandb_records(run: Path) -> dict[str, list[Any]]:
    """The records of an offline run, by kind, as Weights & Biases' own tool reads them."""
    command = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(run)]
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    records: dict[str, list[Any]] = {}
    for record in map(json.loads, lines):
        records.setdefault(record["type"], []).append(record.get(record["type"]))
    return records


def test_wandb_offline(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path, 0, evaluated(0), step(1), step(2), evaluated(2), wandb="offline", run_name="mine")
    (run,) = tmp_path.glob("wandb/offline-run-*")
    identity = (tmp_path / "wandb_id.txt").read_text()
    upload = f"wandb sync --id {identity} {tmp_path}/wandb/*-{identity}"
    assert f"upload this run with: {upload}\n" in capsys.readouterr().out
    records = wandb_records(run)
    assert len(identity) == 8
    about = records["run"][0]
    assert (about["run_id"], about["project"], about["display_name"]) == (identity, "tests", "mine")
    assert about["config"]["update"]["optim"] == {"lr": 1e-3}
    rows = [{k: v for k, v in row["item"].items() if not k.startswith("_")} for row in records["history"]]
    evaluation = {"eval/loss": 4.0, "eval/perplexity": 54.6, "eval/bits_per_byte": 1.25}
    performance = {"perf/tokens_per_s": 1234.5, "perf/step_seconds": 0.25, "mem/peak_gib": 1.5}
    training = {
        "train/grad_norm": 0.5,
        "train/lr": 1e-3,
        "train/skipped_steps": 0,
        "train/loss_scale": 1,
        **performance,
    }
    # Every row says where on the axis of tokens it stands, the evaluation before the first step too.
    assert rows == [
        {"train/tokens": 0, **evaluation},
        {"train/tokens": 100, "train/loss": 4.0, **training},
        {"train/tokens": 200, "train/loss": 3.0, **training, **evaluation},
    ]
    assert [row["item"]["_step"] for row in records["history"]] == [0, 1, 2]
    assert records["metric"][0]["step_metric"] == "train/tokens"

    write(tmp_path, 2, step(3), wandb="offline")
    assert (tmp_path / "wandb_id.txt").read_text() == identity
    (resumed,) = set(tmp_path.glob("wandb/offline-run-*")) - {run}
    assert wandb_records(resumed)["run"][0]["run_id"] == identity
    assert [row["item"]["_step"] for row in wandb_records(resumed)["history"]] == [3]


def test_wandb_resumes_the_run_that_a_checkpoint_names(tmp_path: Path) -> None:
    """Resumed into another folder."""
    resumed = tracker(tmp_path, wandb="offline")
    assert resumed.wandb_id is None
    resumed.start(2, 4, "abcd1234")
    assert resumed.wandb_id == (tmp_path / "wandb_id.txt").read_text() == "abcd1234"
    resumed.finish()


def test_the_environment_overrides_the_config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "disabled")
    write(tmp_path, 0, step(1), wandb="online")
    assert not (tmp_path / "wandb_id.txt").exists()
    assert not (tmp_path / "wandb").exists()


def test_one_schema_for_both_kinds_of_lines(tmp_path: Path) -> None:
    """As docs/evaluation.md reads them, with pandas."""
    settings = TrackingConfig(tensorboard=False, wandb="disabled", project="tests", run_name=None)
    made = Tracker(settings, tmp_path, RUN_CONFIG, 0, steps_per_epoch=8)
    made.start(0, 4)
    made.evaluation(evaluated(0))
    made.step(step(2))
    made.step(step(3, loss=math.nan))
    made.finish()
    table = pandas.read_json(tmp_path / "metrics.jsonl", lines=True, dtype=False)
    assert table.kind.tolist() == ["eval", "train", "train"]
    assert table.epoch.tolist() == [0, 0.25, 0.375]
    assert table.time.is_monotonic_increasing
    assert table.set_index("step").loss[2] == 3.0
    assert table.loss.isna().tolist() == [True, False, True]


def test_lines_of_the_first_version_are_read(tmp_path: Path) -> None:
    lines = [{"step": 0, "eval_loss": 4.0}, {"step": 1, "loss": 4.0, "tokens": 9, "memory": 1.5}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    first, second = read_metrics(tmp_path)
    assert first == {"kind": "eval", "step": 0, "eval_loss": 4.0}
    assert second == {"kind": "train", "step": 1, "loss": 4.0, "tokens": 9, "memory_gib": 1.5}


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    events = EventAccumulator(str(folder / "tensorboard")).Reload()
    return {tag: [(one.step, one.value) for one in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def test_tensorboard_over_a_resume(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made = tracker(tmp_path, tensorboard=True)
    made.describe({"parameters": 12})
    made.start(0, 4)
    for line in (evaluated(0), step(1), step(2), step(3)):
        (made.evaluation if "eval_loss" in line else made.step)(line)
    made.finish()
    assert f"tensorboard --logdir {tmp_path / 'tensorboard'}" in capsys.readouterr().out
    write(tmp_path, 2, step(3, loss=1.5), evaluated(3), tensorboard=True)
    found = scalars(tmp_path)
    assert found["train/loss"] == [(1, 4.0), (2, 3.0), (3, 1.5)]
    assert found["train/tokens"] == [(0, 0), (1, 100), (2, 200), (3, 300), (3, 300)]
    assert found["eval/loss"] == [(0, 4.0), (3, 4.0)]
    assert found["mem/peak_gib"] == [(1, 1.5), (2, 1.5), (3, 1.5)]
    text = EventAccumulator(str(tmp_path / "tensorboard")).Reload().Tensors("config/text_summary")[0]
    assert "optim.lr: 0.001" in str(text.tensor_proto.string_val)
    assert "parameters: 12" in str(text.tensor_proto.string_val)


@pytest.mark.parametrize(
    "bad", [b'{"step": 2, "lo\xffss": 1}', b"[1]", b"{}", b'{"step": "2", "tokens": 1}', b"[" * 200000, b"hello"]
)
def test_a_bad_line_costs_only_itself(tmp_path: Path, bad: bytes, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path, 0, step(1), step(2))
    path = tmp_path / "metrics.jsonl"
    first, second = path.read_bytes().splitlines()
    path.write_bytes(b"\n".join([first, bad, second, b""]))
    assert recorded(tmp_path) == [step(1), step(2)]
    write(tmp_path, 2, step(3))
    assert f"{path}: 1 unreadable lines are dropped" in capsys.readouterr().out
    assert recorded(tmp_path) == [step(1), step(2), step(3)]


def test_a_pipe_in_place_of_the_metrics_does_not_block(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "metrics.jsonl")
    assert read_metrics(tmp_path) == []
    write(tmp_path, 2, step(3))
    assert recorded(tmp_path) == [step(3)]


def test_a_repeated_evaluation_is_recorded_once(tmp_path: Path) -> None:
    write(tmp_path, 0, step(1), step(2), evaluated(2))
    for _ in range(2):  # resumed from a checkpoint that does not know of the evaluation
        again = tracker(tmp_path)
        again.start(2, 4, evaluated=False)
        again.evaluation(evaluated(2))
        again.finish()
    assert recorded(tmp_path) == [step(1), step(2), evaluated(2)]
