"""Numbers with their nouns and units, as the screen shows them."""

from __future__ import annotations

import pytest

from gptj_train.counted import counted, sized


@pytest.mark.parametrize(
    ("number", "text"), [(0, "0 windows"), (1, "1 window"), (2, "2 windows"), (12_000, "12,000 windows")]
)
def test_only_one_is_singular(number: int, text: str) -> None:
    assert counted(number, "window") == text


@pytest.mark.parametrize(
    ("size", "text"), [(0, "0.0 kB"), (16_726, "16.7 kB"), (114_084, "0.1 MB"), (4_607_255_000, "4,607.3 MB")]
)
def test_sizes(size: int, text: str) -> None:
    assert sized(size) == text
