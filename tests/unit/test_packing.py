"""Windows: every token in one of them or counted as dropped; document ids say who owns it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from text_data import FakeStore

from gptj_train.data.packing import PADDING, BestFitWindows, ContiguousWindows, Documents, Windows

FILL = 7
documents = st.lists(st.lists(st.integers(10, 99), min_size=1, max_size=30), min_size=1, max_size=12)
lengths = st.integers(2, 12)


def contiguous(texts: Any, length: int) -> ContiguousWindows:
    return ContiguousWindows(Documents([FakeStore(texts)]), length, FILL)  # type: ignore[list-item]


def best_fit(texts: Any, length: int, flags: Any = None) -> BestFitWindows:
    return BestFitWindows(Documents([FakeStore(texts, flags)]), length, FILL, flags is not None)  # type: ignore[list-item]


def everything(windows: Windows) -> tuple[list, list]:
    found = [windows[index] for index in range(len(windows))]
    return [window.tokens.tolist() for window in found], [window.document_ids.tolist() for window in found]


def reference(texts: list[list[int]], length: int) -> Iterator[tuple[list[int], list[int]]]:
    """The joined stream, token by token."""
    stream = [(token, number) for number, text in enumerate(texts) for token in text]
    for start in range(0, len(stream), length):
        part = stream[start : start + length]
        first = part[0][1]
        empty = length - len(part)
        yield [t for t, _ in part] + [FILL] * empty, [n - first + 1 for _, n in part] + [PADDING] * empty


def test_by_hand() -> None:
    tokens, owners = everything(contiguous([[1, 2], [3, 4, 5, 6], [7], [8, 9]], 4))
    assert tokens == [[1, 2, 3, 4], [5, 6, 7, 8], [9, FILL, FILL, FILL]]
    # The documents 3456 and 89 cross a border: they are number 1 of the next window.
    assert owners == [[1, 1, 2, 2], [1, 1, 2, 3], [1, 0, 0, 0]]


@given(documents, lengths)
def test_contiguous_windows_are_the_stream(texts: list[list[int]], length: int) -> None:
    windows = contiguous(texts, length)
    tokens, owners = everything(windows)
    expected = list(reference(texts, length))
    assert tokens == [window for window, _ in expected]
    assert owners == [numbers for _, numbers in expected]
    assert windows.padding == sum(row.count(PADDING) for row in owners)
    assert not windows.dropped


@given(documents, documents, lengths)
def test_several_stores_are_one_stream(some: list[list[int]], others: list[list[int]], length: int) -> None:
    two = ContiguousWindows(Documents([FakeStore(some), FakeStore(others)]), length, FILL)  # type: ignore[list-item]
    assert everything(two) == everything(contiguous(some + others, length))


def test_a_component_is_its_documents_alone() -> None:
    stores = [
        FakeStore([[1, 2], [3]], component="a"),
        FakeStore([[4, 5]], component="b"),
        FakeStore([[6]], component="a"),
    ]
    tokens, _ = everything(ContiguousWindows(Documents(stores, "a"), 4, FILL))  # type: ignore[arg-type]
    assert tokens == [[1, 2, 3, 6]]
    assert len(Documents(stores, "missing")) == 0  # type: ignore[arg-type]


def test_best_fit_by_hand() -> None:
    texts = [[1] * 5, [2] * 3, [3] * 2, [4] * 6, [5] * 4]
    tokens, owners = everything(best_fit(texts, 8))
    assert sorted(map(sorted, tokens)) == [[1] * 5 + [2] * 3, [3] * 2 + [4] * 6, [5] * 4 + [FILL] * 4]
    assert all(row[0] == 1 for row in owners)


@given(documents, lengths)
def test_best_fit_loses_nothing_and_cuts_nothing_that_fits(texts: list[list[int]], length: int) -> None:
    windows = best_fit(texts, length)
    packed: dict[int, dict[int, int]] = {}
    for index in range(len(windows)):
        pieces = windows.pieces(index)
        assert sum(size for _, _, size in pieces) <= length
        for document, start, size in pieces:
            packed.setdefault(document, {})[start] = size
    for number, text in enumerate(texts):
        assert sorted(packed[number]) == list(range(0, len(text), length))
        assert sum(packed[number].values()) == len(text)
    tokens, owners = everything(windows)
    kept = [t for row, own in zip(tokens, owners, strict=True) for t, o in zip(row, own, strict=True) if o != PADDING]
    assert sorted(kept) == sorted(token for text in texts for token in text)
    assert windows.padding == sum(row.count(PADDING) for row in owners)


@given(st.lists(st.integers(1, 20), min_size=1, max_size=40))
def test_no_two_windows_could_be_one(sizes: list[int]) -> None:
    windows = best_fit([[1] * size for size in sizes], 20)
    used = sorted(sum(size for _, _, size in windows.pieces(index)) for index in range(len(windows)))
    assert len(used) == 1 or used[0] + used[1] > 20


def test_a_ragged_corpus_fills_its_windows() -> None:
    sizes = np.random.default_rng(0).lognormal(5.5, 1.2, 8000).astype(int).clip(1, 40_000)
    texts = [[1] * size for size in sizes]
    for windows, full in ((contiguous(texts, 2048), 0.999), (best_fit(texts, 2048), 0.99)):
        assert windows.tokens / (len(windows) * 2048) >= full
        assert not windows.dropped.total()


def test_examples_keep_their_beginning_and_are_told_when_they_do_not_fit() -> None:
    texts = [[1] * 4, [2] * 9, [3] * 9, [4] * 3]
    flags = [[0, 0, 1, 1], [0, 0, 0, 1, 1, 1, 1, 1, 1], [0] * 8 + [1], [0, 0, 0]]
    windows = best_fit(texts, 6, flags)
    tokens, _ = everything(windows)
    assert sorted(tokens) == [[1, 1, 1, 1, FILL, FILL], [2] * 6]
    assert windows.dropped == {"nothing to predict within sequence_length": 12, "beyond sequence_length": 3}
    of_two = windows[[row[0] for row in tokens].index(2)]
    assert of_two.targets.tolist() == [False, False, False, True, True, True]
    assert windows.tokens == 25 == windows.dropped.total() + 4 + 6


def test_an_example_whose_only_target_has_nothing_before_it_is_left_out() -> None:
    assert len(best_fit([[1, 2]], 4, [[1, 0]])) == 0
    assert len(best_fit([[1]], 4, [[1]])) == 0


@pytest.mark.parametrize("make", [contiguous, best_fit])
def test_a_window_can_be_changed_without_harm(make: Any) -> None:
    windows = make([[1, 2, 3]], 3)
    windows[0].tokens[:] = 0
    assert windows[0].tokens.tolist() == [1, 2, 3]
