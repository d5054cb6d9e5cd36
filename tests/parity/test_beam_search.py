"""Beam search returns the texts that Transformers returns."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from pair import padding_mask, random_ids


@pytest.mark.parametrize(
    "penalties", [{}, {"length_penalty": 0.3}, {"length_penalty": 2.0}, {"repetition_penalty": 1.7}]
)
@pytest.mark.parametrize("ends", [[], [3], list(range(0, 60, 3))])
@pytest.mark.parametrize("num_beams", [2, 5])
def test_beam_search(pair: tuple[Any, Any], num_beams: int, ends: list[int], penalties: dict[str, float]) -> None:
    ours, theirs = pair
    ids, mask = random_ids(batch=3), padding_mask([11, 4, 8], side="left")
    options = {"num_beams": num_beams, "max_new_tokens": 12, "pad_token_id": 100, **penalties}
    expected = theirs.generate(ids, attention_mask=mask, do_sample=False, eos_token_id=ends or None, **options)
    assert torch.equal(ours.generate(ids, mask, eos_token_id=ends, **options), expected)


@pytest.mark.parametrize("penalty", [0.7, 1.7])
def test_padding_is_not_penalized(pair: tuple[Any, Any], penalty: float) -> None:
    ours, theirs = pair
    ids, mask = random_ids(batch=3), padding_mask([11, 4, 8], side="left")
    options = {"max_new_tokens": 12, "pad_token_id": 100, "repetition_penalty": penalty, "do_sample": False}
    assert torch.equal(ours.generate(ids, mask, **options), theirs.generate(ids, attention_mask=mask, **options))
