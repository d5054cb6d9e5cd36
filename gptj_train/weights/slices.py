"""Checkpoint files of flat fp32 slices of parameters: written by each rank, read into buffers of any size."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor

from gptj_train.errors import UserError
from gptj_train.weights.safetensors_file import CHUNK, SafetensorsWriter, Written, open_plain, read_fully, read_header
from gptj_train.weights.stored import is_finite

_FP32_BYTES = 4


class Slice(NamedTuple):
    """``numel`` elements of a flattened parameter, from its element ``start`` on."""

    name: str
    start: int
    numel: int


class SliceWriter:
    """Stream slices into one safetensors file, each as a tensor named ``parameter:start``."""

    def __init__(self, path: Path, slices: Sequence[Slice]) -> None:
        self._announced = iter(slices)
        shapes = {f"{name}:{start}": (numel,) for name, start, numel in slices}
        # json.dumps' own separators: the bytes of checkpoint files stay what they always were.
        self._file = SafetensorsWriter(path, shapes, dtype=torch.float32, separators=(", ", ": "))

    def add(self, tensor: Tensor) -> None:
        """Write the next slice, (numel), of any float dtype and on any device.

        Raises:
            UserError: a NaN or infinity; such a state is not worth keeping.
        """
        piece = next(self._announced)
        _check_finite(piece.name, tensor)
        self._file.add(f"{piece.name}:{piece.start}", tensor)

    def finish(self) -> Written:
        """Flush the file to disk, once all slices are in, and return its size and hash."""
        return self._file.finish()

    def close(self) -> None:
        """Close the file, finished or not."""
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _check_finite(name: str, tensor: Tensor) -> None:
    if not is_finite(tensor):
        raise UserError(f"{name} contains NaN or infinity")


class _Place(NamedTuple):
    """Where a file holds a slice; ``offset`` counts bytes from the file's beginning."""

    start: int
    numel: int
    descriptor: int
    offset: int


class SliceReader:
    """Read parameters whose slices lie in some files, straight into buffers.

    Raises:
        UserError: a file that SliceWriter did not write.
    """

    def __init__(self, paths: Iterable[Path]) -> None:
        self._descriptors: list[int] = []
        self._places: dict[str, list[_Place]] = defaultdict(list)
        try:
            for path in paths:
                self._open(path)
        except ValueError:
            self.close()
            raise

    def _open(self, path: Path) -> None:
        descriptor = open_plain(path)
        self._descriptors.append(descriptor)
        for piece, offset in _read_slices(path, descriptor):
            self._places[piece.name].append(_Place(piece.start, piece.numel, descriptor, offset))

    def read(self, name: str, start: int, into: Tensor) -> None:
        """Fill ``into``, one-dimensional and contiguous, with a parameter's elements from ``start`` on.

        Raises:
            UserError: elements that no file holds.
        """
        if into.device.type == "cpu" and into.dtype == torch.float32:
            self._read_fp32(name, start, into)
            return
        # By way of a small buffer: a GPU's memory, or another dtype, cannot be read into from a file.
        for chunk in torch.split(into, CHUNK):
            buffer = torch.empty(len(chunk), dtype=torch.float32)
            self._read_fp32(name, start, buffer)
            chunk.copy_(buffer)
            start += len(chunk)

    def _read_fp32(self, name: str, start: int, into: Tensor) -> None:
        target = into.detach().numpy().data.cast("B")
        end = start + into.numel()
        found = 0
        # The files may come from another number of ranks, whose slices begin and end elsewhere.
        for place in self._places.get(name, ()):
            first = max(start, place.start)
            last = min(end, place.start + place.numel)
            if first >= last:
                continue
            part = target[_FP32_BYTES * (first - start) : _FP32_BYTES * (last - start)]
            offset = place.offset + _FP32_BYTES * (first - place.start)
            read_fully(place.descriptor, part, offset=offset, what=name)
            found += last - first
        # No slice is stored twice, so that the count alone shows a gap.
        if found != into.numel():
            raise UserError(f"the checkpoint holds {found} of the elements {start} to {end} of {name}")

    def close(self) -> None:
        """Close the files."""
        for descriptor in self._descriptors:
            os.close(descriptor)
        self._descriptors.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _read_slices(path: Path, descriptor: int) -> list[tuple[Slice, int]]:
    """Return a file's slices, each with the byte at which its elements begin."""
    found = []
    try:
        size = os.fstat(descriptor).st_size
        header, data_begin = read_header(descriptor)
        for key, entry in header.items():
            name, _, start = key.rpartition(":")
            numel, begin = _read_entry(key, entry, size - data_begin)
            found.append((Slice(name, int(start), numel), data_begin + begin))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{path}: not a file of parameter slices ({error})") from None
    return found


def _read_entry(key: str, entry: Any, data_bytes: int) -> tuple[int, int]:
    """Return the number of elements of a header's entry and where they begin, in bytes behind the header."""
    (numel,) = entry["shape"]
    begin, end = entry["data_offsets"]
    if entry["dtype"] != "F32" or end - begin != _FP32_BYTES * numel or begin < 0 or end > data_bytes:
        raise UserError(f"{key} is not where the header says")
    return numel, begin
