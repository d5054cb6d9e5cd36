"""Tensors out of Transformers folders: safetensors or legacy .bin, one file or sharded."""

from __future__ import annotations

import json
import os
import re
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self
from zipfile import ZipFile

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

_LARGEST_INDEX = 50_000_000  # bytes; GPT-J's has 25 thousand
_MOST_MAPPED = 200_000_000  # bytes
_FLOATS = ("F64", "F32", "F16", "BF16")
_PLAIN_NAME = re.compile(r"[A-Za-z0-9][\w.-]*")
# Buffers that old Transformers versions saved; they hold no weights.
_LEGACY_BUFFER = re.compile(r"(transformer\.)?h\.\d+\.attn\.(bias|masked_bias|embed_positions)")
_PREFIX = "transformer."


class StoredWeights(ABC):
    """Named tensors in a folder, read one at a time."""

    folder: Path

    @abstractmethod
    def names(self) -> list[str]:
        """Of all tensors in the folder, in their order."""

    @abstractmethod
    def form(self, name: str) -> tuple[tuple[int, ...], str]:
        """A tensor's shape and safetensors' name of its dtype, without reading the numbers."""

    @abstractmethod
    def tensor(self, name: str) -> Tensor:
        """One stored tensor, as stored."""

    @abstractmethod
    def read(self, name: str, start: int, into: Tensor) -> None:
        """Fill ``into``, one-dimensional, with the tensor's elements from ``start`` on, cast to its dtype."""

    @abstractmethod
    def close(self) -> None:
        """Release the files; tensors already read stay valid."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def match(
        self, shapes: Mapping[str, torch.Size], tied: frozenset[str] = frozenset(), new_head: bool = False
    ) -> dict[str, str]:
        """Stored name of each wanted parameter, after checking that exactly these are here.

        A trunk without head reads a folder with head and leaves the head. ``tied`` names may be stored
        though nobody wants them. With ``new_head`` a folder of another task will do: the parameters outside
        the trunk are then left out.

        Raises:
            ValueError: missing or unexpected tensors, or other shapes, all listed.
        """
        stored = {name for name in self.names() if not _LEGACY_BUFFER.fullmatch(name)} - tied
        trunk_only = not any(name.startswith(_PREFIX) for name in shapes)
        prefix = _PREFIX if trunk_only and any(name.startswith(_PREFIX) for name in stored) else ""
        wanted = {name: prefix + name for name in shapes}
        head = {name for name in shapes if not trunk_only and not name.startswith(_PREFIX)}
        if new_head and head.isdisjoint(stored):
            wanted = {name: name for name in shapes if name not in head}
            stored = {name for name in stored if name.startswith(_PREFIX)}
        missing = sorted(set(wanted.values()) - stored)
        unexpected = sorted(name for name in stored - set(wanted.values()) if name.startswith(prefix))
        if missing or unexpected:
            raise ValueError(
                f"{self.folder}: the weights are not this model's; "
                f"missing: {_some(missing)}; unexpected: {_some(unexpected)}"
            )
        for name, place in wanted.items():
            (found, kind), shape = self.form(place), tuple(shapes[name])
            if found != shape:
                raise ValueError(f"{self.folder}: {name} has shape {found}, config.json says {shape}")
            if kind not in _FLOATS:
                raise ValueError(
                    f"{self.folder}: {name} is stored as {kind}, which is no weight to train; "
                    "give a folder in fp32, bf16 or fp16, one that is not quantized"
                )
        return wanted


class HFWeights(StoredWeights):
    """The tensors of a Transformers folder, read one at a time from memory-mapped files.

    Files are data: nothing in them runs, and none outside the folder is opened, except the blobs that a folder
    in a hub cache links to.

    Raises:
        ValueError: no weights in the folder, or an index or file that cannot be trusted or read.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self._open: dict[str, Any] = {}
        self._mapped: Counter[str] = Counter()  # bytes read from each file since it was opened
        self._file_of = self._locate()

    def _locate(self) -> dict[str, str]:
        for single, index in (
            ("model.safetensors", "model.safetensors.index.json"),
            ("pytorch_model.bin", "pytorch_model.bin.index.json"),
        ):
            if (self.folder / single).is_file():
                return dict.fromkeys(self._handle(single).keys(), single)
            if (self.folder / index).is_file():
                return self._read_index(self._regular(index))
        raise ValueError(
            f"{self.folder}: no model.safetensors, pytorch_model.bin or their index here; "
            "give the folder that Transformers' save_pretrained or our export wrote"
        )

    def _regular(self, file: str) -> Path:
        """The path of a file, once it is known to be one and to be in the folder."""
        path = self.folder / file
        real, home = Path(os.path.realpath(path)), Path(os.path.realpath(self.folder))
        blobs = home.parent.parent / "blobs" if home.parent.name == "snapshots" else home
        if not (real.is_relative_to(home) or real.is_relative_to(blobs)):
            raise ValueError(f"{path}: refused, it is a link to outside of its folder; put the file itself there")
        if not real.is_file():
            why = "not a regular file" if real.exists() else "the index names it, but it is not there"
            raise ValueError(f"{path}: cannot be read as weights ({why})")
        return path

    @staticmethod
    def _read_index(path: Path) -> dict[str, str]:
        try:
            if path.stat().st_size > _LARGEST_INDEX:
                raise ValueError("it is too large for one")
            weight_map = json.loads(path.read_text())["weight_map"]
            plain = all(_PLAIN_NAME.fullmatch(file) for file in weight_map.values())
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise ValueError(f"{path}: not a readable weight index ({error})") from None
        if not plain:
            raise ValueError(f"{path}: weight_map may name files of its own folder only")
        return weight_map

    def _handle(self, file: str) -> Any:
        if file not in self._open:
            path = self._regular(file)
            try:
                if file.endswith(".safetensors"):
                    self._open[file] = safe_open(path, framework="pt").__enter__()
                else:
                    self._open[file] = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
            except (OSError, SafetensorError, RuntimeError, ValueError, EOFError) as error:
                raise ValueError(f"{path}: cannot be read as weights ({error})") from None
            except Exception as error:  # torch raises pickle.UnpicklingError for anything but tensors
                raise ValueError(f"{path}: refused, it holds more than tensors ({type(error).__name__})") from None
            if file.endswith(".bin"):
                if not _is_state_dict(self._open[file]):
                    raise ValueError(f"{path}: refused, it is not a plain dictionary of tensors")
                if not _is_whole(path, self._open[file]):
                    raise ValueError(f"{path}: cannot be read as weights (its records are not as long as its tensors)")
        return self._open[file]

    def close(self) -> None:
        for file in list(self._open):
            self._release(file)

    def names(self) -> list[str]:
        return list(self._file_of)

    def form(self, name: str) -> tuple[tuple[int, ...], str]:
        handle = self._handle(self._file_of[name])
        if name not in handle.keys():  # noqa: SIM118 (a safetensors handle is no mapping)
            raise ValueError(f"{self.folder}: the index places {name} in {self._file_of[name]}, which lacks it")
        if isinstance(handle, dict):
            kinds = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
            return tuple(handle[name].shape), kinds.get(handle[name].dtype, str(handle[name].dtype))
        stored = handle.get_slice(name)
        return tuple(stored.get_shape()), stored.get_dtype()

    def tensor(self, name: str) -> Tensor:
        handle = self._handle(self._file_of[name])
        return handle[name] if isinstance(handle, dict) else handle.get_tensor(name)

    def read(self, name: str, start: int, into: Tensor) -> None:
        # Only these elements come from the disk. They stay mapped, and count as this process's memory, until so
        # many have been read that the file is mapped anew.
        flat = self.tensor(name).reshape(-1)
        into.copy_(flat.narrow(0, start, into.numel()))
        file = self._file_of[name]
        self._mapped[file] += into.numel() * flat.element_size()
        if self._mapped[file] > _MOST_MAPPED:
            self._release(file)

    def _release(self, file: str) -> None:
        handle = self._open.pop(file)
        self._mapped[file] = 0
        if hasattr(handle, "__exit__"):
            handle.__exit__(None, None, None)


def _is_state_dict(loaded: Any) -> bool:
    return isinstance(loaded, dict) and all(isinstance(value, Tensor) for value in loaded.values())


def _is_whole(path: Path, state: dict[str, Tensor]) -> bool:
    # Mapped into memory, a record that is too short would be continued with whatever follows it in the file.
    with ZipFile(path) as archive:
        stored = sum(record.compress_size for record in archive.infolist() if "/data/" in record.filename)
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in state.values()}
    return sum(storages.values()) == stored


def _some(names: list[str]) -> str:
    shown = ", ".join(names[:5]) or "none"
    return f"{shown} and {len(names) - 5} more" if len(names) > 5 else shown
