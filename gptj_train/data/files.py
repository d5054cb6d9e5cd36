"""Files of text: found by path, folder or glob, and read line by line, compressed or not."""

from __future__ import annotations

import glob
import gzip
import json
import os
import re
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import BinaryIO

import zstandard

from gptj_train.data.remote_files import fetched, is_url
from gptj_train.errors import UserError
from gptj_train.failed_download import LFS_POINTER, what_it_is
from gptj_train.near_name import near_name

_PACKED = ("", ".zst", ".gz")
_OF_RECORDS = (".jsonl", ".json", ".csv", ".tsv")
_TABLES = (".parquet", ".arrow")
RECORD_SUFFIXES = (*(text + packed for text in _OF_RECORDS for packed in _PACKED), *_TABLES)
SUFFIXES = (*(text + packed for text in (*_OF_RECORDS, ".txt") for packed in _PACKED), *_TABLES)

_NO_DATA = re.compile(r"dataset_info\.json|dataset_dict\.json|state\.json|cache-.*\.arrow")
"""What ``datasets`` writes beside the files of a saved dataset."""

LONGEST_LINE = 256 * 2**20
"""In bytes. A line is held in memory several times over; no record of text is this long."""

_CHUNK = 2**20  # bytes read at once
_HEAD = 1024  # bytes that tell a failed download
# Bytes decompressed at once. A zstd block takes at least 4 bytes and expands to at most 128 KiB, so that 4 KiB of a
# decompression bomb fill 128 MiB, and no more.
_ZSTD_CHUNK = 2**12
_LARGEST_WINDOW = 2**27  # bytes of history that a frame may require; zstd --long=27 writes such frames
_LARGEST_RATIO = 1000  # text compresses 3 to 20 times
_FREE = 64 * 2**20  # decompressed bytes before the ratio is checked: a small file may compress better


def kind_of(file: Path) -> str:
    """Return a file's suffix in lower case, without that of its compression: ".jsonl" of "a.JSONL.gz"."""
    name = file.name.lower()
    for packed in (".zst", ".gz"):
        name = name.removesuffix(packed)
    return Path(name).suffix


def find_files(paths: str | list[str], key: str, suffixes: tuple[str, ...] = SUFFIXES) -> list[Path]:
    """Find the files that paths, folders and globs name, in a fixed order.

    Args:
        paths: one or several; a single one may be a list with commas.
        key: the config key that holds the paths, for messages.

    Raises:
        UserError: a path that matches nothing, no path, a file with another suffix, or several splits of a dataset.
    """
    found: list[Path] = []
    for path in _separate(paths):
        files: dict[Path, None] = {}
        for match in fetched(path, key, suffixes) if is_url(path) else _matches(path):
            # ** matches folders and the files inside them: each file counts once.
            files |= dict.fromkeys(_files_at(Path(match), key, suffixes))
            if (Path(match) / "dataset_dict.json").is_file() and os.environ.get("RANK", "0") == "0":
                print(f"{key}: the split {key.rpartition('.')[2]!r} of {match}", flush=True)
        if not files:
            _check_readable(path, key)
            raise UserError(f"{key}: {_why_none(path, suffixes)}")
        found += files
    if not found:
        raise UserError(f"{key} is empty; give files, folders or globs")
    for file in found:
        if not file.name.lower().endswith(suffixes):
            raise UserError(f"{key}: {file} is none of {', '.join(suffixes)}; convert it, or name files without it")
        # Opening a named pipe would wait forever.
        if not file.is_file():
            raise UserError(f"{key}: {file} is not a regular file")
    return found


def local_files(paths: str | list[str] | None, key: str) -> list[Path]:
    """Return the files at paths, folders and globs, of any kind and without those at URLs; [] for none."""
    files: dict[Path, None] = {}
    for path in _separate(paths or []):
        if not is_url(path):
            for match in _matches(path):
                files |= dict.fromkeys(_files_at(Path(match), key, ("",)))
    return [file for file in files if file.is_file()]


