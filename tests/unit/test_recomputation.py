"""Each degree of recomputation gives the same bits, and keeps as little as it says."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from typed_configs import engine_config, lora_config

from gptj_train import GPTJConfig, GPTJForCausalLM
from gptj_train.errors import UserError
from gptj_train.model.lora import with_lora
from gptj_train.model.recomputation import Degree, recompute

DEGREES: list[Degree] = ["gelu", "mlp", "block"]
SHAPE = {"vocab_size": 61, "n_positions": 16, "n_embd": 32, "n_layer": 2, "n_head": 2, "rotary_dim": 8}
IDS = torch.randint(61, (2, 16), generator=torch.Generator().manual_seed(0))


def gradients(model: GPTJForCausalLM) -> list[torch.Tensor]:
    torch.manual_seed(3)
    model.train()(IDS, labels=IDS, use_cache=False).loss.backward()
    return [parameter.grad for parameter in model.parameters() if parameter.grad is not None]


@pytest.mark.parametrize("degree", DEGREES)
@pytest.mark.parametrize("dropout", [0.0, 0.2])
@pytest.mark.parametrize("lora", [0, 2])
def test_gradients_keep_every_bit(degree: Degree, dropout: float, lora: int) -> None:
    config = GPTJConfig(**SHAPE, resid_pdrop=dropout, attn_pdrop=dropout)
    adapters = replace(lora_config(), rank=lora, alpha=4, dropout=dropout, targets=["q_proj", "fc_in", "fc_out"])
    plain = with_lora(GPTJForCausalLM(config), adapters)
    again = copy.deepcopy(plain)
    recompute(again, degree)
    for expected, found in zip(gradients(plain), gradients(again), strict=True):
        assert torch.equal(found, expected)


@pytest.mark.parametrize(("degree", "calls"), [("none", (1, 1)), ("gelu", (1, 2)), ("mlp", (2, 2)), ("block", (2, 2))])
def test_what_runs_twice(degree: Degree, calls: tuple[int, int]) -> None:
    model = GPTJForCausalLM(GPTJConfig(**SHAPE))
    recompute(model, degree)
    counted = {"fc_in": 0, "activation": 0}
    mlp = model.transformer.h[0].mlp
    activation = mlp.activation

    def count_activation(x: torch.Tensor) -> torch.Tensor:
        counted["activation"] += 1
        return activation(x)

    def count_matrix(*_: object) -> None:
        counted["fc_in"] += 1

    mlp.activation = count_activation
    mlp.fc_in.register_forward_hook(count_matrix)
    gradients(model)
    assert (counted["fc_in"], counted["activation"]) == calls


@pytest.mark.parametrize(("dropout", "saved"), [(0.0, 0), (0.1, 2)])
def test_random_state_is_kept_only_for_dropout(dropout: float, saved: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model = GPTJForCausalLM(GPTJConfig(**SHAPE, resid_pdrop=dropout))
    recompute(model, "block")
    states = []
    plain = torch.get_rng_state
    monkeypatch.setattr(torch, "get_rng_state", lambda: states.append(0) or plain())
    model.train()(IDS, labels=IDS, use_cache=False)
    assert len(states) == saved  # one a block


def test_values_of_the_key() -> None:
    assert engine_config().activation_checkpointing == "block"
    assert engine_config("zero3", "activation_checkpointing=mlp").activation_checkpointing == "mlp"
    # As before the degrees.
    assert engine_config("zero3", "activation_checkpointing=true").activation_checkpointing == "block"
    assert engine_config("zero3", "activation_checkpointing=false").activation_checkpointing == "none"
    with pytest.raises(UserError, match=r"activation_checkpointing: .*'none', 'gelu', 'mlp' or 'block', got 'full'"):
        engine_config("zero3", "activation_checkpointing=full")
