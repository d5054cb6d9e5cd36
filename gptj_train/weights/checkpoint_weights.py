"""The fp32 weights inside a training checkpoint, and the choice between a checkpoint and a Transformers folder."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from gptj_train.errors import UserError
from gptj_train.weights.hf_reader import HFWeights
from gptj_train.weights.manifest import MANIFEST, Manifest
from gptj_train.weights.moments import MOMENTS
from gptj_train.weights.slices import SliceReader
from gptj_train.weights.stored import StoredWeights, is_adapter


class CheckpointWeights(StoredWeights):
    """The fp32 master weights of a training checkpoint, whatever number of ranks wrote it.

    All files but the moments are verified against the manifest's hashes before anything is read.

    Args:
        share: (rank, ranks) that verify the files together, each its share; all of them must open the folder.

    Raises:
        UserError: a folder without a valid manifest, or damaged files.
    """

    def __init__(self, folder: str | Path, *, share: tuple[int, int] = (0, 1)) -> None:
        self.folder = Path(folder)
        self._manifest = Manifest.read(self.folder)
        # Moments are two thirds of the bytes, and no weights.
        needed = set(self._manifest.files)
        for moment in MOMENTS:
            needed -= set(self._manifest.of_kind(moment))
        rank, ranks = share
        damage = self._manifest.damage(self.folder, sorted(needed)[rank::ranks])
        if damage:
            raise UserError("; ".join(damage))
        self._reader = SliceReader(self.folder / file for file in self._manifest.of_kind("master"))

    def names(self) -> list[str]:
        return list(self._manifest.parameters)

    def shape_and_dtype(self, name: str) -> tuple[tuple[int, ...], str]:
        return tuple(self._manifest.parameters[name]), "F32"

    def tensor(self, name: str) -> Tensor:
        whole = torch.empty(self._manifest.parameters[name], dtype=torch.float32)
        self.read(name, 0, whole.view(-1))
        return whole

    def read(self, name: str, start: int, into: Tensor) -> None:
        self._reader.read(name, start, into)

    def close(self) -> None:
        self._reader.close()


def open_weights(folder: str | Path, *, share: tuple[int, int] = (0, 1)) -> StoredWeights:
    """Open the weights of a training checkpoint or of a Transformers folder.

    Args:
        share: see ``CheckpointWeights``.

    Raises:
        UserError: no weights, damaged weights, or a checkpoint of LoRA adapters only.
    """
    if not (Path(folder) / MANIFEST).exists():
        return HFWeights(folder)
    weights = CheckpointWeights(folder, share=share)
    if any(is_adapter(name) for name in weights.names()):
        weights.close()
        raise UserError(
            f"{folder} holds LoRA adapters only; merge them into a model first: "
            f"python recipes/export.py run={folder} output_dir=DIR"
        )
    return weights
