"""Documents out of files; what is not a record with text is named by file, line and reason."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from gptj_train.data.sources import find_files, read_documents


def jsonl(path: Path, *texts: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    records = [{"text": text, "meta": {"pile_set_name": "Books"}} for text in texts]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def texts_of(*files: Path, field: str = "text") -> list[str]:
    return [record["text"] for record in read_documents(list(files), field)]


def test_jsonl_has_a_document_a_line(tmp_path: Path) -> None:
    file = jsonl(tmp_path / "a.jsonl", "one\n\ntwo", " ", "drei 🙂\u2028\r\n")
    assert texts_of(file) == ["one\n\ntwo", " ", "drei 🙂\u2028\r\n"]


def test_blank_lines_windows_line_ends_and_a_missing_last_newline(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_bytes(b'\n{"text": "x"}\r\n  \r\n{"text": "y"}')
    assert texts_of(file) == ["x", "y"]


def test_raw_unicode_line_separators_do_not_split_a_record(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text('{"text": "a\u2028b\u0085c"}\n', encoding="utf-8")
    assert texts_of(file) == ["a\u2028b\u0085c"]


def test_txt_is_one_document(tmp_path: Path) -> None:
    file = tmp_path / "a.txt"
    file.write_text("first\n\nsecond é\n", encoding="utf-8")
    assert texts_of(file) == ["first\n\nsecond é\n"]


def test_text_field_is_chosen(tmp_path: Path) -> None:
    file = tmp_path / "a.json"
    file.write_text('{"text": "no", "content": "yes"}\n')
    assert texts_of(file, field="content") == ["yes"]


def test_files_come_in_the_order_given(tmp_path: Path) -> None:
    second, first = jsonl(tmp_path / "b.jsonl", "b1", "b2"), jsonl(tmp_path / "a.jsonl", "a")
    assert texts_of(second, first) == ["b1", "b2", "a"]


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
    assert str(caught.value).startswith(f"data.validation: no .jsonl, .json or .txt file at {name!r} (looked from")
    assert "\n" not in str(caught.value)


def test_one_bad_path_of_a_list_is_enough(tree: Path) -> None:
    with pytest.raises(ValueError, match="nowhere"):
        find_files([str(tree), f"{tree}/nowhere"], "data.train")


def test_an_empty_list_is_refused() -> None:
    with pytest.raises(ValueError, match=r"data\.train is empty; give files"):
        find_files([], "data.train")


GOOD = b'{"text": "good"}\n'
BAD_LINES = {
    "broken JSON": (b'{"text": "x"', "not a line of JSON (Expecting ',' delimiter"),
    "pretty-printed JSON": (b"{", "not a line of JSON (Expecting property name"),
    "not JSON": (b"plain words", "not a line of JSON (Expecting value"),
    "nested too deeply": (b"[" * 100_000, "not a line of JSON (maximum recursion depth"),
    "a number of too many digits": (
        b'{"text": "x", "n": ' + b"1" * 5000 + b"}",
        "not a line of JSON (Exceeds the limit",
    ),
    "not an object": (b'["text"]', "no text in field 'text'"),
    "a string": (b'"text"', "no text in field 'text'"),
    "null": (b"null", "no text in field 'text'"),
    "missing field": (b'{"txt": "x"}', "no text in field 'text'; set data.text_field or correct the record"),
    "empty text": (b'{"text": ""}', "no text in field 'text'"),
    "text is a number": (b'{"text": 5}', "no text in field 'text'"),
    "text is null": (b'{"text": null}', "no text in field 'text'"),
    "text is a list": (b'{"text": ["x"]}', "no text in field 'text'"),
    "lone surrogate": (b'{"text": "a \\ud83d b"}', "the text holds a lone surrogate"),
    "invalid UTF-8": (b'{"text": "caf\xe9"}', "not UTF-8 text (invalid continuation byte at byte 13 of the line)"),
    "UTF-16": ('{"text": "x"}'.encode("utf-16"), "not UTF-8 text (invalid start byte at byte 0 of the line)"),
}


@pytest.mark.parametrize(("line", "reason"), BAD_LINES.values(), ids=BAD_LINES)
def test_a_bad_record_is_named_by_file_line_and_reason(tmp_path: Path, line: bytes, reason: str) -> None:
    file = tmp_path / "a.jsonl"
    file.write_bytes(GOOD + b"\n" + GOOD + line + b"\n" + GOOD)
    with pytest.raises(ValueError, match="a") as caught:
        texts_of(file)
    message = str(caught.value)
    assert type(caught.value) is ValueError
    assert message.startswith(f"{file}:4: {reason}")
    assert "\n" not in message


def test_the_records_before_a_bad_one_are_given(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_bytes(GOOD + b"broken\n")
    records = iter(read_documents([file], "text"))
    assert next(records) == {"text": "good"}
    with pytest.raises(ValueError, match=":2: not a line of JSON"):
        next(records)


def test_txt_that_is_no_utf8(tmp_path: Path) -> None:
    file = tmp_path / "a.txt"
    file.write_bytes(b"caf\xe9 au lait")
    with pytest.raises(ValueError, match=r"a\.txt: not UTF-8 text \(invalid continuation byte at byte 3\); convert it"):
        texts_of(file)


@pytest.mark.parametrize("content", ["", "\n \n"])
def test_txt_without_text(tmp_path: Path, content: str) -> None:
    file = tmp_path / "a.txt"
    file.write_text(content)
    with pytest.raises(ValueError, match=r"a\.txt: no text in it; remove it from the data"):
        texts_of(file)


@pytest.mark.parametrize("name", ["gone.jsonl", "gone.txt"])
def test_a_file_that_went_away(tmp_path: Path, name: str) -> None:
    with pytest.raises(ValueError, match=rf"{name}: cannot be read \(No such file or directory\)"):
        texts_of(tmp_path / name)
