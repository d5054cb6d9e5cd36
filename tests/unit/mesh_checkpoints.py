"""Writes mesh-transformer-jax checkpoints as that program does: a tree cut into shards, flattened, in npz pieces.

Knows nothing of the importer. Names, cuts and order are those of CausalTransformerShard with haiku's module names,
jax.tree_flatten and checkpoint.write_ckpt.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

PIECES = 16
Tree = dict[str, Any]


def as_bf16_void(x: np.ndarray) -> np.ndarray:
    """The upper halves of fp32 numbers that have nothing in the lower: what np.savez makes of JAX's bfloat16."""
    bits = x.astype(np.float32).view(np.uint32)
    assert not (bits & 0xFFFF).any()
    return (bits >> 16).astype(np.uint16).view("V2")


def random_parameters(rng: np.random.Generator, layers: int, width: int, vocab: int, shards: int) -> list[Tree]:
    """The parameters of each shard, by haiku's names; numbers that bf16 holds."""

    def some(*shape: int) -> np.ndarray:
        return (rng.integers(-64, 64, shape) / 64).astype(np.float32)

    def norm(rank: int) -> Tree:
        # Only the first shard's norms are used; the others stay as they were born.
        return {"offset": some(width), "scale": some(width)} if rank == 0 else {"offset": zeros, "scale": ones}

    zeros, ones = np.zeros(width, np.float32), np.ones(width, np.float32)
    trees = []
    part = width // shards
    for rank in range(shards):
        tree: Tree = {"embedding_shard/~/linear": {"w": some(vocab // shards, width), "b": some(width)}}
        for layer in range(layers):
            block = f"layer_{layer}/~/"
            tree[f"{block}linear"] = {"w": some(width, part)}
            tree[f"{block}linear_1"] = {"w": some(width, part)}
            tree[f"{block}linear_2"] = {"w": some(width, part)}
            tree[f"{block}linear_3"] = {"w": some(part, width)}
            tree[f"{block}linear_4"] = {"w": some(width, 4 * part), "b": some(4 * part)}
            tree[f"{block}linear_5"] = {"w": some(4 * part, width), "b": some(width)}
            tree[f"{block}replicated_layer_norm"] = norm(rank)
        tree["projection_shard/~/linear"] = {"w": some(width, vocab // shards), "b": some(vocab // shards)}
        tree["projection_shard/~/replicated_layer_norm"] = norm(rank)
        trees.append({f"causal_transformer_shard/~/{name}": leaves for name, leaves in tree.items()})
    return trees


def flattened(tree: Any) -> list[np.ndarray]:
    """Leaves in the order of jax.tree_flatten: dicts by sorted key, sequences as they stand."""
    if isinstance(tree, dict):
        return [leaf for key in sorted(tree) for leaf in flattened(tree[key])]
    if isinstance(tree, (list, tuple)):
        return [leaf for one in tree for leaf in flattened(one)]
    return [tree]


def write_checkpoint(
    folder: Path,
    parameters: list[Tree],
    step: int,
    moments: tuple[list[Tree], list[Tree]] | None = None,
    half: bool = False,
) -> Path:
    """``folder/shard_N/M.npz``; with moments a full checkpoint, else a slim one."""
    for rank, tree in enumerate(parameters):
        state: Tree = {"params": tree, "step": np.array(step, np.int32)}
        if moments is not None:
            count = np.array(step - 1, np.int32)
            # optax.chain(scale, clip, scale_by_adam, additive_weight_decay, scale, scale_by_schedule)
            state["opt_state"] = [(), (), (count, moments[0][rank], moments[1][rank]), (), (), (count,)]
        leaves = flattened(state)
        if half:
            leaves = [as_bf16_void(leaf) if leaf.dtype == np.float32 else leaf for leaf in leaves]
        shard = folder / f"shard_{rank}"
        shard.mkdir(parents=True)
        for number, piece in enumerate(np.array_split(np.arange(len(leaves)), PIECES)):
            np.savez(shard / f"{number}.npz", *(leaves[i] for i in piece))
    return folder
