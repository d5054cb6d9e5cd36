"""Windows over documents: every token in one window or counted as dropped; document ids say who owns it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gptj_train.data.best_fit import best_fit as place_best
from gptj_train.data.packing import PADDING, Method, Window, Windows, pack
from gptj_train.data.records import Segment
from gptj_train.data.store import TokenStore, write_store
from gptj_train.data.tokenizer import Tokenizer

FILL = 999
documents = st.lists(st.lists(st.integers(0, 99), min_size=1, max_size=30), max_size=12)
lengths = st.integers(1, 12)
examples = st.lists(st.lists(st.tuples(st.integers(0, 99), st.booleans()), min_size=1, max_size=30), max_size=12)


class StoreInMemory(SimpleNamespace):
    """What a ``TokenStore`` holds."""

    part = TokenStore.part


def store_of(texts: list[list[int]], targets: list[list[bool]] | None = None, names: str = "") -> Any:
    """Documents in memory; ``names`` has a letter for each document's component."""
    known = list(dict.fromkeys(names)) or ["all"]
    return StoreInMemory(
        tokens=np.array([token for text in texts for token in text], dtype=np.uint16),
        targets=None if targets is None else np.array([flag for flags in targets for flag in flags], dtype=bool),
        ends=np.cumsum([len(text) for text in texts], dtype=np.int64),
        bytes=np.array([2 * len(text) for text in texts], dtype=np.int64),
        components=np.array([known.index(name) for name in names] or [0] * len(texts), dtype=np.uint16),
        names=known,
    )


def windows_of(stores: list[Any], method: Method, length: int, component: str | None = None) -> Windows:
    return Windows(stores, pack(stores, component, method=method, length=length), length=length, fill=FILL)


def dropped(windows: Windows) -> int:
    return sum(windows.facts.dropped.values())


def reference(texts: Iterable[list[int]], length: int) -> Iterator[tuple[list[int], list[int]]]:
    """(tokens, document ids) of contiguous windows, token by token."""
    tokens: list[int] = []
    owners: list[int] = []
    for text in texts:
        owner = owners[-1] + 1 if owners else 1
        for token in text:
            tokens.append(token)
            owners.append(owner)
            if len(tokens) == length:
                yield tokens, owners
                tokens, owners, owner = [], [], 1
    if tokens:
        missing = length - len(tokens)
        yield tokens + [FILL] * missing, owners + [PADDING] * missing


def contiguous(texts: list[list[int]], length: int) -> Windows:
    return windows_of([store_of(texts)], "contiguous", length)


def best_fit(texts: list[list[int]], length: int) -> Windows:
    return windows_of([store_of(texts)], "text", length)


def all_of(windows: Windows) -> list[Window]:
    return [windows[index] for index in range(len(windows))]


def stretches(window: Window) -> list[list[int]]:
    """The tokens of each document in a window."""
    return [window.tokens[window.document_ids == owner].tolist() for owner in range(1, window.document_ids.max() + 1)]


# --- contiguous ---


def test_contiguous_by_hand() -> None:
    windows = contiguous([[1, 2], [3, 4, 5, 6], [7], [8, 9]], 4)
    assert [window.tokens.tolist() for window in all_of(windows)] == [[1, 2, 3, 4], [5, 6, 7, 8], [9, FILL, FILL, FILL]]
    # The documents 3456 and 89 cross a border: they are number 1 of the next window.
    assert [window.document_ids.tolist() for window in all_of(windows)] == [[1, 1, 2, 2], [1, 1, 2, 3], [1, 0, 0, 0]]
    assert windows[2].targets.tolist() == [True, False, False, False]
    assert (windows.facts.tokens, windows.padding, dropped(windows)) == (9, 3, 0)
    assert {array.dtype for window in all_of(windows) for array in window[:2]} == {np.dtype(np.int64)}


def test_nothing_gives_no_window() -> None:
    assert len(contiguous([], 4)) == len(best_fit([], 4)) == 0


@given(documents, lengths)
def test_contiguous_windows_are_those_of_the_reference(texts: list[list[int]], length: int) -> None:
    windows = contiguous(texts, length)
    expected = list(reference(texts, length))
    assert [(w.tokens.tolist(), w.document_ids.tolist()) for w in all_of(windows)] == expected
    assert all((w.targets == (w.document_ids != PADDING)).all() for w in all_of(windows))
    assert windows.padding == sum(owners.count(PADDING) for _, owners in expected)
    assert windows.padding < length