def _why_none(path: str, suffixes: tuple[str, ...]) -> str:
    """Return why there is no file at a path, and what to do."""
    if os.path.isdir(path):
        return f"no {', '.join(suffixes)} file in the folder {path!r}; convert the files, or give another folder"
    missing = f"no file at {path!r} (working directory: {Path.cwd()}); "
    near = near_name(path)
    if near:
        return missing + near.removesuffix("; ")
    if path.startswith("data/") and "quickstart" in path:
        return missing + "make the corpus of the quickstarts first, by the script that the preset names"
    if re.fullmatch(r"[\w-]+(/[\w.-]+)?", path):
        return missing + f"correct the path; for a dataset of the Hugging Face hub write data.dataset={path}"
    return missing + "correct the path"


def _separate(paths: str | list[str]) -> list[str]:
    """Return the paths of a list, or of a text with commas, unless such a file exists."""
    if not isinstance(paths, str):
        return paths
    if is_url(paths):
        return [paths]
    if "," not in paths or _matches(paths):
        return [paths]
    return [os.path.expanduser(path.strip()) for path in paths.split(",") if path.strip()]


def _matches(path: str) -> list[str]:
    # A path that exists is taken as it is, though it may look like a glob: "run[1].jsonl".
    return [path] if os.path.exists(path) else sorted(glob.glob(path, recursive=True))


def _check_readable(path: str, key: str) -> None:
    """Raise UserError for the first folder of a path that may not be read: in it no file is seen."""
    folder = Path(path).absolute()
    for part in [*reversed(folder.parents), folder]:
        if part.is_dir() and not os.access(part, os.R_OK | os.X_OK):
            raise UserError(f"{key}: {part} cannot be read; correct its permissions")


def _files_at(path: Path, key: str, suffixes: tuple[str, ...]) -> list[Path]:
    """Return the path itself, or the files of these kinds in a folder, or those of a dataset that was saved there."""
    if not path.is_dir():
        return [path]
    if (path / "dataset_dict.json").is_file():
        splits = sorted(state.parent for state in path.glob("*/state.json"))
        split = key.rpartition(".")[2]  # "train" of data.train
        if path / split not in splits:
            names = ", ".join(map(str, splits))
            raise UserError(f"{path}: contains several splits; name one of them: {names}")
        path /= split
    if (path / "state.json").is_file():
        return _files_saved(path)
    files = []
    for file in path.rglob("*"):
        if file.name.lower().endswith(suffixes) and not _NO_DATA.fullmatch(file.name):
            files.append(file)
    return sorted(files)


def _files_saved(folder: Path) -> list[Path]:
    """Return the files of a dataset that ``datasets`` saved: earlier ones and caches may lie beside them."""
    try:
        state = json.loads((folder / "state.json").read_bytes())
        names = [str(entry["filename"]) for entry in state["_data_files"]]
    except (ValueError, TypeError, KeyError):
        raise UserError(f"{folder / 'state.json'}: not what datasets writes; save the dataset again") from None
    for name in names:
        if name != os.path.basename(name):
            raise UserError(f"{folder / 'state.json'}: refused, it names {name}, which is outside of the folder")
    return [folder / name for name in names]


def numbered_lines(file: Path, progress: Callable[[int], None]) -> Iterator[tuple[int, bytes]]:
    r"""Read the lines of a text file, plain, .gz or .zst, numbered from 1, without their line feed.

    Only ``\n`` ends a line: JSON strings may contain other line separators of Unicode.

    Args:
        progress: called with the number of bytes of the file read since the last call.

    Raises:
        UserError: a line above ``LONGEST_LINE``, or a compressed file that is cut off, damaged or a bomb.
    """
    yield from split_lines(file, chunks(file, progress))


