"""environment.json says what made a run, and keeps no secret; cards say what base they have, and keep no path."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import yaml

from gptj_train.environment import describe_environment, describe_host
from gptj_train.export.card_facts import base_path, card_facts
from gptj_train.export.model_card import model_card
from gptj_train.weights.hf_writer import parse_size


def rank_on(host: str, gpu: str | None) -> dict[str, object]:
    return {"host": host, "cores": 2, "memory_gib": 24.0, "gpu": gpu and {"name": gpu, "memory_gib": 79.1}}


def test_ranks_are_grouped_by_host() -> None:
    found = describe_environment([rank_on("a", "H100"), rank_on("a", "H100"), rank_on("b", None)])
    assert found["ranks"] == 3
    assert [(host["host"], host["ranks"], len(host["gpus"])) for host in found["hosts"]] == [("a", 2, 2), ("b", 1, 0)]
    assert found["versions"]["python"].startswith("3.")
    assert len(found["git"]["commit"]) == 40


def test_no_secret_is_written(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "topsecret1")
    monkeypatch.setattr(sys, "argv", ["/home/me/clm.py", "data.train=https://me:topsecret2@host/x", "a b"])
    found = describe_environment([describe_host()])
    assert "topsecret" not in json.dumps(found)
    assert found["command"] == "clm.py data.train=https://***@host/x 'a b'"


def test_base_license_and_language_are_those_of_the_bases_card(tmp_path: Path) -> None:
    base = tmp_path / "private" / "gpt-j-6B"
    base.mkdir(parents=True)
    (base / "README.md").write_text("---\nlicense: apache-2.0\nlanguage:\n- en\n---\n# GPT-J\n")
    (base / "config.json").write_text("{}")
    facts = card_facts({}, run=tmp_path, base=str(base), chat=False)
    assert (facts.base, facts.license, facts.language) == ("gpt-j-6B", "apache-2.0", "en")
    (base / "config.json").write_text('{"_name_or_path": "EleutherAI/gpt-j-6b"}')
    assert card_facts({}, run=tmp_path, base=str(base), chat=False).base == "EleutherAI/gpt-j-6b"
    (base / "README.md").write_text("---\nlicense: [\n---\n")
    assert card_facts({}, run=tmp_path, base=str(base), chat=False).license is None


@pytest.mark.parametrize(
    ("data", "names"),
    [
        ("{train: /private/a.jsonl}", ()),
        ("{dataset: squad, train: null}", ("squad",)),
        ("{train: [hf://datasets/me/texts/a.jsonl, 'hf://datasets/me/texts@main/b.jsonl', /c.jsonl]}", ("me/texts",)),
        ("[1]", ()),
    ],
)
def test_datasets_of_the_hub_are_named_in_the_card(tmp_path: Path, data: str, names: tuple[str, ...]) -> None:
    (tmp_path / "config.yaml").write_text(f"data: {data}\n")
    facts = card_facts({}, run=tmp_path, base=None, chat=False)
    assert facts.datasets == names
    _, front, _ = model_card("GPTJForCausalLM", facts).split("---\n", 2)
    assert yaml.safe_load(front).get("datasets", []) == list(names)


def test_the_base_of_adapters_is_found_from_everywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "models" / "a").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert base_path("models/a") == str(tmp_path / "models" / "a")
    assert base_path("EleutherAI/gpt-j-6b") == "EleutherAI/gpt-j-6b"
    assert base_path(None) is None


@pytest.mark.parametrize(("text", "size"), [("5GB", 5_000_000_000), ("500 mb", 500_000_000), ("1.5GB", 1_500_000_000)])
def test_sizes(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["5", "GB", "0.1MB", "-1GB", "5GiB", ""])
def test_sizes_that_are_none(text: str) -> None:
    with pytest.raises(ValueError, match="export_shard_size must be a size from 1MB on, such as 5GB"):
        parse_size(text)
