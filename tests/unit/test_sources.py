"""Documents are read from files; a bad record is named by file, line and reason."""

from __future__ import annotations

import gzip
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from text_data import jsonl, text_data

from gptj_train.data import files, sources
from gptj_train.data.records import Segment
from gptj_train.data.sources import read_segments
from gptj_train.data.tokenizer import Tokenizer
from gptj_train.errors import UserError


def segments_of(file: Path, **changes: Any) -> list[Segment]:
    return list(read_segments(file, text_data(**changes), skipped=Counter(), progress=lambda read: None))


def skipping(file: Path, **changes: Any) -> tuple[list[Segment], Counter[str]]:
    """The segments of the good records, and the reasons of the others."""
    skipped = Counter[str]()
    data = text_data(bad_records="skip", **changes)
    return list(read_segments(file, data, skipped=skipped, progress=lambda read: None)), skipped


def texts_of(file: Path, **changes: Any) -> list[str]:
    """The documents, their segments joined."""
    texts = [""]
    for segment in segments_of(file, **changes):
        texts[-1] += segment.text
        if segment.last:
            texts.append("")
    assert texts.pop() == ""
    return texts


def refusal(file: Path, **changes: Any) -> str:
    """The message, after the file's name."""
    with pytest.raises(UserError, match=r"\S") as caught:
        segments_of(file, **changes)
    message = str(caught.value)
    assert type(caught.value) is UserError
    assert message.startswith(str(file))
    assert "\n" not in message
    return message.removeprefix(str(file))


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


def test_text_field_is_chosen(tmp_path: Path) -> None:
    file = tmp_path / "a.json"
    file.write_text('{"text": "no", "content": "yes"}\n')
    assert texts_of(file, text_field="content") == ["yes"]


@pytest.mark.parametrize("suffix", [".zst", ".gz"])
@pytest.mark.parametrize("kind", [".jsonl", ".json", ".txt"])
def test_compressed_files_hold_the_same(tmp_path: Path, kind: str, suffix: str) -> None:
    content = b'{"text": "x"}\n{"text": "y"}\n'
    file = tmp_path / f"a{kind}{suffix}"
    file.write_bytes(gzip.compress(content) if suffix == ".gz" else zstandard.compress(content))
    assert texts_of(file) == ([content.decode()] if kind == ".txt" else ["x", "y"])


# --- whole texts ---


def test_txt_is_one_document(tmp_path: Path) -> None:
    file = tmp_path / "a.txt"
    file.write_text("first\n\nsecond é\n", encoding="utf-8")
    assert segments_of(file) == [Segment("first\n\nsecond é\n", tmp_path.name)]


WORDS = "One, two.  Three!\n\n\tnaïve café 🙂 don't 東京 1234 x = [1, 2]\r\n_a_ ''' \x1c\x85 \u00a0end " * 40


@pytest.mark.parametrize("piece", [1, 50, 997])
@pytest.mark.parametrize("kind", [".txt", ".jsonl"])
def test_a_long_text_in_pieces_has_the_tokens_of_the_whole(
    tmp_path: Path, kind: str, piece: int, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sources, "_PIECE", piece)
    monkeypatch.setattr(files, "_CHUNK", 61)  # bytes: a character may be cut in two
    file = tmp_path / f"a{kind}"
    file.write_bytes(WORDS.encode() if kind == ".txt" else json.dumps({"text": WORDS}).encode())
    found = segments_of(file)
    assert len(found) > len(WORDS) / (piece + 60)
    assert [segment.last for segment in found] == [False] * (len(found) - 1) + [True]
    assert "".join(segment.text for segment in found) == WORDS
    ids = tokenizer.encode_texts([segment.text for segment in found])
    assert [token for part in ids for token in part] == tokenizer.encode_texts([WORDS])[0]


def test_txt_with_no_space_in_it_does_not_fill_the_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "LONGEST_LINE", 3 * 2**20)
    monkeypatch.setattr(sources, "_PIECE", 2**18)
    (tmp_path / "a.txt").write_bytes(b"x" * 2**22)
    assert refusal(tmp_path / "a.txt").startswith(": no white space over a long stretch; this is not text")


