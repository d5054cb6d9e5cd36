"""recipes/evaluate.py computes the same metrics as Transformers for each task, on one rank or two."""

from __future__ import annotations

import csv
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch.nn import functional as F

from gptj_train import GPTJConfig, GPTJForCausalLM, GPTJForQuestionAnswering, GPTJForSequenceClassification, GPTJModel
from gptj_train.config import EvaluateConfig
from gptj_train.data.tokenizer import Tokenizer
from gptj_train.inference.evaluate_checkpoint import build_task, evaluate, write_results
from gptj_train.launch.command_line import compose

ROOT = Path(__file__).parents[2]
TEXTS = ["a rose is a rose", "this is not a pipe, it is a picture", "the sea, the sea", "is it?", "it is a sea"]


def saved(folder: Path, cls: type, **config: Any) -> Path:
    """A tiny random model with its tokenizer."""
    torch.manual_seed(1)
    tokenizer = Tokenizer.train(TEXTS * 3, 290)
    shape = {"vocab_size": 290, "n_positions": 48, "n_embd": 32, "n_layer": 2, "n_head": 2, "rotary_dim": 8}
    model = cls(GPTJConfig(**shape, initializer_range=0.3, eos_token_id=tokenizer.eos_id, **config))
    model.save_pretrained(folder)
    tokenizer.save(folder)
    return folder


def config(checkpoint: Path, data: Path, *more: str) -> EvaluateConfig:
    given = [f"checkpoint={checkpoint}", f"data.validation={data}", f"data.cache_dir={data.parent}/cache", *more]
    return compose("evaluate", given, EvaluateConfig)


def measured(cfg: EvaluateConfig, output_dir: Path) -> dict[str, Any]:
    task = build_task(cfg)
    metrics = evaluate(cfg.checkpoint, cfg.dtype, task, rank=0, world_size=1)
    write_results(output_dir, metrics, task)
    assert json.loads((output_dir / "metrics.json").read_text()) == metrics
    return metrics


def test_language_modelling(tmp_path: Path) -> None:
    folder = saved(tmp_path / "model", GPTJForCausalLM)
    data = tmp_path / "texts.jsonl"
    data.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    found = measured(config(folder, data, "batch_size=2"), tmp_path / "out")

    tokenizer = Tokenizer.load(folder)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    loss, targets, size = 0.0, 0, 0
    # No document is cut: each stands alone, whatever window it is in.
    for ids in [[*ids, tokenizer.eos_id] for ids in tokenizer.encode_texts(TEXTS)]:
        with torch.no_grad():
            logits = theirs(torch.tensor([ids])).logits[0, :-1].log_softmax(-1)
        loss -= logits.gather(1, torch.tensor(ids[1:])[:, None]).sum().item()
        targets += len(ids) - 1
        size += sum(int(tokenizer.bytes_per_token[token]) for token in ids[1:])
    assert found["eval_loss"] == pytest.approx(loss / targets, rel=1e-5)
    assert found["perplexity"] == pytest.approx(math.exp(loss / targets), rel=1e-4)
    assert found["bits_per_byte"] == pytest.approx(loss / math.log(2) / size, rel=1e-5)


def test_classification_keeps_the_models_order_of_labels(tmp_path: Path) -> None:
    names = ["z", "a", "m"]  # neither sorted nor in the order of the data
    folder = saved(tmp_path / "model", GPTJForSequenceClassification, id2label=dict(enumerate(names)), pad_token_id=0)
    labels = ["a", "m", "a", "z", "z"]
    data = tmp_path / "texts.csv"
    with data.open("w", newline="") as file:
        csv.writer(file).writerows([("text", "kind"), *zip(TEXTS, labels, strict=True)])
    found = measured(config(folder, data, "data.label_field=kind", "batch_size=3"), tmp_path / "out")

    tokenizer = Tokenizer.load(folder)
    theirs = transformers.AutoModelForSequenceClassification.from_pretrained(folder).eval()
    with torch.no_grad():
        logits = torch.cat([theirs(torch.tensor([tokenizer.encode(text)])).logits for text in TEXTS])
    lines = [json.loads(line) for line in (tmp_path / "out/predictions.jsonl").read_text().splitlines()]
    scores = torch.tensor([[line["scores"][name] for name in names] for line in lines])
    torch.testing.assert_close(scores, logits.softmax(1))
    assert [line["label"] for line in lines] == labels
    assert [line["predicted"] for line in lines] == [names[label] for label in logits.argmax(1)]
    ids = torch.tensor([names.index(label) for label in labels])
    assert found["eval_loss"] == pytest.approx(F.cross_entropy(logits, ids).item(), rel=1e-5)
    assert found["accuracy"] == pytest.approx((logits.argmax(1) == ids).float().mean().item())


def test_question_answering_on_two_ranks(tmp_path: Path) -> None:
    folder = saved(tmp_path / "model", GPTJForQuestionAnswering)
    records = [
        {"id": str(number), "question": "is it?", "context": text, "answers": {"text": ["is"], "answer_start": [at]}}
        for number, text in enumerate(TEXTS)
        if (at := text.find("is")) >= 0
    ]
    data = tmp_path / "questions.jsonl"
    data.write_text("".join(json.dumps(record) + "\n" for record in records))
    sizes = ["task.doc_stride=8", "task.max_question_tokens=8", "batch_size=2"]
    alone = measured(config(folder, data, *sizes), tmp_path / "alone")
    arguments = [f"checkpoint={folder}", f"data.validation={data}", f"output_dir={tmp_path}/shared", *sizes]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone"]
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [*launcher, "recipes/evaluate.py", *arguments]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    shared = json.loads((tmp_path / "shared/metrics.json").read_text())
    assert shared == pytest.approx(alone, rel=1e-5)
    assert done.stdout.count("exact_match ") == 1
    answers = [json.loads((tmp_path / side / "predictions.json").read_text()) for side in ("alone", "shared")]
    assert answers[0] == answers[1]
    assert answers[0].keys() == {record["id"] for record in records}


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("trunk", "GPTJModel has no head to evaluate"),
        ("foreign", r"architectures is \['LlamaForCausalLM'\]; it must name one of GPTJModel, GPTJForCausalLM"),
        ("long", r"sequence_length 64 exceeds the model's n_positions \(48\)"),
        ("label", "label 'b' is none of x, y"),
    ],
)
def test_what_cannot_be_evaluated(tmp_path: Path, case: str, message: str) -> None:
    classes = {"trunk": GPTJModel, "label": GPTJForSequenceClassification}
    more = {"id2label": {0: "x", 1: "y"}, "pad_token_id": 0} if case == "label" else {}
    folder = saved(tmp_path / "model", classes.get(case, GPTJForCausalLM), **more)
    if case == "foreign":
        config_json = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config_json | {"architectures": ["LlamaForCausalLM"]}))
    data = tmp_path / "texts.jsonl"
    data.write_text('{"text": "a", "label": "b"}\n')
    with pytest.raises(ValueError, match=message):
        build_task(config(folder, data, *(["sequence_length=64"] if case == "long" else [])))
