"""Files -> documents: every format gives the same texts; what is bad is named by file, line and reason, or counted."""

from __future__ import annotations

import gzip
import json
import os
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.feather
import pyarrow.parquet as pq
import pytest
import zstandard
from text_data import data_config, segments_of

from gptj_train.data.files import find_files
from gptj_train.data.sources import Segment
from gptj_train.data.tokenizer import Tokenizer


def jsonl(path: Path, *texts: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    records = [{"text": text, "meta": {"pile_set_name": "Books"}} for text in texts]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def texts_of(file: Path, **changes: Any) -> list[str]:
    return [segment.text for segment in segments_of(file, **changes)]


# --- formats ---

TEXTS = ["one\n\ntwo", " ", "drei 🙂\u2028\r\n", "x" * 3000]


def write_jsonl(path: Path) -> None:
    path.write_text("".join(json.dumps({"text": text, "meta": {"pile_set_name": "Books"}}) + "\n" for text in TEXTS))


def table() -> pa.Table:
    rows = [{"text": text, "meta": {"pile_set_name": "Books"}, "n": 1} for text in TEXTS]
    return pa.Table.from_pylist(rows)


def write_arrow_stream(path: Path) -> None:
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, table().schema) as writer:
        writer.write_table(table(), max_chunksize=3)


def compressed(path: Path, compress: Callable[[bytes], bytes]) -> None:
    plain = path.with_name("plain")
    write_jsonl(plain)
    path.write_bytes(compress(plain.read_bytes()))


FORMATS: dict[str, Callable[[Path], Any]] = {
    "a.jsonl": write_jsonl,
    "a.json": write_jsonl,
    "a.jsonl.gz": lambda path: compressed(path, gzip.compress),
    "a.jsonl.zst": lambda path: compressed(path, zstandard.ZstdCompressor().compress),
    "a.parquet": lambda path: pq.write_table(table(), path, row_group_size=3),
    "a.arrow": write_arrow_stream,
    "b.arrow": lambda path: pyarrow.feather.write_feather(table(), str(path), compression="lz4", chunksize=2),
}


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_gives_the_same_documents(tmp_path: Path, name: str) -> None:
    FORMATS[name](tmp_path / name)
    assert find_files(str(tmp_path / name), "data.train") == [tmp_path / name]
    assert segments_of(tmp_path / name) == [Segment(text, "Books") for text in TEXTS]


@pytest.mark.parametrize("suffix", [".txt", ".txt.gz", ".txt.zst"])
def test_txt_is_one_document(tmp_path: Path, suffix: str) -> None:
    file, text = tmp_path / f"a{suffix}", "first\n\nsecond é\n"
    compress = {".gz": gzip.compress, ".zst": zstandard.ZstdCompressor().compress}.get(file.suffix, bytes)
    file.write_bytes(compress(text.encode()))
    assert segments_of(file) == [Segment(text, tmp_path.name)]


