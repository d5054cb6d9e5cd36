"""Original checkpoints of mesh-transformer-jax, read with NumPy: ``shard_0..N/``, each of numbered npz pieces.

Every shard holds the leaves of one JAX tree, in the tree's own order: of a full checkpoint the optimizer's
(count, first moments, second moments, count), then the parameters, then the step; of a slim one only the last
two. The names are nowhere stored; order and cuts follow from mesh_transformer/transformer_shard.py, layers.py
and checkpoint.py of github.com/kingoflolz/mesh-transformer-jax.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from zipfile import BadZipFile, ZipFile

import numpy as np
import torch
from numpy.lib import format as npy
from torch import Tensor
from tqdm import tqdm

from gptj_train.errors import UserError
from gptj_train.model.gptj_config import GPTJConfig
from gptj_train.model.heads import GPTJForCausalLM
from gptj_train.weights.hf_writer import write_weights
from gptj_train.weights.moments import MOMENTS, write_steps

_EMBEDDING_BIAS = "transformer.wte.bias"  # in no Transformers folder: added to every row of the embedding


@dataclass(frozen=True)
class _Leaf:
    """A parameter under its Transformers name, and how the shards divide it.

    ``cut``: dimension of the Transformers tensor that is divided; None: each shard has one of the whole size,
    which the model adds up (``summed``) or of which it takes the first.
    """

    name: str
    cut: int | None = None
    summed: bool = False

    @property
    def transposed(self) -> bool:
        """Stored (in, out), where Transformers has (out, in)."""
        return self.cut is not None and self.name.endswith("weight") and "wte" not in self.name


def _leaves(layers: int) -> list[_Leaf]:
    """The parameters in the order of the tree: modules by name, so that layer 10 comes before layer 2."""
    leaves = [_Leaf(_EMBEDDING_BIAS, summed=True), _Leaf("transformer.wte.weight", cut=0)]
    for layer in sorted(range(layers), key=str):
        block = f"transformer.h.{layer}."
        leaves += [_Leaf(f"{block}attn.{name}_proj.weight", cut=0) for name in "qvk"]
        leaves += [
            _Leaf(f"{block}attn.out_proj.weight", cut=1),
            _Leaf(f"{block}mlp.fc_in.bias", cut=0),
            _Leaf(f"{block}mlp.fc_in.weight", cut=0),
            _Leaf(f"{block}mlp.fc_out.bias", summed=True),
            _Leaf(f"{block}mlp.fc_out.weight", cut=1),
            _Leaf(f"{block}ln_1.bias"),
            _Leaf(f"{block}ln_1.weight"),
        ]
    head = [_Leaf("lm_head.bias", cut=0), _Leaf("lm_head.weight", cut=0)]
    return [*leaves, *head, _Leaf("transformer.ln_f.bias"), _Leaf("transformer.ln_f.weight")]


@dataclass
class _Shard:
    """The leaves of one shard folder, each read when asked for."""

    folder: Path
    leaves: list[tuple[Path, str]] = field(default_factory=list)

    def __post_init__(self) -> None:
        number = 0
        while (piece := self.folder / f"{number}.npz").is_file():
            members = self._guarded(piece, lambda: ZipFile(piece).namelist())
            self.leaves += [(piece, f"arr_{i}.npy") for i in range(len(members))]
            number += 1

    @staticmethod
    def _guarded(piece: Path, read: Any) -> Any:
        try:
            return read()
        except (OSError, BadZipFile, KeyError, ValueError, EOFError, NotImplementedError) as error:
            raise UserError(f"{piece}: cannot be read as a piece of a checkpoint ({error})") from None

    def shape(self, leaf: int) -> tuple[int, ...]:
        piece, member = self.leaves[leaf]

        def read() -> tuple[int, ...]:
            with ZipFile(piece) as archive, archive.open(member) as file:
                readers = {(1, 0): npy.read_array_header_1_0, (2, 0): npy.read_array_header_2_0}
                return readers[npy.read_magic(file)](file)[0]

        return self._guarded(piece, read)

    def tensor(self, leaf: int) -> Tensor:
        """One leaf, as stored; NumPy has no bf16 and calls it void of two bytes."""
        piece, member = self.leaves[leaf]

        def read() -> Tensor:
            with ZipFile(piece) as archive, archive.open(member) as file:
                stored = npy.read_array(file, allow_pickle=False)
            if stored.dtype.kind == "V" and stored.dtype.itemsize == 2:
                return torch.from_numpy(stored.view(np.int16)).view(torch.bfloat16)
            if stored.dtype.kind not in "fiu":
                raise UserError(f"{member} holds {stored.dtype}")
            return torch.from_numpy(stored)

        return self._guarded(piece, read)


class MeshCheckpoint:
    """A ``step_N`` folder of mesh-transformer-jax as the parameters of our model.

    Args:
        folder: the one that holds ``shard_0``.
        config: the model's shape. Heads and rotary dimensions cannot be seen in the files.

    Raises:
        UserError: no such folder, pieces that are missing or damaged, or the shapes of another model.
    """

    def __init__(self, folder: str | Path, config: GPTJConfig) -> None:
        self.folder, self.config = Path(folder), config
        self._shards = self._open()
        self._table = _leaves(config.n_layer)
        with torch.device("meta"):
            model = GPTJForCausalLM(config)
        self.shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
        counts = {len(shard.leaves) for shard in self._shards}
        slim, full = len(self._table) + 1, 3 * len(self._table) + 3
        if counts != {slim} and counts != {full}:
            raise UserError(
                f"{self.folder}: {' or '.join(map(str, sorted(counts)))} arrays a shard; a model of "
                f"{config.n_layer} layers has {slim} in a slim checkpoint, {full} in a full one"
            )
        self.is_full = counts == {full}
        trees = {"exp_avg": 1, "exp_avg_sq": 1 + len(self._table), "weights": 2 + 2 * len(self._table)}
        self._first = trees if self.is_full else {"weights": 0}
        for tree in self._first:
            for leaf in self._table:
                self._check(tree, leaf)
        self.step = self._count(full - 1 if self.is_full else slim - 1)

    def _open(self) -> list[_Shard]:
        folders: list[Path] = []
        while (folder := self.folder / f"shard_{len(folders)}").is_dir():
            folders.append(folder)
        if not folders:
            raise UserError(f"{self.folder}: no shard_0 here; give the step_... folder of a mesh-transformer-jax run")
        shards = [_Shard(folder) for folder in folders]
        for shard in shards:
            if not shard.leaves:
                raise UserError(f"{shard.folder}: no 0.npz here; the download is not complete")
        return shards

    def _count(self, place: int) -> int:
        shard = self._shards[0]
        if (shape := shard.shape(place)) != ():
            raise UserError(f"{shard.folder}: an array of shape {shape} where a number of steps should be")
        return int(shard.tensor(place))

    def _place(self, tree: str, leaf: _Leaf) -> int:
        return self._first[tree] + self._table.index(leaf)

    def _shape(self, leaf: _Leaf) -> tuple[int, ...]:
        return (self.config.n_embd,) if leaf.name == _EMBEDDING_BIAS else tuple(self.shapes[leaf.name])

    def _check(self, tree: str, leaf: _Leaf) -> None:
        expected = list(self._shape(leaf))
        if leaf.cut is not None:
            if expected[leaf.cut] % len(self._shards):
                raise UserError(
                    f"{self.folder}: {leaf.name} of {tuple(expected)} does not divide into "
                    f"{len(self._shards)} shards; check the model's shape and the download"
                )
            expected[leaf.cut] //= len(self._shards)
        if leaf.transposed:
            expected.reverse()
        for shard in self._shards:
            if (found := shard.shape(self._place(tree, leaf))) != tuple(expected):
                raise UserError(
                    f"{shard.folder}: {leaf.name} has shape {found}, the model's shape asks for {tuple(expected)}"
                )

    def tensors(self, tree: str = "weights") -> Iterator[tuple[str, Tensor]]:
        """Each parameter's weights or moments, under its Transformers name and in the model's order.

        Weights keep their stored dtype, but what is added up comes in fp32. Moments belong to the parameters as
        the shards hold them: those of the embedding's own bias, which the rows absorb, are left out, and of
        biases that the shards add up all copies saw the same gradient, so that one copy's are theirs.
        """
        by_name = {leaf.name: leaf for leaf in self._table}
        for name in tqdm(self.shapes, desc=tree, unit="tensor", disable=None):
            tensor = self._whole(tree, by_name[name])
            if tree == "weights" and name == "transformer.wte.weight":
                tensor = tensor.float()
                tensor += self._whole(tree, by_name[_EMBEDDING_BIAS])
            yield name, tensor

    def _whole(self, tree: str, leaf: _Leaf) -> Tensor:
        place = self._place(tree, leaf)
        first = self._shards[0].tensor(place)
        if leaf.cut is None:
            if not leaf.summed or tree != "weights":
                return first
            return first.float() + sum(shard.tensor(place).float() for shard in self._shards[1:])
        whole = first.new_empty(self._shape(leaf))
        for part, shard in zip(whole.chunk(len(self._shards), dim=leaf.cut), self._shards, strict=True):
            stored = shard.tensor(place)
            part.copy_(stored.T if leaf.transposed else stored)
        return whole

    def save_pretrained(self, folder: str | Path, dtype: torch.dtype = torch.float32) -> None:
        """Write a Transformers folder, and of a full checkpoint the moments as ``adam/`` in it.

        ``adam/exp_avg`` and ``adam/exp_avg_sq`` hold the moments in fp32, as weights are held and under the
        parameters' names; ``adam/state.json`` the number of updates they come from. A tensor or two are in memory
        at a time.

        Raises:
            UserError: the folder is there already.
        """
        target = Path(folder)
        if target.exists() and not (target.is_dir() and not any(target.iterdir())):
            raise UserError(f"{target} is there already; give another output_dir")
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}.") as scratch:
            finished = Path(scratch) / target.name
            finished.mkdir()
            write_weights(finished, self.tensors(), self.shapes, dtype)
            self.config.dtype = str(dtype).removeprefix("torch.")
            self.config.save_pretrained(finished, architecture="GPTJForCausalLM")
            if self.is_full:
                for moment in MOMENTS:
                    (finished / "adam" / moment).mkdir(parents=True)
                    write_weights(finished / "adam" / moment, self.tensors(moment), self.shapes, torch.float32)
                write_steps(finished, self._count(0))
            os.replace(finished, target)
