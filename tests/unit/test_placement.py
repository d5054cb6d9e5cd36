"""Device placement for inference: what fits goes to the accelerator, and offloaded blocks change no number."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from accelerate import dispatch_model

from gptj_train import GPTJConfig, GPTJForCausalLM
from gptj_train.inference.placement import device_map, place

GIB = 2**30
SHAPE = {"vocab_size": 60, "n_positions": 32, "n_embd": 32, "n_layer": 4, "n_head": 2, "rotary_dim": 8}


def test_gpt_j_6b_in_bf16() -> None:
    with torch.device("meta"):
        model = GPTJForCausalLM(GPTJConfig()).bfloat16()
    assert device_map(model, int(0.8 * 15.5 * GIB), 0) == {"": 0}  # a card of 16 GB has room for all of it
    sizes = {name: sum(p.numel() * 2 for p in module.parameters()) for name, module in model.named_modules()}
    for room, blocks in ((6, 13), (1.5, 1)):
        placed = device_map(model, int(room * GIB), 0)
        assert sum(place == 0 and ".h." in name for name, place in placed.items()) == blocks
        # The largest offloaded module has room beside those that stay.
        largest = max(sizes[name] for name, place in placed.items() if place == "cpu")
        assert sum(sizes[name] for name, place in placed.items() if place == 0) + largest <= room * GIB


def test_offloaded_blocks_change_no_number(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = GPTJConfig(**SHAPE, initializer_range=0.3)  # type: ignore[arg-type]
    model = GPTJForCausalLM(config).eval()
    ids = torch.randint(60, (2, 9))
    labels = ids.clone()
    with torch.no_grad():
        loss, logits = model(ids, labels=labels).loss, model(ids).logits
    text = model.generate(ids, max_new_tokens=8)

    size = sum(parameter.numel() * 4 for parameter in model.parameters())
    placed = device_map(model, size // 2, 0)
    assert {0, "cpu"} == set(placed.values())
    stand_in = {name: "cpu" if place == 0 else "disk" for name, place in placed.items()}  # there is no accelerator here
    visited = dispatch_model(model, stand_in, main_device="cpu", offload_dir=tmp_path)
    assert any(parameter.is_meta for parameter in visited.parameters())
    with torch.no_grad():
        torch.testing.assert_close(visited(ids, labels=labels).loss, loss)
        torch.testing.assert_close(visited(ids).logits, logits)
    assert torch.equal(visited.generate(ids, max_new_tokens=8), text)


@pytest.mark.skipif(torch.accelerator.is_available(), reason="of hosts without an accelerator")
def test_without_an_accelerator_the_model_stays_on_the_cpu() -> None:
    model = GPTJForCausalLM(GPTJConfig(**SHAPE))  # type: ignore[arg-type]
    assert place(model) == torch.device("cpu")
    assert {parameter.device.type for parameter in model.parameters()} == {"cpu"}
