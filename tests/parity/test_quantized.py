"""A quantized base computes what Transformers, PEFT and bitsandbytes compute from the same folder."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import bitsandbytes
import peft
import pytest
import torch
import transformers
from torch import Tensor, nn
from typed_configs import lora_config

from gptj_train import GPTJConfig, GPTJForCausalLM
from gptj_train.errors import UserError
from gptj_train.model.lora import TARGETS, with_lora
from gptj_train.model.quantized import QuantizedMatrix, is_quantized, product_bytes, quantize_blocks, stored_bytes
from gptj_train.weights.stored import is_adapter

KINDS = ["nf4", "int8"]
SHAPE = GPTJConfig(vocab_size=211, n_positions=32, n_embd=128, n_layer=2, n_head=4, rotary_dim=8)
IDS = torch.randint(211, (2, 24), generator=torch.Generator().manual_seed(0))
each_kind = pytest.mark.parametrize("kind", KINDS)
each_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(1)
    path = tmp_path_factory.mktemp("base")
    model = GPTJForCausalLM(SHAPE)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.05)
    model.save_pretrained(path)
    return path


def theirs(folder: Path, kind: str, dtype: torch.dtype) -> nn.Module:
    """Transformers' GPT-J, quantized by its integration of bitsandbytes."""
    config = (
        transformers.BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
        )
        if kind == "nf4"
        else transformers.BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=0.0)
    )
    model: nn.Module = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype, quantization_config=config, device_map="cpu"
    )
    return model


def matrices(model: nn.Module) -> Iterator[tuple[str, Tensor, Tensor]]:
    """(name, packed weights, scales) of Transformers' model."""
    for name, module in model.named_modules():
        if isinstance(module, bitsandbytes.nn.Linear4bit):
            yield name, module.weight.data, module.weight.quant_state.absmax
        elif isinstance(module, bitsandbytes.nn.Linear8bitLt):
            yield name, module.weight.CB, module.weight.SCB


@each_kind
@each_dtype
def test_the_bits_are_those_of_transformers(folder: Path, kind: Any, dtype: torch.dtype) -> None:
    ours = GPTJForCausalLM.from_pretrained(folder, dtype=dtype, quantize=kind)
    count = 0
    for name, packed, scales in matrices(theirs(folder, kind, dtype)):
        matrix = ours.get_submodule(f"{name}.weight")
        assert isinstance(matrix, QuantizedMatrix)
        assert torch.equal(matrix.packed, packed), name
        assert torch.equal(matrix.scales if kind == "nf4" else matrix.fp32_bits.view(torch.float32), scales), name
        count += 1
    assert count == 2 * 6


def lora_pair(folder: Path, kind: Any, dtype: torch.dtype) -> tuple[GPTJForCausalLM, nn.Module]:
    """Our quantized model and PEFT's, with the same adapters, none of which is zero."""
    ours = with_lora(
        GPTJForCausalLM.from_pretrained(folder, dtype=dtype),
        replace(lora_config(), rank=4, alpha=8, dropout=0.0, targets="all-linear"),
    )
    torch.manual_seed(3)
    adapters = {}
    for name, parameter in ours.named_parameters():
        if is_adapter(name):
            nn.init.normal_(parameter, std=0.05)
            adapters[f"base_model.model.{name}"] = parameter.detach()
    # The adapters compute in the dtype of the weights here, as under DeepSpeed; PEFT keeps them in fp32 by default.
    ours.to(dtype)
    unquantized = dict(GPTJForCausalLM.from_pretrained(folder, dtype=dtype).named_parameters())
    quantize_blocks(ours, kind, unquantized.__getitem__)
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=list(TARGETS), task_type="CAUSAL_LM")
    adapted = peft.get_peft_model(theirs(folder, kind, dtype), config, autocast_adapter_dtype=False)
    peft.set_peft_model_state_dict(adapted, adapters)
    return ours.eval(), adapted.eval()


def gradients(model: nn.Module) -> dict[str, Tensor]:
    found = {}
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            found[name.removeprefix("base_model.model.").replace(".default", "")] = parameter.grad.float()
    return found


@each_kind
def test_forward_and_gradients_equal_pefts(folder: Path, kind: str) -> None:
    """fp32, to 1e-5 of the largest number. Training mode: bitsandbytes' int8 then rounds no activations on a CPU."""
    ours, adapted = lora_pair(folder, kind, torch.float32)
    output, expected = ours.train()(IDS, labels=IDS), adapted.train()(input_ids=IDS, labels=IDS)
    assert output.loss.item() == pytest.approx(expected.loss.item(), rel=1e-5)
    assert (output.logits - expected.logits).abs().max() <= 1e-5 * expected.logits.abs().max()
    output.loss.backward()
    expected.loss.backward()
    found, wanted = gradients(ours), gradients(adapted)
    assert found.keys() == wanted.keys()
    assert len(found) == 2 * 6 * 2
    for name, gradient in wanted.items():
        assert (found[name] - gradient).abs().max() <= 1e-5 * gradient.abs().max(), name


