"""Files of text -> segments of documents."""

from __future__ import annotations

import codecs
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from gptj_train.data.file_parts import FilePart, PlaceInPart, lines_of
from gptj_train.data.files import LONGEST_LINE, SUFFIXES, chunks, kind_of
from gptj_train.data.parsing import BadRecordError, with_outermost
from gptj_train.data.record_files import read_records
from gptj_train.data.records import Segment, checked_text, document_of, prompt_fields
from gptj_train.data.text_config import DataConfig
from gptj_train.errors import UserError

_PIECE = 2**20  # characters tokenized at once
# White space after a letter or digit. Byte-level BPE splits a text into words before it merges, and every split in use
# ends a word here. So the pieces of a text that is cut here have the same tokens as the whole.
_WORD_END = re.compile(r"(?<=[^\W_])[ \n\r\t]")


def read_segments(
    file: Path,
    data: DataConfig,
    *,
    skipped: Counter[str],
    progress: Callable[[int], None],
    part: FilePart | None = None,
) -> Iterator[Segment]:
    """Read the documents of a file in order, segment by segment.

    A .txt file is one document; .jsonl and .json hold a record a line or an array of records, .parquet and .arrow a
    record a row.

    Args:
        skipped: filled with reason -> number of records that ``data.bad_records=skip`` leaves out.
        progress: called with the number of bytes of the file read since the last call.
        part: of the file, to read only the lines that begin there; None reads all.

    Raises:
        UserError: a bad record, named by file and line or row, or a file that cannot be read.
    """
    if kind_of(file) == ".txt":
        yield from _read_txt(file, data, progress)
        return
    default_component = _without_suffix(file)
    rows: Iterable[dict[str, Any]] = read_records(file, columns_of(data), progress)
    if part is not None and part.end is not None:
        rows = _rows_of(part, progress)
    for row in rows:
        try:
            document = document_of(row["record"], data, default_component=default_component)
        except BadRecordError as error:
            if data.bad_records == "error":
                raise UserError(f"{row['where']}: {error}, or skip such records with data.bad_records=skip") from None
            skipped[error.reason] += 1
            continue
        for segment in document:
            *pieces, rest = _pieces(segment.text)
            for piece in pieces:
                yield segment._replace(text=piece, last=False)
            yield segment._replace(text=rest)


def _rows_of(part: FilePart, progress: Callable[[int], None]) -> Iterator[dict[str, Any]]:
    """Yield the lines of a part as ``read_records`` yields those of a file."""
    for number, line in lines_of(part, progress):
        if line.strip():
            yield {"where": PlaceInPart(part, number), "record": line}


def _without_suffix(file: Path) -> str:
    # "a.jsonl.zst" ends with a suffix of two parts; "a.txt.jsonl" keeps its first.
    longest = ""
    for suffix in SUFFIXES:
        if file.name.lower().endswith(suffix) and len(suffix) > len(longest):
            longest = suffix
    return file.name[: len(file.name) - len(longest)] or file.name


def columns_of(data: DataConfig) -> set[str]:
    """Return the fields of a record that are read, and the outermost names of those inside others."""
    if data.kind == "chat":
        read = [data.messages_field]
    elif data.kind == "completion":
        read = [*prompt_fields(data.prompt_field), data.response_field]
    else:
        read = [data.text_field]
    return with_outermost([*read, data.component_field])


def _read_txt(file: Path, data: DataConfig, progress: Callable[[int], None]) -> Iterator[Segment]:
    """Read a file as one document. Its bad content is never skipped: nothing would be left."""
    if data.has_examples:
        raise UserError(f"{file}: a .txt file cannot contain {data.kind} records; give .jsonl, or set data.kind=text")
    # A folder of books is a component; a component for each book would be too many.
    component = Path(os.path.abspath(file)).parent.name or file.name
    decoder = codecs.getincrementaldecoder("utf-8-sig")()  # a chunk may end within a character
    rest = ""
    read = 0
    empty = True
    try:
        for chunk in chunks(file, progress):
            read += len(chunk)
            *pieces, rest = _pieces(rest + decoder.decode(chunk))
            for piece in pieces:
                yield Segment(checked_text(piece), component, last=False)
                empty = False
            if len(rest) > LONGEST_LINE:
                raise BadRecordError("no white space over a long stretch", "this is not text, remove it from the data")
        rest += decoder.decode(b"", final=True)
        if empty and not rest.strip():
            raise BadRecordError("no text in it", "remove it from the data")
        yield Segment(checked_text(rest), component)
    except UnicodeDecodeError as error:
        # error.object is what the decoder had at hand: the last chunk, and what was left of the one before.
        place = read - len(error.object) + error.start
        raise UserError(f"{file}: not UTF-8 text ({error.reason} at byte {place:,}); convert it") from None
    except BadRecordError as error:
        raise UserError(f"{file}: {error}") from None


def _pieces(text: str) -> Iterator[str]:
    """Cut a long text into pieces of about ``_PIECE`` characters that end where a word ends."""
    start = 0
    while len(text) - start > _PIECE:
        word_end = _WORD_END.search(text, start + _PIECE)
        if word_end is None:
            break
        yield text[start : word_end.start()]
        start = word_end.start()
    yield text[start:]
