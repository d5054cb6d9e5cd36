"""Files of text: found by path, folder or glob, and read line by line whatever compresses them."""

from __future__ import annotations

import glob
import gzip
import os
import re
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import zstandard

from gptj_train.errors import UserError

TEXT_SUFFIXES = (".jsonl", ".json", ".txt")
SUFFIXES = (*(text + packed for text in TEXT_SUFFIXES for packed in ("", ".zst", ".gz")), ".parquet", ".arrow")

_NO_DATA = re.compile(r"dataset_info\.json|dataset_dict\.json|state\.json|cache-.*\.arrow")
"""What ``datasets`` writes beside a saved dataset's own files."""

LONGEST_LINE = 256 * 2**20
"""Bytes; what is longer is no record of text, and would not fit in memory on the way."""

_CHUNK = 2**20
# A block of zstd is at most 128 KiB and at least 4 bytes: so little at once, and no bomb fills the memory.
_ZSTD_CHUNK = 2**12
_LARGEST_WINDOW = 2**27  # bytes of history that a frame may ask for: zstd --long=27
_LARGEST_RATIO, _FREE = 1000, 64 * 2**20  # text compresses 3 to 20 times; the first bytes are not judged


def find_files(paths: str | list[str], key: str, suffixes: tuple[str, ...] = SUFFIXES) -> list[Path]:
    """The files that paths, folders and globs name, in a fixed order.

    Args:
        key: the config key the paths came from, for the message.

    Raises:
        UserError: a path that matches nothing, no path, or a file of another kind.
    """
    found: list[Path] = []
    for path in [paths] if isinstance(paths, str) else paths:
        matches = [path] if os.path.exists(path) else sorted(glob.glob(path, recursive=True))
        # A ** matches folders and the files inside them: each file counts once.
        files = dict.fromkeys(file for match in matches for file in _files_at(Path(match), suffixes))
        if not files:
            raise UserError(
                f"{key}: no {', '.join(suffixes)} file at {path!r} (looked from {Path.cwd()}); "
                "correct the path; a quickstart's corpus is written by its script, see the preset in configs/config"
            )
        found += files
    if not found:
        raise UserError(f"{key} is empty; give files, folders or globs")
    for file in found:
        if not file.name.endswith(suffixes):
            raise UserError(f"{key}: {file} is none of {', '.join(suffixes)}; convert it, or name files without it")
        if not file.is_file():
            raise UserError(f"{key}: {file} is not a regular file")
    return found


def _files_at(path: Path, suffixes: tuple[str, ...]) -> list[Path]:
    if not path.is_dir():
        return [path]
    return sorted(
        file for file in path.rglob("*") if file.name.endswith(suffixes) and not _NO_DATA.fullmatch(file.name)
    )


def numbered_lines(file: Path, progress: Callable[[int], None]) -> Iterator[tuple[int, bytes]]:
    """The lines of a text file, plain, .gz or .zst, numbered from 1, without their line end.

    Args:
        progress: told how many bytes of the file have been read since it was last told.

    Raises:
        UserError: a line beyond ``LONGEST_LINE``, or a compressed file that is cut off, damaged or a bomb.
    """
    number, parts, size = 1, list[bytes](), 0
    for chunk in chunks(file, progress):
        for turn, part in enumerate(chunk.split(b"\n")):
            if turn:
                yield number, b"".join(parts)
                number, parts, size = number + 1, [], 0
            parts.append(part)
            size += len(part)
            if size > LONGEST_LINE:
                limit = f"{LONGEST_LINE / 2**20:g} MiB"
                raise UserError(f"{file}:{number}: the line is longer than {limit}; split the record")
    if size:
        yield number, b"".join(parts)


def chunks(file: Path, progress: Callable[[int], None]) -> Iterator[bytes]:
    """The bytes of a file, decompressed, in pieces of any length. Arguments and errors as ``numbered_lines``."""
    try:
        with open(file, "rb") as raw:
            watched = _Watched(raw, progress)
            if file.suffix == ".zst":
                yield from _zstd_chunks(watched, file)
            elif file.suffix == ".gz":
                with gzip.GzipFile(fileobj=watched) as stream:  # type: ignore[call-overload]
                    while chunk := stream.read(_CHUNK):
                        yield chunk
            else:
                while chunk := watched.read(_CHUNK):
                    yield chunk
    except (EOFError, zlib.error, gzip.BadGzipFile, zstandard.ZstdError) as error:
        raise UserError(f"{file}: damaged, cut off or not unpacked here ({error}); fetch or pack it again") from None
    except OSError as error:
        raise UserError(f"{file}: cannot be read ({error.strerror})") from None


class _Watched:
    """A file that tells how much of it is read."""

    def __init__(self, raw, progress: Callable[[int], None]) -> None:  # type: ignore[no-untyped-def]
        self._raw, self._progress = raw, progress

    def read(self, size: int = -1) -> bytes:
        chunk = self._raw.read(size)
        self._progress(len(chunk))
        return chunk


def _zstd_chunks(raw: _Watched, file: Path) -> Iterator[bytes]:
    """All frames of a file. The package's own readers stop silently where a frame is cut off."""
    decompressor = zstandard.ZstdDecompressor(max_window_size=_LARGEST_WINDOW)
    frame, ready = None, bytearray()
    taken = given = 0
    while data := raw.read(_CHUNK):
        for start in range(0, len(data), _ZSTD_CHUNK):
            rest = data[start : start + _ZSTD_CHUNK]
            while rest:
                frame = frame or decompressor.decompressobj()
                chunk = frame.decompress(rest)
                taken, given = taken + len(rest), given + len(chunk)
                if given > _FREE and given > _LARGEST_RATIO * taken:
                    raise UserError(f"{file}: refused, it unpacks to more than {_LARGEST_RATIO} times its size")
                ready += chunk
                rest = b""
                if frame.eof:
                    rest, frame = frame.unused_data, None
                    taken -= len(rest)
            if len(ready) >= _CHUNK:
                yield bytes(ready)
                ready.clear()
    if frame is not None:
        raise UserError(f"{file}: cut off in the middle of a zstd frame; fetch it again")
    yield bytes(ready)
