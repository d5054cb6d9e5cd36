"""Rows of .csv and .tsv files. Every value stays the text that it is; a row of another length is an error."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Iterator
from pathlib import Path

from gptj_train.counted import counted
from gptj_train.data.files import LONGEST_LINE
from gptj_train.data.parsing import BadRecordError
from gptj_train.errors import UserError


def read_csv(
    file: Path, lines: Iterable[tuple[int, bytes]], *, delimiter: str
) -> Iterator[tuple[int, dict[str, str] | BadRecordError]]:
    """Yield the line on which each row begins, and the row; an error takes the place of a row that does not fit.

    Args:
        file: its name, for messages.
        lines: its numbered lines without their line feeds. A quoted field may span several.

    Raises:
        UserError: no header, or quotes that do not close.
    """
    # The module's own limit of 128 KiB is for a field, and a field may be a book.
    csv.field_size_limit(LONGEST_LINE)
    rows = csv.reader(_decoded(file, lines), delimiter=delimiter, strict=True)
    header: list[str] | None = None
    begin = 1
    while True:
        try:
            row = next(rows, None)
        except csv.Error as error:
            raise UserError(f"{file}:{begin}: not a row of {file.suffix[1:]} ({error}); correct its quotes") from None
        if row is None:
            return
        if not row:
            pass  # a blank line
        elif header is None:
            header = row
            if len(set(header)) < len(header):
                raise UserError(f"{file}:{begin}: two columns have the same name; rename one of {', '.join(header)}")
        elif len(row) != len(header):
            fields = counted(len(row), "field")
            yield begin, BadRecordError(f"{fields}, the header has {len(header)}", "quote the text")
        else:
            yield begin, dict(zip(header, row, strict=True))
        begin = rows.line_num + 1


def _decoded(file: Path, lines: Iterable[tuple[int, bytes]]) -> Iterator[str]:
    for number, line in lines:
        try:
            # The byte order mark that Excel writes would otherwise be part of the first column's name.
            yield line.decode("utf-8-sig" if number == 1 else "utf-8") + "\n"
        except UnicodeDecodeError as error:
            raise UserError(f"{file}:{number}: not UTF-8 text ({error.reason}); convert it") from None
