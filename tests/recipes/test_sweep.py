"""--multirun: a bad point does not end the sweep, and a signal saves the running job and ends it."""

from __future__ import annotations

import csv
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from gptj_train.data.tokenizer import Tokenizer
from gptj_train.metrics_file import read_metrics

ROOT = Path(__file__).parents[2]


@pytest.fixture
def command(tmp_path: Path) -> list[str]:
    texts = [f"a text of a few words, number {number} of them" for number in range(300)]
    (tmp_path / "train.txt").write_text("\n".join(texts))
    (tmp_path / "held_out.txt").write_text("a text of words that were held out")
    (tmp_path / "tokenizer").mkdir()
    Tokenizer.train(texts, 300).save(tmp_path / "tokenizer")
    return [
        *(sys.executable, str(ROOT / "recipes" / "clm.py"), "--multirun", "+config=quickstart"),
        *(f"data.train={tmp_path}/train.txt", f"data.validation={tmp_path}/held_out.txt"),
        *(f"tokenizer={tmp_path}/tokenizer", f"output_dir={tmp_path}/sweep", f"data.cache_dir={tmp_path}/cache"),
        *("model.n_layer=1", "model.n_embd=16", "model.n_head=2", "model.rotary_dim=4", "model.vocab_size=300"),
        *("sequence_length=16", "global_batch_size=2", "micro_batch_size=2", "optim.warmup_steps=0"),
        *("sample_prompt=null", f"hydra.sweep.dir={tmp_path}/multirun"),
    ]


def environment() -> dict[str, str]:
    return os.environ | {"DS_ACCELERATOR": "cpu", "PYTHONPATH": str(ROOT)}


@pytest.mark.slow
def test_a_bad_point_does_not_end_the_sweep(command: list[str], tmp_path: Path) -> None:
    points = ["max_steps=2", "optim.lr=0.001,-1,0.002"]
    done = subprocess.run(command + points, env=environment(), capture_output=True, text=True, timeout=900)
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    with (tmp_path / "sweep" / "sweep.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["job"], row["state"], row["overrides"]) for row in rows] == [
        ("0", "done", "optim.lr=0.001"),
        ("1", "mistake", "optim.lr=-1"),
        ("2", "done", "optim.lr=0.002"),
    ]
    for number in (0, 2):
        last = read_metrics(tmp_path / "sweep" / str(number))[-1]
        assert rows[number]["step"] == "2"
        assert float(rows[number]["eval_loss"]) == pytest.approx(last["eval_loss"], rel=1e-5)
    assert (rows[1]["step"], rows[1]["eval_loss"]) == ("", "")
    table = (tmp_path / "sweep" / "sweep.md").read_text()
    assert table.splitlines()[0].startswith("| job | state | overrides | step | eval_loss |")
    assert table in done.stdout


@pytest.mark.slow
def test_a_signal_saves_the_running_job_and_ends_the_sweep(command: list[str], tmp_path: Path) -> None:
    points = ["max_steps=100000", "eval_every=0", "save_every=0", "optim.lr=0.001,0.002"]
    process = subprocess.Popen(
        command + points, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    metrics = tmp_path / "sweep" / "0" / "metrics.jsonl"
    for _ in range(6000):
        if metrics.exists() and '"loss"' in metrics.read_text():
            break
        assert process.poll() is None, process.communicate()
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=600)
    assert process.returncode == 85, err
    steps = [line["step"] for line in read_metrics(tmp_path / "sweep" / "0") if line["kind"] == "train"]
    assert (tmp_path / "sweep" / "0" / "checkpoints" / f"step_{steps[-1]:08}").is_dir()
    assert not (tmp_path / "sweep" / "1").exists()
    assert "| 0 | stopped | optim.lr=0.001 |" in out
    assert "| 1 | not started | optim.lr=0.002 |" in out
    assert "stopped: rerun the same command to resume the sweep" in err
