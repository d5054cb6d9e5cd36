"""Records out of files -> the segments of text that make a document."""

from __future__ import annotations

import codecs
import json
import re
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple

from gptj_train.data.files import chunks, numbered_lines
from gptj_train.schema import schema

_PIECE = 2**20  # characters of a .txt that are tokenized at once
_WORD_END = re.compile(r"(?<=\S)\s")
_ROWS = 1000
_ARROW_END = b"\xff\xff\xff\xff\0\0\0\0"


@schema
class DataConfig:
    """Where the text is and what is made of it. Paths may be files, folders or globs, one or a list."""

    train: str | list[str] | None
    validation: str | list[str] | None
    forgetting: str | list[str] | None
    kind: Literal["text", "completion", "chat"]
    text_field: str
    prompt_field: str
    response_field: str
    messages_field: str
    chat_template: str
    component_field: str
    weights: dict[str, float] | None
    packing: Literal["contiguous", "best_fit"]
    isolate: bool
    bad_records: Literal["error", "skip"]
    max_bad_share: float
    cache_dir: str

    def __post_init__(self) -> None:
        if self.chat_template.count("{content}") != 1:
            raise ValueError("data.chat_template must hold {content} once, and {role} where it is to stand")
        if not 0 <= self.max_bad_share < 1:
            raise ValueError(f"data.max_bad_share must be from 0 to below 1, got {self.max_bad_share}")
        if self.weights is not None and (not self.weights or min(self.weights.values()) <= 0):
            raise ValueError(f"data.weights must be above 0, got {self.weights}; leave out what is not wanted")


class Segment(NamedTuple):
    """A stretch of a document.

    Attributes:
        target: whether its tokens are to be predicted.
        template: whether it may spell special tokens; data may not.
        last: whether it ends the document.
    """

    text: str
    component: str
    target: bool = True
    template: bool = False
    last: bool = True


class BadRecordError(ValueError):
    """A record that cannot be used: ``where`` and ``reason`` apart, since reasons are counted."""

    def __init__(self, where: str, reason: str, advice: str) -> None:
        super().__init__(f"{where}: {reason}; {advice}, or skip such records with data.bad_records=skip")
        self.reason = reason


def read_segments(
    file: Path, data: DataConfig, skipped: Counter[str], progress: Callable[[int], None]
) -> Iterator[Segment]:
    """The documents of a file, segment by segment, in their order.

    A .txt file is one document; .jsonl and .json have a record a line, .parquet and .arrow a row.

    Args:
        skipped: counts the reasons of records that ``data.bad_records=skip`` leaves out.
        progress: see ``numbered_lines``.

    Raises:
        ValueError: a bad record, named by file and line or row, or a file that cannot be read.
    """
    if ".txt" in file.suffixes:
        yield from _text_file(file, data, progress)
        return
    for where, record in _records(file, progress):
        try:
            document = _document(record, where, file, data)
        except BadRecordError as error:
            if data.bad_records == "error":
                raise
            skipped[error.reason] += 1
            continue
        yield from document


def _text_file(file: Path, data: DataConfig, progress: Callable[[int], None]) -> Iterator[Segment]:
    """One document in pieces that end before white space, where every byte-level BPE begins a new word."""
    decoder = codecs.getincrementaldecoder("utf-8-sig")()
    held, read, pieces = "", 0, 0
    try:
        for chunk in chunks(file, progress):
            held += decoder.decode(chunk)
            read += len(chunk)
            while len(held) > _PIECE:
                found = _WORD_END.search(held, _PIECE)
                if found is None and len(held) < 2 * _PIECE:
                    break
                cut = found.start() if found else _PIECE  # text without white space
                yield Segment(_checked(held[:cut], str(file)), file.parent.name, last=False)
                held, pieces = held[cut:], pieces + 1
        held += decoder.decode(b"", final=True)
    except UnicodeDecodeError as error:
        raise ValueError(f"{file}: not UTF-8 text ({error.reason} after byte {read}); convert it") from None
    if not pieces and not held.strip():
        raise ValueError(f"{file}: no text in it; remove it from the data")
    yield Segment(_checked(held, str(file)), file.parent.name)


