"""Instruction data: recognised from its first records, said in one line, and nothing left out silently."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import datasets
import pytest
from text_data import jsonl, text_data

from gptj_train.data.corpus import TextData, prepare
from gptj_train.data.inspection import render_windows
from gptj_train.data.sources import read_segments
from gptj_train.data.tokenizer import Tokenizer
from gptj_train.errors import UserError

TEMPLATE = "<{role}>{content}\n"
USER, ASSISTANT = {"role": "user", "content": "one"}, {"role": "assistant", "content": "two"}


@pytest.fixture
def prepared(tmp_path: Path, tokenizer: Tokenizer) -> Any:
    def prepare_it(path: Path, kind: str = "auto", **changes: Any) -> TextData:
        given = {"chat_template": TEMPLATE} | changes
        data = text_data(train=str(path), kind=kind, cache_dir=str(tmp_path / "cache"), **given)
        return prepare(data, tokenizer, 64)

    return prepare_it


def learned(data: TextData, tokenizer: Tokenizer) -> list[tuple[str, str]]:
    """(what is read, what is predicted) of each document; of several runs, each joined."""
    found = []
    (windows,) = data.train.windows.values()
    for number in range(len(windows)):
        window = windows[number]
        for document in range(1, int(window.document_ids.max()) + 1):
            parts = []
            for target in (False, True):
                ids = window.tokens[(window.document_ids == document) & (window.targets == target)]
                parts.append(tokenizer.decode(ids.tolist()))
            found.append((parts[0], parts[1]))
    return sorted(found)


FORMATS: dict[str, tuple[dict[str, Any], tuple[str, str]]] = {
    "Alpaca": ({"instruction": "Sort", "input": "b a", "output": "a b"}, ("Sort\nb a\n", "a b")),
    "Alpaca without input": ({"instruction": "Sort", "input": "", "output": "a b"}, ("Sort\n", "a b")),
    "Dolly": ({"instruction": "Say", "context": "x", "response": "y"}, ("Say\nx\n", "y")),
    "prompt and completion": ({"prompt": "one?", "completion": " two"}, ("one?", " two")),
    "prompt and response": ({"prompt": "one?", "response": " two"}, ("one?", " two")),
    "OpenAI": ({"messages": [USER, ASSISTANT]}, ("<user>one\n<assistant>", "two\n")),
    "ShareGPT": (
        {"conversations": [{"from": "human", "value": "one"}, {"from": "gpt", "value": "two"}]},
        ("<user>one\n<assistant>", "two\n"),
    ),
    "system and tool": (
        {
            "messages": [
                {"role": "system", "content": "be"},
                USER,
                {"role": "tool", "content": "3"},
                ASSISTANT,
            ]
        },
        ("<system>be\n<user>one\n<tool>3\n<assistant>", "two\n"),
    ),
    "parts of text": (
        {
            "messages": [
                {"role": "user", "content": [{"type": "text", "text": "o"}, {"text": "ne"}]},
                {"role": "assistant", "content": [{"type": "text", "text": "two"}]},
            ]
        },
        ("<user>one\n<assistant>", "two\n"),
    ),
    "messages by another name": (
        {"dialog": [{"from": "human", "value": "one"}, {"from": "gpt", "value": "two"}]},
        ("<user>one\n<assistant>", "two\n"),
    ),
    "messages inside another field": ({"sample": {"turns": [USER, ASSISTANT]}}, ("<user>one\n<assistant>", "two\n")),
    "weight 0": (
        {"messages": [USER, {"role": "assistant", "content": "BAD", "weight": 0}, USER, {**ASSISTANT, "weight": 1}]},
        ("<user>one\n<assistant>BAD\n<user>one\n<assistant>", "two\n"),
    ),
    "train false": (
        {"messages": [USER, {"role": "assistant", "content": "BAD", "train": False}, {**ASSISTANT, "train": True}]},
        ("<user>one\n<assistant>BAD\n<assistant>", "two\n"),
    ),
}


@pytest.mark.parametrize("form", ["lines", "array", "parquet"])
@pytest.mark.parametrize(("record", "expected"), FORMATS.values(), ids=FORMATS)
def test_a_format_is_recognised_and_said(
    prepared: Any,
    tokenizer: Tokenizer,
    tmp_path: Path,
    record: dict[str, Any],
    expected: tuple[str, str],
    form: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    file = tmp_path / "a.jsonl"
    if form == "lines":
        jsonl(file, record, record)
    elif form == "array":
        file = tmp_path / "a.json"
        file.write_text(json.dumps([record, record], indent=2))
    else:
        file = tmp_path / "a.parquet"
        datasets.Dataset.from_list([record, record]).to_parquet(file)
    assert learned(prepared(file), tokenizer) == [expected] * 2
    (said,) = capsys.readouterr().out.splitlines()
    assert said.startswith("data.train: records recognised as c")
    assert "not read" not in said


def test_plain_text_is_nothing_to_say(prepared: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = prepared(jsonl(tmp_path / "a.jsonl", {"text": "a text", "prompt": 5, "n": 1, "note": ""}))
    assert capsys.readouterr().out == ""
    assert dict(data.train.facts())["records"] == "text (in 'text')"


def test_fields_with_text_that_is_not_read_are_named_once(
    prepared: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    records = [{"prompt": "p", "response": "r", "input": "lost", "ti\x1btle": "t"}] * 3
    prepared(jsonl(tmp_path / "a.jsonl", *records), kind="completion")
    assert capsys.readouterr().out == "data.train: text that is not read, in the fields input, ti\\x1btle\n"


def test_a_kind_that_is_given_stays_and_its_fields_are_recognised(
    prepared: Any, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    file = jsonl(tmp_path / "a.jsonl", {"text": "t", "messages": [USER, ASSISTANT], "prompt": "p", "completion": "c"})
    assert learned(prepared(file), tokenizer) == [("", "t")]
    assert learned(prepared(file, kind="completion"), tokenizer) == [("p", "c")]
    assert learned(prepared(file, kind="chat"), tokenizer) == [("<user>one\n<assistant>", "two\n")]
    with pytest.raises(
        UserError, match=r"a.jsonl:1: no text in field 'body'; the record is a chat: set data.kind=chat"
    ):
        prepared(file, kind="text", text_field="body")


@pytest.mark.parametrize(
    ("prompt_field", "prompt"),
    [
        (["a", "b"], "one\ntwo\n"),
        (["b", "none", "a"], "two\none\n"),
        ("{a}\n{b}\n", "one\ntwo\n"),
        (r"Q: {a}\nA: ", "Q: one\nA: "),  # as a shell passes it
        ("{a}{none} {b}", "one two"),
        ("a", "one"),
    ],
)
def test_a_prompt_of_several_fields(
    prepared: Any, tokenizer: Tokenizer, tmp_path: Path, prompt_field: Any, prompt: str
) -> None:
    file = jsonl(tmp_path / "a.jsonl", {"a": "one", "b": "two", "c": "x"})
    found = prepared(file, kind="completion", prompt_field=prompt_field, response_field="c")
    assert learned(found, tokenizer) == [(prompt, "x")]


def test_what_a_field_holds_is_no_template(prepared: Any, tokenizer: Tokenizer, tmp_path: Path) -> None:
    file = jsonl(tmp_path / "a.jsonl", {"a": r"{b}\n", "b": "two", "c": "x"})
    found = prepared(file, kind="completion", prompt_field="{a}{b}", response_field="c")
    assert learned(found, tokenizer) == [(r"{b}\ntwo", "x")]


BAD = {
    "nothing in any field": ({"instruction": "", "input": "", "output": "x"}, "no text in fields instruction, input"),
    "a field of numbers": ({"instruction": "a", "input": 3, "output": "x"}, "no text in field 'input'"),
    "half a weight": ({"messages": [USER, {**ASSISTANT, "weight": 0.5}]}, "a message whose weight is neither 0 nor 1"),
    "an image": (
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}, ASSISTANT]},
        "a message with parts that are no text",
    ),
    "a tool call": (
        {"messages": [USER, {"role": "assistant", "content": None, "tool_calls": [{"id": "1"}]}]},
        "a message with tool calls; write the call as text",
    ),
    "nothing to learn": ({"messages": [USER, {**ASSISTANT, "weight": 0}]}, "nothing said by the assistant"),
}


@pytest.mark.parametrize(("record", "message"), BAD.values(), ids=BAD)
def test_a_bad_example_is_named(prepared: Any, tmp_path: Path, record: dict[str, Any], message: str) -> None:
    good = {"instruction": "a", "input": "b", "output": "c"} if "output" in record else {"messages": [USER, ASSISTANT]}
    with pytest.raises(UserError, match=message) as caught:
        prepared(jsonl(tmp_path / "a.jsonl", good, record))
    assert str(caught.value).startswith(f"{tmp_path}/a.jsonl:2: ")


def test_each_split_has_its_own_format(prepared: Any, tmp_path: Path) -> None:
    chat = jsonl(tmp_path / "chat.jsonl", {"messages": [USER, ASSISTANT]})
    (tmp_path / "known.txt").write_text("known before")
    data = prepared(chat, forgetting=str(tmp_path / "known.txt"))
    assert [dict(split.facts())["records"][:4] for split in data.splits.values()] == ["chat", "text"]


# --- arrays of JSON ---


@pytest.mark.parametrize("chunk", [1, 7, 4096])
def test_an_array_is_read_record_by_record(tmp_path: Path, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gptj_train.data.files._CHUNK", chunk)
    texts = ['a ]}{[ \\" \u2028 é🙂', "b\n" * 50, "12"]
    file = tmp_path / "a.json"
    file.write_bytes(
        b"\xef\xbb\xbf\r\n" + json.dumps([{"text": text} for text in texts], indent=1, ensure_ascii=False).encode()
    )
    read: list[int] = []
    found = read_segments(file, text_data(), skipped=Counter(), progress=read.append)
    assert [segment.text for segment in found] == texts
    assert sum(read) == file.stat().st_size


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('[{"text": "a"},\n{"text": "b"}', ":2: not JSON (the file ends too early)"),
        ('[{"text": "a"},\n{"text": "b"} {"text": "c"}]', ":2: not JSON (']' expected, found '{')"),
        ('[{"text": "a"},\n\n{"text": b}]', ":3: not JSON (Expecting value"),
        ('[{"text": "a"}]\n{"text": "b"}', ":2: not JSON (something follows the end of the list)"),
        ('[{"text": "a"},\n5]', ":2: not a record; write a JSON object"),
        ('[{"text": "a"},\n{"text": ""}]', ":2: no text in field 'text'"),
    ],
)
def test_a_fault_in_an_array_is_named_by_its_line(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "a.json").write_text(content)
    with pytest.raises(UserError, match=r"\S") as caught:
        list(read_segments(tmp_path / "a.json", text_data(), skipped=Counter(), progress=lambda read: None))
    assert str(caught.value).startswith(f"{tmp_path}/a.json{message}")


def test_a_byte_order_mark_is_no_part_of_a_txt(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfhello \xef\xbb\xbfthere")
    (segment,) = read_segments(tmp_path / "a.txt", text_data(), skipped=Counter(), progress=lambda read: None)
    assert segment.text == "hello \ufeffthere"


# --- special tokens in the data ---


@pytest.mark.parametrize("how", ["text", "tokens"])
def test_special_tokens_in_data_are_counted_said_and_shown(
    prepared: Any, tokenizer: Tokenizer, tmp_path: Path, how: str, capsys: pytest.CaptureFixture[str]
) -> None:
    file = jsonl(tmp_path / "a.jsonl", "a<|endoftext|>b<|endoftext|>", "plain < text")
    data = prepared(file, special_tokens=how)
    said = capsys.readouterr().out
    read_as, other = ("plain text", "tokens") if how == "text" else ("their single ids", "text")
    assert said == (
        f"data.train: spells special tokens, read as {read_as} (2 x <|endoftext|>); data.special_tokens={other} "
        "changes it\n"
    )
    assert dict(data.train.facts())["special tokens"] == "2 x <|endoftext|> in the data"
    (windows,) = data.train.windows.values()
    single_ids = int((windows[0].tokens == tokenizer.eos_id)[windows[0].document_ids > 0].sum())
    assert single_ids == (2 if how == "text" else 4)
    (shown,) = render_windows(data.train, tokenizer, count=1, seed=0)
    assert ("a<|endoftext|>b" in shown) is (how == "text")
    assert ("a⟦<|endoftext|>⟧b" in shown) is (how == "tokens")