@each_kind
def test_bf16_equals_pefts_to_its_rounding(folder: Path, kind: str) -> None:
    """Losses to 3e-3; Transformers' eager attention rounds elsewhere than fused attention."""
    ours, adapted = lora_pair(folder, kind, torch.bfloat16)
    loss = ours.train()(IDS, labels=IDS).loss.item()
    assert loss == pytest.approx(adapted.train()(input_ids=IDS, labels=IDS).loss.item(), rel=3e-3)


@each_kind
def test_fifty_steps_beside_peft(folder: Path, kind: str) -> None:
    """AdamW on the adapters, fp32: the same loss at each of 50 steps to 1e-4, falling by more than a fifth."""
    ours, adapted = lora_pair(folder, kind, torch.float32)
    losses = []
    for model in (ours.train(), adapted.train()):
        trained = [parameter for name, parameter in model.named_parameters() if "lora_" in name]
        optimizer = torch.optim.AdamW(trained, lr=2e-3)
        of_model = []
        for step in range(50):
            generator = torch.Generator().manual_seed(step % 5)
            ids = torch.randint(211, (2, 24), generator=generator)
            loss = model(input_ids=ids, labels=ids).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            of_model.append(loss.item())
        losses.append(of_model)
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    assert losses[0][-1] < 0.8 * losses[0][0]


@each_kind
@each_dtype
def test_moving_and_casting_keep_the_scales(folder: Path, kind: Any, dtype: torch.dtype) -> None:
    """DeepSpeed calls module.bfloat16()."""
    model = GPTJForCausalLM.from_pretrained(folder, quantize=kind)
    matrix = model.transformer.h[0].mlp.fc_in.weight
    before = matrix.dequantized(torch.float32)
    model.to(dtype).to("cpu")
    assert torch.equal(matrix.dequantized(torch.float32), before)


def test_a_chunk_is_quantized_as_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gptj_train.model.quantized._CHUNK", 1024)
    whole = torch.randn(48, 192, generator=torch.Generator().manual_seed(2))
    matrix = QuantizedMatrix(whole, "nf4")
    packed, state = bitsandbytes.functional.quantize_4bit(whole, compress_statistics=True, quant_type="nf4")
    assert torch.equal(matrix.packed, packed)
    assert torch.equal(matrix.dequantized(torch.float32), bitsandbytes.functional.dequantize_4bit(packed, state))
    rows, largest, _ = bitsandbytes.functional.int8_vectorwise_quant(whole.half())
    matrix = QuantizedMatrix(whole, "int8")
    assert torch.equal(matrix.packed, rows)
    assert torch.equal(matrix.fp32_bits.view(torch.float32), largest)


@pytest.mark.parametrize(("kind", "most"), [("nf4", 0.1), ("int8", 0.01)])
def test_quantized_matrices_are_near_the_stored(kind: Any, most: float) -> None:
    """RMS of the error relative to that of normal weights: 9 % and 0.7 %."""
    whole = torch.randn(256, 512, generator=torch.Generator().manual_seed(2))
    error = QuantizedMatrix(whole, kind).dequantized(torch.float32) - whole
    assert most / 2 < error.pow(2).mean().sqrt() < most


def test_rows_that_the_kernel_gets_wrong_are_refused() -> None:
    with pytest.raises(UserError, match=r"multiples of 64, got 96"):
        QuantizedMatrix(torch.randn(64, 96), "nf4")


@each_kind
def test_bytes_are_as_planned(folder: Path, kind: Any) -> None:
    model = GPTJForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, quantize=kind)
    held = sum(tensor.nbytes for tensor in [*model.parameters(), *model.buffers()])
    shapes = {name: tuple(parameter.shape) for name, parameter in GPTJForCausalLM(SHAPE).named_parameters()}
    assert held == stored_bytes(shapes, kind, element=2)
    assert sum(map(is_quantized, shapes)) == 12


def test_six_billion_parameters_in_4_bits_take_less_than_4_gb() -> None:
    with torch.device("meta"):
        model = GPTJForCausalLM(GPTJConfig())
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    assert stored_bytes(shapes, "none", 2) / 1e9 == pytest.approx(12.10, abs=0.01)
    assert stored_bytes(shapes, "nf4", 2) / 1e9 == pytest.approx(3.73, abs=0.01)
    assert stored_bytes(shapes, "int8", 2) / 1e9 == pytest.approx(6.47, abs=0.01)
    assert product_bytes(shapes, "nf4", 2) == 2 * 4096 * 16384


@each_kind
def test_generation_takes_quantized_weights(folder: Path, kind: Any) -> None:
    model = GPTJForCausalLM.from_pretrained(folder, quantize=kind)
    ids = model.generate(IDS[:1], max_new_tokens=5, do_sample=False)
    full = model(ids[:, :-1]).logits[:, -5:].argmax(-1)
    assert torch.equal(ids[:, -5:], full)  # the cache, one token at a time, gives what the whole gives


def test_a_quantized_model_is_not_saved(folder: Path, tmp_path: Path) -> None:
    model = GPTJForCausalLM.from_pretrained(folder, quantize="int8")
    with pytest.raises(UserError, match="a quantized model cannot be saved"):
        model.save_pretrained(tmp_path / "out")