@given(documents, lengths, st.integers(0, 12))
def test_several_stores_are_one_stream(texts: list[list[int]], length: int, cut: int) -> None:
    stores = [store_of(texts[:cut]), store_of([]), store_of(texts[cut:])]
    windows = windows_of(stores, "contiguous", length)
    assert [(w.tokens.tolist(), w.document_ids.tolist()) for w in all_of(windows)] == list(reference(texts, length))


def test_windows_can_be_read_in_any_order_and_modified() -> None:
    windows = contiguous([[1, 2, 3], [4, 5]], 2)
    windows[1].tokens[:] = 77
    assert [windows[index].tokens.tolist() for index in (2, 0, 1)] == [[5, FILL], [1, 2], [3, 4]]


# --- components ---


@given(documents, st.data())
def test_a_component_has_its_own_documents_in_their_order(texts: list[list[int]], data: st.DataObject) -> None:
    names = "".join(data.draw(st.lists(st.sampled_from("abc"), min_size=len(texts), max_size=len(texts))))
    cut = data.draw(st.integers(0, len(texts)))
    stores = [store_of(texts[:cut], names=names[:cut]), store_of(texts[cut:], names=names[cut:])]
    for component in "abcd":
        own = [text for text, name in zip(texts, names, strict=True) if name == component]
        windows = windows_of(stores, "contiguous", 5, component)
        assert windows.facts.documents == len(own)
        assert windows.facts.bytes == 2 * sum(map(len, own))
        assert [window.tokens.tolist() for window in all_of(windows)] == [tokens for tokens, _ in reference(own, 5)]


# --- best fit ---


def cut_every(text: list[int], length: int) -> list[list[int]]:
    return [text[start : start + length] for start in range(0, len(text), length)]


@given(documents, lengths)
def test_best_fit_keeps_every_token_and_cuts_nothing_that_fits(texts: list[list[int]], length: int) -> None:
    windows = best_fit(texts, length)
    found = [stretch for window in all_of(windows) for stretch in stretches(window)]
    assert sorted(found) == sorted(piece for text in texts for piece in cut_every(text, length))
    assert dropped(windows) == 0
    assert windows.facts.tokens == sum(map(len, texts))
    for window in all_of(windows):
        used = window.document_ids != PADDING
        assert (np.diff(used.astype(int)) <= 0).all()  # padding is at the end
        assert set(np.diff(window.document_ids[used])) <= {0, 1}
        assert window.document_ids[0] == 1
        assert (window.targets == used).all()
        assert (window.tokens[~used] == FILL).all()
    assert windows.padding == sum(int((window.document_ids == PADDING).sum()) for window in all_of(windows))


def first_fit_decreasing(sizes: list[int], length: int) -> int:
    rooms: list[int] = []
    for size in sorted(sizes, reverse=True):
        place = next((number for number, room in enumerate(rooms) if room >= size), None)
        if place is None:
            rooms.append(length - size)
        else:
            rooms[place] -= size
    return len(rooms)


