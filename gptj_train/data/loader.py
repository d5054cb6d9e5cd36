"""Which windows a rank sees at a step: a pure function, so that resuming restores one integer."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from functools import lru_cache

import numpy as np
from torch import Tensor


@lru_cache(maxsize=2)
def _epoch_order(windows: int, seed: int, epoch: int) -> np.ndarray:
    return np.random.default_rng((seed, epoch)).permutation(windows)


def sample_at(position: int, windows: int, seed: int) -> int:
    """Window at a position of the endless training order: each epoch visits every window once, shuffled."""
    epoch, offset = divmod(position, windows)
    return int(_epoch_order(windows, seed, epoch)[offset])


def micro_batches_at(
    step: int, windows: int, seed: int, global_batch_size: int, micro_batch_size: int, rank: int, world_size: int
) -> list[list[int]]:
    """Window indices of this rank's micro-batches at an optimizer step.

    The step's global batch is the same windows whatever the world size; ranks take turns of
    ``micro_batch_size`` windows.

    Args:
        step: from 0.
        global_batch_size: a multiple of ``micro_batch_size * world_size``.
    """
    start = step * global_batch_size
    stride = micro_batch_size * world_size
    return [
        [sample_at(start + turn + i, windows, seed) for i in range(micro_batch_size)]
        for turn in range(rank * micro_batch_size, global_batch_size, stride)
    ]


def evaluation_batches(windows: int, micro_batch_size: int, rank: int, world_size: int) -> list[list[int | None]]:
    """Every window once over all ranks; as many batches on each rank, filled up with None."""
    stride = micro_batch_size * world_size
    turns = range(rank * micro_batch_size, -(-windows // stride) * stride, stride)
    return [[i if i < windows else None for i in range(turn, turn + micro_batch_size)] for turn in turns]


def fingerprint(batches: Iterable[Mapping[str, Tensor]]) -> str:
    """sha256 of the samples in some batches, however they are grouped and padded to each other's length."""
    digest = hashlib.sha256()
    for batch in batches:
        mask = batch.get("attention_mask")
        for row in range(len(batch["input_ids"])):
            for name, values in sorted(batch.items()):
                sample = values[row]
                if mask is not None and values.shape == mask.shape:
                    sample = sample[mask[row].bool()]
                digest.update(f"{name}{tuple(sample.shape)}".encode() + sample.numpy().tobytes())
    return digest.hexdigest()
