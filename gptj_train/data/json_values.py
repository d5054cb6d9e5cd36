"""The values in a JSON file that are not a line each: elements of an array, objects over several lines, columns.

They are read one at a time: memory does not grow with the file.
"""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from gptj_train.data.parsing import BadRecordError, parse_record, unique_fields
from gptj_train.errors import UserError

_LONGEST_ELEMENT = 2**28  # characters, as the longest line
_SPACE = " \t\r\n"
_LISTS = ("data", "examples", "instances", "items", "records", "rows")
"""Names under which a file that is one object keeps its records: SQuAD's, pandas's, and others in use."""


def begins_array(head: bytes) -> bool:
    """Return whether the first bytes of a file begin a JSON array; lines of records begin with a brace."""
    return head.lstrip().startswith(b"[")


def spans_lines(head: bytes) -> bool:
    """Return whether a value goes on behind the first line, as in pretty-printed JSON: it ends in the middle."""
    first, line_feed, _ = head.lstrip().partition(b"\n")
    return line_feed != b"" and first.startswith(b"{") and first.rstrip().endswith((b"{", b"[", b","))


def read_elements(file: Path, chunks: Iterable[bytes]) -> Iterator[tuple[int, Any]]:
    """Yield the line on which each element of a top-level array begins, and the element.

    Args:
        file: its name, for messages.
        chunks: its bytes, in pieces of any length.

    Raises:
        UserError: a fault in the JSON, named by its line. The rest of the file cannot be read then, so that it is
            never skipped.
    """
    text = _Text(file, chunks)
    text.expect("[")
    if text.peek() != "]":
        yield text.element()
        while text.peek() == ",":
            text.expect(",")
            yield text.element()
    text.expect("]")
    if text.peek():
        raise text.fault("something follows the end of the list")


def read_values(file: Path, chunks: Iterable[bytes]) -> Iterator[tuple[int, Any]]:
    """Yield the line on which each of several values begins, and the value. Arguments and errors as above."""
    text = _Text(file, chunks)
    while text.peek():
        yield text.element()


def records_within(value: Any, fields: set[str]) -> list[tuple[str, Any]] | None:
    """Return the records in a file's only value, each with its place; None if the value is a record by itself.

    An object holds records as a list under a usual name, such as SQuAD's {"version": ..., "data": [...]}; or as pandas
    writes a table: a dictionary, or a list, for each column, or a dictionary for each row.

    Args:
        value: an object, or a line of JSON.
        fields: those that are asked for; an object with one of them beside a list is a record.
    """
    if isinstance(value, bytes):
        try:
            value = parse_record(value)
        except BadRecordError:
            return None  # its reader names the fault
    if not isinstance(value, dict) or not value:
        return None
    for name in _LISTS:
        entries = value.get(name)
        if not isinstance(entries, list) or (fields - {name}) & value.keys():
            continue
        if all(isinstance(entry, dict) for entry in entries):
            return [(f"{name}[{number}]", entry) for number, entry in enumerate(entries)]
    columns = list(value.values())
    if all(isinstance(column, dict) for column in columns):
        return _records_of_pandas(value)
    if not all(isinstance(column, list) and len(column) == len(columns[0]) for column in columns):
        return None
    if any(isinstance(cell, dict) for column in columns for cell in column):
        return None  # a record whose field is a list of dictionaries, as the messages of a chat are
    rows = zip(*columns, strict=True)
    return [(f"row {number}", dict(zip(value, row, strict=True))) for number, row in enumerate(rows, start=1)]


def _records_of_pandas(value: dict[str, dict[str, Any]]) -> list[tuple[str, Any]] | None:
    """Return the rows of a table: column -> row number -> cell, or row number -> column -> cell."""
    if all(name.isdecimal() for name in value):
        return [(f"row {name}", row) for name, row in value.items()]
    first, *others = value.values()
    if not all(name.isdecimal() for name in first) or any(column.keys() != first.keys() for column in others):
        return None
    return [(f"row {name}", {column: cells[name] for column, cells in value.items()}) for name in first]


class _Text:
    """The text of a file from the current position on, and the line at which that is."""

    def __init__(self, file: Path, chunks: Iterable[bytes]) -> None:
        self._file = file
        self._chunks = iter(chunks)
        self._decoder = codecs.getincrementaldecoder("utf-8")()
        self._json = json.JSONDecoder(object_pairs_hook=unique_fields)
        self._text = ""
        self._position = 0
        self._line = 1
        self._complete = False

    def fault(self, what: str) -> UserError:
        return UserError(f"{self._file}:{self._line}: not JSON ({what}); correct the file, or write a record a line")

    def peek(self) -> str:
        """Skip white space and return the next character; empty at the end of the file."""
        while True:
            while self._position < len(self._text) and self._text[self._position] in _SPACE:
                self._advance(self._position + 1)
            if self._position < len(self._text):
                return self._text[self._position]
            if not self._read_more(1):
                return ""

    def expect(self, character: str) -> None:
        found = self.peek()
        if found != character:
            raise self.fault(f"{character!r} expected, found {found!r}" if found else "the file ends too early")
        self._advance(self._position + 1)

    def element(self) -> tuple[int, Any]:
        """Return the line and the value of the next element."""
        self.peek()
        line = self._line
        while True:
            try:
                value, end = self._json.raw_decode(self._text, self._position)
            except RecursionError:
                raise self.fault("nested too deeply") from None
            except BadRecordError as error:
                raise self.fault(str(error)) from None
            except ValueError as error:
                # Either the element is not whole yet, or it is wrong: only more text can tell. Twice as much each
                # time, since every attempt starts from the beginning of the element.
                if self._read_more(2 * (len(self._text) - self._position)):
                    continue
                raise self.fault(str(error)) from None
            # A number at the end of the text may have more digits.
            if end == len(self._text) and self._read_more(1):
                continue
            self._advance(end)
            return line, value

    def _advance(self, position: int) -> None:
        self._line += self._text.count("\n", self._position, position)
        self._position = position

    def _read_more(self, characters: int) -> bool:
        """Read until so many characters lie ahead, or the file ends; return whether there are more than before."""
        ahead = self._text[self._position :]
        if len(ahead) > _LONGEST_ELEMENT:
            raise self.fault("the record is longer than 256 Mi characters")
        parts = [ahead]
        size = len(ahead)
        while size <= characters and not self._complete:
            chunk = next(self._chunks, b"")
            self._complete = not chunk
            try:
                part = self._decoder.decode(chunk, final=self._complete)
            except UnicodeDecodeError as error:
                raise UserError(f"{self._file}: not UTF-8 text ({error.reason}); convert it") from None
            parts.append(part)
            size += len(part)
        self._text = "".join(parts)
        self._position = 0
        return size > len(ahead)
