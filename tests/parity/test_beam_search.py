"""Beam search returns the texts that Transformers returns."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
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


@pytest.mark.parametrize("early_stopping", [True, False, "never"])
@pytest.mark.parametrize("length_penalty", [-0.7, 0.0, 1.0, 2.5])
def test_early_stopping(pair: tuple[Any, Any], early_stopping: bool | str, length_penalty: float) -> None:
    ours, theirs = pair
    ids, mask = random_ids(batch=4), padding_mask([11, 4, 8, 1], side="left")
    options = {
        **{"num_beams": 3, "num_return_sequences": 3, "max_new_tokens": 20, "eos_token_id": list(range(0, 60, 2))},
        **{"pad_token_id": 100, "early_stopping": early_stopping, "length_penalty": length_penalty},
    }
    expected = theirs.generate(ids, attention_mask=mask, do_sample=False, **options)
    assert torch.equal(ours.generate(ids, mask, **options), expected)


def test_each_way_to_stop_makes_a_difference(pair: tuple[Any, Any]) -> None:
    ids = random_ids(batch=4)
    options = {"num_beams": 3, "max_new_tokens": 20, "eos_token_id": list(range(0, 30, 2)), "length_penalty": 2.5}
    texts = [pair[0].generate(ids, early_stopping=stop, **options).tolist() for stop in (True, False, "never")]
    assert texts[0] != texts[1]
    assert texts[1] != texts[2]


@pytest.mark.parametrize("share", [2, 3, 50])
def test_criteria_that_leave_nothing_to_extend(pair: tuple[Any, Any], share: int) -> None:
    ids = random_ids(batch=3)
    criterion = transformers.StoppingCriteriaList([lambda ids, scores, **_: ids[:, -1] % 50 < share])
    options = {"num_beams": 3, "max_new_tokens": 10, "pad_token_id": 100, "eos_token_id": 99}
    options["stopping_criteria"] = criterion
    expected = pair[1].generate(ids, do_sample=False, **options)
    assert torch.equal(pair[0].generate(ids, **options), expected)
