"""recipes/qa.py from end to end: two ranks, more windows than divide, an export that Transformers agrees with."""

from __future__ import annotations

import itertools
import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from gptj_train import GPTJConfig, GPTJForQuestionAnswering
from gptj_train.data.squad import read_files
from gptj_train.data.squad_features import Features
from gptj_train.data.tokenizer import Tokenizer
from gptj_train.export.model_card import CardFacts, model_card
from gptj_train.tasks.question_answering import QATaskConfig, QuestionAnswering, build_features, qa_layout
from gptj_train.training.model_files import ModelFiles

ROOT = Path(__file__).parents[2]
WORDS = ["alpha", "beta", "gamma", "delta", "epsilon", "zeta", "eta", "theta"]


def questions(count: int, offset: int) -> list[dict[str, Any]]:
    """Where a letter comes in a row of them; every third asks for one that does not come."""
    found = []
    for number in range(offset, offset + count):
        row = [WORDS[(number + i) % 8] for i in range(5 + number % 3)]
        context = " ".join(row)
        asked = row[number % 5]
        answers = {"text": [asked], "answer_start": [context.index(asked)]}
        if number % 3 == 0:
            asked, answers = WORDS[(number + 7) % 8], {"text": [], "answer_start": []}
        found.append({"id": str(number), "question": f"Where is {asked}?", "context": context, "answers": answers})
    return found


def example_of(folder: Path) -> str:
    """Return the code in a folder's card without its last line, the call."""
    example = (folder / "README.md").read_text().partition("```python\n")[2].partition("print(answer")[0]
    return example.replace('"this folder"', repr(str(folder)))


