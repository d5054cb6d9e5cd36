"""Named tensors in a folder, read one at a time, and matched to the parameters of a model."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Self

import torch
from torch import Tensor

from gptj_train.errors import UserError

_FLOATS = ("F64", "F32", "F16", "BF16")
# Buffers that old Transformers versions saved; they hold no weights.
_LEGACY_BUFFER = re.compile(r"(transformer\.)?h\.\d+\.attn\.(bias|masked_bias|embed_positions)")
_PREFIX = "transformer."
_ADAPTER = re.compile(r"(.+)\.(lora_[AB])\.weight")


def is_adapter(name: str) -> bool:
    """Return whether a parameter is a LoRA matrix, by its name."""
    return _ADAPTER.fullmatch(name) is not None


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
            UserError: missing or unexpected tensors, or other shapes, all listed.
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
            raise UserError(
                f"{self.folder}: the weights are not this model's; "
                f"missing: {_some(missing)}; unexpected: {_some(unexpected)}"
            )
        for name, place in wanted.items():
            (found, kind), shape = self.form(place), tuple(shapes[name])
            if found != shape:
                raise UserError(f"{self.folder}: {name} has shape {found}, config.json says {shape}")
            if kind not in _FLOATS:
                raise UserError(
                    f"{self.folder}: {name} is stored as {kind}, which is no weight to train; "
                    "give a folder in fp32, bf16 or fp16, one that is not quantized"
                )
        return wanted


def _some(names: list[str]) -> str:
    shown = ", ".join(names[:5]) or "none"
    return f"{shown} and {len(names) - 5} more" if len(names) > 5 else shown
