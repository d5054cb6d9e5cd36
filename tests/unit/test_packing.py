"""pack(): every token lands in one window, in order; document ids say who owns it."""

from __future__ import annotations

from itertools import count, islice

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gptj_train.data.packing import PADDING, pack

FILL = -7
documents = st.lists(st.lists(st.integers(0, 99), min_size=1, max_size=30), max_size=12)
lengths = st.integers(1, 12)


def packed(texts: list[list[int]], length: int) -> tuple[np.ndarray, np.ndarray]:
    windows = list(pack(texts, length, FILL))
    tokens, owners = ([pair[side] for pair in windows] for side in (0, 1))
    return np.array(tokens).reshape(-1, length), np.array(owners).reshape(-1, length)


def test_by_hand() -> None:
    tokens, owners = packed([[1, 2], [3, 4, 5, 6], [7], [8, 9]], 4)
    assert tokens.tolist() == [[1, 2, 3, 4], [5, 6, 7, 8], [9, FILL, FILL, FILL]]
    # The documents 3456 and 89 cross a border: they are number 1 of the next window.
    assert owners.tolist() == [[1, 1, 2, 2], [1, 1, 2, 3], [1, 0, 0, 0]]


def test_a_document_that_ends_at_the_border_leaves_nothing_behind() -> None:
    tokens, owners = packed([[1, 2, 3], [4, 5]], 3)
    assert tokens.tolist() == [[1, 2, 3], [4, 5, FILL]]
    assert owners.tolist() == [[1, 1, 1], [1, 1, 0]]


def test_a_document_longer_than_several_windows() -> None:
    tokens, owners = packed([list(range(8))], 3)
    assert tokens.tolist() == [[0, 1, 2], [3, 4, 5], [6, 7, FILL]]
    assert owners.tolist() == [[1, 1, 1], [1, 1, 1], [1, 1, 0]]


def test_nothing_gives_no_window() -> None:
    assert list(pack([], 4, FILL)) == []


@given(documents, lengths)
def test_tokens_are_conserved_in_order(texts: list[list[int]], length: int) -> None:
    tokens, owners = packed(texts, length)
    assert tokens[owners != PADDING].tolist() == [token for text in texts for token in text]


@given(documents, lengths)
def test_only_the_end_of_the_last_window_is_padded(texts: list[list[int]], length: int) -> None:
    tokens, owners = packed(texts, length)
    used = sum(map(len, texts))
    assert len(tokens) == -(-used // length)
    assert ((owners == PADDING).ravel() == (np.arange(owners.size) >= used)).all()
    assert (tokens[owners == PADDING] == FILL).all()


@given(documents, lengths)
def test_ids_count_the_documents_of_each_window_from_one(texts: list[list[int]], length: int) -> None:
    _, owners = packed(texts, length)
    # Oracle: number the documents over the whole stream, then count from the window's first.
    stream = [number for number, text in enumerate(texts) for _ in text]
    expected = [number - stream[place - place % length] + 1 for place, number in enumerate(stream)]
    assert owners[owners != PADDING].tolist() == expected


@given(documents, lengths)
def test_ids_rise_by_at_most_one(texts: list[list[int]], length: int) -> None:
    for owners in packed(texts, length)[1]:
        real = owners[owners != PADDING]
        assert real[0] == 1
        assert set(np.diff(real)) <= {0, 1}


def test_documents_are_taken_as_they_are_needed() -> None:
    endless = ([number] * 3 for number in count())
    windows = list(islice(pack(endless, 4, FILL), 3))
    assert [tokens.tolist() for tokens, _ in windows] == [[0, 0, 0, 1], [1, 1, 2, 2], [2, 3, 3, 3]]
    assert next(endless) == [4, 4, 4]


@pytest.mark.parametrize("length", [2, 5])
def test_a_window_is_not_written_to_after_it_was_given(length: int) -> None:
    seen = [(window, window[0].copy(), window[1].copy()) for window in pack([[1] * 7, [2] * 6, [3]], length, FILL)]
    for (tokens, owners), tokens_then, owners_then in seen:
        assert (tokens == tokens_then).all()
        assert (owners == owners_then).all()
