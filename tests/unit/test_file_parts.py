"""A large file in parts: each line in one of them, with its number in the file, and the same tokens as the whole."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from text_data import jsonl, text_data

from gptj_train.data import file_parts, preparation
from gptj_train.data.corpus import prepare
from gptj_train.data.file_parts import FilePart, PlaceInPart, lines_of, parts_of
from gptj_train.data.preparation import open_stores
from gptj_train.data.tokenizer import Tokenizer
from gptj_train.errors import UserError

DOCUMENTS = [f"Document {number}: " + "naïve words, 東京 🙂 " * (number % 7) for number in range(300)]


def read(part: FilePart) -> list[tuple[str, bytes]]:
    return [(str(PlaceInPart(part, number)), line) for number, line in lines_of(part, lambda size: None)]


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.binary(max_size=9).map(lambda line: line.replace(b"\n", b"")), max_size=9), st.booleans(), st.data())
def test_every_line_is_in_one_part(tmp_path: Path, lines: list[bytes], ended: bool, data: st.DataObject) -> None:
    content = b"\n".join(lines) + (b"\n" if ended else b"")
    file = tmp_path / "lines.jsonl"
    file.write_bytes(content)
    size = data.draw(st.integers(1, max(1, len(content))))
    parts = [FilePart(file, begin, min(begin + size, len(content))) for begin in range(0, len(content), size)]
    found = [line for part in parts for line in read(part)]
    expected = content.split(b"\n")
    if expected[-1] == b"":
        expected.pop()
    assert found == [(f"{file}:{number}", line) for number, line in enumerate(expected, start=1)]


@pytest.fixture
def _small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(file_parts, "PART", 3000)
    monkeypatch.setattr(preparation, "_SMALL", 0)


@pytest.mark.usefixtures("_small_parts")
def test_parts_give_the_tokens_and_windows_of_the_whole(tmp_path: Path, tokenizer: Tokenizer) -> None:
    """Prepared by workers, as one with a byte order mark."""
    file = jsonl(tmp_path / "train.jsonl", *DOCUMENTS)
    file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes())
    assert len(parts_of(file)) > 5
    made = prepare(text_data(train=str(file), cache_dir=str(tmp_path / "parts")), tokenizer, 64)
    stores = open_stores([file], text_data(cache_dir=str(tmp_path / "parts")), tokenizer)
    file_parts.PART = 2**30  # restored by the fixture
    (whole,) = open_stores([file], text_data(cache_dir=str(tmp_path / "whole")), tokenizer)
    assert np.concatenate([store.tokens for store in stores]).tolist() == whole.tokens.tolist()
    assert sum(map(len, stores)) == len(whole) == 300
    expected = prepare(text_data(train=str(file), cache_dir=str(tmp_path / "whole")), tokenizer, 64)
    ours, theirs = made.train.windows[""], expected.train.windows[""]
    assert len(ours) == len(theirs)
    assert all(np.array_equal(ours[number].tokens, theirs[number].tokens) for number in range(len(ours)))


@pytest.mark.usefixtures("_small_parts")
def test_a_bad_record_is_named_by_its_line_in_the_file(tmp_path: Path, tokenizer: Tokenizer) -> None:
    file = jsonl(tmp_path / "train.jsonl", *DOCUMENTS)
    lines = file.read_text().splitlines()
    lines[249] = "broken"
    file.write_text("\n".join(lines) + "\n")
    with pytest.raises(UserError, match=r"train\.jsonl:250: not a line of JSON"):
        open_stores([file], text_data(cache_dir=str(tmp_path / "cache")), tokenizer)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("array.jsonl", json.dumps([{"text": text} for text in DOCUMENTS])),
        ("pretty.jsonl", json.dumps({"data": [{"text": text} for text in DOCUMENTS]}, indent=1)),
        ("lines.json", "".join(json.dumps({"text": text}) + "\n" for text in DOCUMENTS)),
    ],
)
@pytest.mark.usefixtures("_small_parts")
def test_other_files_are_not_divided(tmp_path: Path, name: str, content: Any) -> None:
    (tmp_path / name).write_text(content)
    assert parts_of(tmp_path / name) == [FilePart(tmp_path / name)]


def test_a_line_too_long(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "long.jsonl"
    file.write_bytes(b"ab\ncdef\n")
    monkeypatch.setattr(file_parts, "LONGEST_LINE", 3)
    with pytest.raises(UserError, match=r"long\.jsonl:2: the line is longer than "):
        read(FilePart(file, 1, 8))
