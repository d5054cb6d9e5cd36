"""Which windows a rank sees: a pure function of seed and step, the same set for any number of ranks."""

from __future__ import annotations

from collections import Counter
from itertools import chain, pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gptj_train.data.sampler import Sampler, evaluation_batches, permuted, sample_at

CYCLE = 10_000

small = st.integers(1, 4)
window_counts = st.integers(1, 60)
seeds = st.integers(0, 2**32)
step_numbers = st.integers(0, 50)


def single(windows: int, seed: int, *, global_batch_size: int, micro_batch_size: int) -> Sampler:
    """A sampler of one component."""
    return Sampler(
        [windows],
        seed=seed,
        global_batch_size=global_batch_size,
        micro_batch_size=micro_batch_size,
    )


def mixture(sizes: list[int], weights: list[float] | None, seed: int) -> Sampler:
    """A sampler whose batches have one window: step n is position n."""
    return Sampler(sizes, weights=weights, seed=seed, global_batch_size=1, micro_batch_size=1)


def in_turn(ranks: list[list[list[int]]]) -> list[int]:
    """Windows in the global order: micro-batch by micro-batch, the ranks taking turns."""
    return [window for turn in zip(*ranks, strict=True) for micro_batch in turn for window in micro_batch]


@given(window_counts, seeds, step_numbers, small, small, small)
def test_a_step_reads_the_same_windows_in_the_same_order_for_any_world_size(
    windows: int, seed: int, step: int, micro: int, world: int, accumulation: int
) -> None:
    total = micro * world * accumulation
    sampler = single(windows, seed, global_batch_size=total, micro_batch_size=micro)
    ranks = [sampler.windows(step, rank, world) for rank in range(world)]
    assert all(len(micro_batches) == accumulation for micro_batches in ranks)
    assert all(len(micro_batch) == micro for micro_batches in ranks for micro_batch in micro_batches)
    (alone,) = single(windows, seed, global_batch_size=total, micro_batch_size=total).windows(step, 0, 1)
    assert in_turn(ranks) == alone
    assert alone == [sample_at(step * total + place, windows, seed) for place in range(total)]


def test_ranks_take_turns_by_hand() -> None:
    order = [sample_at(place, 100, 3) for place in range(24)]
    sampler = single(100, 3, global_batch_size=12, micro_batch_size=2)
    assert sampler.windows(1, rank=0, world_size=3) == [order[12:14], order[18:20]]
    assert sampler.windows(1, rank=2, world_size=3) == [order[16:18], order[22:24]]


@given(window_counts, seeds, st.integers(0, 5))
def test_each_epoch_visits_every_window_once(windows: int, seed: int, epoch: int) -> None:
    visited = [sample_at(epoch * windows + place, windows, seed) for place in range(windows)]
    assert sorted(visited) == list(range(windows))


@given(window_counts, seeds, small, small)
def test_steps_follow_each_other_without_gap(windows: int, seed: int, micro: int, accumulation: int) -> None:
    total = micro * accumulation
    sampler = single(windows, seed, global_batch_size=total, micro_batch_size=micro)
    steps = [in_turn([sampler.windows(step, 0, 1)]) for step in range(5)]
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
    assert [sample_at(place, 8, seed=0) for place in range(16)] == [0, 3, 5, 1, 6, 2, 4, 7, 5, 2, 4, 0, 7, 1, 3, 6]
    assert [sample_at(place, 10**12, seed=0) for place in (0, 1, 10**12)] == [708517909475, 435097626347, 315768234181]


def test_a_window_does_not_depend_on_which_were_asked_for_before() -> None:
    forward = [sample_at(place, 7, 1) for place in range(70)]
    backward = [sample_at(place, 7, 1) for place in reversed(range(70))]
    assert backward[::-1] == forward


@given(window_counts, small, small)
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


# --- the permutation ---


@given(st.integers(1, 700), seeds, st.integers(0, 9))
def test_a_permutation_takes_each_index_once(size: int, seed: int, epoch: int) -> None:
    assert sorted(permuted(index, size, seed, epoch) for index in range(size)) == list(range(size))


@given(st.integers(1, 2**60), seeds, st.data())
def test_a_permutation_of_any_size_stays_within_it(size: int, seed: int, data: st.DataObject) -> None:
    index = data.draw(st.integers(0, size - 1))
    assert 0 <= permuted(index, size, seed) < size


