"""One safetensors file: streamed out tensor by tensor with its hash, or opened to read its header.

The format puts the places of all tensors first, in a JSON header behind its length in eight bytes
(https://github.com/huggingface/safetensors#format). The library's own ``save_file`` wants every tensor in memory at
once; here one tensor, or a part of it, is enough.
"""

from __future__ import annotations

import hashlib
import json
import os
import stat
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor

from gptj_train.errors import UserError

CHUNK = 1 << 24
"""Elements that are moved to the CPU, converted and written at a time."""

_LARGEST_HEADER = 100_000_000  # bytes, as in the safetensors library
_DTYPE_NAMES = {torch.bfloat16: "BF16", torch.float16: "F16", torch.float32: "F32", torch.float64: "F64"}


class Written(NamedTuple):
    """Size and hash of a file, as a manifest records them."""

    bytes: int
    sha256: str


class SafetensorsWriter:
    """Stream tensors into a new safetensors file, and hash what goes out.

    Args:
        path: the file to create; one that exists is never overwritten.
        shapes: name -> shape of every tensor, in the order in which ``add`` will get them.
        dtype: that each tensor is cast to; or name -> dtype.
        metadata: free text for the header.
        separators: of the header's JSON, as in ``json.dumps``; they decide the header's bytes.
    """

    def __init__(
        self,
        path: Path,
        shapes: Mapping[str, Sequence[int]],
        *,
        dtype: torch.dtype | Mapping[str, torch.dtype],
        metadata: Mapping[str, str] | None = None,
        separators: tuple[str, str] = (",", ":"),
    ) -> None:
        self._shapes = shapes
        self._dtypes = dict.fromkeys(shapes, dtype) if isinstance(dtype, torch.dtype) else dtype
        self._announced = iter(shapes)
        header: dict[str, Any] = {} if metadata is None else {"__metadata__": dict(metadata)}
        end = 0
        for name, shape in shapes.items():
            own_dtype = self._dtypes[name]
            begin, end = end, end + torch.Size(shape).numel() * own_dtype.itemsize
            header[name] = {"dtype": _DTYPE_NAMES[own_dtype], "shape": list(shape), "data_offsets": [begin, end]}
        encoded = json.dumps(header, separators=separators).encode()
        # Readers map the file into memory: spaces bring the first tensor to a multiple of 8 bytes.
        encoded += b" " * (-len(encoded) % 8)
        self._digest = hashlib.sha256()
        self._file = path.open("xb")
        self._write(len(encoded).to_bytes(8, "little") + encoded)

    def _write(self, data: bytes | memoryview) -> None:
        # Hashed on the way out: the hash is of what was meant, so that a disk that stores something else is found.
        self._digest.update(data)
        self._file.write(data)

    def add(self, name: str, tensor: Tensor) -> None:
        """Write the next tensor, of any float dtype and on any device."""
        expected = next(self._announced, "no tensor")
        assert name == expected, f"{name} came where {expected} was announced"
        assert tensor.shape == torch.Size(self._shapes[name]), f"{name} has another shape than announced"
        for chunk in torch.split(tensor.detach().reshape(-1), CHUNK):
            stored = chunk.to("cpu", self._dtypes[name]).contiguous()
            self._write(stored.view(torch.uint8).numpy().data)

    def finish(self) -> Written:
        """Flush the file to disk, once every tensor is in, and return its size and hash."""
        missing = next(self._announced, None)
        assert missing is None, f"{missing} was announced and never came"
        self._file.flush()
        os.fsync(self._file.fileno())
        # Whoever verifies the file shall read the disk, not this host's cache. Only Linux has the call.
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(self._file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        size = self._file.tell()
        self.close()
        return Written(size, self._digest.hexdigest())

    def close(self) -> None:
        """Close the file, finished or not."""
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def open_plain(path: Path) -> int:
    """Return a file descriptor to read a regular file; links, pipes and devices are refused.

    Raises:
        UserError: anything but a regular file, or a file that cannot be opened.
    """
    try:
        # O_NONBLOCK: opening a pipe that has no writer would otherwise wait forever.
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        reason = "it is a symbolic link" if path.is_symlink() else error.strerror
        raise UserError(f"{path}: cannot be read ({reason})") from None
    # Checked on the descriptor, not on the path, which somebody could exchange in between.
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise UserError(f"{path}: refused, it is not an ordinary file")
    return descriptor


def read_header(descriptor: int) -> tuple[dict[str, Any], int]:
    """Return an open file's header, name -> entry, and the byte at which the tensors begin.

    Raises:
        ValueError: a file too short for its header, or a header that is not JSON.
    """
    size = os.fstat(descriptor).st_size
    length_bytes = bytearray(8)
    read_fully(descriptor, memoryview(length_bytes), offset=0, what="its header")
    length = int.from_bytes(length_bytes, "little")
    # The length is a stranger's: checked before memory is taken for it.
    if length > min(size, _LARGEST_HEADER):
        raise UserError("its header would be longer than the file")
    text = bytearray(length)
    read_fully(descriptor, memoryview(text), offset=8, what="its header")
    return json.loads(text), 8 + length


def read_fully(descriptor: int, target: memoryview, *, offset: int, what: str) -> None:
    """Fill ``target`` with a file's bytes from ``offset`` on; ``what`` they are names them in the error.

    Raises:
        UserError: the file ends before that.
    """
    # One call may return less than was asked for: Linux reads at most 2 GiB at a time.
    while target:
        count = os.preadv(descriptor, [target], offset)
        if not count:
            raise UserError(f"{what}: the file ends too early")
        target, offset = target[count:], offset + count


def count_tensor_bytes(path: Path) -> int:
    """Return a safetensors file's size without its header."""
    descriptor = open_plain(path)
    try:
        _, begin = read_header(descriptor)
        return os.fstat(descriptor).st_size - begin
    finally:
        os.close(descriptor)
