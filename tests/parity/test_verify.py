"""Verifying an export detects damage, and its streamed logits equal the model's."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from pair import assert_close, build_pair, random_ids
from safetensors.torch import load_file, save_file

import gptj_train
from gptj_train import GPTJConfig
from gptj_train.export.verify import ExportError, streamed_logits, verify_folder
from gptj_train.weights.hf_reader import HFWeights

SHARDED, WHOLE = 10_000, 10**9


def written(folder: Path, limit: int, kind: str = "GPTJForCausalLM", dtype: torch.dtype = torch.float32) -> Any:
    model, _ = build_pair(kind)
    model.to(dtype).save_pretrained(folder, max_shard_bytes=limit)
    return model


def shapes_of(model: torch.nn.Module) -> dict[str, torch.Size]:
    return {name: parameter.shape for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("limit", [SHARDED, WHOLE])
def test_report_of_a_complete_folder(tmp_path: Path, limit: int, dtype: torch.dtype) -> None:
    model = written(tmp_path / "export", limit, dtype=dtype)
    report = verify_folder(tmp_path / "export", shapes_of(model), dtype=dtype, written={})
    count = sum(parameter.numel() for parameter in model.parameters())
    assert (report["parameters"], report["total_size"]) == (count, count * dtype.itemsize)
    assert report["dtype"] == str(dtype).removeprefix("torch.")
    assert report["files"].keys() == {path.name for path in (tmp_path / "export").iterdir()}
    for name, entry in report["files"].items():
        content = (tmp_path / "export" / name).read_bytes()
        assert entry == {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    json.dumps(report)


@pytest.mark.parametrize("damage", ["missing", "stranger", "shape", "dtype", "nan", "infinite", "extra file"])
@pytest.mark.parametrize("limit", [SHARDED, WHOLE])
def test_damage_is_detected(tmp_path: Path, limit: int, damage: str) -> None:
    model = written(tmp_path, limit)
    file = max(tmp_path.glob("*.safetensors"))
    state = load_file(file)
    name = max(state)
    if damage == "missing":
        del state[name]
    elif damage == "stranger":
        state["stranger"] = torch.zeros(2)
    elif damage == "shape":
        state[name] = state[name][..., :-1].contiguous()
    elif damage == "dtype":
        state[name] = state[name].half()
    elif damage == "extra file":
        save_file({"x": torch.zeros(3)}, tmp_path / "model-99999.safetensors")
    else:
        state[name].view(-1)[-1] = float(damage.removesuffix("inite"))
    save_file(state, file)
    if limit == SHARDED and damage == "stranger":  # The index does not name it, but the file is too large.
        message = "bytes of weights"
    else:
        message = {
            "missing": name,
            "stranger": "unexpected: stranger",
            "shape": "has shape",
            "dtype": "is stored as torch.float16, not torch.float32",
            "extra file": "bytes of weights",
        }.get(damage, "contains NaN or infinity")
    with pytest.raises(ExportError, match=message):
        verify_folder(tmp_path, shapes_of(model), dtype=torch.float32, written={})


def test_fp16_overflow_is_reported(tmp_path: Path) -> None:
    model, _ = build_pair()
    with torch.no_grad():
        model.lm_head.bias[3] = 70000.0
    model.save_pretrained(tmp_path, dtype=torch.float16)
    with pytest.raises(ExportError, match=r"lm_head\.bias contains NaN or infinity; a weight is beyond fp16"):
        verify_folder(tmp_path, shapes_of(model), dtype=torch.float16, written={})


@pytest.mark.parametrize("limit", [SHARDED, WHOLE])
@pytest.mark.parametrize("kind", ["GPTJForCausalLM", "GPTJForSequenceClassification", "GPTJForQuestionAnswering"])
def test_streamed_logits_equal_the_models(tmp_path: Path, kind: str, limit: int) -> None:
    written(tmp_path, limit, kind)
    ids = random_ids(1)
    with HFWeights(tmp_path) as weights:
        found, _ = streamed_logits(weights, GPTJConfig.from_pretrained(tmp_path), ids)
    output = getattr(gptj_train, kind).from_pretrained(tmp_path)(ids)
    if kind == "GPTJForQuestionAnswering":
        expected = torch.stack((output.start_logits[0], output.end_logits[0]), dim=-1)
    else:
        expected = output.logits[0]
    assert_close(found if kind != "GPTJForSequenceClassification" else found[-1], expected)


@pytest.mark.parametrize("form", ["model.safetensors", "pytorch_model.bin"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_slices_are_read_into_any_dtype(
    tmp_path: Path, form: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The low limit maps the file anew for every read."""
    monkeypatch.setattr("gptj_train.weights.hf_reader._MOST_MAPPED", 100)
    state = {"a": torch.randn(7, 5).to(dtype), "b": torch.randn(6, 4).to(dtype).T}
    if form.endswith(".bin"):
        torch.save(state, tmp_path / form)
    else:
        save_file({name: tensor.contiguous() for name, tensor in state.items()}, tmp_path / form)
    with HFWeights(tmp_path) as weights:
        for name, tensor in state.items():
            for start, numel in ((0, tensor.numel()), (3, 9), (20, 1)):
                for into in (torch.empty(numel), torch.empty(numel, dtype=torch.bfloat16)):
                    weights.read(name, start, into)
                    assert torch.equal(into, tensor.reshape(-1)[start : start + numel].to(into.dtype))