@pytest.mark.parametrize(
    "text", ["word and\n\n  word " * 200, "a\u3000é" * 900, "x = {'k': 1}\n\tpass\n" * 99, "長い文" * 800]
)
def test_the_pieces_of_a_long_txt_give_the_tokens_of_the_whole(
    tmp_path: Path, text: str, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gptj_train.data.sources._PIECE", 500)
    (tmp_path / "a.txt").write_text(text, encoding="utf-8")
    pieces = segments_of(tmp_path / "a.txt")
    assert "".join(piece.text for piece in pieces) == text
    assert [piece.last for piece in pieces] == [False] * (len(pieces) - 1) + [True]
    ids = [token for own in tokenizer.encode_texts([piece.text for piece in pieces]) for token in own]
    if " " in text or "\u3000" in text:
        assert len(pieces) > 2
        assert ids == tokenizer.encode_texts([text])[0]


def test_blank_lines_windows_line_ends_and_a_missing_last_newline(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_bytes(b'\n{"text": "x"}\r\n  \r\n{"text": "y"}')
    assert texts_of(file) == ["x", "y"]


def test_raw_unicode_line_separators_do_not_split_a_record(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text('{"text": "a\u2028b\u0085c"}\n', encoding="utf-8")
    assert texts_of(file) == ["a\u2028b\u0085c"]


@pytest.mark.parametrize("name", ["a.jsonl", "a.txt"])
def test_a_byte_order_mark_is_no_text(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text('{"text": "x"}' if name == "a.jsonl" else "x", encoding="utf-8-sig")
    assert texts_of(tmp_path / name) == ["x"]


def test_text_field_is_chosen(tmp_path: Path) -> None:
    file = tmp_path / "a.json"
    file.write_text('{"text": "no", "content": "yes"}\n')
    assert texts_of(file, text_field="content") == ["yes"]


@pytest.mark.parametrize(
    ("record", "component"),
    [
        ({"meta": {"pile_set_name": "Wikipedia (en)"}}, "Wikipedia (en)"),
        ({"meta": {"pile_set_name": 5}}, "a"),
        ({"meta": "Books"}, "a"),
        ({}, "a"),
    ],
)
def test_components(tmp_path: Path, record: dict[str, Any], component: str) -> None:
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": "x", **record}))
    assert [segment.component for segment in segments_of(tmp_path / "a.jsonl")] == [component]


# --- supervised text ---


def supervised(tmp_path: Path, record: Any, **changes: Any) -> list[Segment]:
    (tmp_path / "a.jsonl").write_text(json.dumps(record))
    return segments_of(tmp_path / "a.jsonl", **changes)


def test_of_a_completion_only_the_response_is_predicted(tmp_path: Path) -> None:
    record = {"q": "1 + 1 =", "a": " 2"}
    found = supervised(tmp_path, record, kind="completion", prompt_field="q", response_field="a")
    assert found == [Segment("1 + 1 =", "a", target=False, last=False), Segment(" 2", "a")]


def test_of_a_chat_only_the_assistant_is_predicted(tmp_path: Path) -> None:
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello!"}]
    found = supervised(tmp_path, {"messages": turns}, kind="chat", chat_template="<|{role}|>{content}<|end|>")
    assert [(s.text, s.target, s.template, s.last) for s in found] == [
        ("<|user|>", False, True, False),
        ("Hi", False, False, False),
        ("<|end|>", False, True, False),
        ("<|assistant|>", False, True, False),
        ("Hello!", True, False, False),
        ("<|end|>", True, True, True),
    ]


@pytest.mark.parametrize(
    ("kind", "record", "reason"),
    [
        ("completion", {"prompt": "x"}, "no text in field 'response'; set data.response_field or correct the record"),
        ("completion", {"response": "x"}, "no text in field 'prompt'; set data.prompt_field"),
        ("completion", {"prompt": "x", "response": ""}, "no text in field 'response'"),
        ("chat", {}, "no messages; set data.messages_field (now messages)"),
        ("chat", {"messages": []}, "no messages"),
        ("chat", {"messages": "Hi"}, "no messages"),
        ("chat", {"messages": ["Hi"]}, "a message without role and content"),
        ("chat", {"messages": [{"role": ["user"], "content": "x"}]}, "a message without role and content"),
        ("chat", {"messages": [{"role": "user", "content": "x"}]}, "nothing said by the assistant"),
        ("chat", {"messages": [{"role": "assistant", "content": None}]}, "a message without role and content"),
        ("chat", {"messages": [{"role": "assistant", "content": "\ud800"}]}, "a lone surrogate in the text"),
    ],
)
def test_bad_supervised_records(tmp_path: Path, kind: str, record: Any, reason: str) -> None:
    with pytest.raises(ValueError, match="a") as caught:
        supervised(tmp_path, record, kind=kind)
    assert str(caught.value).startswith(f"{tmp_path}/a.jsonl:1: {reason}")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"chat_template": "{role}"}, "data.chat_template must hold {content} once"),
        ({"max_bad_share": 1.0}, "data.max_bad_share must be from 0 to below 1, got 1"),
        ({"weights": {"a": -1.0}}, "data.weights must be above 0"),
        ({"weights": {}}, "data.weights must be above 0"),
    ],
)
def test_configs_that_make_no_sense(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match="data") as caught:
        data_config(**changes)
    assert message in str(caught.value)


# --- finding files ---


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    jsonl(tmp_path / "d" / "b.jsonl", "b")
    jsonl(tmp_path / "d" / "deep" / "a.json", "a")
    (tmp_path / "d" / "c.txt").write_text("c")
    (tmp_path / "d" / "notes.md").write_text("not data")
    return tmp_path / "d"