# --- parquet and arrow ---

ROWS = [{"text": f"row {number}", "meta": {"pile_set_name": "AB"[number % 2]}, "n": number} for number in range(2500)]


def table_file(path: Path, rows: list[dict[str, Any]], kind: str) -> Path:
    table = pa.Table.from_pylist(rows)
    if kind == "parquet":
        pq.write_table(table, path)
        return path
    new = pa.ipc.new_stream if kind == "stream" else pa.ipc.new_file
    with pa.OSFile(str(path), "wb") as sink, new(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=700)
    return path


@pytest.mark.parametrize("kind", ["parquet", "stream", "file"])
def test_tables_have_a_document_a_row(tmp_path: Path, kind: str) -> None:
    file = table_file(tmp_path / ("a.parquet" if kind == "parquet" else "a.arrow"), ROWS, kind)
    read: list[int] = []
    found = list(read_segments(file, text_data(), skipped=Counter(), progress=read.append))
    assert [(segment.text, segment.component) for segment in found] == [
        (row["text"], row["meta"]["pile_set_name"]) for row in ROWS
    ]
    assert sum(read) == file.stat().st_size
    assert len(read) > 2


def test_saved_datasets_are_read(tmp_path: Path) -> None:
    import datasets

    datasets.Dataset.from_list(ROWS[:5]).save_to_disk(tmp_path / "saved")
    saved = datasets.load_from_disk(str(tmp_path / "saved"))
    saved.map(lambda row: {"n": row["n"] + 1})  # leaves a cache beside it
    assert len(list((tmp_path / "saved").glob("*.arrow"))) == 2
    (file,) = files.find_files(str(tmp_path / "saved"), "data.train")
    assert texts_of(file) == [row["text"] for row in ROWS[:5]]


def test_a_row_that_python_cannot_represent_is_one_bad_row(tmp_path: Path) -> None:
    bad = pa.array([b"good", b"\xff\xfe", b"also good"]).cast(pa.binary()).view(pa.utf8())
    far = pa.array([0, 2**58, 0], pa.timestamp("us"))  # of a column that is not read
    pq.write_table(pa.table({"text": bad, "when": far}), tmp_path / "a.parquet")
    assert refusal(tmp_path / "a.parquet").startswith(" row 2: a value that cannot be read; correct it")
    skipped: Counter[str] = Counter()
    found = list(
        read_segments(
            tmp_path / "a.parquet", text_data(bad_records="skip"), skipped=skipped, progress=lambda read: None
        )
    )
    assert [segment.text for segment in found] == ["good", "also good"]
    assert skipped == {"a value that cannot be read": 1}


def test_a_byte_order_mark_is_no_part_of_the_text(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'\xef\xbb\xbf{"text": "x"}\n{"text": "y"}\n')
    assert texts_of(tmp_path / "a.jsonl") == ["x", "y"]


@pytest.mark.parametrize("kind", ["parquet", "stream", "file"])
def test_a_bad_row_is_named_by_its_number(tmp_path: Path, kind: str) -> None:
    rows = [*ROWS[:1500], {"text": None, "meta": None, "n": 0}, *ROWS[:10]]
    file = table_file(tmp_path / ("a.parquet" if kind == "parquet" else "a.arrow"), rows, kind)
    assert refusal(file).startswith(" row 1501: no text in field 'text'; set data.text_field")
    found, skipped = skipping(file)
    assert len(found) == 1510
    assert skipped == {"no text in field 'text'": 1}


@pytest.mark.parametrize("kind", ["parquet", "stream", "file"])
@pytest.mark.parametrize("cut", [0, 3, 100, -1, -9])
def test_tables_cut_off(tmp_path: Path, kind: str, cut: int) -> None:
    file = table_file(tmp_path / ("a.parquet" if kind == "parquet" else "a.arrow"), ROWS, kind)
    if kind == "stream" and cut == -1:
        cut = -16  # its last bytes only say that it ends
    file.write_bytes(file.read_bytes()[:cut])
    expected = f": cannot be read as {file.suffix[1:]} (" if cut else ": this is an empty file; download it again"
    assert refusal(file).startswith(expected)