@given(st.lists(st.integers(1, 24), max_size=40), st.integers(4, 24))
def test_best_fit_needs_no_more_windows_than_first_fit(sizes: list[int], length: int) -> None:
    pieces = [len(piece) for size in sizes for piece in cut_every([0] * size, length)]
    windows = best_fit([[0] * size for size in sizes], length)
    assert -(-sum(pieces) // length) <= len(windows) <= first_fit_decreasing(pieces, length)


@given(st.lists(st.integers(1, 6), max_size=8))
def test_best_fit_against_the_fewest_windows_there_can_be(sizes: list[int]) -> None:
    def fewest(left: tuple[int, ...], rooms: tuple[int, ...]) -> int:
        if not left:
            return len(rooms)
        size, *rest = left
        options = [fewest(tuple(rest), tuple(sorted((*rooms, 6 - size))))]
        for room in {room for room in rooms if room >= size}:
            others = list(rooms)
            others.remove(room)
            options.append(fewest(tuple(rest), tuple(sorted((*others, room - size)))))
        return min(options)

    found = len(best_fit([[0] * size for size in sizes], 6))
    assert 9 * found <= 11 * fewest(tuple(sizes), ()) + 6  # the bound of best-fit decreasing (Johnson, 1973)


@pytest.mark.parametrize(("median", "spread"), [(60, 0.8), (200, 1.0), (700, 1.2)])
def test_ragged_corpora_fill_the_windows(median: int, spread: float) -> None:
    rng = np.random.default_rng(0)
    sizes = np.exp(rng.normal(np.log(median), spread, 20_000)).astype(int).clip(1)
    store = store_of([])
    store.tokens, store.ends = np.zeros(sizes.sum(), dtype=np.uint16), sizes.cumsum()
    store.bytes = store.components = np.zeros_like(sizes)
    methods: list[tuple[Method, float]] = [("contiguous", 0.999), ("text", 0.99)]
    for method, least in methods:
        windows = windows_of([store], method, 2048)
        assert windows.facts.tokens / (len(windows) * 2048) > least
        assert windows.facts.tokens == sizes.sum()


def one_by_one(lengths: list[int], capacity: int) -> list[int]:
    """Best fit of a piece at a time; of windows with the same room, the one that got it last."""
    rooms: list[list[int]] = []  # [room, number], in the order in which they got their room
    found = []
    for length in lengths:
        fitting = [entry for entry in rooms if entry[0] >= length]
        if fitting:
            least = min(room for room, _ in fitting)
            entry = [entry for entry in fitting if entry[0] == least][-1]
            rooms.remove(entry)
        else:
            entry = [capacity, max(found, default=-1) + 1]
        found.append(entry[1])
        rooms.append([entry[0] - length, entry[1]])
    return found


@given(st.integers(1, 24), st.data())
def test_equal_lengths_are_placed_together_as_one_by_one(capacity: int, data: st.DataObject) -> None:
    lengths = sorted(data.draw(st.lists(st.integers(1, capacity), max_size=80)), reverse=True)
    assert place_best(np.array(lengths, dtype=np.uint32), capacity).tolist() == one_by_one(lengths, capacity)


# --- examples ---


def supervised(rows: list[list[tuple[int, bool]]], length: int) -> Windows:
    tokens, flags = ([[cell[side] for cell in row] for row in rows] for side in (0, 1))
    return windows_of([store_of(tokens, flags)], "examples", length)


@given(examples, st.integers(2, 12))
def test_examples_keep_their_targets_and_dropped_tokens_are_counted(
    rows: list[list[tuple[int, bool]]], length: int
) -> None:
    windows = supervised(rows, length)
    kept = [row for row in rows if any(flag for _, flag in row[1:length])]
    found = []
    for window in all_of(windows):
        for owner in range(1, window.document_ids.max() + 1):
            own = window.document_ids == owner
            found.append(list(zip(window.tokens[own].tolist(), window.targets[own].tolist(), strict=True)))
        assert not window.targets[window.document_ids == PADDING].any()
    assert sorted(found) == sorted(row[:length] for row in kept)
    without = sum(len(row) for row in rows if row not in kept)
    beyond = sum(max(0, len(row) - length) for row in kept)
    assert windows.facts.dropped == {
        "nothing to predict within sequence_length": without,
        "beyond sequence_length": beyond,
    }
    packed = sum(int((window.document_ids != PADDING).sum()) for window in all_of(windows))
    assert packed + dropped(windows) == windows.facts.tokens == sum(map(len, rows))


def test_examples_by_hand() -> None:
    rows = [
        [(1, False), (2, True)],
        [(3, True)],  # its only target has nothing before it
        [(4, False), (5, False), (6, False), (7, True)],  # its target is beyond the window
        [(8, False), (9, True), (10, True), (11, True)],
    ]
    windows = supervised(rows, 3)
    assert [window.tokens.tolist() for window in all_of(windows)] == [[8, 9, 10], [1, 2, FILL]]
    assert [window.targets.tolist() for window in all_of(windows)] == [[False, True, True], [False, True, False]]
    assert windows.facts.dropped == {"nothing to predict within sequence_length": 5, "beyond sequence_length": 1}


def test_windows_over_a_store_on_disk(tmp_path: Path) -> None:
    tokenizer = Tokenizer.train(["abc"], 257)
    segments = [Segment("ab", "x", target=False, last=False), Segment("c", "x"), Segment("cc", "y", target=False)]
    write_store(tmp_path, segments, tokenizer, skipped=Counter(), all_targets=False)
    windows = windows_of([TokenStore(tmp_path)], "examples", 5)
    (window,) = all_of(windows)
    assert tokenizer.decode(window.tokens.tolist()) == "abc"
    assert window.targets.tolist() == [False, False, True, True, False]
    assert windows.facts.dropped["nothing to predict within sequence_length"] == 3
