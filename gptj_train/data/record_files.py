"""The records of any file, for all tasks: lines or an array of JSON, rows of .csv, .tsv, .parquet and .arrow.

A record is named by its place, "FILE:LINE" or "FILE row NUMBER". Only the fields that are asked for are looked at: no
other field can make a file unreadable, and no value changes its type.
"""

from __future__ import annotations

import codecs
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from gptj_train.data.csv_rows import read_csv
from gptj_train.data.files import chunks, kind_of, numbered_lines, split_lines
from gptj_train.data.json_arrays import begins_array, read_elements
from gptj_train.data.records import BadRecordError, parse_line
from gptj_train.data.tables import first_rows, read_rows
from gptj_train.errors import UserError

_FIRST = 100  # records that decide about the format and name unread fields
_DELIMITERS = {".csv": ",", ".tsv": "\t"}


def read_records(
    file: Path, columns: set[str], progress: Callable[[int], None]
) -> Iterator[tuple[str, Any | BadRecordError]]:
    """Yield the place of each record and the record: a line of JSON as bytes, or an object, or an error.

    Args:
        columns: the columns of a table that are needed: others may be large, or impossible to convert.
        progress: called with the number of bytes of the file read since the last call.

    Raises:
        UserError: a file that cannot be read.
    """
    kind = kind_of(file)
    if kind in (".parquet", ".arrow"):
        for number, row in enumerate(read_rows(file, columns, progress), start=1):
            yield f"{file} row {number}", row
    elif kind in _DELIMITERS:
        rows = read_csv(file, numbered_lines(file, progress), delimiter=_DELIMITERS[kind])
        for number, csv_row in rows:
            yield f"{file}:{number}", csv_row
    else:
        yield from _read_json(file, progress)


def _read_json(file: Path, progress: Callable[[int], None]) -> Iterator[tuple[str, Any]]:
    pieces = chunks(file, progress)
    head = b""
    # White space or a byte order mark of three bytes may come first, and a .gz may yield few bytes at a time.
    for piece in pieces:
        head += piece
        if len(head) > len(codecs.BOM_UTF8) and head.removeprefix(codecs.BOM_UTF8).strip():
            break
    whole = _chained(head, pieces)
    if begins_array(head):
        for number, element in read_elements(file, whole):
            yield f"{file}:{number}", element
    else:
        for number, line in split_lines(file, whole):
            if line.strip():
                yield f"{file}:{number}", line


def _chained(head: bytes, pieces: Iterator[bytes]) -> Iterator[bytes]:
    yield head
    yield from pieces


def first_records(file: Path) -> list[dict[str, Any]]:
    """Return the first records of a file with all their fields; those that cannot be read are left out.

    What is wrong with a file is told when it is read in full: here it only has no records.
    """
    try:
        if kind_of(file) in (".parquet", ".arrow"):
            return first_rows(file, _FIRST)
        records = []
        for _, record in islice(read_records(file, set(), lambda read: None), _FIRST):
            try:
                record = parse_line(record) if isinstance(record, bytes) else record
            except BadRecordError:
                continue
            if isinstance(record, dict):
                records.append(record)
        return records
    except UserError:
        return []
