"""The fp32 weights inside a training checkpoint, and the choice between that and a Transformers folder."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from gptj_train.errors import UserError
from gptj_train.weights.hf_reader import HFWeights
from gptj_train.weights.manifest import KINDS, MANIFEST, Manifest
from gptj_train.weights.slices import SliceReader
from gptj_train.weights.stored import StoredWeights, is_adapter


class CheckpointWeights(StoredWeights):
    """The fp32 master weights of a training checkpoint, of whatever world size, one parameter at a time.

    Raises:
        UserError: a folder without a whole manifest, or damaged weights.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self._manifest = Manifest.read(self.folder)
        moments = {file for kind in KINDS[1:] for file in self._manifest.of_kind(kind)}
        if damage := self._manifest.damage(self.folder, self._manifest.files.keys() - moments):
            raise UserError("; ".join(damage))
        self._reader = SliceReader(self.folder / file for file in self._manifest.of_kind("master"))

    def names(self) -> list[str]:
        return list(self._manifest.parameters)

    def form(self, name: str) -> tuple[tuple[int, ...], str]:
        return tuple(self._manifest.parameters[name]), "F32"

    def tensor(self, name: str) -> Tensor:
        """A parameter, whole, fp32."""
        whole = torch.empty(self._manifest.parameters[name], dtype=torch.float32)
        self.read(name, 0, whole.view(-1))
        return whole

    def read(self, name: str, start: int, into: Tensor) -> None:
        self._reader.read(name, start, into)

    def close(self) -> None:
        self._reader.close()


def open_weights(folder: str | Path) -> StoredWeights:
    """The weights of a training checkpoint, or of an HF folder.

    Raises:
        UserError: a folder without weights, or with damaged ones, or with those of LoRA adapters alone.
    """
    if not (Path(folder) / MANIFEST).exists():
        return HFWeights(folder)
    weights = CheckpointWeights(folder)
    if any(map(is_adapter, weights.names())):
        weights.close()
        raise UserError(
            f"{folder} holds LoRA adapters alone; merge them into a model first: "
            f"python recipes/export.py run={folder} output_dir=DIR"
        )
    return weights
