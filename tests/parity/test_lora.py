"""LoRA adapters equal PEFT's: the same numbers from the same files, merged or not."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from pair import assert_close, build_pair, random_ids
from torch import Tensor, nn
from typed_configs import lora_config

from gptj_train.export.adapters import save_adapter
from gptj_train.model.lora import TARGETS, LoraConfig, merged, new_heads, with_lora
from gptj_train.weights.stored import is_adapter

RANK, ALPHA = 3, 7.0
KINDS = ["GPTJForCausalLM", "GPTJForSequenceClassification", "GPTJForQuestionAnswering"]


def lora(targets: Sequence[str], rank: int = RANK, dropout: float = 0.0) -> LoraConfig:
    return replace(lora_config(), rank=rank, alpha=ALPHA, dropout=dropout, targets=list(targets))


def build_lora_pair(kind: str, targets: Sequence[str]) -> tuple[nn.Module, nn.Module]:
    """Build (our model with adapters, Transformers' without); no B is zero, so that every adapter shows."""
    model, reference = build_pair(kind, pad_token_id=0)
    with_lora(model, lora(targets))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if is_adapter(name):
                parameter.normal_(std=0.2)
    return model, reference


def logits(output: Any) -> Tensor:
    return output.logits if hasattr(output, "logits") else output.start_logits


def save(model: nn.Module, folder: Path, kind: str, targets: tuple[str, ...]) -> None:
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    folder.mkdir()
    save_adapter(
        folder,
        trained.items(),
        {name: parameter.shape for name, parameter in trained.items()},
        rank=RANK,
        alpha=ALPHA,
        dropout=0.1,
        targets=targets,
        rslora=False,
        heads=[head.removesuffix(".") for head in new_heads(model)],
        base="gpt-j",
        architecture=kind,
    )


@pytest.mark.parametrize("targets", [("q_proj", "v_proj"), TARGETS], ids=["two", "all"])
@pytest.mark.parametrize("kind", KINDS)
def test_peft_reads_our_adapters(tmp_path: Path, kind: str, targets: tuple[str, ...]) -> None:
    model, reference = build_lora_pair(kind, targets)
    save(model, tmp_path / "adapter", kind, targets)
    ids = random_ids()
    expected = logits(model(ids))
    assert (logits(reference(ids)) - expected).abs().max() > 0.1  # The adapters have an effect.
    theirs = peft.PeftModel.from_pretrained(reference, tmp_path / "adapter").eval()
    assert_close(expected, logits(theirs(ids)))
    stored = peft.utils.load_peft_weights(str(tmp_path / "adapter"))
    assert stored.keys() == peft.get_peft_model_state_dict(theirs).keys()


@pytest.mark.parametrize("kind", KINDS)
def test_merged_weights_equal_pefts_and_give_the_same_logits(tmp_path: Path, kind: str) -> None:
    model, reference = build_lora_pair(kind, TARGETS)
    adapters = {name: parameter for name, parameter in model.named_parameters() if is_adapter(name)}
    whole = {name: tensor.detach() for name, tensor in merged(model.named_parameters(), adapters, ALPHA / RANK)}
    save(model, tmp_path / "adapter", kind, TARGETS)
    theirs = peft.PeftModel.from_pretrained(reference, tmp_path / "adapter").merge_and_unload()
    assert whole.keys() == dict(theirs.named_parameters()).keys()
    for name, tensor in theirs.named_parameters():
        assert_close(whole[name], tensor, 1e-6)
    plain, _ = build_pair(kind, pad_token_id=0)
    plain.load_state_dict(whole)
    ids = random_ids()
    assert_close(logits(plain(ids)), logits(model(ids)))


@pytest.mark.parametrize("kind", KINDS)
def test_only_adapters_and_new_heads_are_trained(kind: str) -> None:
    model, _ = build_pair(kind, pad_token_id=0)
    before = logits(model(ids := random_ids()))
    names = {name for name, _ in model.named_parameters()}
    with_lora(model, lora(["k_proj", "fc_out"], dropout=0.5))
    assert torch.equal(logits(model(ids)), before)  # B is zero, and dropout is off.
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    sides = {f"{side}.weight" for side in ("lora_A", "lora_B")}
    blocks = [f"transformer.h.{layer}.{module}" for layer in (0, 1) for module in ("attn.k_proj", "mlp.fc_out")]
    heads = {"GPTJForCausalLM": set(), KINDS[1]: {"score.weight"}, KINDS[2]: {"qa_outputs.weight", "qa_outputs.bias"}}
    assert trained == {f"{block}.{side}" for block in blocks for side in sides} | heads[kind]
    assert names <= {name for name, _ in model.named_parameters()}  # Frozen parameters keep their names.


def test_gradients_equal_pefts(tmp_path: Path) -> None:
    model, reference = build_lora_pair("GPTJForCausalLM", TARGETS)
    save(model, tmp_path / "adapter", "GPTJForCausalLM", TARGETS)
    theirs = peft.PeftModel.from_pretrained(reference, tmp_path / "adapter", is_trainable=True).eval()
    ids = random_ids()
    model.eval()(ids, labels=ids).loss.backward()
    theirs(input_ids=ids, labels=ids).loss.backward()
    expected = {
        name.removeprefix("base_model.model.").replace(".default", ""): parameter.grad
        for name, parameter in theirs.named_parameters()
        if parameter.grad is not None
    }
    found = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        assert_close(found[name], gradient, 1e-4)


def test_initial_a_has_the_standard_deviation_of_pefts() -> None:
    """PEFT draws from a uniform distribution, we from a normal one."""
    model, reference = build_pair(n_embd=256, n_head=4)
    with_lora(model, lora(["q_proj"], rank=64))
    theirs = peft.get_peft_model(reference, peft.LoraConfig(r=64, target_modules=["q_proj"]))
    spread = {
        side: torch.cat([x.flatten() for name, x in side.named_parameters() if "lora_A" in name]).std().item()
        for side in (model, theirs)
    }
    assert spread[model] == pytest.approx(spread[theirs], rel=0.02)


@pytest.mark.parametrize("targets", [[], ["lm_head"], ["q_proj", "wte"]])
def test_unknown_targets_are_refused(targets: list[str]) -> None:
    with pytest.raises(ValueError, match=r"lora.targets must be all-linear, or some of q_proj, k_proj"):
        lora(targets)


def test_all_linear_means_the_six_matrices_of_a_block() -> None:
    assert lora_config("targets=all-linear").matrices == TARGETS
    assert lora_config("targets=[all-linear]").matrices == TARGETS
    assert lora_config("targets=q_proj").matrices == ("q_proj",)


def test_rank_stabilized_scale_equals_pefts() -> None:
    config = replace(lora(TARGETS, rank=16), rslora=True)
    _, reference = build_pair("GPTJForCausalLM", pad_token_id=0)
    theirs = peft.LoraConfig(r=16, lora_alpha=ALPHA, use_rslora=True, target_modules=["q_proj"])
    (layer, *_) = [module for module in peft.get_peft_model(reference, theirs).modules() if hasattr(module, "scaling")]
    assert config.scale == layer.scaling["default"] == ALPHA / 4