# --- components ---


@pytest.mark.parametrize(
    ("record", "field", "component"),
    [
        ({"meta": {"pile_set_name": "Pile-CC"}}, "meta.pile_set_name", "Pile-CC"),
        ({"source": "web"}, "source", "web"),
        ({"meta": {"pile_set_name": None}}, "meta.pile_set_name", "part.00"),
        ({"meta": "x"}, "meta.pile_set_name", "part.00"),
        ({}, "meta.pile_set_name", "part.00"),
        ({"meta": {"pile_set_name": ""}}, "meta.pile_set_name", "part.00"),
    ],
)
def test_components_by_field_or_file(tmp_path: Path, record: dict[str, Any], field: str, component: str) -> None:
    file = jsonl(tmp_path / "part.00.jsonl", {"text": "x", **record})
    assert segments_of(file, component_field=field)[0].component == component


def test_the_component_of_a_txt_is_its_folder_wherever_it_is_seen_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "books").mkdir()
    (tmp_path / "books" / "a.txt.gz").write_bytes(gzip.compress(b"x"))
    monkeypatch.chdir(tmp_path / "books")
    for name in (tmp_path / "books" / "a.txt.gz", Path("a.txt.gz"), Path("../books/./a.txt.gz")):
        assert segments_of(name)[0].component == "books"


def test_a_name_that_contains_txt_is_not_a_txt_file(tmp_path: Path) -> None:
    assert segments_of(jsonl(tmp_path / "a.txt.jsonl", "x")) == [Segment("x", "a.txt")]


# --- examples ---


def test_a_prompt_is_read_and_its_response_predicted(tmp_path: Path) -> None:
    file = jsonl(tmp_path / "qa.jsonl", {"q": "one?", "a": " two"})
    found = segments_of(file, kind="completion", prompt_field="q", response_field="a")
    assert found == [
        Segment("one?", "qa", target=False, template=False, last=False),
        Segment(" two", "qa", target=True, template=False, last=True),
    ]