@pytest.mark.parametrize("size", [64, 100, 1000, 1025])
def test_a_permutation_looks_random(size: int) -> None:
    orders = [[permuted(index, size, seed, epoch) for index in range(size)] for seed in range(20) for epoch in range(5)]
    # Of a shuffled order one index on average stays where it is, one follows its predecessor, one equals another's.
    fixed = sum(order[index] == index for order in orders for index in range(size))
    steps = sum(after - before == 1 for order in orders for before, after in pairwise(order))
    same = sum(a == b for one, other in pairwise(orders) for a, b in zip(one, other, strict=True))
    for count in (fixed, steps, same):
        assert 60 < count < 140  # 100 orders: 4 standard deviations of a Poisson count
    # Halves mix: a shuffled order takes half of its lower half from the lower half.
    low = [sum(index < size // 2 for index in order[: size // 2]) for order in orders]
    assert abs(sum(low) / len(low) - size / 4) < size / 50


def test_a_permutation_of_three_takes_all_six_orders() -> None:
    assert {tuple(permuted(index, 3, seed) for index in range(3)) for seed in range(200)} == {
        (0, 1, 2), (0, 2, 1), (1, 0, 2), (1, 2, 0), (2, 0, 1), (2, 1, 0)
    }  # fmt: skip
    assert permuted(0, 1, 5) == 0


# --- mixtures ---

sizes_and_weights = st.lists(st.tuples(st.integers(1, 300), st.floats(0.01, 10)), min_size=1, max_size=4)


@given(st.lists(st.integers(1, 40), min_size=1, max_size=5), seeds)
def test_without_weights_every_window_once_an_epoch(sizes: list[int], seed: int) -> None:
    sampler, total = mixture(sizes, None, seed), sum(sizes)
    everything = [(component, window) for component, size in enumerate(sizes) for window in range(size)]
    for epoch in range(2):
        assert sorted(sampler.at(epoch * total + place) for place in range(total)) == everything
    assert sampler.epochs(3 * total) == pytest.approx([3.0] * len(sizes))


@pytest.mark.parametrize(
    ("weights", "shares"),
    [
        ([0.7, 0.2, 0.1], [7000, 2000, 1000]),
        ([14, 4, 2], [7000, 2000, 1000]),
        ([1, 1, 1], [3334, 3333, 3333]),
        ([1e6, 1, 1], [9998, 1, 1]),
        ([1], [10000]),
    ],
)
def test_weights_are_kept_exactly_in_each_cycle(weights: list[float], shares: list[int]) -> None:
    sampler = mixture([17, 230, 4000][: len(weights)], weights, seed=3)
    for cycle in range(2):
        drawn = Counter(sampler.at(cycle * CYCLE + place)[0] for place in range(CYCLE))
        assert [drawn[component] for component in range(len(weights))] == shares
    # And the components come mixed, not one after the other.
    first = [sampler.at(place)[0] for place in range(1000)]
    for component, share in enumerate(shares):
        assert abs(first.count(component) - share / 10) < 60


def test_each_component_has_its_own_epochs() -> None:
    sizes = [7, 450, 3000]
    sampler = mixture(sizes, [0.5, 0.3, 0.2], seed=1)
    seen: list[list[int]] = [[], [], []]
    for position in range(2 * CYCLE + 1234):
        component, window = sampler.at(position)
        seen[component].append(window)
    # The order within a cycle is shuffled, so that epochs are told apart cycle by cycle: 5000 of 7, 3000 of 450, ...
    for component, share in enumerate((5000, 3000, 2000)):
        counts = Counter(seen[component][: 2 * share])
        most, least = max(counts.values()), min(counts[window] for window in range(sizes[component]))
        assert most - least <= 1
    assert sampler.epochs(2 * CYCLE) == pytest.approx([10000 / 7, 6000 / 450, 4000 / 3000])


@given(sizes_and_weights, seeds, st.integers(0, 10**9))
def test_a_mixture_is_a_function_of_the_position(pairs: list[tuple[int, float]], seed: int, position: int) -> None:
    sizes, weights = [size for size, _ in pairs], [weight for _, weight in pairs]
    component, window = mixture(sizes, weights, seed).at(position)
    assert mixture(sizes, weights, seed).at(position) == (component, window)
    assert 0 <= window < sizes[component]


def test_seeds_mix_differently() -> None:
    drawn = {tuple(mixture([50, 50], [1, 1], seed).at(place) for place in range(60)) for seed in range(10)}
    assert len(drawn) == 10


@given(st.integers(0, 40), small, small, small)
def test_a_mixture_reads_the_same_positions_for_any_world_size(
    step: int, micro: int, world: int, accumulation: int
) -> None:
    total = micro * world * accumulation
    sampler = Sampler([50, 70], weights=[1, 2], seed=5, global_batch_size=total, micro_batch_size=micro)
    ranks = [sampler.micro_batches(step, rank, world) for rank in range(world)]
    order = [sample for turn in zip(*ranks, strict=True) for micro_batch in turn for sample in micro_batch]
    assert order == [sampler.at(position) for position in range(step * total, (step + 1) * total)]
