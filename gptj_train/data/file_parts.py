"""Parts of a large file, so that several processes, also on several hosts, prepare it together."""

from __future__ import annotations

import codecs
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from gptj_train.data.files import LONGEST_LINE, chunks
from gptj_train.data.json_values import begins_array, spans_lines
from gptj_train.errors import UserError

PART = 2**30  # bytes; a few seconds of tokenizing for each core
_HEAD = 2**16  # bytes that tell what a file holds
_COUNTED_AT_ONCE = 2**24


@dataclass(frozen=True)
class FilePart:
    """The lines of a file that begin within a range of its bytes; the default is the whole file.

    Attributes:
        begin: first byte of the range.
        end: one past its last byte; None: the end of the file, of any kind.
    """

    file: Path
    begin: int = 0
    end: int | None = None

    @property
    def size(self) -> int:
        """Bytes of the range."""
        return (self.file.stat().st_size if self.end is None else self.end) - self.begin


@dataclass(frozen=True)
class PlaceInPart:
    """The place of a line, for messages. Its number in the file is counted only if it is shown."""

    part: FilePart
    number: int
    """From 1, within the part."""

    def __str__(self) -> str:
        return f"{self.part.file}:{_lines_before(self.part) + self.number}"


def parts_of(file: Path) -> list[FilePart]:
    """Return the parts of a file that holds a record a line and is large; of another file the whole."""
    size = file.stat().st_size
    if file.suffix.lower() != ".jsonl" or size < 2 * PART or not _is_a_record_a_line(file):
        return [FilePart(file)]
    return [FilePart(file, begin, min(begin + PART, size)) for begin in range(0, size, PART)]


def lines_of(part: FilePart, progress: Callable[[int], None]) -> Iterator[tuple[int, bytes]]:
    """Read the lines that begin in a part, numbered from 1 within it, without their line feed.

    Args:
        progress: called with the number of bytes of the file read since the last call.

    Raises:
        UserError: a line above ``LONGEST_LINE``, or a file that cannot be read.
    """
    assert part.end is not None
    try:
        with open(part.file, "rb") as file:
            if part.begin > 0:
                # The line that holds the byte before the range begins in an earlier part.
                file.seek(part.begin - 1)
                file.readline()
            at = file.tell()
            number = 0
            while at < part.end:
                line = file.readline(LONGEST_LINE + 2)
                if not line:
                    return
                number += 1
                progress(len(line))
                content = line.removesuffix(b"\n")
                if len(content) > LONGEST_LINE:
                    place = PlaceInPart(part, number)
                    raise UserError(f"{place}: the line is longer than {LONGEST_LINE / 2**20:g} MiB; split the record")
                # Windows programs put a byte order mark first.
                yield number, content.removeprefix(codecs.BOM_UTF8) if at == 0 else content
                at += len(line)
    except OSError as error:
        raise UserError(f"{part.file}: cannot be read ({error.strerror})") from None


def _is_a_record_a_line(file: Path) -> bool:
    head = b""
    for chunk in chunks(file, lambda read: None):
        head += chunk
        if len(head) >= _HEAD:
            break
    head = head.removeprefix(codecs.BOM_UTF8)
    return not begins_array(head) and not spans_lines(head)


def _lines_before(part: FilePart) -> int:
    """Count the lines that begin before a part."""
    if part.begin == 0:
        return 0
    # A line that begins at the last byte before the part ends there or in the part: its line feed may be in either.
    count = 1
    left = part.begin - 1
    with open(part.file, "rb") as file:
        while left > 0:
            piece = file.read(min(left, _COUNTED_AT_ONCE))
            if not piece:
                break
            count += piece.count(b"\n")
            left -= len(piece)
    return count
