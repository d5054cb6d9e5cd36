"""The interface to a folder of named tensors, and the check that they are the parameters of a model."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor

from gptj_train.errors import UserError
from gptj_train.weights.quantized_folder import refuse_quantized

_CHUNK = 1 << 24  # elements looked at together
_FLOATS = ("F64", "F32", "F16", "BF16")
# Causal masks and position tables that old Transformers versions saved as buffers; they hold no weights.
_LEGACY_BUFFER = re.compile(r"(transformer\.)?h\.\d+\.attn\.(bias|masked_bias|embed_positions)")
_PREFIX = "transformer."
_ADAPTER = re.compile(r"(.+)\.(lora_[AB])\.weight")


def is_adapter(name: str) -> bool:
    """Return whether a parameter is a LoRA matrix, by its name."""
    return _ADAPTER.fullmatch(name) is not None


def is_finite(tensor: Tensor) -> bool:
    """Return whether a tensor holds no NaN and no infinity, with little memory."""
    for chunk in torch.split(tensor.detach().reshape(-1), _CHUNK):
        # The sum needs no memory and is finite in all but strange cases; only then each element is looked at.
        if not chunk.sum(dtype=torch.float32).isfinite() and not chunk.isfinite().all():
            return False
    return True


class StoredWeights(ABC):
    """Named tensors in a folder, read one at a time."""

    folder: Path

    @abstractmethod
    def names(self) -> list[str]:
        """Return the names of all tensors, in the folder's order."""

    @abstractmethod
    def shape_and_dtype(self, name: str) -> tuple[tuple[int, ...], str]:
        """Return a tensor's shape and its dtype as safetensors names it ("F32"); the elements are not read."""

    @abstractmethod
    def tensor(self, name: str) -> Tensor:
        """Return a tensor in its stored dtype."""

    def check_finite(self, name: str, tensor: Tensor) -> None:  # noqa: B027 (what we wrote ourselves was checked then)
        """Check a tensor of this folder for NaN and infinity; a checkpoint's were checked when it was written.

        Raises:
            UserError: there are some; the message names file and tensor.
        """

    @abstractmethod
    def read(self, name: str, start: int, into: Tensor) -> None:
        """Fill ``into``, one-dimensional, with the flattened tensor's elements from ``start`` on, cast to its dtype."""

    def read_whole(self, name: str, dtype: torch.dtype) -> Tensor:
        """Return a copy of a tensor in another dtype; unlike ``tensor``'s, its memory ends with it."""
        shape, _ = self.shape_and_dtype(name)
        whole = torch.empty(shape, dtype=dtype)
        self.read(name, 0, whole.view(-1))
        return whole

    @abstractmethod
    def close(self) -> None:
        """Close the files; tensors already read stay valid."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def match(
        self, shapes: Mapping[str, torch.Size], tied: frozenset[str] = frozenset(), new_head: bool = False
    ) -> dict[str, str]:
        """Return the stored name of each parameter, after checking that the folder holds exactly these.

        A model without head (trunk) also reads a folder with head, and ignores the head.

        Args:
            shapes: of the model's parameters.
            tied: names that may be stored although the model has no such parameter.
            new_head: accept a folder of another task; parameters outside the trunk are then left out of the result.

        Raises:
            UserError: missing or unexpected tensors, all of them listed; another shape; quantized weights.
        """
        refuse_quantized(self.folder, self.names())
        found = {name for name in self.names() if not _LEGACY_BUFFER.fullmatch(name)} - tied
        # Names first: a wrong model shows in them, and all its faults fit into one message.
        stored_names, relevant = _pair_names(shapes, found, new_head)
        self._check_complete(set(stored_names.values()), relevant)
        for name, stored_name in stored_names.items():
            self._check_tensor(name, stored_name, tuple(shapes[name]))
        return stored_names

    def _check_complete(self, wanted: set[str], found: set[str]) -> None:
        missing, unexpected = sorted(wanted - found), sorted(found - wanted)
        if missing or unexpected:
            raise UserError(
                f"{self.folder}: the weights are not this model's; "
                f"missing: {_shortened(missing)}; unexpected: {_shortened(unexpected)}"
            )

    def _check_tensor(self, name: str, stored_name: str, shape: tuple[int, ...]) -> None:
        found, dtype = self.shape_and_dtype(stored_name)
        if found != shape:
            raise UserError(f"{self.folder}: {name} has shape {found}, config.json says {shape}")
        if dtype not in _FLOATS:
            raise UserError(
                f"{self.folder}: {name} is stored as {dtype}, which cannot be trained; "
                "give a folder in fp32, bf16 or fp16, one that is not quantized"
            )


def _pair_names(shapes: Mapping[str, Any], found: set[str], new_head: bool) -> tuple[dict[str, str], set[str]]:
    """Return parameter -> stored name, and the stored names that these should be all of."""
    in_trunk = {name for name in found if name.startswith(_PREFIX)}
    head = {name for name in shapes if not name.startswith(_PREFIX)}
    if len(head) == len(shapes):
        # A trunk's own names have no prefix; a folder that holds a trunk inside a model has.
        prefix = _PREFIX if in_trunk else ""
        return {name: prefix + name for name in shapes}, in_trunk or found
    # Some of the head: then it is this task's, and what lacks is missing.
    if new_head and head.isdisjoint(found):
        return {name: name for name in shapes if name not in head}, in_trunk
    return dict(zip(shapes, shapes, strict=True)), found


def _shortened(names: list[str]) -> str:
    shown = ", ".join(names[:5]) or "none"
    return f"{shown} and {len(names) - 5} more" if len(names) > 5 else shown
