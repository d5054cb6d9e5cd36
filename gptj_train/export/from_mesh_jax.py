"""Import original checkpoints of mesh-transformer-jax, read with NumPy: ``shard_0..N/``, each of numbered .npz files.

Every shard holds the leaves of one JAX tree, in the tree's own order. A full checkpoint has the optimizer state
(count, first moments, second moments, count), the parameters, and the step; a slim one has only the parameters and
the step. The names are stored nowhere: order and cuts follow from mesh_transformer/transformer_shard.py, layers.py
and checkpoint.py of github.com/kingoflolz/mesh-transformer-jax.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import TypeVar
from zipfile import BadZipFile, ZipFile

import numpy as np
import torch
from numpy.lib import format as npy
from torch import Tensor
from tqdm import tqdm

from gptj_train.atomic_write import new_folder
from gptj_train.errors import UserError
from gptj_train.model.gptj_config import GPTJConfig
from gptj_train.model.heads import GPTJForCausalLM
from gptj_train.weights.hf_writer import write_weights
from gptj_train.weights.moments import MOMENTS, write_steps

T = TypeVar("T")

_EMBEDDING_BIAS = "transformer.wte.bias"  # in no Transformers folder: it is added to every row of the embedding


@dataclass(frozen=True)
class _Leaf:
    """A parameter, by its Transformers name, and how the shards divide it.

    Attributes:
        cut: the dimension of the Transformers tensor that is divided; None if each shard holds the whole size.
        summed: the model adds the shards' whole-sized copies; otherwise it takes the first shard's.
    """

    name: str
    cut: int | None = None
    summed: bool = False

    @property
    def transposed(self) -> bool:
        """Whether it is stored (in, out), where Transformers has (out, in)."""
        return self.cut is not None and self.name.endswith("weight") and "wte" not in self.name


def _leaves(layers: int) -> list[_Leaf]:
    """Return the parameters in the order of the tree."""
    leaves = [_Leaf(_EMBEDDING_BIAS, summed=True), _Leaf("transformer.wte.weight", cut=0)]
    # JAX sorts a tree's keys as text, so that layer_10 comes before layer_2.
    for layer in sorted(range(layers), key=str):
        block = f"transformer.h.{layer}."
        leaves += [
            # linear, linear_1 and linear_2 of the attention are q, v and k, in this order.
            _Leaf(f"{block}attn.q_proj.weight", cut=0),
            _Leaf(f"{block}attn.v_proj.weight", cut=0),
            _Leaf(f"{block}attn.k_proj.weight", cut=0),
            _Leaf(f"{block}attn.out_proj.weight", cut=1),
            _Leaf(f"{block}mlp.fc_in.bias", cut=0),
            _Leaf(f"{block}mlp.fc_in.weight", cut=0),
            _Leaf(f"{block}mlp.fc_out.bias", summed=True),
            _Leaf(f"{block}mlp.fc_out.weight", cut=1),
            _Leaf(f"{block}ln_1.bias"),
            _Leaf(f"{block}ln_1.weight"),
        ]
    leaves += [_Leaf("lm_head.bias", cut=0), _Leaf("lm_head.weight", cut=0)]
    leaves += [_Leaf("transformer.ln_f.bias"), _Leaf("transformer.ln_f.weight")]
    return leaves


class _Shard:
    """The leaves of one shard folder, read one at a time."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._members: list[tuple[Path, str]] = []  # of each leaf: the .npz file and its array in there
        # 0.npz, 1.npz, ... in this order, and the arrays of each by number: the tree's leaves one after the other.
        for number in count():
            piece = folder / f"{number}.npz"
            if not piece.is_file():
                break
            arrays = len(_guarded(piece, ZipFile.namelist))
            self._members += [(piece, f"arr_{i}.npy") for i in range(arrays)]

    def __len__(self) -> int:
        return len(self._members)

    def shape(self, leaf: int) -> tuple[int, ...]:
        """Return a leaf's shape from its header; the numbers are not read."""
        piece, member = self._members[leaf]

        def read(archive: ZipFile) -> tuple[int, ...]:
            with archive.open(member) as file:
                readers = {(1, 0): npy.read_array_header_1_0, (2, 0): npy.read_array_header_2_0}
                return readers[npy.read_magic(file)](file)[0]

        return _guarded(piece, read)

    def tensor(self, leaf: int) -> Tensor:
        """Read a leaf in its stored dtype."""
        piece, member = self._members[leaf]

        def read(archive: ZipFile) -> Tensor:
            with archive.open(member) as file:
                # Pickled objects in a stranger's file could run code.
                stored = npy.read_array(file, allow_pickle=False)
            # NumPy has no bf16: it stores JAX's as "void of two bytes".
            if stored.dtype.kind == "V" and stored.dtype.itemsize == 2:
                return torch.from_numpy(stored.view(np.int16)).view(torch.bfloat16)
            if stored.dtype.kind not in "fiu":
                raise UserError(f"{member} holds {stored.dtype}")
            return torch.from_numpy(stored)

        return _guarded(piece, read)


