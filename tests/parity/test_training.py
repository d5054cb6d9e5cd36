"""Gradients, dropout, activation checkpointing and initial weights equal Transformers'."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from pair import SMALL, VOCAB, assert_close, assert_gradients_close, build_pair, gradients, padding_mask, random_ids
from torch import Tensor, nn

import gptj_train

DROPOUTS = ("embd_pdrop", "attn_pdrop", "resid_pdrop")


@pytest.mark.parametrize("eager", [False, True])
@pytest.mark.parametrize("mask", [None, padding_mask([7, 11], "left")], ids=["full", "padded"])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"tie_word_embeddings": True, "rotary_dim": 2, "n_inner": 50},
        {"vocab_size": 37, "n_embd": 42, "n_head": 3, "rotary_dim": 14, "n_layer": 3, "activation_function": "silu"},
    ],
    ids=["small", "tied", "odd-sizes"],
)
def test_all_gradients(changes: dict[str, Any], mask: Tensor | None, eager: bool) -> None:
    pair = build_pair(**changes)
    ids = random_ids(vocab=changes.get("vocab_size", VOCAB))
    labels = ids.clone()
    labels[:, :3] = -100
    for model in pair:
        model(ids, labels=labels, attention_mask=mask, output_attentions=eager).loss.backward()
    assert_gradients_close(*pair)


def test_gradients_of_logits_and_embeddings() -> None:
    embeddings = torch.randn(2, 11, SMALL["n_embd"])
    weights = torch.randn(2, 11, VOCAB)
    found = []
    for model in build_pair():
        inputs = embeddings.clone().requires_grad_()
        (model(inputs_embeds=inputs).logits * weights).sum().backward()
        found.append(inputs.grad)
    assert_close(*found)


def test_gradients_of_loss_and_logits_together() -> None:
    pair, ids = build_pair(), random_ids()
    for model in pair:
        out = model(ids, labels=ids)
        (out.loss + out.logits.square().mean()).backward()
    assert_gradients_close(*pair)


def test_seeded_dropout_equals_transformers() -> None:
    pair = build_pair(embd_pdrop=0.1, attn_pdrop=0.2, resid_pdrop=0.3)
    ids, found = random_ids(), []
    for model in pair:
        torch.manual_seed(5)
        # Both use eager attention here, so they draw the same random numbers in the same order.
        found.append(model.train()(ids, labels=ids, output_attentions=True))
    for key in ("loss", "logits", "attentions"):
        assert_close(found[0][key], found[1][key])


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("dropout", DROPOUTS)
def test_dropout_is_on_in_training_mode_only_and_follows_the_seed(dropout: str, packed: bool) -> None:
    model, _ = build_pair(**{dropout: 0.5})
    documents = torch.tensor([[0] * 5 + [1] * 6] * 2) if packed else None
    ids = random_ids()

    def logits(seed: int) -> Tensor:
        torch.manual_seed(seed)
        return model(ids, document_ids=documents).logits

    evaluated = logits(1)
    assert torch.equal(evaluated, logits(2))
    model.train()
    assert torch.equal(logits(1), logits(1))
    assert not torch.equal(logits(1), logits(2))
    assert not torch.equal(logits(1), evaluated)


@pytest.mark.parametrize("packed", [False, True])
def test_gradient_checkpointing_is_bit_exact(packed: bool) -> None:
    plain, _ = build_pair(**dict.fromkeys(DROPOUTS, 0.1))
    recomputed, _ = build_pair(**dict.fromkeys(DROPOUTS, 0.1))
    recomputed.load_state_dict(plain.state_dict())
    recomputed.gradient_checkpointing_enable()
    documents = torch.tensor([[0] * 5 + [1] * 6] * 2) if packed else None
    ids, outputs = random_ids(), []
    for model in (plain, recomputed):
        torch.manual_seed(5)
        outputs.append(model.train()(ids, labels=ids, document_ids=documents, output_hidden_states=True))
        outputs[-1].loss.backward()
    assert torch.equal(outputs[0].loss, outputs[1].loss)
    assert outputs[1].past_key_values is None
    for ours, theirs in zip(outputs[0].hidden_states, outputs[1].hidden_states, strict=True):
        assert torch.equal(ours, theirs)
    expected = gradients(plain)
    for name, gradient in gradients(recomputed).items():
        assert torch.equal(gradient, expected[name]), name


def test_gradient_checkpointing_recomputes_each_block() -> None:
    model, _ = build_pair()
    model.gradient_checkpointing_enable()
    calls = []
    for block in model.transformer.h:
        block.register_forward_pre_hook(lambda module, _: calls.append(module))
    ids = random_ids()
    model.train()(ids, labels=ids).loss.backward()
    assert len(calls) == 2 * SMALL["n_layer"]
    model.eval()
    assert model(ids).past_key_values.get_seq_length() == 11


def _fresh_ours(**changes: Any) -> nn.Module:
    return gptj_train.GPTJForCausalLM(gptj_train.GPTJConfig(**(SMALL | changes)))


def _fresh_theirs(**changes: Any) -> nn.Module:
    return transformers.GPTJForCausalLM(transformers.GPTJConfig(**(SMALL | changes)))


@pytest.mark.parametrize("build", [_fresh_ours, _fresh_theirs])
@pytest.mark.parametrize("std", [0.02, 0.5])
def test_initial_weights(build: Any, std: float) -> None:
    model = build(n_embd=64, initializer_range=std)
    names = dict(model.named_parameters())
    assert len(names) == 2 * 10 + 5
    for name, parameter in names.items():
        if "ln_" in name or name.endswith("bias"):
            assert torch.equal(parameter, torch.full_like(parameter, float(name.endswith("weight")))), name
        else:  # Within 4 standard errors of the mean and of the standard deviation.
            assert abs(parameter.mean()) < 4 * std / parameter.numel() ** 0.5, name
            assert abs(parameter.std() / std - 1) < 4 / (2 * parameter.numel()) ** 0.5, name


def test_initial_weights_follow_the_seed() -> None:
    def weights(seed: int) -> Tensor:
        torch.manual_seed(seed)
        return torch.nn.utils.parameters_to_vector(_fresh_ours().parameters())

    assert torch.equal(weights(1), weights(1))
    assert not torch.equal(weights(1), weights(2))


def test_tied_head_is_one_parameter() -> None:
    model = _fresh_ours(tie_word_embeddings=True)
    assert model.lm_head.weight is model.transformer.wte.weight
    assert "lm_head.weight" not in dict(model.named_parameters())
