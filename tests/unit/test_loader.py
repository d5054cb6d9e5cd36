"""Which windows a rank sees: a pure function of seed and step, the same set for any number of ranks."""

from __future__ import annotations

from itertools import chain

import torch
from hypothesis import given
from hypothesis import strategies as st

from gptj_train.data.loader import evaluation_batches, fingerprint, micro_batches_at, sample_at

small = st.integers(1, 4)
windows_strategy = st.integers(1, 60)
seeds = st.integers(0, 2**32)
step_numbers = st.integers(0, 50)


def in_turn(ranks: list[list[list[int]]]) -> list[int]:
    """Windows in the global order: micro-batch by micro-batch, the ranks taking turns."""
    return [window for turn in zip(*ranks, strict=True) for micro_batch in turn for window in micro_batch]


@given(windows_strategy, seeds, step_numbers, small, small, small)
def test_a_step_is_the_same_windows_in_the_same_order_for_any_world(
    windows: int, seed: int, step: int, micro: int, world: int, accumulation: int
) -> None:
    total = micro * world * accumulation
    ranks = [micro_batches_at(step, windows, seed, total, micro, rank, world) for rank in range(world)]
    assert all(len(micro_batches) == accumulation for micro_batches in ranks)
    assert all(len(micro_batch) == micro for micro_batches in ranks for micro_batch in micro_batches)
    alone = micro_batches_at(step, windows, seed, total, total, 0, 1)
    assert in_turn(ranks) == alone[0]
    assert alone[0] == [sample_at(step * total + place, windows, seed) for place in range(total)]


def test_ranks_take_turns_by_hand() -> None:
    order = [sample_at(place, 100, 3) for place in range(24)]
    first = micro_batches_at(1, 100, 3, global_batch_size=12, micro_batch_size=2, rank=0, world_size=3)
    last = micro_batches_at(1, 100, 3, global_batch_size=12, micro_batch_size=2, rank=2, world_size=3)
    assert first == [order[12:14], order[18:20]]
    assert last == [order[16:18], order[22:24]]


@given(windows_strategy, seeds, st.integers(0, 5))
def test_each_epoch_visits_every_window_once(windows: int, seed: int, epoch: int) -> None:
    visited = [sample_at(epoch * windows + place, windows, seed) for place in range(windows)]
    assert sorted(visited) == list(range(windows))


@given(windows_strategy, seeds, small, small)
def test_steps_follow_each_other_without_gap(windows: int, seed: int, micro: int, accumulation: int) -> None:
    total = micro * accumulation
    steps = [in_turn([micro_batches_at(step, windows, seed, total, micro, 0, 1)]) for step in range(5)]
    assert list(chain(*steps)) == [sample_at(place, windows, seed) for place in range(5 * total)]


def test_epochs_and_seeds_are_shuffled_differently() -> None:
    orders = {
        (seed, epoch): tuple(sample_at(epoch * 50 + place, 50, seed) for place in range(50))
        for seed in range(3)
        for epoch in range(3)
    }
    assert len(set(orders.values())) == 9
    assert tuple(range(50)) not in orders.values()


def test_the_order_is_the_one_that_saved_runs_were_trained_in() -> None:
    assert [sample_at(place, 8, seed=0) for place in range(16)] == [2, 4, 3, 6, 5, 0, 1, 7, 1, 3, 7, 6, 0, 4, 2, 5]


def test_asking_again_in_any_order_gives_the_same() -> None:
    forward = [sample_at(place, 7, 1) for place in range(70)]
    backward = [sample_at(place, 7, 1) for place in reversed(range(70))]
    assert backward[::-1] == forward


@given(windows_strategy, small, small)
def test_evaluation_covers_every_window_once_in_equal_shares(windows: int, micro: int, world: int) -> None:
    ranks = [evaluation_batches(windows, micro, rank, world) for rank in range(world)]
    assert len({len(batches) for batches in ranks}) == 1
    assert all(len(batch) == micro for batches in ranks for batch in batches)
    rows = [row for batches in ranks for batch in batches for row in batch]
    assert sorted(row for row in rows if row is not None) == list(range(windows))
    assert rows.count(None) < micro * world


def test_evaluation_by_hand() -> None:
    assert evaluation_batches(7, 2, 0, 2) == [[0, 1], [4, 5]]
    assert evaluation_batches(7, 2, 1, 2) == [[2, 3], [6, None]]
    assert evaluation_batches(1, 2, 1, 2) == [[None, None]]


def padded_to_each_other(rows: list[list[int]], micro: int) -> list[dict[str, torch.Tensor]]:
    batches = []
    for first in range(0, len(rows), micro):
        part = rows[first : first + micro]
        longest = max(map(len, part))
        ids = [row + [0] * (longest - len(row)) for row in part]
        mask = [[1] * len(row) + [0] * (longest - len(row)) for row in part]
        batches.append({"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask)})
    return batches


def test_a_fingerprint_is_of_the_samples_not_of_their_grouping() -> None:
    rows = [[5, 6, 7], [8], [9, 10], [11, 12, 13, 14]]
    known = {fingerprint(padded_to_each_other(rows, micro)) for micro in (1, 2, 4)}
    assert len(known) == 1
    others = [rows[::-1], rows[:3], [[5, 6, 7], [8], [9, 10], [11, 12, 13, 15]], [[5, 6], [7, 8], [9, 10], rows[3]]]
    prints = [fingerprint(padded_to_each_other(other, 2)) for other in others]
    assert len({*known, *prints}) == 5
