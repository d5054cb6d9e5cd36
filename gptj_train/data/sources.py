"""Records out of files -> the segments of text that make a document."""

from __future__ import annotations

import codecs
import json
import os
import re
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple

from gptj_train.data.files import LONGEST_LINE, SUFFIXES, chunks, numbered_lines
from gptj_train.errors import UserError
from gptj_train.schema import schema

_PIECE = 2**20  # characters that are tokenized at once
# Every byte-level BPE in use begins a new word here: the ids are those of the whole.
_WORD_END = re.compile(r"(?<=[^\W_])[ \n\r\t]")
_TEXT_SUFFIXES = (".txt", ".txt.zst", ".txt.gz")
_ROLE = re.compile(r"[\w -]+")
_ROWS = 1000
_ARROW_END = b"\xff\xff\xff\xff\0\0\0\0"  # of a stream


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
            raise UserError("data.chat_template must hold {content} once, and {role} where it is to stand")
        if not 0 <= self.max_bad_share < 1:
            raise UserError(f"data.max_bad_share must be from 0 to below 1, got {self.max_bad_share}")
        if self.weights is not None and (not self.weights or min(self.weights.values()) <= 0):
            raise UserError(f"data.weights must be above 0, got {self.weights}; leave out what is not wanted")


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
    """A record that cannot be used. The reasons are counted, so they name no particulars; the advice may."""

    def __init__(self, reason: str, advice: str) -> None:
        super().__init__(f"{reason}; {advice}")
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
        UserError: a bad record, named by file and line or row, or a file that cannot be read.
    """
    if file.name.endswith(_TEXT_SUFFIXES):
        yield from _text_file(file, data, progress)
        return
    name = _without_suffix(file)
    for where, record in _records(file, data, progress):
        try:
            document = _document(record, name, data)
        except BadRecordError as error:
            if data.bad_records == "error":
                raise UserError(f"{where}: {error}, or skip such records with data.bad_records=skip") from None
            skipped[error.reason] += 1
            continue
        for segment in document:
            *parts, rest = _pieces(segment.text)
            yield from (segment._replace(text=part, last=False) for part in parts)
            yield segment._replace(text=rest)


def _without_suffix(file: Path) -> str:
    longest = max((suffix for suffix in SUFFIXES if file.name.endswith(suffix)), key=len, default="")
    return file.name.removesuffix(longest) or file.name


def _text_file(file: Path, data: DataConfig, progress: Callable[[int], None]) -> Iterator[Segment]:
    if data.kind != "text":
        raise UserError(f"{file}: a .txt file holds no {data.kind} records; give .jsonl, or set data.kind=text")
    component = Path(os.path.abspath(file)).parent.name or file.name
    decoder = codecs.getincrementaldecoder("utf-8")()
    held, read, began = "", 0, False
    try:
        for chunk in chunks(file, progress):
            read += len(chunk)
            *parts, held = _pieces(held + decoder.decode(chunk))
            for part in parts:
                yield Segment(_checked(part), component, last=False)
                began = True
            if len(held) > LONGEST_LINE:
                raise BadRecordError("no white space over a long stretch", "this is no text, remove it from the data")
        held += decoder.decode(b"", final=True)
        if not began and not held.strip():
            raise BadRecordError("no text in it", "remove it from the data")
        yield Segment(_checked(held), component)
    except UnicodeDecodeError as error:
        place = read - len(error.object) + error.start
        raise UserError(f"{file}: not UTF-8 text ({error.reason} at byte {place:,}); convert it") from None
    except BadRecordError as error:
        raise UserError(f"{file}: {error}") from None


def _pieces(text: str) -> Iterator[str]:
    """A long text in pieces that end where a word does, however it is tokenized."""
    start = 0
    while len(text) - start > _PIECE and (found := _WORD_END.search(text, start + _PIECE)):
        yield text[start : found.start()]
        start = found.start()
    yield text[start:]


def _records(file: Path, data: DataConfig, progress: Callable[[int], None]) -> Iterator[tuple[str, Any]]:
    """(place, row, or line as bytes) of each record; blank lines are none."""
    if file.suffix in (".parquet", ".arrow"):
        rows = _rows(file, data, progress)
        yield from ((f"{file} row {number}", row) for number, row in enumerate(rows, start=1))
    else:
        yield from ((f"{file}:{number}", line) for number, line in numbered_lines(file, progress) if line.strip())


def _rows(file: Path, data: DataConfig, progress: Callable[[int], None]) -> Iterator[Any]:
    import pyarrow as pa

    size, told = file.stat().st_size, 0
    fields = {
        "text": {data.text_field},
        "completion": {data.prompt_field, data.response_field},
        "chat": {data.messages_field},
    }[data.kind] | {data.component_field.partition(".")[0]}
    try:
        with pa.memory_map(str(file)) as source:
            for share, batch in _batches(source, file.suffix):
                read = [name for name in batch.schema.names if name in fields]
                yield from _dictionaries(batch.select(read)) if read else batch.to_pylist()
                progress(int(size * share) - told)
                told = int(size * share)
    except (pa.ArrowException, OSError, ValueError, OverflowError) as error:  # also of values that Python has not
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"{file}: cannot be read as {file.suffix[1:]} ({reason}); write it again") from None
    progress(size - told)


def _dictionaries(batch: Any) -> Iterator[Any]:
    """The rows of a record batch; in place of one that Python has no value for, what is wrong with it."""
    try:
        yield from batch.to_pylist()
    except (ValueError, OverflowError):
        for number in range(batch.num_rows):
            try:
                yield from batch.slice(number, 1).to_pylist()
            except (ValueError, OverflowError) as error:
                yield BadRecordError("a value that cannot be read", f"correct it ({error})")


def _batches(source: Any, suffix: str) -> Iterator[tuple[float, Any]]:
    """(share of the file that is read with it, record batch)."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    if suffix == ".parquet":
        table, rows = pq.ParquetFile(source), 0
        for batch in table.iter_batches(batch_size=_ROWS):
            rows += batch.num_rows
            yield rows / table.metadata.num_rows, batch
        return
    if source.read(6) == b"ARROW1":  # the format with an index at its end
        table = pa.ipc.open_file(source)
        for number in range(table.num_record_batches):
            yield (number + 1) / table.num_record_batches, table.get_batch(number)
        return
    if source.read_at(len(_ARROW_END), max(0, source.size() - len(_ARROW_END))) != _ARROW_END:
        raise pa.ArrowInvalid("it has no end, it is cut off")
    source.seek(0)
    for batch in pa.ipc.open_stream(source):
        yield source.tell() / source.size(), batch


