"""Every Python block of docs/export.md runs, in order and in one folder, on small exports."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

import gptj_train
from gptj_train import GPTJConfig
from gptj_train.data.chat_template import DEFAULT, to_jinja
from gptj_train.data.tokenizer import Tokenizer
from gptj_train.export.model_card import CardFacts, model_card
from gptj_train.training.model_files import ModelFiles

PAGE = Path(__file__).parents[2] / "docs" / "export.md"
BLOCKS = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(), re.MULTILINE | re.DOTALL)
KINDS = {"text": "GPTJForCausalLM", "chat": "GPTJForCausalLM", "qa": "GPTJForQuestionAnswering"}


@pytest.fixture
def exports(tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> Path:
    ids = {"eos_token_id": 0, "bos_token_id": 0, "pad_token_id": 359}
    shape = {"vocab_size": 360, "n_positions": 48, "n_embd": 32, "n_layer": 2, "n_head": 2, "rotary_dim": 16}
    for name, kind in KINDS.items():
        folder = tmp_path / name / "export"
        folder.mkdir(parents=True)
        model = getattr(gptj_train, kind)(GPTJConfig(**shape, **ids))
        model.save_pretrained(folder)
        own = Tokenizer.from_json(tokenizer.to_json(), tokenizer.eos_token)
        own.chat_template = to_jinja(DEFAULT) if name == "chat" else None
        ModelFiles(model.config, kind, own).save(folder, torch.float32)
        (folder / "README.md").write_text(model_card(kind, CardFacts(table={"data": "none"}, chat=name == "chat")))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_blocks_run(exports: Path) -> None:
    assert len(BLOCKS) == 4
    names: dict[str, Any] = {}
    for number, block in enumerate(BLOCKS):
        exec(compile(block, f"docs/export.md block {number}", "exec"), names)
    assert len(names["texts"]) == 2
    # A batch is padded before its texts, or generation would continue after the padding.
    assert names["texts"][1].startswith("<|extratoken_20|>")
    assert len(names["result"][0].sequences_ids[0]) > 0


@pytest.mark.parametrize("name", ["text", "chat"])
def test_the_cards_example_runs(exports: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    card = (exports / name / "export" / "README.md").read_text()
    example = card.partition("```python\n")[2].partition("```")[0].replace("max_new_tokens=50", "max_new_tokens=3")
    exec(example.replace("this folder", f"{name}/export"), {})
    assert ("Once upon a time" if name == "text" else "### user\nHello") in capsys.readouterr().out


def test_lengths_sides_and_merges(exports: Path) -> None:
    theirs = AutoTokenizer.from_pretrained(exports / "text" / "export")
    assert theirs.model_max_length == 48
    assert theirs("a b " * 100, truncation=True)["input_ids"].__len__() == 48
    assert theirs.padding_side == "left"
    assert AutoTokenizer.from_pretrained(exports / "qa" / "export").padding_side == "right"
    values = json.loads((exports / "text" / "export" / "tokenizer.json").read_text())
    assert values["model"]["merges"]
    assert all(isinstance(merge, str) and merge.count(" ") == 1 for merge in values["model"]["merges"])
    lines = (exports / "text" / "export" / "merges.txt").read_text().splitlines()
    assert lines == ["#version: 0.2", *values["model"]["merges"]]


def test_gpt2s_two_files_give_the_same_ids(exports: Path, tmp_path: Path, tokenizer: Tokenizer) -> None:
    """As slow readers take them."""
    (tmp_path / "slow").mkdir()
    for name in ("vocab.json", "merges.txt"):
        (tmp_path / "slow" / name).write_bytes((exports / "text" / "export" / name).read_bytes())
    slow = Tokenizer.load(tmp_path / "slow")
    text = "Grüße 🙂 from  the lazy dog, isn't it?\n\n\tdef hello(name):"
    assert slow.encode(text) == tokenizer.encode(text)
    assert len(slow) == 360


def test_front_matter() -> None:
    import yaml

    facts = CardFacts(table={}, base="EleutherAI/gpt-j-6b", license="apache-2.0", language="en", results={"f1": 88.5})
    _, front, _ = model_card("GPTJForQuestionAnswering", facts).split("---\n", 2)
    values = yaml.safe_load(front)
    assert values["base_model"] == "EleutherAI/gpt-j-6b"
    assert (values["license"], values["language"], values["library_name"]) == ("apache-2.0", "en", "transformers")
    assert "pipeline_tag" not in values  # Transformers 5 has no such pipeline
    (result,) = values["model-index"][0]["results"]
    assert result["metrics"] == [{"type": "f1", "value": 88.5}]
    assert result["task"] == {"type": "question-answering"}
