"""Safetensors files that hold flat fp32 slices of parameters: streamed out with their hash, read into buffers."""

from __future__ import annotations

import hashlib
import json
import os
import stat
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple, Self

import torch
from torch import Tensor

from gptj_train.errors import UserError

_LARGEST_HEADER = 100_000_000  # bytes, as in the safetensors library
_CHUNK = 1 << 24  # elements that are converted or checked at once


class Slice(NamedTuple):
    """``numel`` elements from ``start`` on of a parameter that is laid flat."""

    name: str
    start: int
    numel: int


class Written(NamedTuple):
    """What a manifest says of a file."""

    bytes: int
    sha256: str


def open_plain(path: Path) -> int:
    """File descriptor to read an ordinary file, and nothing else: no link, no pipe, no device.

    Raises:
        UserError: anything else, or a file that cannot be opened.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        reason = "it is a symbolic link" if path.is_symlink() else error.strerror
        raise UserError(f"{path}: cannot be read ({reason})") from None
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise UserError(f"{path}: refused, it is not an ordinary file")
    return descriptor


class SliceWriter:
    """Streams slices into one safetensors file, named ``parameter:start``, and hashes what it writes.

    The safetensors library would first copy all of them (https://github.com/huggingface/safetensors#format).
    """

    def __init__(self, path: Path, slices: Sequence[Slice]) -> None:
        self._file = path.open("xb")
        self._digest = hashlib.sha256()
        self._expected = iter(slices)
        header: dict[str, object] = {}
        end = 0
        for name, start, numel in slices:
            begin, end = end, end + 4 * numel
            header[f"{name}:{start}"] = {"dtype": "F32", "shape": [numel], "data_offsets": [begin, end]}
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        self._write(len(text).to_bytes(8, "little") + text)

    def _write(self, data: bytes | memoryview) -> None:
        self._digest.update(data)
        self._file.write(data)

    def add(self, tensor: Tensor) -> None:
        """The next slice, (numel), of any float dtype and on any device.

        Raises:
            UserError: a value that is not finite; such a state is not worth keeping.
        """
        name, start, numel = next(self._expected)
        assert tensor.numel() == numel, f"{name}:{start} has {tensor.numel()} elements, {numel} were announced"
        for chunk in tensor.detach().split(_CHUNK):
            values = chunk.to("cpu", torch.float32).contiguous()
            if not values.sum().isfinite() and not values.isfinite().all():
                raise UserError(f"{name} holds values that are not finite")
            self._write(values.numpy().data.cast("B"))

    def finish(self) -> Written:
        """Once all slices are in: make the file last, and tell its size and hash."""
        assert next(self._expected, None) is None, "slices that were announced are missing"
        self._file.flush()
        os.fsync(self._file.fileno())
        size = self._file.tell()
        self.close()
        return Written(size, self._digest.hexdigest())

    def close(self) -> None:
        """Let go of the file, finished or not."""
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class _Place(NamedTuple):
    start: int
    numel: int
    descriptor: int
    offset: int  # bytes from the file's beginning


class SliceReader:
    """Parameters whose slices lie in some files, read straight into buffers of whatever size.

    Raises:
        UserError: a file that is not what SliceWriter writes.
    """

    def __init__(self, paths: Iterable[Path]) -> None:
        self._descriptors: list[int] = []
        self._places: dict[str, list[_Place]] = defaultdict(list)
        try:
            for path in paths:
                self._descriptors.append(open_plain(path))
                for piece, offset in _header(path, self._descriptors[-1]):
                    place = _Place(piece.start, piece.numel, self._descriptors[-1], offset)
                    self._places[piece.name].append(place)
        except ValueError:
            self.close()
            raise

    def read(self, name: str, start: int, into: Tensor) -> None:
        """Fill ``into``, one-dimensional and contiguous, with the parameter's elements from ``start`` on.

        Raises:
            UserError: elements that no file holds.
        """
        if into.device.type != "cpu" or into.dtype != torch.float32:
            for chunk in into.split(_CHUNK):
                buffer = torch.empty(len(chunk), dtype=torch.float32)
                self.read(name, start, buffer)
                chunk.copy_(buffer)
                start += len(chunk)
            return
        target = into.detach().numpy().data.cast("B")
        end = start + into.numel()
        found = 0
        for place in self._places.get(name, ()):
            first, last = max(start, place.start), min(end, place.start + place.numel)
            if first < last:
                part = target[4 * (first - start) : 4 * (last - start)]
                _read_fully(place.descriptor, part, place.offset + 4 * (first - place.start), name)
                found += last - first
        if found != into.numel():
            raise UserError(f"the checkpoint holds {found} of the elements {start} to {end} of {name}")

    def close(self) -> None:
        """Let go of the files."""
        for descriptor in self._descriptors:
            os.close(descriptor)
        self._descriptors.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _read_fully(descriptor: int, target: memoryview, offset: int, what: object) -> None:
    while target:
        count = os.preadv(descriptor, [target], offset)
        if not count:
            raise UserError(f"{what}: the file ends too early")
        target, offset = target[count:], offset + count


def _header(path: Path, descriptor: int) -> list[tuple[Slice, int]]:
    """The slices of a file and where their data begin."""
    size = os.fstat(descriptor).st_size
    length = bytearray(8)
    _read_fully(descriptor, memoryview(length), 0, path)
    try:
        if int.from_bytes(length, "little") > min(size, _LARGEST_HEADER):
            raise UserError("its header would be longer than the file")
        text = bytearray(int.from_bytes(length, "little"))
        _read_fully(descriptor, memoryview(text), 8, path)
        found = []
        for key, entry in json.loads(text).items():
            name, _, start = key.rpartition(":")
            (numel,), (begin, end) = entry["shape"], entry["data_offsets"]
            if entry["dtype"] != "F32" or end - begin != 4 * numel or begin < 0 or 8 + len(text) + end > size:
                raise UserError(f"{key} is not where the header says")
            found.append((Slice(name, int(start), numel), 8 + len(text) + begin))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{path}: not a file of parameter slices ({error})") from None
    return found
