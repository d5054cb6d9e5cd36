"""Greedy text equals Transformers' token by token; sampling draws from equal scores, repeatably under a seed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from pair import SMALL, VOCAB, build_pair, padding_mask, random_ids
from torch import Tensor
from transformers import (
    LogitsProcessorList,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from gptj_train.model.sampling import Sampling

PAD = 100
# Transformers warns about a missing length limit.
pytestmark = pytest.mark.filterwarnings("ignore:Using the model-agnostic default")


def prompts(batch: int = 3, length: int = 9) -> Tensor:
    return torch.randint(PAD, (batch, length))


def assert_same_greedy_text(pair: tuple[Any, Any], ids: Tensor, **options: Any) -> Tensor:
    ours, theirs = (model.generate(ids, do_sample=False, **options) for model in pair)
    assert torch.equal(ours, theirs)
    return ours


@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize(
    ("options", "length"),
    [
        ({"max_new_tokens": 15}, 24),
        ({"max_length": 17}, 17),
        ({"max_new_tokens": 1}, 10),
        ({}, 29),
        ({"max_new_tokens": 12, "repetition_penalty": 1.5}, 21),
        ({"max_new_tokens": 12, "repetition_penalty": 0.5}, 21),
        ({"max_length": 64}, 64),
    ],
)
@pytest.mark.parametrize("batch", [1, 3])
def test_greedy(pair: tuple[Any, Any], batch: int, options: dict[str, Any], length: int, use_cache: bool) -> None:
    ids = prompts(batch)
    out = assert_same_greedy_text(pair, ids, use_cache=use_cache, **options)
    assert out.shape == (batch, length)
    assert torch.equal(out[:, :9], ids)


def test_default_length_ends_at_the_last_position(pair: tuple[Any, Any]) -> None:
    assert assert_same_greedy_text(pair, prompts(1, 50)).shape == (1, 64)


@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("penalty", [1.0, 1.3])
def test_greedy_of_left_padded_prompts(pair: tuple[Any, Any], penalty: float, use_cache: bool) -> None:
    mask = padding_mask([5, 9, 1], "left", 9)
    ids = prompts().masked_fill(mask == 0, PAD)
    options = {"max_new_tokens": 8, "pad_token_id": PAD, "repetition_penalty": penalty, "use_cache": use_cache}
    out = assert_same_greedy_text(pair, ids, attention_mask=mask, **options)
    assert torch.equal(assert_same_greedy_text(pair, ids, **options), out)  # Derived from the pad id.
    # Padding changes nothing: the padded row generates what its prompt does alone.
    alone = pair[0].generate(ids[:1, 4:], max_new_tokens=8, repetition_penalty=penalty)
    assert torch.equal(out[:1, 4:], alone)


def test_padding_by_eos_without_a_spare_row(pair: tuple[Any, Any]) -> None:
    """A text that ends a document keeps its end token; the mask alone tells it from padding."""
    mask = padding_mask([5, 9, 3], "left", 9)
    ids = prompts().masked_fill(mask == 0, PAD)
    ids[2, -1] = PAD
    out = assert_same_greedy_text(
        pair, ids, attention_mask=mask, max_new_tokens=8, eos_token_id=PAD, pad_token_id=PAD, repetition_penalty=1.2
    )
    for row, length in enumerate((5, 9, 3)):
        prompt = ids[row : row + 1, 9 - length :]
        alone = pair[0].generate(prompt, max_new_tokens=8, eos_token_id=PAD, repetition_penalty=1.2)
        assert torch.equal(out[row, 9 - length : 9 - length + alone.shape[1]], alone[0])


@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("pad", [PAD, None])
@pytest.mark.parametrize("ends", [1, 2])
def test_finished_rows_are_filled(pair: tuple[Any, Any], ends: int, pad: int | None, use_cache: bool) -> None:
    ids = prompts()
    free = pair[0].generate(ids, max_new_tokens=12)
    stops = [int(free[0, 12]), int(free[1, 15])][:ends]
    eos = stops[0] if ends == 1 else stops
    options = {"max_new_tokens": 12, "eos_token_id": eos, "use_cache": use_cache}
    out = assert_same_greedy_text(pair, ids, attention_mask=torch.ones_like(ids), pad_token_id=pad, **options)
    new = out[0, 9:].tolist()
    after = new[new.index(stops[0]) + 1 :]
    assert after == [stops[0] if pad is None else pad] * len(after)


def test_generation_stops_once_all_rows_are_finished(pair: tuple[Any, Any]) -> None:
    ids = prompts(1)
    eos = int(pair[0].generate(ids, max_new_tokens=3)[0, -1])
    out = assert_same_greedy_text(pair, ids, max_new_tokens=30, eos_token_id=eos, pad_token_id=PAD)
    assert out.shape[1] <= 12
    assert out[0, -1] == eos


def test_eos_and_pad_of_the_config() -> None:
    model, _ = build_pair()
    ids = prompts(1)
    free = model.generate(ids, max_new_tokens=6)
    model.config.eos_token_id, model.config.pad_token_id = int(free[0, 11]), PAD
    out = model.generate(ids, max_new_tokens=6)
    assert torch.equal(out, free[:, : out.shape[1]])
    assert out[0, -1] == model.config.eos_token_id


def test_stream_yields_what_generate_returns(pair: tuple[Any, Any]) -> None:
    ids = prompts()
    columns = list(pair[0].stream(ids, max_new_tokens=7))
    assert torch.equal(torch.stack(columns, dim=1), pair[0].generate(ids, max_new_tokens=7)[:, 9:])


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize(
    "options",
    [
        {"top_k": 0},
        {"top_k": 1},
        {"top_k": 7},
        {"top_k": 500},
        {"top_k": 0, "temperature": 0.3},
        {"top_k": 0, "top_p": 0.8},
        {"top_k": 0, "top_p": 1e-6},
        {"top_k": 0, "repetition_penalty": 1.7},
        {"top_k": 20, "top_p": 0.9, "temperature": 1.3, "repetition_penalty": 0.6},
        {},
    ],
)
def test_scores(options: dict[str, Any], ties: bool) -> None:
    logits = 3 * torch.randn(5, VOCAB)
    if ties:
        logits = logits.round()
    ids_so_far = random_ids(5, 30)
    sampling = Sampling(do_sample=True, **options)
    processors = [RepetitionPenaltyLogitsProcessor(sampling.repetition_penalty)]
    processors.append(TemperatureLogitsWarper(sampling.temperature))
    if sampling.top_k:
        processors.append(TopKLogitsWarper(sampling.top_k))
    processors.append(TopPLogitsWarper(sampling.top_p))
    before = logits.clone()
    assert torch.equal(sampling.scores(logits, ids_so_far), LogitsProcessorList(processors)(ids_so_far, logits.clone()))
    assert torch.equal(logits, before)


def test_top_p_that_falls_between_equal_tokens() -> None:
    logits, ids_so_far = torch.zeros(1, 4), torch.zeros(1, 1, dtype=torch.long)
    kept = Sampling(do_sample=True, top_p=0.5).scores(logits, ids_so_far)
    assert torch.equal(kept, TopPLogitsWarper(0.5)(ids_so_far, logits))
    assert kept.isfinite().sum() == 2


def test_greedy_scores_ignore_the_sampling_options() -> None:
    logits, ids_so_far = torch.randn(2, VOCAB), random_ids()
    greedy = Sampling(temperature=0.5, top_k=3, top_p=0.5)
    assert torch.equal(greedy.scores(logits, ids_so_far), logits)
    assert torch.equal(greedy.pick(logits, None), logits.argmax(dim=-1))


def test_sampling_stays_within_the_allowed_tokens(pair: tuple[Any, Any]) -> None:
    logits = torch.randn(1, VOCAB).expand(500, -1)
    sampling = Sampling(do_sample=True, top_k=4)
    picked = sampling.pick(sampling.scores(logits, random_ids(500, 3)), torch.Generator().manual_seed(0))
    assert set(picked.tolist()) == set(logits[0].topk(4).indices.tolist())
    ids = prompts()
    narrow = pair[0].generate(ids, max_new_tokens=8, do_sample=True, top_k=1)
    assert torch.equal(narrow, pair[0].generate(ids, max_new_tokens=8))


def test_sampling_follows_the_distribution() -> None:
    logits = torch.tensor([[1.0, 0.0, 2.0, -1.0]]).expand(20_000, -1)
    sampling = Sampling(do_sample=True, temperature=0.7)
    scores = sampling.scores(logits, torch.zeros(20_000, 1, dtype=torch.long))
    picked = sampling.pick(scores, torch.Generator().manual_seed(0))
    expected = (logits[0] / 0.7).softmax(dim=-1)
    assert torch.allclose(picked.bincount(minlength=4) / 20_000, expected, atol=0.015)


@pytest.mark.parametrize("options", [{}, {"top_p": 0.9, "temperature": 1.4, "top_k": 0, "repetition_penalty": 1.2}])
def test_seeded_sampling_is_repeatable(pair: tuple[Any, Any], options: dict[str, Any]) -> None:
    ids = prompts()

    def sample(seed: int, **more: Any) -> Tensor:
        torch.rand(3)  # Earlier draws do not matter.
        return pair[0].generate(ids, max_new_tokens=12, do_sample=True, seed=seed, **options, **more)

    assert torch.equal(sample(1), sample(1))
    assert torch.equal(sample(1), sample(1, use_cache=False))
    assert not torch.equal(sample(1), sample(2))


def test_generation_while_checkpointing_in_training() -> None:
    model, _ = build_pair()
    ids = prompts()
    expected = model.generate(ids, max_new_tokens=5)
    model.gradient_checkpointing_enable()
    out = model.train().generate(ids, max_new_tokens=5)
    assert torch.equal(out, expected)
    assert not out.requires_grad


@pytest.mark.parametrize(
    ("ids", "options", "message"),
    [
        (prompts(), {"attention_mask": padding_mask([5, 9, 9], "right", 9)}, "padded on the left"),
        (torch.tensor([[1, 2, PAD]]), {"pad_token_id": PAD}, "padded on the left"),
        (prompts(), {"attention_mask": torch.ones(3, 8)}, r"attention_mask must be \(3, 9\), got \(3, 8\)"),
        (prompts(2, 0), {}, "at least one prompt token"),
        (torch.tensor([1, 2]), {}, "at least one prompt token"),
        (prompts(), {"max_length": 65}, r"\(65\) exceed the model's n_positions \(64\)"),
        (prompts(), {"max_new_tokens": 56}, r"\(65\) exceed the model's n_positions \(64\)"),
        (prompts(), {"max_length": 9}, "max_length 9 leaves no room after the prompt of 9 tokens"),
        (prompts(1, 64), {}, "leaves no room after the prompt of 64 tokens"),
        (prompts(), {"max_new_tokens": 0}, "max_new_tokens must be at least 1"),
        (prompts(), {"do_sample": True, "temperature": 0.0}, "temperature must be above 0"),
        (prompts(), {"do_sample": True, "temperature": -1.0}, "temperature must be above 0"),
        (prompts(), {"num_beams": 0}, "num_beams must be at least 1"),
        (prompts(), {"top_k": -1}, "top_k must be 0"),
        (prompts(), {"top_p": 0.0}, r"top_p must be in \(0, 1\]"),
        (prompts(), {"top_p": 1.5}, r"top_p must be in \(0, 1\]"),
        (prompts(), {"repetition_penalty": 0.0}, "repetition_penalty must be above 0"),
    ],
)
def test_invalid_options_raise_user_errors(
    pair: tuple[Any, Any], ids: Tensor, options: dict[str, Any], message: str
) -> None:
    assert SMALL["n_positions"] == 64
    with pytest.raises(ValueError, match=message):
        pair[0].generate(ids, **options)