def _records(file: Path, progress: Callable[[int], None]) -> Iterator[tuple[str, Any]]:
    """(place, row, or line as bytes) of each record; blank lines are none."""
    if file.suffix in (".parquet", ".arrow"):
        yield from ((f"{file} row {number}", row) for number, row in enumerate(_rows(file, progress), start=1))
    else:
        yield from ((f"{file}:{number}", line) for number, line in numbered_lines(file, progress) if line.strip())


def _rows(file: Path, progress: Callable[[int], None]) -> Iterator[Any]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pa.memory_map(str(file)) as source:
            for batch in pq.ParquetFile(source).iter_batches(_ROWS) if file.suffix == ".parquet" else _arrow(source):
                yield from batch.to_pylist()
        progress(file.stat().st_size)
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(f"{file}: cannot be read as {file.suffix[1:]} ({reason}); write it again") from None


def _arrow(source: Any) -> Iterator[Any]:
    """The batches of an arrow file or of a stream, which ``datasets`` writes."""
    import pyarrow as pa

    if source.read_at(6, 0) == b"ARROW1":
        file = pa.ipc.open_file(source)
        yield from (file.get_batch(number) for number in range(file.num_record_batches))
    elif source.read_at(len(_ARROW_END), source.size() - len(_ARROW_END)) != _ARROW_END:
        raise pa.ArrowInvalid("it has no end, it is cut off")
    else:
        yield from pa.ipc.open_stream(source)


def _parsed(line: bytes, where: str) -> Any:
    try:
        return json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise BadRecordError(where, "not UTF-8 text", f"convert it (byte {error.start} of the line)") from None
    except (ValueError, RecursionError) as error:  # ValueError: also a number of too many digits
        raise BadRecordError(where, "not a line of JSON", f"each line must be one record ({error})") from None


def _document(raw: Any, where: str, file: Path, data: DataConfig) -> list[Segment]:
    record = _parsed(raw, where) if isinstance(raw, bytes) else raw
    if not isinstance(record, dict):
        raise BadRecordError(where, "not a record", "write an object with a text in it")
    component = _component(record, data.component_field) or file.name.partition(".")[0]
    if data.kind == "text":
        return [Segment(_text(record, data.text_field, "data.text_field", where), component)]
    if data.kind == "completion":
        prompt = _text(record, data.prompt_field, "data.prompt_field", where)
        response = _text(record, data.response_field, "data.response_field", where)
        return [Segment(prompt, component, target=False, last=False), Segment(response, component)]
    return _chat(record.get(data.messages_field), component, data, where)


def _chat(messages: Any, component: str, data: DataConfig, where: str) -> list[Segment]:
    """Each message between the halves of the template; what the assistant says, and how it ends it, is the target."""
    if not isinstance(messages, list) or not messages:
        raise BadRecordError(where, "no messages", f"set data.messages_field (now {data.messages_field})")
    before, after = data.chat_template.split("{content}")
    segments = []
    for message in messages:
        role, content = (message.get(name) if isinstance(message, dict) else None for name in ("role", "content"))
        if not isinstance(role, str) or not isinstance(content, str):
            raise BadRecordError(where, "a message without role and content", "give both, as texts")
        said = role == "assistant"
        segments += [
            Segment(before.replace("{role}", _checked(role, where)), component, False, True, False),
            Segment(_checked(content, where), component, said, False, False),
            Segment(after.replace("{role}", role), component, said, True, False),
        ]
    if not any(segment.target for segment in segments):
        raise BadRecordError(where, "nothing said by the assistant", "there is nothing to learn from it")
    return [*(segment for segment in segments[:-1] if segment.text), segments[-1]._replace(last=True)]


def _component(record: dict[str, Any], field: str) -> str:
    value: Any = record
    for name in field.split("."):
        value = value.get(name) if isinstance(value, dict) else None
    return value if isinstance(value, str) else ""


def _text(record: dict[str, Any], field: str, key: str, where: str) -> str:
    text = record.get(field)
    if not isinstance(text, str) or not text:
        raise BadRecordError(where, f"no text in field {field!r}", f"set {key} or correct the record")
    return _checked(text, where)


def _checked(text: str, where: str) -> str:
    if "\0" in text:
        raise BadRecordError(where, "a NUL character in the text", "remove it: this is no text, or was cut off")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise BadRecordError(where, "a lone surrogate in the text", "this is no valid Unicode, correct it") from None
    return text