def _guarded(piece: Path, read: Callable[[ZipFile], T]) -> T:
    """Open an .npz file and return what ``read`` returns; whatever is wrong with the file becomes a UserError."""
    try:
        with ZipFile(piece) as archive:
            return read(archive)
    except (OSError, BadZipFile, KeyError, ValueError, EOFError, NotImplementedError) as error:
        raise UserError(f"{piece}: cannot be read as a piece of a checkpoint ({error})") from None


class MeshCheckpoint:
    """A ``step_N`` folder of mesh-transformer-jax, as the parameters of our model.

    Args:
        folder: the one that holds ``shard_0``.
        config: the model's shape. Heads and rotary dimensions cannot be seen in the files.

    Attributes:
        shapes: of our model's parameters, by name.
        is_full: whether the folder holds Adam's moments.
        step: that the checkpoint was written at.

    Raises:
        UserError: no such folder, pieces that are missing or damaged, or the shapes of another model.
    """

    def __init__(self, folder: str | Path, config: GPTJConfig) -> None:
        self.folder, self.config = Path(folder), config
        self._shards = self._open_shards()
        self._leaves = _leaves(config.n_layer)
        with torch.device("meta"):
            model = GPTJForCausalLM(config)
        self.shapes = {name: parameter.shape for name, parameter in model.named_parameters()}

        parameters = len(self._leaves)
        slim_count = parameters + 1  # and the step
        full_count = 3 * parameters + 3  # two counts of the optimizer, two moments
        self.is_full = self._check_counts(slim_count, full_count)
        # Where each tree of parameters begins among a shard's leaves.
        self._begin = {"weights": 0}
        if self.is_full:
            self._begin = {"exp_avg": 1, "exp_avg_sq": 1 + parameters, "weights": 2 + 2 * parameters}
        # All of them now, so that nothing is written from a checkpoint that does not fit.
        for tree in self._begin:
            for leaf in self._leaves:
                self._check_shape(tree, leaf)
        self.step = self._read_count((full_count if self.is_full else slim_count) - 1)

    def _open_shards(self) -> list[_Shard]:
        shards: list[_Shard] = []
        for number in count():
            folder = self.folder / f"shard_{number}"
            if not folder.is_dir():
                break
            shard = _Shard(folder)
            if len(shard) == 0:
                raise UserError(f"{folder}: no 0.npz here; the download is not complete")
            shards.append(shard)
        if not shards:
            raise UserError(f"{self.folder}: no shard_0 here; give the step_... folder of a mesh-transformer-jax run")
        return shards

    def _check_counts(self, slim_count: int, full_count: int) -> bool:
        """Return whether the checkpoint is a full one, by the number of arrays in its shards."""
        counts = {len(shard) for shard in self._shards}
        if counts != {slim_count} and counts != {full_count}:
            raise UserError(
                f"{self.folder}: {' or '.join(map(str, sorted(counts)))} arrays a shard; a model of "
                f"{self.config.n_layer} layers has {slim_count} in a slim checkpoint, {full_count} in a full one"
            )
        return counts == {full_count}

    def _read_count(self, place: int) -> int:
        shard = self._shards[0]
        if (shape := shard.shape(place)) != ():
            raise UserError(f"{shard.folder}: an array of shape {shape} where a number of steps should be")
        return int(shard.tensor(place))

    def _place(self, tree: str, leaf: _Leaf) -> int:
        return self._begin[tree] + self._leaves.index(leaf)

    def _shape(self, leaf: _Leaf) -> tuple[int, ...]:
        """Return a leaf's shape with all shards joined, as Transformers has it."""
        return (self.config.n_embd,) if leaf.name == _EMBEDDING_BIAS else tuple(self.shapes[leaf.name])

    def _shape_in_shard(self, leaf: _Leaf) -> tuple[int, ...]:
        whole = self._shape(leaf)
        shape = list(whole)
        shards = len(self._shards)
        if leaf.cut is not None:
            if shape[leaf.cut] % shards:
                raise UserError(
                    f"{self.folder}: {leaf.name} of {whole} does not divide into {shards} shards; "
                    "check the model's shape and the download"
                )
            shape[leaf.cut] //= shards
        return tuple(reversed(shape)) if leaf.transposed else tuple(shape)

    def _check_shape(self, tree: str, leaf: _Leaf) -> None:
        expected = self._shape_in_shard(leaf)
        place = self._place(tree, leaf)
        for shard in self._shards:
            found = shard.shape(place)
            if found != expected:
                raise UserError(f"{shard.folder}: {leaf.name} has shape {found}, the model's shape asks for {expected}")

    def tensors(self, tree: str = "weights") -> Iterator[tuple[str, Tensor]]:
        """Yield each parameter's weights or moments, by Transformers name in the model's order.

        Weights keep their stored dtype, except that sums are fp32. The moments of the embedding's own bias, which
        its rows absorb, are left out.

        Args:
            tree: "weights", or of a full checkpoint "exp_avg" or "exp_avg_sq".
        """
        by_name = {leaf.name: leaf for leaf in self._leaves}
        # disable=None: a bar on a terminal only.
        for name in tqdm(self.shapes, desc=tree, unit="tensor", disable=None):
            tensor = self._joined(tree, by_name[name])
            if tree == "weights" and name == "transformer.wte.weight":
                # In fp32: the sum of two bf16 numbers seldom is one.
                tensor = tensor.float()
                tensor += self._joined(tree, by_name[_EMBEDDING_BIAS])
            yield name, tensor

    def _joined(self, tree: str, leaf: _Leaf) -> Tensor:
        """Read a leaf from all shards that hold a part of it."""
        place = self._place(tree, leaf)
        first = self._shards[0].tensor(place)
        if leaf.cut is None:
            # Every copy of a summed bias saw the same gradient, so that each copy's moments are those of the sum.
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

        ``adam/exp_avg`` and ``adam/exp_avg_sq`` hold the moments in fp32, in the same kind of files and under the same
        names as the weights; ``adam/state.json`` the number of updates. One or two tensors are in memory at a time.

        Raises:
            UserError: the folder exists and is not empty.
        """
        target = Path(folder)
        if target.exists() and not (target.is_dir() and not any(target.iterdir())):
            raise UserError(f"{target} exists and is not empty; give another output_dir")
        with new_folder(target) as scratch:
            write_weights(scratch, self.tensors(), self.shapes, dtype=dtype)
            self.config.dtype = str(dtype).removeprefix("torch.")
            self.config.save_pretrained(scratch, architecture="GPTJForCausalLM")
            if self.is_full:
                for moment in MOMENTS:
                    moment_folder = scratch / "adam" / moment
                    moment_folder.mkdir(parents=True)
                    write_weights(moment_folder, self.tensors(moment), self.shapes, dtype=torch.float32)
                # Adam's own count, the first leaf; it may differ from the step.
                write_steps(scratch, self._read_count(0))
