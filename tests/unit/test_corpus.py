"""The text of a run: its splits and components, every token accounted for, and rendered windows."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import pytest
from text_data import jsonl, text_data

from gptj_train.data.corpus import TextData, prepare
from gptj_train.data.inspection import render_windows
from gptj_train.data.tokenizer import Tokenizer
from gptj_train.errors import UserError


def record(text: str, component: str) -> dict[str, Any]:
    return {"text": text, "meta": {"pile_set_name": component}}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    jsonl(tmp_path / "train.jsonl", *(record(f"text {n} " * 9, "AAB"[n % 3]) for n in range(60)))
    jsonl(tmp_path / "held_out.jsonl", record("another text", "B"), record("and one more", "C"))
    (tmp_path / "old.txt").write_text("known before")
    return tmp_path


@pytest.fixture
def prepared(folder: Path, tokenizer: Tokenizer) -> Any:
    def prepare_it(length: int = 16, **changes: Any) -> TextData:
        paths = {"train": "train.jsonl", "validation": "held_out.jsonl", "forgetting": "old.txt"} | {
            key: changes.pop(key) for key in ("train", "validation", "forgetting") if key in changes
        }
        given = {key: str(folder / name) if isinstance(name, str) else name for key, name in paths.items()}
        return prepare(text_data(cache_dir=str(folder / "cache"), **given, **changes), tokenizer, length)

    return prepare_it


def test_splits_and_components(prepared: Any, tokenizer: Tokenizer) -> None:
    data = prepared()
    assert list(data.splits) == ["train", "validation", "forgetting"]
    assert list(data.train.windows) == [""]
    assert data.weights is None
    assert data.train.windows[""].facts.documents == 60
    assert list(data.held_out) == ["B", "C", "forgetting"]
    texts = {name: tokenizer.decode(windows[0].tokens.tolist()) for name, windows in data.held_out.items()}
    assert texts == {"B": "another text", "C": "and one more", "forgetting": "known before"}


def test_weights_choose_the_components(prepared: Any) -> None:
    data = prepared(weights={"B": 3, "A": 1})
    assert data.weights == [3, 1]
    assert {name: windows.facts.documents for name, windows in data.train.windows.items()} == {"B": 20, "A": 40}


def test_components_without_weight_are_named(prepared: Any) -> None:
    assert dict(prepared(weights={"B": 1}).train.facts())["data"].endswith("; without A, not in data.weights")
    assert "without" not in dict(prepared().train.facts())["data"]


def test_packing_is_chosen(prepared: Any) -> None:
    contiguous = prepared(packing="contiguous").train.windows[""]
    assert contiguous.padding < 16  # only in the last window
    best_fit = prepared(packing="best_fit").train.windows[""]
    assert best_fit.padding > 16  # where no document fits


@pytest.mark.parametrize("nothing", [None, []])
def test_without_held_out_text(prepared: Any, nothing: list[str] | None) -> None:
    assert prepared(validation=nothing, forgetting=nothing).held_out == {}


def test_only_held_out_text(prepared: Any) -> None:
    data = prepared(train=None)
    assert list(data.held_out) == ["B", "C", "forgetting"]
    with pytest.raises(UserError, match=r"data\.train is null; give files to train on"):
        _ = data.train


@pytest.mark.parametrize(("train", "validation"), [("train.jsonl", "gone"), ("gone", "held_out.jsonl"), ([], None)])
def test_all_files_are_found_before_any_is_read(prepared: Any, folder: Path, train: Any, validation: Any) -> None:
    with pytest.raises(UserError, match="^data.validation: no" if validation == "gone" else "^data.train"):
        prepared(train=train, validation=validation)
    assert not (folder / "cache").exists()


@pytest.mark.parametrize("length", [-1, 0, 1])
def test_lengths_that_make_no_windows(prepared: Any, length: int) -> None:
    with pytest.raises(UserError, match=f"sequence_length must be at least 2, got {length}"):
        prepared(length)


def test_a_weight_without_its_component(prepared: Any) -> None:
    with pytest.raises(UserError, match=r"data\.train: nothing to pack of D; the components are A, B$"):
        prepared(weights={"A": 1, "D": 1})


def test_no_component_can_be_named_like_the_forgetting_set(prepared: Any, folder: Path) -> None:
    jsonl(folder / "forgetting.jsonl", "x")
    with pytest.raises(UserError, match=r"data\.validation: no component can be named 'forgetting'; give it as"):
        prepared(validation="forgetting.jsonl")


EXAMPLE = {"prompt": "what is it?", "response": " it is a text"}
LONG = {"prompt": "very long " * 30, "response": " x"}


def test_a_held_out_component_may_be_empty_but_not_a_whole_split(prepared: Any, folder: Path) -> None:
    jsonl(folder / "train.jsonl", EXAMPLE)
    jsonl(folder / "some.jsonl", LONG | {"meta": {"pile_set_name": "long"}}, EXAMPLE)
    data = prepared(48, kind="completion", validation="some.jsonl", forgetting=None)
    assert {name: len(windows) for name, windows in data.held_out.items()} == {"long": 0, "some": 1}
    assert "dropped (nothing to predict within" in dict(data.splits["validation"].facts())["data"]
    jsonl(folder / "none.jsonl", LONG)
    with pytest.raises(
        UserError,
        match=r"data\.validation: nothing to pack of none, \d+ dropped \(nothing to predict within sequence_length\); "
        r"the components are none",
    ):
        prepared(48, kind="completion", validation="none.jsonl", forgetting=None)
    with pytest.raises(UserError, match=r"data\.train: nothing to pack of all of it, \d+ dropped"):
        prepared(48, kind="completion", train="none.jsonl", validation=None, forgetting=None)


def test_facts_account_for_every_token(prepared: Any, folder: Path, tokenizer: Tokenizer) -> None:
    texts = [f"text {n} " * 9 for n in range(60)]
    tokens = sum(len(ids) + 1 for ids in tokenizer.encode_texts(texts))  # EOS ends each
    size = sum(map(len, texts))
    windows = -(-tokens // 16)
    facts = dict(prepared().train.facts())
    assert facts["data"] == (
        f"60 documents, 0.0 MB, {tokens:,} tokens in {windows:,} windows, {tokens / windows / 16:.2%} full"
    )
    assert facts["bytes per token"] == f"{size / tokens:.2f}"
    assert facts["tokens a document"] == "up to 64: 17%, up to 256: 83%"
    assert "components" not in facts
    assert "skipped" not in facts
    with (folder / "train.jsonl").open("a") as lines:
        lines.write("broken\n")
    facts = dict(prepared(weights={"A": 1, "B": 1}, bad_records="skip", max_bad_share=0.1).train.facts())
    assert facts["skipped"] == "1 record: not a line of JSON"
    of_b = sum(len(ids) + 1 for ids in tokenizer.encode_texts(texts[2::3])) / tokens
    assert facts["components"] == f"A {1 - of_b:.1%}, B {of_b:.1%}"


@pytest.mark.parametrize(("tokens", "bin_name"), [(16, "up to 16"), (17, "up to 64"), (2**14, "up to 16,384")])
def test_a_bin_of_document_lengths_includes_its_limit(prepared: Any, folder: Path, tokens: int, bin_name: str) -> None:
    jsonl(folder / "train.jsonl", "\x01" * (tokens - 1))
    assert dict(prepared().train.facts())["tokens a document"] == f"{bin_name}: 100%"


def test_facts_of_examples_that_are_cut(prepared: Any, folder: Path, tokenizer: Tokenizer) -> None:
    jsonl(folder / "train.jsonl", EXAMPLE, LONG, {"prompt": "a", "response": " b" * 200})
    data = prepared(64, kind="completion", validation=None, forgetting=None)
    lengths = [
        sum(len(ids) for ids in tokenizer.encode_texts([row["prompt"], row["response"]])) + 1
        for row in (EXAMPLE, LONG, {"prompt": "a", "response": " b" * 200})
    ]
    assert (
        f" {sum(lengths):,} tokens, {lengths[1]:,} dropped (nothing to predict within sequence_length), "
        f"{lengths[2] - 64:,} dropped (beyond sequence_length) in 2 windows, {(lengths[0] + 64) / 128:.2%} full"
    ) in dict(data.train.facts())["data"]


# --- rendered windows ---


def test_windows_without_colours_where_stdout_is_no_terminal(prepared: Any, folder: Path, tokenizer: Tokenizer) -> None:
    jsonl(folder / "train.jsonl", EXAMPLE, {"prompt": "\x1b[31mred", "response": "\x07\nbell"})
    data = prepared(96, kind="completion", validation=None, forgetting=None)
    (text,) = render_windows(data.train, tokenizer, count=5, seed=0)
    used = sum(windows.facts.tokens for windows in data.train.windows.values())
    first, second = (
        "[{}] {{what is it?}} it is a text⟦<|endoftext|>⟧",
        "[{}] {{\\x1b[31mred}}\\x07\nbell⟦<|endoftext|>⟧",
    )
    drawn = (
        "--- window 0 of 1 ---\n" + "\n".join(part.format(at) for at, part in enumerate(order, start=1))
        for order in ((first, second), (second, first))
    )
    assert text in [f"{one}[{96 - used} of padding]" for one in drawn]


def test_windows_in_colours_on_a_terminal(prepared: Any, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    split = prepared(weights={"A": 1, "B": 1}).train
    plain = list(render_windows(split, tokenizer, count=3, seed=2))
    assert not any("\033" in text for text in plain)
    assert [re.fullmatch(r"--- window \d+ of \d+ ([AB]) ---", text.splitlines()[0])[1] for text in plain] == [*"AAABBB"]
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    coloured = list(render_windows(split, tokenizer, count=3, seed=2))
    assert all("\033[33m" in text and text.count("\033") % 2 == 0 for text in coloured)
    assert [re.sub(r"\033\[\d+m", "", text) for text in coloured] == plain
    assert plain != list(render_windows(split, tokenizer, count=3, seed=3))


def test_no_windows_are_rendered_for_a_count_of_0(prepared: Any, tokenizer: Tokenizer) -> None:
    assert list(render_windows(prepared().train, tokenizer, count=0, seed=0)) == []
