"""Which windows a rank sees at a step: a pure function, so that resuming restores one integer."""

from __future__ import annotations

from functools import lru_cache

import numpy as np


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