def _parsed(line: bytes) -> Any:
    try:
        return json.loads(line.removeprefix(codecs.BOM_UTF8).decode())
    except UnicodeDecodeError as error:
        raise BadRecordError(
            "not UTF-8 text", f"convert it ({error.reason} at byte {error.start} of the line)"
        ) from None
    except (ValueError, RecursionError) as error:  # ValueError: also a number of too many digits
        raise BadRecordError("not a line of JSON", f"each line must be one record ({error})") from None


def _document(raw: Any, name: str, data: DataConfig) -> list[Segment]:
    if isinstance(raw, BadRecordError):
        raise raw
    record = _parsed(raw) if isinstance(raw, bytes) else raw
    if not isinstance(record, dict):
        raise BadRecordError("not a record", "write an object with a text in it")
    component = _component(record, data.component_field) or name
    if data.kind == "text":
        return [Segment(_text(record, data.text_field, "data.text_field"), component)]
    if data.kind == "completion":
        prompt = _text(record, data.prompt_field, "data.prompt_field")
        response = _text(record, data.response_field, "data.response_field")
        return [Segment(prompt, component, target=False, last=False), Segment(response, component)]
    return _chat(record.get(data.messages_field), component, data)


def _chat(messages: Any, component: str, data: DataConfig) -> list[Segment]:
    """Each message between the halves of the template; what the assistant says, and how it ends it, is the target."""
    if not isinstance(messages, list) or not messages:
        raise BadRecordError("no messages", f"set data.messages_field (now {data.messages_field})")
    before, after = data.chat_template.split("{content}")
    segments = []
    for message in messages:
        role, content = (message.get(name) if isinstance(message, dict) else None for name in ("role", "content"))
        if not isinstance(role, str) or not isinstance(content, str):
            raise BadRecordError("a message without role and content", "give both, as texts")
        if not _ROLE.fullmatch(role):  # it becomes part of the template, and may spell no special token
            raise BadRecordError("a role that is no name", "write it in letters, digits, _ and -")
        said = role == "assistant"
        segments += [
            Segment(before.replace("{role}", role), component, False, True, False),
            Segment(_checked(content), component, said, False, False),
            Segment(after.replace("{role}", role), component, said, True, False),
        ]
    if not any(segment.target for segment in segments):
        raise BadRecordError("nothing said by the assistant", "there is nothing to learn from it")
    return [*(segment for segment in segments[:-1] if segment.text), segments[-1]._replace(last=True)]


def _component(record: dict[str, Any], field: str) -> str:
    value: Any = record
    for name in field.split("."):
        value = value.get(name) if isinstance(value, dict) else None
    if not isinstance(value, str):
        return ""
    if not _checked(value).isprintable():
        raise BadRecordError("a control character in the component's name", "a terminal would obey it, remove it")
    return value


def _text(record: dict[str, Any], field: str, key: str) -> str:
    text = record.get(field)
    if not isinstance(text, str) or not text:
        raise BadRecordError(f"no text in field {field!r}", f"set {key} or correct the record")
    return _checked(text)


def _checked(text: str) -> str:
    if "\0" in text:
        raise BadRecordError("a NUL character in the text", "remove it: this is no text, or was cut off")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise BadRecordError("a lone surrogate in the text", "this is no valid Unicode, correct it") from None
    return text
