"""Every number that a forward returns equals Transformers', for many configs and arguments."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from pair import SMALL, VOCAB, assert_close, build_pair, padding_mask, positions_of, random_ids
from transformers.activations import ACT2FN

from gptj_train import GPTJConfig, GPTJForCausalLM
from gptj_train.model.activations import ACTIVATIONS

CONFIGS = [
    pytest.param({}, id="small"),
    pytest.param({"n_inner": 50, "layer_norm_epsilon": 1e-3}, id="n_inner"),
    pytest.param({"rotary_dim": 2, "activation_function": "relu"}, id="rotary-2"),
    pytest.param({"rotary_dim": 8, "n_layer": 3}, id="rotary-full"),
    pytest.param({"tie_word_embeddings": True}, id="tied"),
    pytest.param({"vocab_size": 37, "n_embd": 42, "n_head": 3, "rotary_dim": 6}, id="odd-sizes"),
    pytest.param({"n_head": 1, "rotary_dim": 16, "activation_function": "quick_gelu"}, id="one-head"),
]


@pytest.mark.parametrize("changes", CONFIGS)
def test_logits_loss_states_and_attentions(changes: dict[str, Any]) -> None:
    model, reference = build_pair(**changes)
    ids = random_ids(vocab=changes.get("vocab_size", VOCAB))
    labels = ids.clone()
    labels[0, :4] = labels[1, 7] = -100
    arguments = {"labels": labels, "output_hidden_states": True, "output_attentions": True}
    ours, theirs = model(ids, **arguments), reference(ids, **arguments)
    for key in ("loss", "logits", "hidden_states", "attentions"):
        assert_close(ours[key], theirs[key])
    assert_close(model(ids, labels=labels).loss, theirs.loss)  # Fused attention.
    assert_close(model(ids).logits, theirs.logits)


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activation(name: str) -> None:
    ours = torch.linspace(-12, 12, 1001).requires_grad_()
    theirs = ours.detach().clone().requires_grad_()
    out, expected = ACTIVATIONS[name](ours), ACT2FN[name](theirs)
    assert_close(out, expected)
    out.sum().backward()
    expected.sum().backward()
    assert_close(ours.grad, theirs.grad)


def test_trunk() -> None:
    model, reference = build_pair("GPTJModel")
    ids = random_ids()
    assert_close(model(ids).last_hidden_state, reference(ids).last_hidden_state)


@pytest.mark.parametrize("grad", [False, True])  # With gradients, fully masked rows use eager attention.
@pytest.mark.parametrize("eager", [False, True])
@pytest.mark.parametrize("side", ["left", "right"])
def test_attention_mask(pair: tuple[Any, Any], side: str, eager: bool, grad: bool) -> None:
    mask = padding_mask([7, 11, 3], side)
    arguments = {"attention_mask": mask, "labels": random_ids(3), "output_attentions": eager}
    ids = random_ids(3)
    for positions in (None, positions_of(mask)):
        with torch.set_grad_enabled(grad):
            ours, theirs = (model(ids, position_ids=positions, **arguments) for model in pair)
            assert_close(ours.logits, theirs.logits)  # At padding too.
        assert_close(ours.loss, theirs.loss)
        assert (ours.attentions is not None) == eager


@pytest.mark.parametrize("eager", [False, True])
@torch.no_grad()
def test_four_dimensional_masks(pair: tuple[Any, Any], eager: bool) -> None:
    model, reference = pair
    ids = random_ids()
    seen = (torch.rand(2, 1, 11, 11) < 0.6).tril() | torch.eye(11, dtype=torch.bool)
    seen[0, 0, 4] = False  # A fully masked row.
    additive = torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min)
    expected = reference(ids, attention_mask=additive).logits
    for mask in (additive, seen):
        assert_close(model(ids, attention_mask=mask, output_attentions=eager).logits, expected)
    soft = torch.randn(1, 1, 11, 11)  # A bias for every row.
    assert_close(model(ids, attention_mask=soft).logits, reference(ids, attention_mask=soft).logits)


@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize(
    "positions",
    [
        pytest.param([list(range(5, 16))], id="shifted"),
        pytest.param([[*range(4), *range(7)], [*range(9), 0, 1]], id="packed"),
        pytest.param([[0, 1, 2, 2, 3, 9, 8, 7, 0, 0, 1]], id="jumping"),
    ],
)
def test_position_ids(pair: tuple[Any, Any], positions: list[list[int]], use_cache: bool) -> None:
    # Without cache and mask Transformers isolates documents at jumps of the positions.
    ids, arguments = random_ids(), {"position_ids": torch.tensor(positions), "use_cache": use_cache}
    for mask in (None, torch.ones_like(ids), padding_mask([7, 11], "right")):
        ours, theirs = (model(ids, attention_mask=mask, **arguments) for model in pair)
        assert_close(ours.logits, theirs.logits)


def test_embeddings_and_token_types(pair: tuple[Any, Any]) -> None:
    model = pair[0]
    embeddings, types = torch.randn(2, 11, SMALL["n_embd"]), random_ids()
    ours, theirs = (m(inputs_embeds=embeddings, token_type_ids=types) for m in pair)
    assert_close(ours.logits, theirs.logits)
    ids = random_ids()
    ours, theirs = (m(ids, token_type_ids=types) for m in pair)
    assert_close(ours.logits, theirs.logits)
    assert torch.equal(model(inputs_embeds=model.transformer.wte(ids)).logits, model(ids).logits)


@pytest.mark.parametrize("items", [7, torch.tensor(3)])
def test_num_items_in_batch(pair: tuple[Any, Any], items: int | torch.Tensor) -> None:
    ids = random_ids()
    ours, theirs = (model(ids, labels=ids, num_items_in_batch=items) for model in pair)
    assert_close(ours.loss, theirs.loss)


def test_logits_beside_the_loss_are_those_without_labels(pair: tuple[Any, Any]) -> None:
    ids = random_ids()
    ours, theirs = (model(ids, labels=ids) for model in pair)
    assert_close(ours.logits, theirs.logits)
    assert torch.equal(ours.logits, pair[0](ids).logits)


@pytest.mark.parametrize(
    ("arguments", "skipped"),
    [
        ({}, False),
        ({"skip_logits": True}, True),
        ({"num_items_in_batch": 7}, True),
        ({"num_items_in_batch": 7, "skip_logits": False}, False),
    ],
)
def test_skipped_logits_leave_the_loss_as_it_is(
    pair: tuple[Any, Any], arguments: dict[str, Any], skipped: bool
) -> None:
    model, ids = pair[0], random_ids()
    out = model(ids, labels=ids, **arguments)
    assert ("logits" in out) == (not skipped)
    assert (out.logits is None) == skipped
    targets = ids[:, 1:].numel()
    summed = model(ids, labels=ids).loss * targets
    assert_close(out.loss * arguments.get("num_items_in_batch", targets), summed)


def test_heads_take_only_input_ids_by_position(pair: tuple[Any, Any]) -> None:
    ids = random_ids()
    with pytest.raises(TypeError, match="positional"):
        pair[0](ids, torch.ones_like(ids))
    with pytest.raises(TypeError, match="unexpected keyword argument 'attention_masks'"):
        pair[0](ids, attention_masks=torch.ones_like(ids))


def test_loss_without_targets_is_nan_as_in_transformers(pair: tuple[Any, Any]) -> None:
    ids = random_ids()
    ours, theirs = (model(ids, labels=torch.full_like(ids, -100)) for model in pair)
    assert ours.loss.isnan()
    assert theirs.loss.isnan()


@pytest.mark.parametrize("keep", [0, 1, 3])
def test_logits_to_keep(pair: tuple[Any, Any], keep: int) -> None:
    ids = random_ids()
    ours, theirs = (model(ids, logits_to_keep=keep) for model in pair)
    assert_close(ours.logits, theirs.logits)


@pytest.mark.parametrize("kind", ["GPTJForCausalLM", "GPTJModel"])
@pytest.mark.parametrize("flags", list(itertools.product([False, True], repeat=4)))
def test_tuple_has_the_same_values_in_the_same_order(flags: tuple[bool, ...], kind: str) -> None:
    labelled, use_cache, attentions, states = flags
    if kind == "GPTJModel" and labelled:
        return  # It takes no labels.
    ids = random_ids()
    arguments: dict[str, Any] = {"labels": ids} if labelled else {}
    arguments |= {"use_cache": use_cache, "output_attentions": attentions, "output_hidden_states": states}
    pair = build_pair(kind)
    ours, theirs = (model(ids, return_dict=False, **arguments) for model in pair)
    assert type(ours) is tuple
    assert len(ours) == len(theirs)
    for mine, other in zip(ours, theirs, strict=True):
        if isinstance(other, torch.Tensor | tuple):
            assert_close(mine, other)
        else:
            assert mine.get_seq_length() == other.get_seq_length() == 11
    named, expected = (model(ids, **arguments) for model in pair)
    assert list(named.keys()) == list(expected.keys())
    assert len(named.to_tuple()) == len(ours)


def test_output_reads_by_name_key_and_index(pair: tuple[Any, Any]) -> None:
    ids = random_ids()
    out = pair[0](ids, labels=ids)
    assert out["loss"] is out.loss is out[0]
    assert out["logits"] is out.logits is out[1]
    assert out[:2] == (out.loss, out.logits)
    assert "loss" in out
    assert "attentions" not in out
    assert out.attentions is None
    with pytest.raises(AttributeError, match="no 'scores'"):
        _ = out.scores
    with pytest.raises(KeyError):
        _ = out["attentions"]


def test_config_gives_defaults_of_the_call() -> None:
    switches = {"output_attentions": True, "output_hidden_states": True, "use_cache": False}
    model, reference = build_pair(**switches)
    ids = random_ids()
    assert list(model(ids).keys()) == list(reference(ids).keys()) == ["logits", "hidden_states", "attentions"]
    model.config.return_dict = False
    assert type(model(ids)) is tuple


@pytest.mark.parametrize("per_layer", [False, True])
def test_head_mask(per_layer: bool) -> None:
    # Transformers 5 has no head mask. Scaling a head's weights scales its output, and so does scaling the columns of
    # out_proj that read the head.
    model, reference = build_pair()
    head_mask = torch.tensor([[1.0, 0.0, 0.5, 1.0], [0.0, 1.0, 1.0, 0.25]])
    ids = random_ids()
    for layer, block in enumerate(reference.transformer.h):
        row = head_mask[layer if per_layer else 0]
        block.attn.out_proj.weight.data *= row.repeat_interleave(SMALL["n_embd"] // SMALL["n_head"])
    out = model(ids, head_mask=head_mask if per_layer else head_mask[0])
    assert_close(out.logits, reference(ids).logits)


@pytest.mark.parametrize("mask", [None, "2d", "4d"])
@torch.no_grad()
def test_bf16(mask: str | None) -> None:
    model, reference = (m.bfloat16() for m in build_pair(rotary_dim=8))
    ids, padding = random_ids(), padding_mask([7, 11], "left")
    seen = torch.ones(11, 11, dtype=torch.bool).tril() & padding.bool()[:, None, None]
    masks = {"2d": padding, "4d": torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min)}
    arguments = {"attention_mask": None if mask is None else masks[mask], "labels": ids}
    ours, theirs = model(ids, **arguments), reference(ids, **arguments)
    # bf16 has 8 significant bits: one rounding is up to 0.4 %, and a forward makes many.
    assert_close(ours.logits, theirs.logits, tolerance=2e-2)
    assert_close(ours.loss, theirs.loss, tolerance=5e-3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "exactly one of input_ids and inputs_embeds"),
        ({"input_ids": random_ids(), "inputs_embeds": torch.zeros(2, 11, 32)}, "exactly one"),
        ({"input_ids": random_ids(1, 65)}, r"longer than the model's n_positions \(64\)"),
        ({"input_ids": random_ids(1, 2), "position_ids": torch.tensor([[63, 64]])}, "n_positions"),
        ({"input_ids": random_ids(), "attention_mask": torch.ones(2, 10)}, r"must be \(2, 11\), got \(2, 10\)"),
        ({"input_ids": random_ids(), "document_ids": torch.zeros(2, 10)}, r"must be \(2, 11\), got \(2, 10\)"),
        ({"input_ids": random_ids(), "skip_logits": True}, "nothing to return without labels"),
    ],
)
def test_invalid_arguments_raise_user_errors(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GPTJForCausalLM(GPTJConfig(**SMALL))(**arguments)
