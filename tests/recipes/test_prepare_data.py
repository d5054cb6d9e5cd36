"""recipes/prepare_data.py prepares token stores, reports what they contain, and prints windows."""

from __future__ import annotations

import json
import runpy
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from gptj_train.data.tokenizer import Tokenizer

RECIPE = Path(__file__).parents[2] / "recipes" / "prepare_data.py"
Command = Callable[..., str]


@pytest.fixture
def place(tmp_path: Path) -> Path:
    texts = [f"a text of a few, number {number}" for number in range(50)]
    for split, part in (("train", texts[:40]), ("held_out", texts[40:])):
        records = [{"text": text, "meta": {"pile_set_name": "AB"[number % 2]}} for number, text in enumerate(part)]
        (tmp_path / f"{split}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    (tmp_path / "tokenizer").mkdir()
    Tokenizer.train(texts, 300).save(tmp_path / "tokenizer")
    return tmp_path


@pytest.fixture
def prepare_data(place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    def run(*changes: str) -> str:
        paths = {"tokenizer": "tokenizer", "data.train": "train.jsonl", "data.validation": "held_out.jsonl"}
        given = [f"{key}={place / name}" for key, name in paths.items()] + [f"data.cache_dir={place}/cache"]
        arguments = ["+config=quickstart", *given, "sequence_length=64", *changes]
        monkeypatch.setattr(sys, "argv", [str(RECIPE), *arguments])
        with pytest.raises(SystemExit) as caught:
            runpy.run_path(str(RECIPE), run_name="__main__")
        out, err = capsys.readouterr()
        assert (caught.value.code, err) == (0, "")
        return out

    return run


def test_it_reports_what_became_of_the_data(prepare_data: Command, place: Path) -> None:
    out = prepare_data()
    lines = out.splitlines()
    assert lines[0] == "train"
    assert lines[1].startswith("  data              40 documents, 1.0 kB, ")
    assert lines[2] == "  records           text (in 'text')"
    assert lines[5] == "validation"
    assert lines[-1] == "  components        A 50.0%, B 50.0%"
    stores = sorted((place / "cache").glob("*/store.json"))
    assert len(stores) == 2
    times = [store.stat().st_mtime_ns for store in stores]
    # Neither another window length nor printing windows tokenizes again.
    assert prepare_data("sequence_length=128", "data.packing=best_fit", "data.weights={B: 1}", "inspect=1") != out
    assert [store.stat().st_mtime_ns for store in sorted((place / "cache").glob("*/store.json"))] == times


def test_windows_are_printed(prepare_data: Command) -> None:
    facts, first, second = prepare_data("inspect=2").split("--- window ")
    assert "[1]" not in facts
    for window in (first, second):
        number, rest = window.split(" of ", 1)
        assert number.isdigit()
        assert "\n[1] " in rest
        assert "\n[2] a text of a few, number " in rest
        assert "\033" not in rest