@pytest.mark.parametrize(
    ("pattern", "found"),
    [
        ("", ["b.jsonl", "c.txt", "deep/a.json"]),
        ("b.jsonl", ["b.jsonl"]),
        ("*.jsonl", ["b.jsonl"]),
        ("[bc].*", ["b.jsonl", "c.txt"]),
        ("*/", ["deep/a.json"]),
        ("**/*.json*", ["b.jsonl", "deep/a.json"]),
        ("deep/**", ["deep/a.json"]),
    ],
)
def test_folders_and_globs(tree: Path, pattern: str, found: list[str]) -> None:
    assert find_files(f"{tree}/{pattern}", "data.train") == [tree / name for name in found]


def test_a_list_keeps_its_order_and_its_repetitions(tree: Path) -> None:
    paths = [f"{tree}/c.txt", f"{tree}/*.jsonl", f"{tree}/c.txt"]
    assert find_files(paths, "data.train") == [tree / "c.txt", tree / "b.jsonl", tree / "c.txt"]


def test_a_path_that_exists_is_no_glob(tmp_path: Path) -> None:
    file = jsonl(tmp_path / "run[1].jsonl", "x")
    assert find_files(str(file), "data.train") == [file]


@pytest.mark.parametrize("name", ["nowhere.jsonl", "*.jsonl", "empty", ""])
def test_a_path_that_matches_nothing_is_named(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="at ") as caught:
        find_files(name, "data.validation")
    assert str(caught.value).startswith("data.validation: no .jsonl, .json, .txt (also .zst, .gz), .parquet or .arrow")
    assert "\n" not in str(caught.value)


def test_one_bad_path_of_a_list_is_enough(tree: Path) -> None:
    with pytest.raises(ValueError, match="nowhere"):
        find_files([str(tree), f"{tree}/nowhere"], "data.train")


def test_an_empty_list_is_refused() -> None:
    with pytest.raises(ValueError, match=r"data\.train is empty; give files"):
        find_files([], "data.train")


