"""What cannot be quantized or continued is refused in one line that says what to do."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from typed_configs import config, lora_config

from gptj_train import GPTJConfig, GPTJForCausalLM
from gptj_train.config import ClmConfig
from gptj_train.errors import UserError
from gptj_train.model import quantized
from gptj_train.model.adapter_folder import AdapterFolder
from gptj_train.model.lora import with_lora
from gptj_train.training.optimizer import decay_groups
from gptj_train.training.quantized_base import check_base
from gptj_train.weights.checkpoint_weights import open_weights

SHAPE = GPTJConfig(vocab_size=61, n_positions=16, n_embd=64, n_layer=1, n_head=2, rotary_dim=8)


@pytest.mark.parametrize(
    ("settings", "line"),
    [
        (["quantize=nf4"], r"quantize=nf4 needs lora=adapters"),
        (["quantize=nf4", "lora=adapters"], r"quantize=nf4 keeps the base whole .* set engine=zero2"),
        (["quantize=int8", "lora=adapters", "engine=zero3_nvme", "engine.nvme_path=x"], r"set engine=zero2"),
        (["quantize=nf4", "lora=adapters", "engine=zero2", "engine.offload_parameters=cpu"], r"needs engine.stage=3"),
        (["quantize=fp4", "lora=adapters"], r"quantize: input should be 'none', 'nf4' or 'int8', got 'fp4'"),
        (["optim.lora_lr_ratio=16"], r"optim.lora_lr_ratio needs lora=adapters"),
        (["lora=adapters", "optim.lora_lr_ratio=0"], r"lora_lr_ratio must be above 0, got 0"),
        (["lora=adapters", "lora.targets=[wte]"], r"lora.targets must be all-linear, or some of q_proj"),
    ],
)
def test_settings_that_mean_nothing(settings: list[str], line: str) -> None:
    with pytest.raises(UserError, match=line):
        config("clm", ClmConfig, *settings)


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_settings_that_do(stage: int) -> None:
    cfg = config("clm", ClmConfig, "quantize=nf4", "lora=adapters", "engine=zero2", f"engine.stage={stage}")
    assert (cfg.quantize, cfg.engine.stage) == ("nf4", stage)


def test_presets_in_4_bits() -> None:
    for name in ("gptj_6b_qlora", "qlora_quickstart"):
        cfg = config("clm", ClmConfig, f"+config={name}", "max_steps=100")
        assert (cfg.quantize, cfg.engine.stage, cfg.lora.rank) == ("nf4", 2, 16)


def test_random_weights_are_not_quantized() -> None:
    with pytest.raises(UserError, match="quantize=nf4 needs init_from"):
        check_base("nf4", None)
    check_base("none", None)


def test_the_package_is_named_where_it_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise ModuleNotFoundError(name)

    quantized.bitsandbytes.cache_clear()
    monkeypatch.setattr(quantized.importlib, "import_module", missing)
    with pytest.raises(UserError, match=r"needs the package bitsandbytes: pip install 'gptj_train\[quantize\]'"):
        check_base("nf4", "folder")
    quantized.bitsandbytes.cache_clear()


@pytest.mark.parametrize(
    ("suffix", "what"),
    [
        (".qweight", "GPTQ or AWQ"),
        (".g_idx", "GPTQ"),
        (".weight.quant_state.bitsandbytes__nf4", r"bitsandbytes, 4 bits \(nf4\)"),
        (".SCB", "bitsandbytes, 8 bits"),
        (".weight.absmax", "bitsandbytes, 8 bits in blocks"),
    ],
)
def test_a_quantized_folder_is_recognized(tmp_path: Path, suffix: str, what: str) -> None:
    """Of GPTQ, of Transformers with bitsandbytes, and of the old 8-bit GPT-J of the hub."""
    module = "transformer.h.0.attn.q_proj"
    save_file({f"{module}{suffix}": torch.zeros(4)}, tmp_path / "model.safetensors", {"format": "pt"})
    SHAPE.save_pretrained(tmp_path, "GPTJForCausalLM")
    with pytest.raises(UserError, match=rf"is quantized already \({what}\).* EleutherAI/gpt-j-6b"):
        GPTJForCausalLM.from_pretrained(tmp_path)
    with open_weights(tmp_path) as weights, pytest.raises(UserError, match=rf"quantized already \({what}\)"):
        weights.match({"transformer.wte.weight": torch.Size([61, 64])})


def adapter_folder(folder: Path, **changes: object) -> None:
    """Write an adapter of q_proj and v_proj with rank 4."""
    model = with_lora(GPTJForCausalLM(SHAPE), replace(lora_config(), rank=4, targets=["q_proj", "v_proj"]))
    tensors = {}
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            tensors[f"base_model.model.{name}"] = parameter.detach()
    save_file(tensors, folder / "adapter_model.safetensors")
    values = {"peft_type": "LORA", "r": 4, "lora_alpha": 32, "target_modules": ["v_proj", "q_proj"], "bias": "none"}
    (folder / "adapter_config.json").write_text(json.dumps(values | changes))


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"r": 8}, r"adapter_config.json: r is 8, and lora.rank is 4; set lora.rank=8"),
        ({"lora_alpha": 16}, r"lora_alpha is 16, and lora.alpha is 32.0; set lora.alpha=16"),
        ({"use_rslora": True}, r"use_rslora is True, and lora.rslora is False"),
        ({"use_dora": True}, r"use_dora is True, which is not offered"),
        ({"peft_type": "IA3"}, r"peft_type is 'IA3', which is not offered"),
        ({"target_modules": ["k_proj"]}, r"target_modules are others .* set lora.targets=\[k_proj\]"),
    ],
)
def test_an_adapter_of_other_settings_is_refused(tmp_path: Path, changes: dict[str, object], line: str) -> None:
    adapter_folder(tmp_path, **changes)
    lora = replace(lora_config(), rank=4, targets=["q_proj", "v_proj"], init_from=str(tmp_path))
    with pytest.raises(UserError, match=line):
        AdapterFolder(lora)


def test_an_adapter_of_another_model_is_refused(tmp_path: Path) -> None:
    adapter_folder(tmp_path)
    lora = replace(lora_config(), rank=4, targets=["q_proj", "v_proj"], init_from=str(tmp_path))
    folder = AdapterFolder(lora)
    name = "transformer.h.0.attn.q_proj.lora_A.weight"
    with pytest.raises(UserError, match=r"has shape \(4, 64\), this model needs \(4, 128\)"):
        folder.match({name: torch.Size([4, 128])})
    with pytest.raises(UserError, match=r"lacks base_model.model.transformer.h.7"):
        folder.match({name.replace("h.0", "h.7"): torch.Size([4, 64])})
    with pytest.raises(UserError, match=r"has more than lora.targets ask for"):
        folder.match({name: torch.Size([4, 64])})


def test_no_adapter_folder(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no adapter_config.json here"):
        AdapterFolder(replace(lora_config(), init_from=str(tmp_path)))


def test_b_matrices_have_a_group_of_their_own_rate() -> None:
    model = with_lora(GPTJForCausalLM(SHAPE), replace(lora_config(), rank=4, targets="all-linear"))
    groups = decay_groups(model, 0.1, lora_lr_ratio=16)
    assert [(len(group["params"]), group.get("lr_ratio")) for group in groups] == [(6, None), (0, None), (6, 16)]
    assert len(decay_groups(model, 0.1)) == 2