def message_of(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def test_a_chat_is_put_into_the_template(tmp_path: Path) -> None:
    messages = [
        message_of("system", "{role} {content}"),
        message_of("user", "<|end|>"),
        message_of("assistant", ""),
        message_of("assistant", "b"),
    ]
    file = jsonl(tmp_path / "chat.jsonl", {"messages": messages})
    found = segments_of(file, kind="chat", chat_template="<|{role}|>{content}<|end|>")
    assert {segment.component for segment in found} == {"chat"}
    assert [(segment.text, segment.target, segment.template) for segment in found] == [
        ("<|system|>", False, True),
        ("{role} {content}", False, False),
        ("<|end|>", False, True),
        ("<|user|>", False, True),
        ("<|end|>", False, False),  # as the user wrote it: no special token
        ("<|end|>", False, True),
        ("<|assistant|>", False, True),
        ("<|end|>", True, True),
        ("<|assistant|>", False, True),
        ("b", True, False),
        ("<|end|>", True, True),
    ]
    assert [segment.last for segment in found] == [False] * 10 + [True]


def test_a_chat_that_ends_with_the_user_does_not_learn_its_end(tmp_path: Path) -> None:
    file = jsonl(tmp_path / "chat.jsonl", {"messages": [message_of("assistant", "a"), message_of("user", "b")]})
    *_, last = segments_of(file, kind="chat", chat_template="{role}: {content}")
    assert last == Segment("", "chat", target=False, template=True, last=True, joined=True)


# --- bad files: the message for each, and the count where they are skipped ---

GOOD = b'{"text": "good"}\n'
NO_TEXT = "no text in field 'text'"
BAD_LINES = {
    "broken JSON": (b'{"text": "x"', "not a line of JSON; each line must be one record (Expecting ',' delimiter"),
    "pretty-printed JSON": (b"{", "not a line of JSON; each line must be one record (Expecting property name"),
    "a line of text": (b"plain words", "not a line of JSON; each line must be one record (Expecting value"),
    "two records on a line": (
        b'{"text": "x"} {"text": "y"}',
        "not a line of JSON; each line must be one record (Extra",
    ),
    "control character in the component": (
        b'{"text": "x", "meta": {"pile_set_name": "a\\u001b[2J"}}',
        "a control character in the component's name",
    ),
    "nested too deeply": (b"[" * 100_000, "not a line of JSON; each line must be one record (maximum recursion depth"),
    "a number of too many digits": (
        b'{"text": "x", "n": ' + b"1" * 5000 + b"}",
        "not a line of JSON; each line must be one record (Exceeds the limit",
    ),
    "a list": (b'["text"]', "not a record; write a JSON object with a text in it"),
    "a string": (b'"text"', "not a record; write a JSON object"),
    "null": (b"null", "not a record; write a JSON object"),
    "missing field": (b'{"txt": "x"}', f"{NO_TEXT}; set data.text_field or correct the record, or skip such records"),
    "empty text": (b'{"text": ""}', NO_TEXT),
    "text is a number": (b'{"text": 5}', NO_TEXT),
    "text is null": (b'{"text": null}', NO_TEXT),
    "text is a list": (b'{"text": ["x"]}', NO_TEXT),
    "lone surrogate": (b'{"text": "a \\ud83d b"}', "a lone surrogate in the text; this is not valid Unicode"),
    "lone surrogate in the component": (
        b'{"text": "a", "meta": {"pile_set_name": "\\ud83d"}}',
        "a lone surrogate in the text",
    ),
    "NUL": (b'{"text": "a\\u0000b"}', "a NUL character in the text; remove it"),
    "raw NUL": (b'{"text": "a\0b"}', "not a line of JSON; each line must be one record (Invalid control character"),
    "invalid UTF-8": (b'{"text": "caf\xe9"}', "not UTF-8 text; convert it (invalid continuation byte at byte 13 of"),
    "a character cut in two": (b'{"text": "\xf0\x9f\x99"}', "not UTF-8 text; convert it (invalid continuation byte"),
    "UTF-16": (
        '{"text": "x"}'.encode("utf-16"),
        "not UTF-8 text; convert it (invalid start byte at byte 0 of the line",
    ),
}


@pytest.mark.parametrize(("line", "reason"), BAD_LINES.values(), ids=BAD_LINES)
def test_a_bad_record_is_named_by_file_line_and_reason_or_counted(tmp_path: Path, line: bytes, reason: str) -> None:
    file = tmp_path / "a.jsonl"
    file.write_bytes(GOOD + b"\n" + GOOD + line + b"\n" + GOOD)
    message = refusal(file)
    assert message.startswith(f":4: {reason}")
    assert message.endswith(", or skip such records with data.bad_records=skip")
    found, skipped = skipping(file)
    assert [segment.text for segment in found] == ["good"] * 3
    assert skipped == {reason.partition(";")[0]: 1}


ALICE = message_of("user", "a")
BAD_EXAMPLES = {
    "no prompt": ("completion", {"response": "b"}, "no text in field 'prompt'; set data.prompt_field"),
    "empty response": ("completion", {"prompt": "a", "response": ""}, "no text in field 'response'; set data.resp"),
    "NUL in a prompt": ("completion", {"prompt": "\0", "response": "b"}, "a NUL character in the text"),
    "no messages": ("chat", {"text": "x"}, "no messages; set data.messages_field (now messages)"),
    "empty messages": ("chat", {"messages": []}, "no messages"),
    "messages are a text": ("chat", {"messages": "hello"}, "no messages"),
    "a message is a text": ("chat", {"messages": ["hello"]}, "a message without role and content; give both"),
    "a message without content": ("chat", {"messages": [{"role": "user"}]}, "a message without role and content"),
    "content is a list": (
        "chat",
        {"messages": [{"role": "user", "content": ["x"]}]},
        "a message without role and content",
    ),
    "nobody answers": ("chat", {"messages": [ALICE]}, "nothing said by the assistant; there is nothing to learn"),
    "a role that spells a special token": (
        "chat",
        {"messages": [message_of("<|endoftext|>", "a")]},
        "a role that is no name",
    ),
    "a role of two lines": ("chat", {"messages": [message_of("user\n", "a")]}, "a role that is no name"),
    "no role": ("chat", {"messages": [message_of("", "a")]}, "a role that is no name; write it in letters"),
    "a lone surrogate said": ("chat", {"messages": [message_of("user", "\ud800")]}, "a lone surrogate in the text"),
}


@pytest.mark.parametrize(("kind", "record", "reason"), BAD_EXAMPLES.values(), ids=BAD_EXAMPLES)
def test_a_bad_example_is_named_or_counted(tmp_path: Path, kind: str, record: dict[str, Any], reason: str) -> None:
    good = {"prompt": "a", "response": "b", "messages": [ALICE, message_of("assistant", "b")]}
    file = jsonl(tmp_path / "a.jsonl", good, record, good)
    assert refusal(file, kind=kind).startswith(f":2: {reason}")
    skipped: Counter[str] = Counter()
    found = list(
        read_segments(file, text_data(kind=kind, bad_records="skip"), skipped=skipped, progress=lambda read: None)
    )
    assert sum(segment.last for segment in found) == 2
    assert skipped == {reason.partition(";")[0]: 1}


BAD_TEXTS = {
    "nothing": (b"", ": no text in it; remove it from the data"),
    "white space": (b"\n \n", ": no text in it; remove it from the data"),
    "Latin-1": (b"caf\xe9 au lait", ": not UTF-8 text (invalid continuation byte at byte 3); convert it"),
    "Latin-1 far down": (
        b"word " * 2**20 + b"caf\xe9 au lait",
        ": not UTF-8 text (invalid continuation byte at byte 5,242,883); convert it",
    ),
    "cut off in a character": ("🙂🙂".encode()[:-1], ": not UTF-8 text (unexpected end of data at byte 4); convert it"),
    "UTF-16": ("text".encode("utf-16"), ": not UTF-8 text (invalid start byte at byte 0); convert it"),
    "NUL": (b"a\0b", ": a NUL character in the text; remove it: this is not text, or was cut off"),
}


@pytest.mark.parametrize("policy", ["error", "skip"])
@pytest.mark.parametrize(("content", "reason"), BAD_TEXTS.values(), ids=BAD_TEXTS)
def test_a_bad_txt_is_refused_whatever_is_done_with_records(
    tmp_path: Path, content: bytes, reason: str, policy: str
) -> None:
    (tmp_path / "a.txt").write_bytes(content)
    assert refusal(tmp_path / "a.txt", bad_records=policy) == reason


@pytest.mark.parametrize("kind", ["completion", "chat"])
def test_txt_holds_no_examples(tmp_path: Path, kind: str) -> None:
    (tmp_path / "a.txt").write_text("a text")
    assert refusal(tmp_path / "a.txt", kind=kind) == (
        f": a .txt file cannot contain {kind} records; give .jsonl, or set data.kind=text"
    )


def test_the_records_before_a_bad_one_are_read(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_bytes(GOOD + b"broken\n")
    found = read_segments(file, text_data(), skipped=Counter(), progress=lambda read: None)
    assert next(found).text == "good"
    with pytest.raises(UserError, match=":2: not a line of JSON"):
        next(found)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"chat_template": "{role}"}, r"data\.chat_template must contain {content} exactly once"),
        ({"chat_template": "{content}{content}"}, r"data\.chat_template must contain {content} exactly once"),
        ({"max_bad_share": 1.0}, r"data\.max_bad_share must be at least 0 and below 1, got 1\.0"),
        ({"max_bad_share": -0.1}, r"data\.max_bad_share must be at least 0"),
        ({"weights": {}}, r"data\.weights must be above 0, got {}"),
        ({"weights": {"a": 1, "b": 0}}, r"data\.weights must be above 0"),
        ({"weights": {"a": float("nan")}}, "finite number"),
        ({"kind": "prose"}, "'text', 'completion' or 'chat'"),
    ],
)
def test_contradictory_settings(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        text_data(**changes)
