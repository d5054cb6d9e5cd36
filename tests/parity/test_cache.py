"""A sequence fed in chunks through the KV cache gives the numbers of one forward, and of Transformers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from pair import assert_close, padding_mask, positions_of, random_ids

LENGTH = 14
MASKS = {"full": None, "left-padded": padding_mask([9, 14, 12], "left", LENGTH)}


@pytest.mark.parametrize("attentions", [False, True])
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize(
    "chunks",
    [[6, 1, 1, 1, 4, 1], [1] * LENGTH, [7, 7], [13, 1]],
    ids=["prefill-steps-chunk", "steps", "two-chunks", "one-step"],
)
def test_chunks_equal_one_forward(pair: tuple[Any, Any], chunks: list[int], mask: str, attentions: bool) -> None:
    ids, padding = random_ids(3, LENGTH), MASKS[mask]
    positions = None if padding is None else positions_of(padding)
    whole = [model(ids, attention_mask=padding, position_ids=positions).logits for model in pair]
    assert_close(*whole)
    caches: list[Any] = [None, None]
    seen = 0
    for chunk in chunks:
        new = slice(seen, seen := seen + chunk)
        logits = []
        for i, model in enumerate(pair):
            out = model(
                ids[:, new],
                attention_mask=None if padding is None else padding[:, :seen],
                position_ids=None if positions is None else positions[:, new],
                past_key_values=caches[i],
                output_attentions=attentions,
            )
            caches[i] = out.past_key_values
            assert caches[i].get_seq_length() == seen
            logits.append(out.logits)
            if attentions:
                assert out.attentions[0].shape == (3, 4, chunk, seen)
        assert_close(*logits)
        real = slice(None) if padding is None else padding[:, new].bool()
        assert_close(logits[0][real], whole[0][:, new][real])


def test_cache_holds_the_keys_and_values_of_transformers(pair: tuple[Any, Any]) -> None:
    ids = random_ids()
    ours, theirs = (model(ids).past_key_values for model in pair)
    assert len(ours) == len(theirs.layers) == 2
    for layer, other in enumerate(theirs.layers):
        assert_close(ours[layer], (other.keys, other.values))


def test_cache_position(pair: tuple[Any, Any]) -> None:
    model, ids = pair[0], random_ids()
    cache = model(ids[:, :8]).past_key_values
    out = model(ids[:, 8:], past_key_values=cache, cache_position=torch.arange(8, 11))
    assert_close(out.logits, model(ids).logits[:, 8:])


def test_given_cache_is_used_with_use_cache_off(pair: tuple[Any, Any]) -> None:
    ids, found = random_ids(), []
    for model in pair:
        cache = model(ids[:, :8]).past_key_values
        found.append(model(ids[:, 8:], past_key_values=cache, use_cache=False).logits)
    assert_close(*found)


def test_reorder_selects_rows(pair: tuple[Any, Any]) -> None:
    model, ids = pair[0], random_ids(3)
    rows = torch.tensor([2, 0, 0])
    cache = model(ids[:, :8]).past_key_values
    cache.reorder_cache(rows)
    out = model(ids[rows, 8:], past_key_values=cache)
    assert_close(out.logits, model(ids[rows]).logits[:, 8:])


def test_documents_have_no_cache(pair: tuple[Any, Any]) -> None:
    model, ids = pair[0], random_ids()
    documents = torch.zeros_like(ids)
    assert model(ids, document_ids=documents, use_cache=True).past_key_values is None
    with pytest.raises(ValueError, match="document_ids cannot be combined with past_key_values"):
        model(ids, document_ids=documents, past_key_values=model(ids).past_key_values)


def test_positions_beyond_n_positions_are_refused(pair: tuple[Any, Any]) -> None:
    model = pair[0]
    cache = model(random_ids(1, 64)).past_key_values
    with pytest.raises(ValueError, match="n_positions"):
        model(random_ids(1, 1), past_key_values=cache)
