"""Which windows a rank sees at a step: a pure function, so that resuming restores one integer."""

from __future__ import annotations

import hashlib
from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise

from torch import Tensor

_CYCLE = 10_000  # positions over which a mixture keeps its weights exactly
_MASK = (1 << 64) - 1
_ROUNDS = 4


def permuted(index: int, size: int, *key: int) -> int:
    """Where a permutation of ``range(size)`` that the key chooses takes an index, in constant time and memory.

    A Feistel network over the next even number of bits, walked until it ends within the range (Black and Rogaway,
    Ciphers with Arbitrary Finite Domains, 2002).
    """
    half = max(1, ((size - 1).bit_length() + 1) // 2)
    low = (1 << half) - 1
    seed = 0
    for part in key:
        seed = _mixed(seed ^ (part & _MASK))
    while True:
        left, right = index >> half, index & low
        for turn in range(_ROUNDS):
            left, right = right, left ^ (_mixed(seed + (turn << 56) + right) & low)
        index = left << half | right
        if index < size:
            return index


def _mixed(value: int) -> int:
    """splitmix64 (Steele, Lea and Flood, 2014): 64 bits that look random."""
    value = (value + 0x9E3779B97F4A7C15) & _MASK
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK
    return value ^ (value >> 31)


def sample_at(position: int, windows: int, seed: int) -> int:
    """Window at a position of the endless training order: each epoch visits every window once, shuffled."""
    epoch, offset = divmod(position, windows)
    return permuted(offset, windows, seed, epoch)


class Mixture:
    """An endless order over several components: each has its share of every cycle, and its own epochs.

    Without weights the windows of all components are one: each epoch visits every window once.
    """

    def __init__(self, sizes: Sequence[int], weights: Sequence[float] | None, seed: int) -> None:
        """``sizes``: windows of each component; ``weights``: their shares, above 0, of any sum."""
        self.sizes, self._seed = list(sizes), seed
        self._first = [sum(sizes[:number]) for number in range(len(sizes) + 1)]
        self._slots: list[int] | None = None
        if weights is not None:
            counts = _rounded([weight / sum(weights) * _CYCLE for weight in weights])
            self._slots = [sum(counts[:number]) for number in range(len(counts) + 1)]

    def at(self, position: int) -> tuple[int, int]:
        """(component, window) at a position, in constant time."""
        if self._slots is None:
            window = sample_at(position, self._first[-1], self._seed)
            component = bisect_right(self._first, window) - 1
            return component, window - self._first[component]
        cycle, offset = divmod(position, _CYCLE)
        slot = permuted(offset, _CYCLE, self._seed, cycle)
        component = bisect_right(self._slots, slot) - 1
        share = self._slots[component + 1] - self._slots[component]
        ordinal = cycle * share + slot - self._slots[component]
        return component, sample_at(ordinal, self.sizes[component], self._seed + component)

    def epochs(self, positions: int) -> list[float]:
        """How often so many positions go through each component."""
        if self._slots is None:
            return [positions / self._first[-1]] * len(self.sizes)
        shares = [end - begin for begin, end in pairwise(self._slots)]
        return [positions * share / _CYCLE / size for share, size in zip(shares, self.sizes, strict=True)]


def _rounded(shares: Sequence[float]) -> list[int]:
    """Integers of the same sum, each at least 1, the largest remainders rounded up."""
    counts = [max(1, int(share)) for share in shares]
    order = sorted(range(len(shares)), key=lambda number: counts[number] - shares[number])
    for number in order[: max(0, round(sum(shares)) - sum(counts))]:
        counts[number] += 1
    counts[max(range(len(counts)), key=counts.__getitem__)] += round(sum(shares)) - sum(counts)
    return counts


def micro_positions_at(
    step: int, global_batch_size: int, micro_batch_size: int, rank: int, world_size: int
) -> list[list[int]]:
    """Positions in the training order of this rank's micro-batches at an optimizer step.

    The step's global batch is the same positions whatever the world size; ranks take turns of
    ``micro_batch_size`` of them.

    Args:
        step: from 0.
        global_batch_size: a multiple of ``micro_batch_size * world_size``.
    """
    start = step * global_batch_size
    stride = micro_batch_size * world_size
    return [
        list(range(start + turn, start + turn + micro_batch_size))
        for turn in range(rank * micro_batch_size, global_batch_size, stride)
    ]


def micro_batches_at(
    step: int, windows: int, seed: int, global_batch_size: int, micro_batch_size: int, rank: int, world_size: int
) -> list[list[int]]:
    """Window indices at ``micro_positions_at``, of a single component."""
    positions = micro_positions_at(step, global_batch_size, micro_batch_size, rank, world_size)
    return [[sample_at(position, windows, seed) for position in batch] for batch in positions]


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
