"""The order of training samples: a pure function of seed and step, so that resuming restores one integer."""

from __future__ import annotations

import hashlib
from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence
from itertools import accumulate, pairwise

from torch import Tensor

_CYCLE = 10_000  # positions in which a mixture has exactly its shares
_MASK = (1 << 64) - 1
_ROUNDS = 4  # of the Feistel network; four make a pseudorandom permutation (Luby and Rackoff, 1988)


class Sampler:
    """Which windows each rank reads at each optimizer step.

    Without ``weights`` the windows of all components form one data set: each epoch visits every window once, in a
    new random order. With ``weights`` each component gets its share of the positions and counts its own epochs.
    Positions take constant time and memory: nothing is shuffled or stored.

    Args:
        sizes: windows of each component; a single data set is one component.
        weights: shares of the components, above 0; they are normalized. None: no mixture.
        seed: chooses the order.
        global_batch_size: windows of an optimizer step, a multiple of ``micro_batch_size * world_size``.
        micro_batch_size: windows that a rank processes at once.
    """

    def __init__(
        self,
        sizes: Sequence[int],
        *,
        weights: Sequence[float] | None = None,
        seed: int,
        global_batch_size: int,
        micro_batch_size: int,
    ) -> None:
        self._sizes = list(sizes)
        self._seed = seed
        self._global_batch_size = global_batch_size
        self._micro_batch_size = micro_batch_size
        # Component c holds the windows from _first_window[c] up to _first_window[c + 1] of the joined data set.
        self._first_window = list(accumulate(self._sizes, initial=0))
        # Likewise, component c owns the slots from _first_slot[c] up to _first_slot[c + 1] of every cycle.
        self._first_slot: list[int] | None = None
        if weights is not None:
            total = sum(weights)
            slots = _rounded([weight / total * _CYCLE for weight in weights])
            self._first_slot = list(accumulate(slots, initial=0))

    def at(self, position: int) -> tuple[int, int]:
        """Return (component, window) at a position of the endless training order."""
        if self._first_slot is None:
            window = sample_at(position, self._first_window[-1], self._seed)
            component = bisect_right(self._first_window, window) - 1
            return component, window - self._first_window[component]
        cycle, offset = divmod(position, _CYCLE)
        slot = permuted(offset, _CYCLE, self._seed, cycle)
        component = bisect_right(self._first_slot, slot) - 1
        first, end = self._first_slot[component], self._first_slot[component + 1]
        # Position in the component's own endless order: how many of its windows come before.
        ordinal = cycle * (end - first) + slot - first
        return component, sample_at(ordinal, self._sizes[component], self._seed + component)

    def micro_batches(self, step: int, rank: int, world_size: int) -> list[list[tuple[int, int]]]:
        """Return (component, window) of each row of this rank's micro-batches at an optimizer step, from 0.

        The global batch of a step holds the same positions whatever the world size: ranks take turns of
        ``micro_batch_size`` positions.
        """
        start = step * self._global_batch_size
        first = start + rank * self._micro_batch_size
        stride = self._micro_batch_size * world_size
        batches = []
        for turn in range(first, start + self._global_batch_size, stride):
            batches.append([self.at(position) for position in range(turn, turn + self._micro_batch_size)])
        return batches

    def windows(self, step: int, rank: int, world_size: int) -> list[list[int]]:
        """Return the window of each row of this rank's micro-batches, for data of a single component."""
        batches = self.micro_batches(step, rank, world_size)
        return [[window for _, window in batch] for batch in batches]

    def epochs(self, steps: int) -> list[float]:
        """Return how often this number of steps visits each component."""
        positions = steps * self._global_batch_size
        if self._first_slot is None:
            return [positions / self._first_window[-1]] * len(self._sizes)
        epochs = []
        for (first, end), size in zip(pairwise(self._first_slot), self._sizes, strict=True):
            epochs.append(positions * (end - first) / _CYCLE / size)
        return epochs


def sample_at(position: int, windows: int, seed: int) -> int:
    """Return the window at a position of one data set's endless order: each epoch is a new permutation."""
    epoch, offset = divmod(position, windows)
    return permuted(offset, windows, seed, epoch)


def permuted(index: int, size: int, *key: int) -> int:
    """Return where a permutation of ``range(size)``, chosen by the key, sends an index.

    A Feistel network over the next even number of bits, applied until the result falls into the range ("cycle
    walking": Black and Rogaway, Ciphers with Arbitrary Finite Domains, 2002). No table is stored.
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
    """Hash 64 bits: splitmix64 (Steele, Lea and Flood, 2014)."""
    value = (value + 0x9E3779B97F4A7C15) & _MASK
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK
    return value ^ (value >> 31)


def _rounded(shares: Sequence[float]) -> list[int]:
    """Round to integers of the same sum, each at least 1: the largest remainders are rounded up."""
    counts = [max(1, int(share)) for share in shares]
    by_remainder = sorted(range(len(shares)), key=lambda number: counts[number] - shares[number])
    missing = round(sum(shares)) - sum(counts)
    for number in by_remainder[: max(0, missing)]:
        counts[number] += 1
    # Shares raised to 1 make the sum too large; the largest component gives that back.
    largest = max(range(len(counts)), key=counts.__getitem__)
    counts[largest] += round(sum(shares)) - sum(counts)
    return counts


def evaluation_batches(windows: int, batch_size: int, rank: int, world_size: int) -> list[list[int | None]]:
    """Split held-out windows over the ranks: each once, and as many batches on each rank; None fills the last."""
    stride = batch_size * world_size
    padded = -(-windows // stride) * stride
    batches = []
    for turn in range(rank * batch_size, padded, stride):
        batches.append([index if index < windows else None for index in range(turn, turn + batch_size)])
    return batches


def fingerprint(batches: Iterable[Mapping[str, Tensor]]) -> str:
    """Return the sha256 of the samples in some batches, independent of how they are grouped and padded."""
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