def split_lines(file: Path, pieces: Iterable[bytes]) -> Iterator[tuple[int, bytes]]:
    """Split the bytes of a file, in pieces of any length, into lines as ``numbered_lines`` does."""
    number = 1
    # A line may cross chunks. Its parts are joined once: adding bytes to bytes takes quadratic time.
    parts: list[bytes] = []
    size = 0
    for chunk in pieces:
        for position, part in enumerate(chunk.split(b"\n")):
            if position > 0:
                # A line feed lies between two parts of a chunk, and so ends the line before this part.
                yield number, b"".join(parts)
                number += 1
                parts = []
                size = 0
            parts.append(part)
            size += len(part)
            if size > LONGEST_LINE:
                limit = f"{LONGEST_LINE / 2**20:g} MiB"
                raise UserError(f"{file}:{number}: the line is longer than {limit}; split the record")
    if size > 0:
        yield number, b"".join(parts)


def chunks(file: Path, progress: Callable[[int], None]) -> Iterator[bytes]:
    """Read the bytes of a file, decompressed, in pieces of any length. Arguments and errors as ``numbered_lines``."""
    try:
        with open(file, "rb") as raw:
            head = raw.read(_HEAD)
            instead = what_it_is(head) if head else None
            # A .txt may be a page of HTML that is meant; a Git LFS pointer is never meant.
            if instead and (kind_of(file) != ".txt" or head.startswith(LFS_POINTER)):
                raise UserError(f"{file}: this is {instead}")
            raw.seek(0)
            watched = _Watched(raw, progress)
            if file.suffix.lower() == ".zst":
                yield from _zstd_chunks(watched, file)
            elif file.suffix.lower() == ".gz":
                with gzip.GzipFile(fileobj=watched) as stream:  # type: ignore[call-overload]
                    while chunk := stream.read(_CHUNK):
                        yield chunk
            else:
                while chunk := watched.read(_CHUNK):
                    yield chunk
    except (EOFError, zlib.error, gzip.BadGzipFile, zstandard.ZstdError) as error:
        raise UserError(
            f"{file}: damaged, cut off or not supported ({error}); fetch or compress the file again"
        ) from None
    except OSError as error:
        raise UserError(f"{file}: cannot be read ({error.strerror})") from None


class _Watched:
    """A file that reports how many bytes are read from it."""

    def __init__(self, raw: BinaryIO, progress: Callable[[int], None]) -> None:
        self._raw = raw
        self._progress = progress

    def read(self, size: int = -1) -> bytes:
        chunk = self._raw.read(size)
        self._progress(len(chunk))
        return chunk


def _zstd_chunks(raw: _Watched, file: Path) -> Iterator[bytes]:
    """Decompress all frames of a file.

    The readers of the ``zstandard`` package end silently where a frame is cut off.
    """
    decompressor = zstandard.ZstdDecompressor(max_window_size=_LARGEST_WINDOW)
    frame = None
    ready = bytearray()
    bytes_in = bytes_out = 0
    while data := raw.read(_CHUNK):
        for start in range(0, len(data), _ZSTD_CHUNK):
            rest = data[start : start + _ZSTD_CHUNK]
            while rest:
                if frame is None:
                    frame = decompressor.decompressobj()
                decompressed = frame.decompress(rest)
                bytes_in += len(rest)
                bytes_out += len(decompressed)
                if bytes_out > _FREE and bytes_out > _LARGEST_RATIO * bytes_in:
                    raise UserError(f"{file}: refused, it decompresses to more than {_LARGEST_RATIO} times its size")
                ready += decompressed
                rest = b""
                if frame.eof:
                    # What follows the frame belongs to the next one, and is counted with it.
                    rest = frame.unused_data
                    bytes_in -= len(rest)
                    frame = None
            if len(ready) >= _CHUNK:
                yield bytes(ready)
                ready.clear()
    if frame is not None:
        raise UserError(f"{file}: cut off in the middle of a zstd frame; fetch it again")
    yield bytes(ready)
