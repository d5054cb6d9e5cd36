"""The records of any file, for all tasks, as a ``datasets.IterableDataset``: JSON, .csv, .tsv, .parquet and .arrow.

A record is named by its place, "FILE:LINE" or "FILE row NUMBER". Only the fields that are asked for are looked at: no
other field can make a file unreadable, and no value changes its type.
"""

from __future__ import annotations

import codecs
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from datasets import IterableDataset
from datasets.iterable_dataset import ExamplesIterable

from gptj_train.data.csv_rows import read_csv
from gptj_train.data.files import chunks, kind_of, numbered_lines, split_lines
from gptj_train.data.json_values import begins_array, read_elements, read_values, records_within, spans_lines
from gptj_train.data.parsing import BadRecordError, parse_record
from gptj_train.data.tables import first_rows, read_rows
from gptj_train.errors import UserError

_FIRST = 100  # records that decide about the format and name unread fields
_LONGEST_FIRST_LINE = 2**16  # bytes; of a value that spans lines the first one is short
_DELIMITERS = {".csv": ",", ".tsv": "\t"}


def read_records(file: Path, columns: set[str], progress: Callable[[int], None]) -> IterableDataset:
    """Return the records of a file, in its order, as rows with two fields.

    * ``where``: the place of the record, for messages.
    * ``record``: a line of JSON as bytes, which is parsed by whoever needs it; or an object; or a ``BadRecordError``.

    Args:
        columns: the columns of a table that are needed: others may be large, or impossible to convert.
        progress: called with the number of bytes of the file read since the last call.

    Raises:
        UserError: while iterating, a file that cannot be read.
    """
    arguments = {"file": file, "columns": columns, "progress": progress}
    # What IterableDataset.from_generator builds in the end. That way round it would import torch into every worker,
    # 1.4 s of CPU time, and leave a lock file in the user's home folder for every file that is read.
    return IterableDataset(ExamplesIterable(_numbered_rows, arguments))


def _numbered_rows(
    file: Path, columns: set[str], progress: Callable[[int], None]
) -> Iterator[tuple[int, dict[str, Any]]]:
    for number, (where, record) in enumerate(_read(file, columns, progress)):
        yield number, {"where": where, "record": record}


def _read(file: Path, columns: set[str], progress: Callable[[int], None]) -> Iterator[tuple[str, Any]]:
    """Yield the place of each record and the record."""
    kind = kind_of(file)
    if kind in (".parquet", ".arrow"):
        for number, row in enumerate(read_rows(file, columns, progress), start=1):
            yield f"{file} row {number}", row
    elif kind in _DELIMITERS:
        rows = read_csv(file, numbered_lines(file, progress), delimiter=_DELIMITERS[kind])
        for number, csv_row in rows:
            yield f"{file}:{number}", csv_row
    else:
        yield from _read_json(file, columns, progress)


def _read_json(file: Path, fields: set[str], progress: Callable[[int], None]) -> Iterator[tuple[str, Any]]:
    """Read a record a line; an array of records; objects that span lines; or one object that holds all records.

    The first line says which, not the file's name.
    """
    pieces = chunks(file, progress)
    # Windows programs put a byte order mark first. It is no part of the content.
    head = _beginning(pieces).removeprefix(codecs.BOM_UTF8)
    whole = _chained(head, pieces)
    if begins_array(head):
        for number, element in read_elements(file, whole):
            yield f"{file}:{number}", element
    elif spans_lines(head):
        yield from _unwrapped(file, fields, read_values(file, whole))
    else:
        lines = ((number, line) for number, line in split_lines(file, whole) if line.strip())
        yield from _unwrapped(file, fields, lines)


def _beginning(pieces: Iterator[bytes]) -> bytes:
    """Read the first line, or enough to tell that it is a long one."""
    head = b""
    for piece in pieces:
        head += piece
        # White space or a byte order mark may come first, and a .gz may yield few bytes at a time.
        if b"\n" in head.removeprefix(codecs.BOM_UTF8).lstrip() or len(head) > _LONGEST_FIRST_LINE:
            break
    return head


def _chained(head: bytes, pieces: Iterator[bytes]) -> Iterator[bytes]:
    yield head
    yield from pieces


def _unwrapped(file: Path, fields: set[str], values: Iterator[tuple[int, Any]]) -> Iterator[tuple[str, Any]]:
    """Yield each value by its line; of a file that has only one, the records in it, if there are any."""
    first = next(values, None)
    if first is None:
        return
    second = next(values, None)
    if second is None:
        records = records_within(first[1], fields)
        if records is not None:
            for place, record in records:
                yield f"{file}: {place}", record
            return
    yield f"{file}:{first[0]}", first[1]
    if second is not None:
        yield f"{file}:{second[0]}", second[1]
    for number, value in values:
        yield f"{file}:{number}", value


def first_records(file: Path) -> list[dict[str, Any]]:
    """Return the first records of a file with all their fields; those that cannot be read are left out.

    What is wrong with a file is reported when it is read in full: here it only has no records.
    """
    try:
        if kind_of(file) in (".parquet", ".arrow"):
            return first_rows(file, _FIRST)
        records = []
        for row in read_records(file, set(), lambda read: None).take(_FIRST):
            try:
                record = parse_record(row["record"])
            except BadRecordError:
                continue
            if isinstance(record, dict):
                records.append(record)
        return records
    except UserError:
        return []