@pytest.mark.distributed
def test_a_run_on_two_ranks(tmp_path: Path) -> None:
    for name, records in (("train", questions(40, 0)), ("validation", questions(7, 100))):
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, records)) + "\n")
    (tmp_path / "tokenizer").mkdir()
    Tokenizer.train([" ".join(WORDS) + "\nWhere is it?"] * 3, 300).save(tmp_path / "tokenizer")
    overrides = {
        "output_dir": tmp_path / "run",
        "tokenizer": tmp_path / "tokenizer",
        "data.train": tmp_path / "train.jsonl",
        "data.validation": tmp_path / "validation.jsonl",
        "model.vocab_size": 300,
        "model.n_embd": 32,
        "model.n_layer": 2,
        "model.n_head": 4,
        "model.rotary_dim": 8,
        "sequence_length": 48,
        "task.doc_stride": 16,
        "task.max_question_tokens": 12,
        "global_batch_size": 8,
        "micro_batch_size": 2,
        "max_steps": 3,
        "export_dtype": "fp32",
    }
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    launcher = [sys.executable, "-m", "deepspeed.launcher.runner", "--num_gpus", "2", "--master_port", port]
    arguments = ["recipes/qa.py", "+config=qa_quickstart", *(f"{key}={value}" for key, value in overrides.items())]
    env = os.environ | {"DS_ACCELERATOR": "cpu", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([*launcher, *arguments], cwd=ROOT, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr

    run = tmp_path / "run"
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == [1, 2, 3]
    assert [line["windows"] for line in lines if "loss" in line] == [8, 16, 24]
    # Tokens, not windows: every window has more than ten, and at most 48.
    assert all(80 < line["tokens"] / line["step"] < 8 * 48 for line in lines if "loss" in line)
    evaluations = [line for line in lines if "eval_loss" in line]
    assert [line["step"] for line in evaluations] == [0, 3]
    assert evaluations[1]["eval_loss"] < evaluations[0]["eval_loss"]
    assert all(0 <= evaluations[1][name] <= 100 for name in ("exact_match", "f1", "has_answer_f1"))
    predictions = json.loads((run / "predictions.json").read_text())
    assert predictions.keys() == {str(number) for number in range(100, 107)}
    # The exported folder alone gives the same answers, by the function in its card. It computes in bf16 as the run did.
    names: dict[str, Any] = {}
    exec(example_of(run / "export"), names)
    for question in questions(7, 100):
        found = names["answer"](
            names["model"].bfloat16(), names["tokenizer"], question["question"], question["context"]
        )
        assert found == predictions[question["id"]]

    features = Features(
        read_files([tmp_path / "validation.jsonl"], "data.validation", bad_records="error", max_bad_share=0),
        Tokenizer.load(run / "export"),
        length=48,
        doc_stride=16,
        max_question_tokens=12,
        repeat_context=False,
    )
    assert len(features) == 7  # not a multiple of 2 ranks x 2 rows
    config = QATaskConfig(
        doc_stride=16,
        max_question_tokens=12,
        max_answer_tokens=30,
        n_best=20,
        null_threshold=0.0,
        repeat_context=False,
    )
    task = QuestionAnswering(validation=features, config=config, batch_size=2)
    ours = GPTJForQuestionAnswering.from_pretrained(run / "export")
    theirs = transformers.AutoModelForQuestionAnswering.from_pretrained(run / "export").eval()
    summed_loss = 0.0
    for batch in itertools.chain(task.evaluation_batches(0, 2), task.evaluation_batches(1, 2)):
        with torch.no_grad():
            mine, other = ours(**batch.inputs, num_items_in_batch=1.0), theirs(**batch.inputs)
        torch.testing.assert_close(mine.start_logits, other.start_logits, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(mine.end_logits, other.end_logits, rtol=1e-4, atol=1e-5)
        summed_loss += mine.loss.item()
    assert summed_loss / 7 == pytest.approx(evaluations[1]["eval_loss"], rel=0.02)  # the run computes in bf16


def test_the_model_cards_function_answers_as_we_do(tmp_path: Path) -> None:
    """With Transformers alone: windows, "no answer", accents and special tokens in the text."""
    records = questions(24, 0)
    for record in records[::2]:
        record["context"] = "Grüße 🙂 <|endoftext|> " + " ".join([record["context"]] * 8)
        record["answers"] = {"text": [], "answer_start": []}
    (tmp_path / "validation.jsonl").write_text("\n".join(map(json.dumps, records)) + "\n")
    tokenizer = Tokenizer.train([" ".join(WORDS) + "\nWhere is it?"] * 3, 300)
    ids = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 319}
    shape = {"vocab_size": 320, "n_positions": 64, "n_embd": 32, "n_layer": 2, "n_head": 4, "rotary_dim": 8}
    read = read_files([tmp_path / "validation.jsonl"], "data.validation", bad_records="error", max_bad_share=0)
    answered = 0
    for number, copies in enumerate((False, True)):
        torch.manual_seed(number)
        config = QATaskConfig(
            doc_stride=8,
            max_question_tokens=9,
            max_answer_tokens=5,
            n_best=20,
            null_threshold=-1.0,
            repeat_context=copies,
        )
        layout = {"qa_layout": qa_layout(config, 60)}
        model = GPTJForQuestionAnswering(GPTJConfig(**shape, **ids, num_labels=2, extra=layout))
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += 0.2 * torch.randn_like(parameter)
        folder = tmp_path / f"export{number}"
        folder.mkdir()
        model.save_pretrained(folder)
        ModelFiles(model.config, "GPTJForQuestionAnswering", tokenizer).save(folder, torch.float32)
        task = QuestionAnswering(validation=build_features(read, tokenizer, 60, config), config=config, batch_size=4)
        evaluated = []
        for batch in task.evaluation_batches(0, 1):
            with torch.no_grad():
                evaluated += task.records(model.eval()(**batch.inputs, num_items_in_batch=1.0), batch)
        task.metrics(evaluated)
        # The card's own text is run, in which a changed function would show.
        (folder / "README.md").write_text(model_card("GPTJForQuestionAnswering", CardFacts(table={})))
        names: dict[str, Any] = {}
        exec(example_of(folder), names)
        found = {}
        for question in read:
            found[question.id] = names["answer"](
                names["model"].eval(), names["tokenizer"], question.question, question.context
            )
        assert found == task.predictions
        answered += sum(bool(text) for text in found.values())
    assert 0 < answered < 2 * len(read)
