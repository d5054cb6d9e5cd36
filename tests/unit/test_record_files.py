"""One reader for every task: whatever a file of records looks like, the same records come out, each with its place."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pandas
import pytest
import zstandard
from datasets import IterableDataset

from gptj_train.data.parsing import BadRecordError, parse_record
from gptj_train.data.record_files import first_records, read_records
from gptj_train.errors import UserError

RECORDS: list[dict[str, Any]] = [{"text": "a cat", "n": "1"}, {"text": "b, \u2028\u0085 dog", "n": "2"}]
BOM = b"\xef\xbb\xbf"


def rows_of(file: Path, fields: set[str] | None = None) -> list[tuple[str, Any]]:
    rows = read_records(file, fields or {"text"}, lambda read: None)
    assert isinstance(rows, IterableDataset)
    return [(row["where"].removeprefix(str(file)), parse_record(row["record"])) for row in rows]


def as_json(value: Any, **options: Any) -> bytes:
    return json.dumps(value, ensure_ascii=False, **options).encode()


LINES = b"\n".join(as_json(record) for record in RECORDS)
FORMS: dict[str, tuple[bytes, list[str]]] = {
    "lines": (LINES, [":1", ":2"]),
    "lines of Windows, blank ones between them": (BOM + b"\r\n\r\n" + LINES.replace(b"\n", b"\r\n\r\n"), [":3", ":5"]),
    "an array": (as_json(RECORDS), [":1", ":1"]),
    "an array of lines": (as_json(RECORDS, indent=2), [":2", ":6"]),
    "objects over several lines": (b"\n".join(as_json(record, indent=2) for record in RECORDS), [":1", ":5"]),
    "records under a name": (as_json({"version": "1", "data": RECORDS}), [": data[0]", ": data[1]"]),
    "the same over several lines": (BOM + as_json({"rows": RECORDS}, indent=1), [": rows[0]", ": rows[1]"]),
    "begun on the first line": (b'{"version": "1", "items": [\n' + LINES.replace(b"\n", b",") + b"]}", []),
    "a list for each column": (as_json({name: [r[name] for r in RECORDS] for name in RECORDS[0]}), [": row 1"]),
    "pandas, by column": (pandas.DataFrame(RECORDS).to_json(force_ascii=False).encode(), [": row 0", ": row 1"]),
    "pandas, by row": (pandas.DataFrame(RECORDS).to_json(orient="index").encode(), [": row 0", ": row 1"]),
}


@pytest.mark.parametrize("packed", [bytes, gzip.compress, zstandard.compress], ids=["plain", "gz", "zst"])
@pytest.mark.parametrize("chunk", [1, 5, 4096])
@pytest.mark.parametrize(("content", "places"), FORMS.values(), ids=FORMS)
def test_every_form_of_json_holds_the_same(
    tmp_path: Path, content: bytes, places: list[str], chunk: int, packed: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gptj_train.data.files._CHUNK", chunk)
    suffix = {bytes: "", gzip.compress: ".gz", zstandard.compress: ".zst"}[packed]
    for name in ("a.json", "b.JSONL"):
        file = tmp_path / f"{name}{suffix}"
        file.write_bytes(packed(content))
        found = rows_of(file)
        assert [record for _, record in found] == RECORDS
        assert [place for place, _ in found][: len(places)] == places
        assert first_records(file) == RECORDS


TABLES: dict[str, tuple[str, bytes]] = {
    "csv": ("a.csv", 'text,n\na cat,1\n"b, \u2028\u0085 dog",2'.encode()),
    "csv as Excel writes it": ("a.CSV", BOM + 'text,n\r\na cat,1\r\n"b, \u2028\u0085 dog",2\r\n'.encode()),
    "tsv": ("a.tsv", BOM + "n\ttext\n1\ta cat\n2\tb, \u2028\u0085 dog\n".encode()),
    "packed tsv": ("a.tsv.gz", gzip.compress(BOM + "n\ttext\r\n1\ta cat\r\n2\tb, \u2028\u0085 dog".encode())),
}


@pytest.mark.parametrize(("name", "content"), TABLES.values(), ids=TABLES)
def test_tables_hold_the_same(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    assert rows_of(tmp_path / name) == [(":2", RECORDS[0]), (":3", RECORDS[1])]


def test_quoted_fields_keep_their_line_ends(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_bytes(b'text,n\r\n"one\r\ntwo\nthree",1\r\nfour,2\r\n')
    texts = [record["text"] for _, record in rows_of(tmp_path / "a.csv")]
    assert texts == ["one\r\ntwo\nthree", "four"]


@pytest.mark.parametrize("name", ["a.json", "a.jsonl", "a.csv", "a.tsv", "a.jsonl.gz"])
def test_nothing_in_a_file_is_no_record(tmp_path: Path, name: str) -> None:
    for content in (b"", b"\n", BOM, b"\r\n \n"):
        (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith("gz") else content)
        if "sv" not in name or content != b"\r\n \n":  # a space is a header
            assert rows_of(tmp_path / name) == []


ALONE: dict[str, dict[str, Any]] = {
    "a chat": {"messages": [{"role": "user", "content": "x"}]},
    "a chat with a title": {"title": "x", "conversations": [{"from": "human", "value": "x"}]},
    "an article": {"title": "x", "paragraphs": [{"context": "x", "qas": []}]},
    "a text beside a list": {"text": "x", "data": [{"text": "y"}]},
    "lists of another length": {"text": ["x"], "label": ["y", "z"]},
    "a text and labels": {"text": "x", "label": ["y", "z"]},
    "nested": {"meta": {"name": "x"}, "more": {"name": "y"}},
}


@pytest.mark.parametrize("indent", [None, 1])
@pytest.mark.parametrize("record", ALONE.values(), ids=ALONE)
def test_a_record_alone_in_its_file_stays_a_record(tmp_path: Path, record: dict[str, Any], indent: int | None) -> None:
    (tmp_path / "a.json").write_bytes(as_json(record, indent=indent))
    assert rows_of(tmp_path / "a.json") == [(":1", record)]


def test_values_keep_their_types(tmp_path: Path) -> None:
    values = ["2021-05-01", "12:30", "1.0", "null", 10**40, 1.0, 1, True, None, [0, 1], {"a": "b"}]
    lines = b"".join(as_json({"text": "x", "label": value}) + b"\n" for value in values)
    (tmp_path / "a.jsonl").write_bytes(lines)
    (tmp_path / "a.json").write_bytes(as_json([{"text": "x", "label": value} for value in values]))
    for name in ("a.jsonl", "a.json"):
        found = [record["label"] for _, record in rows_of(tmp_path / name)]
        assert found == values
        assert [type(value) for value in found] == [type(value) for value in values]


BAD: dict[str, tuple[bytes, str]] = {
    "a field twice": (b'{"text": "a", "text": "b"}', r"a field given twice; remove one of 'text'"),
    "an integer with too many digits": (b'{"n": ' + b"1" * 5000 + b"}", "not a line of JSON"),
    "a value that ends too early": (b'{"text": "a', "not a line of JSON"),
    "no object": (b'"text"', "not a record"),
}


@pytest.mark.parametrize(("line", "reason"), BAD.values(), ids=BAD)
def test_a_bad_line_spoils_no_other(tmp_path: Path, line: bytes, reason: str) -> None:
    good = as_json(RECORDS[0])
    (tmp_path / "a.jsonl").write_bytes(good + b"\n" + line + b"\n" + good)
    first, bad, last = read_records(tmp_path / "a.jsonl", {"text"}, lambda read: None)
    assert parse_record(first["record"]) == parse_record(last["record"]) == RECORDS[0]
    with pytest.raises(BadRecordError, match=reason):
        parse_record(bad["record"])
    assert bad["where"] == f"{tmp_path}/a.jsonl:2"


def test_a_field_twice_in_an_array_is_named_by_its_line(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_bytes(b'[{"text": "a"},\n{"text": "b", "text": "c"}]')
    with pytest.raises(UserError, match=r"a\.json:2: not JSON \(a field given twice; remove one of 'text'\)"):
        rows_of(tmp_path / "a.json")


def test_rows_are_a_dataset_that_can_be_read_again(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(LINES)
    rows = read_records(tmp_path / "a.jsonl", {"text"}, lambda read: None)
    texts = rows.map(lambda row: {"text": json.loads(row["record"])["text"]}).select_columns("text")
    for _ in range(2):
        assert [row["text"] for row in texts] == [record["text"] for record in RECORDS]
    assert len(list(rows.take(1))) == 1
