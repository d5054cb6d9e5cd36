"""recipes/classification.py on one rank, resumed on two: it learns, and its export loads in Transformers."""

from __future__ import annotations

import json
import os
import random
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from torch.nn import functional as F

from gptj_train import GPTJForSequenceClassification
from gptj_train.config import EvaluateConfig
from gptj_train.data.tokenizer import Tokenizer
from gptj_train.inference.evaluate_checkpoint import build_task, evaluate
from gptj_train.launch.command_line import compose

REPOSITORY = Path(__file__).parents[2]
WORDS = {"animal": ["cat", "dog", "horse", "cow"], "food": ["bread", "rice", "apple", "soup"], "tool": ["saw", "axe"]}
HELD_OUT = 23  # two ranks of four rows at once: the last batch is short on one rank, and not on the other


def write_rows(path: Path, count: int) -> None:
    draw = random.Random(path.name)
    rows = []
    for _ in range(count):
        label = draw.choice(list(WORDS))
        text = " ".join(["a"] * draw.randrange(4) + [draw.choice(WORDS[label])] + ["of", "it"] * draw.randrange(3))
        rows.append(json.dumps({"text": text, "label": label}))
    path.write_text("\n".join(rows) + "\n")


@pytest.mark.distributed
def test_one_rank_then_two(tmp_path: Path) -> None:
    write_rows(tmp_path / "train.jsonl", 200)
    write_rows(tmp_path / "validation.jsonl", HELD_OUT)
    (tmp_path / "tokenizer").mkdir()
    Tokenizer.train(((tmp_path / "train.jsonl").read_text(),), 280).save(tmp_path / "tokenizer")
    run = tmp_path / "run"
    settings = f"""
        output_dir={run} init_from=null tokenizer={tmp_path}/tokenizer
        data.train={tmp_path}/train.jsonl data.validation={tmp_path}/validation.jsonl
        model=gptj_tiny model.vocab_size=280 model.n_embd=32 model.n_layer=2 model.n_head=2 model.rotary_dim=8
        engine=zero3_offload engine.precision=fp32 export_dtype=fp32
        optim.lr=0.01 optim.warmup_steps=2 sequence_length=40
        global_batch_size=16 micro_batch_size=4 eval_every=0 save_every=0
    """
    for ranks, max_steps in ((1, 12), (2, 25)):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = str(probe.getsockname()[1])
        launcher = [sys.executable]
        if ranks > 1:
            launcher += ["-m", "deepspeed.launcher.runner", f"--num_gpus={ranks}", "--master_port", port]
        command = [*launcher, "recipes/classification.py", *settings.split(), f"max_steps={max_steps}"]
        env = os.environ | {"DS_ACCELERATOR": "cpu", "PYTHONPATH": str(REPOSITORY)}
        done = subprocess.run(command, cwd=REPOSITORY, env=env, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stdout + done.stderr

    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == list(range(1, 26))
    before, middle, after = (line for line in lines if "eval_loss" in line)
    assert before["eval_loss"] > middle["eval_loss"] > after["eval_loss"]
    assert before["accuracy"] < 0.7
    assert after["accuracy"] > 0.9
    assert after["eval_loss"] < 0.5 * before["eval_loss"]
    assert sum(sum(row.values()) for row in after["confusion_matrix"].values()) == HELD_OUT
    assert "<th>animal</th>" in (run / "report.html").read_text()
    assert "GPTJForSequenceClassification.from_pretrained" in done.stdout

    config = json.loads((run / "export/config.json").read_text())
    assert config["id2label"] == {"0": "animal", "1": "food", "2": "tool"}
    assert config["label2id"] == {"animal": 0, "food": 1, "tool": 2}
    assert config["problem_type"] == "single_label_classification"
    theirs = transformers.AutoModelForSequenceClassification.from_pretrained(run / "export").eval()
    ours = GPTJForSequenceClassification.from_pretrained(run / "export")
    tokenizer = transformers.AutoTokenizer.from_pretrained(run / "export")
    tokenizer.pad_token_id = config["pad_token_id"]
    rows = [json.loads(line) for line in (tmp_path / "validation.jsonl").read_text().splitlines()]
    batch = tokenizer([row["text"] for row in rows], padding=True, return_tensors="pt")
    with torch.no_grad():
        expected, logits = theirs(**batch).logits, ours(**batch).logits
    torch.testing.assert_close(logits, expected)
    labels = torch.tensor([list(WORDS).index(row["label"]) for row in rows])
    assert (expected.argmax(1) == labels).float().mean().item() == pytest.approx(after["accuracy"])
    assert F.cross_entropy(expected, labels).item() == pytest.approx(after["eval_loss"], rel=1e-4)

    cfg = evaluation_config(run / "checkpoints/step_00000025", tmp_path / "validation.jsonl")
    task = build_task(cfg)
    found = evaluate(cfg.checkpoint, cfg.dtype, task, rank=0, world_size=1)
    assert found["confusion_matrix"] == after["confusion_matrix"]
    assert found["eval_loss"] == pytest.approx(after["eval_loss"], rel=1e-4)
    predictions = [json.loads(line) for line in (run / "predictions.jsonl").read_text().splitlines()]
    assert [line["predicted"] for line in predictions] == [line["predicted"] for line in task.predictions]


def evaluation_config(checkpoint: Path, data: Path) -> EvaluateConfig:
    given = [f"checkpoint={checkpoint}", f"data.validation={data}", "sequence_length=40"]
    return compose("evaluate", given, EvaluateConfig)