def test_what_is_no_regular_file_is_named(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.jsonl")
    with pytest.raises(ValueError, match=r"pipe\.jsonl: not a regular file"):
        find_files(str(tmp_path), "data.train")


# --- bad records and bad files ---

GOOD = b'{"text": "good"}\n'
BAD_LINES = {
    "broken JSON": (b'{"text": "x"', "not a line of JSON; each line must be one record ("),
    "pretty-printed JSON": (b"{", "not a line of JSON; each line must be one record ("),
    "not JSON": (b"plain words", "not a line of JSON; each line must be one record ("),
    "two records": (GOOD.strip() * 2, "not a line of JSON; each line must be one record ("),
    "records ended by CR alone": (
        GOOD.strip() + b"\r" + GOOD.strip(),
        "not a line of JSON; each line must be one record (",
    ),
    "nested too deeply": (b"[" * 100_000, "not a line of JSON; each line must be one record ("),
    "a number of too many digits": (
        b'{"n": ' + b"1" * 5000 + b"}",
        "not a line of JSON; each line must be one record (",
    ),
    "raw control character": (b'{"text": "a\x01"}', "not a line of JSON; each line must be one record ("),
    "NUL byte": (b'{"text": "a"}\0', "not a line of JSON; each line must be one record ("),
    "not an object": (b'["text"]', "not a record"),
    "a string": (b'"text"', "not a record"),
    "null": (b"null", "not a record"),
    "missing field": (b'{"txt": "x"}', "no text in field 'text'; set data.text_field or correct the record"),
    "empty text": (b'{"text": ""}', "no text in field 'text'"),
    "text is a number": (b'{"text": 5}', "no text in field 'text'"),
    "text is null": (b'{"text": null}', "no text in field 'text'"),
    "text is a list": (b'{"text": ["x"]}', "no text in field 'text'"),
    "NUL character": (b'{"text": "a\\u0000b"}', "a NUL character in the text"),
    "lone surrogate": (b'{"text": "a \\ud83d b"}', "a lone surrogate in the text"),
    "invalid UTF-8": (b'{"text": "caf\xe9"}', "not UTF-8 text; convert it (byte "),
    "UTF-16": ('{"text": "x"}'.encode("utf-16"), "not UTF-8 text; convert it (byte "),
}


@pytest.mark.parametrize(("line", "reason"), BAD_LINES.values(), ids=BAD_LINES)
def test_a_bad_record_is_named_or_counted(tmp_path: Path, line: bytes, reason: str) -> None:
    file = tmp_path / "a.jsonl"
    file.write_bytes(GOOD + b"\n" + GOOD + line + b"\n" + GOOD)
    with pytest.raises(ValueError, match="a") as caught:
        segments_of(file)
    assert str(caught.value).startswith(f"{file}:4: {reason}")
    assert str(caught.value).endswith("or skip such records with data.bad_records=skip")
    assert "\n" not in str(caught.value)
    skipped: Counter[str] = Counter()
    assert [segment.text for segment in segments_of(file, skipped, bad_records="skip")] == ["good"] * 3
    assert skipped == {reason.partition(";")[0]: 1}


def bad_table(column: pa.Array) -> Callable[[Path], None]:
    return lambda path: pq.write_table(pa.table({"text": column}), path)


def cut(name: str, size: int) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        FORMATS[name](path)
        path.write_bytes(path.read_bytes()[:size])

    return write


NOT_UTF8 = pa.Array.from_buffers(
    pa.string(), 3, [None, pa.py_buffer(b"\0\0\0\0\1\0\0\0\2\0\0\0\3\0\0\0"), pa.py_buffer(b"a\xe9b")]
)
BAD_FILES: dict[str, tuple[str, Callable[[Path], Any], str]] = {
    "txt in Latin-1": (
        "a.txt",
        lambda p: p.write_bytes(b"caf\xe9 au"),
        ": not UTF-8 text (invalid continuation byte ",
    ),
    "txt cut in a character": (
        "a.txt",
        lambda p: p.write_bytes("né".encode()[:-1]),
        ": not UTF-8 text (unexpected end",
    ),
    "txt with NUL": ("a.txt", lambda p: p.write_bytes(b"a\0b"), ": a NUL character in the text"),
    "txt in UTF-16": ("a.txt", lambda p: p.write_text("words", encoding="utf-16"), ": not UTF-8 text (invalid start"),
    "empty txt": ("a.txt", lambda p: p.touch(), ": no text in it; remove it from the data"),
    "blank txt": ("a.txt", lambda p: p.write_text("\n \n"), ": no text in it"),
    "parquet with null": ("a.parquet", bad_table(pa.array(["x", None])), " row 2: no text in field 'text'"),
    "parquet of numbers": ("a.parquet", bad_table(pa.array([1, 2])), " row 1: no text in field 'text'"),
    "parquet not UTF-8": ("a.parquet", bad_table(NOT_UTF8), ": cannot be read as parquet ("),
    "cut parquet": ("a.parquet", cut("a.parquet", 900), ": cannot be read as parquet ("),
    "text as parquet": ("a.parquet", write_jsonl, ": cannot be read as parquet ("),
    "cut arrow stream": ("a.arrow", cut("a.arrow", -8), ": cannot be read as arrow (it has no end, it is cut off"),
    "cut arrow file": ("b.arrow", cut("b.arrow", -20), ": cannot be read as arrow ("),
    "text as arrow": ("a.arrow", write_jsonl, ": cannot be read as arrow ("),
    "cut zst": ("a.jsonl.zst", cut("a.jsonl.zst", -5), ": cut off in the middle of a zstd frame; fetch it again"),
    "cut gz": ("a.jsonl.gz", cut("a.jsonl.gz", -5), ": damaged or cut off ("),
    "gz named zst": ("a.jsonl.zst", FORMATS["a.jsonl.gz"], ": damaged or cut off ("),
    "zst named gz": ("a.jsonl.gz", FORMATS["a.jsonl.zst"], ": damaged or cut off ("),
    "zst named jsonl": ("a.jsonl", FORMATS["a.jsonl.zst"], ":1: not UTF-8 text; "),
    "gone": ("a.jsonl", lambda p: None, ": cannot be read (No such file or directory)"),
    "gone txt": ("a.txt", lambda p: None, ": cannot be read (No such file or directory)"),
    "gone parquet": ("a.parquet", lambda p: None, ": cannot be read as parquet ("),
}


@pytest.mark.parametrize(("name", "write", "said"), BAD_FILES.values(), ids=BAD_FILES)
def test_a_bad_file_is_named(tmp_path: Path, name: str, write: Any, said: str) -> None:
    write(tmp_path / name)
    with pytest.raises(ValueError, match="a") as caught:
        segments_of(tmp_path / name)
    assert str(caught.value).startswith(f"{tmp_path}/{name}{said}")
    assert "\n" not in str(caught.value)
