"""Folders round-trip between Transformers and us without losing a bit or a key."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from folders import FORMATS, edit_json, read_json, write_folder
from pair import SMALL, assert_close, build_pair, build_reference, random_ids
from safetensors import safe_open
from torch import nn

from gptj_train import GPTJConfig, GPTJForCausalLM, GPTJModel
from gptj_train.weights.hf_writer import plan_shards

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def assert_same_weights(ours: nn.Module, theirs: nn.Module) -> None:
    state, expected = ours.state_dict(), theirs.state_dict()
    assert state.keys() == expected.keys()
    for name, tensor in expected.items():
        assert state[name].dtype == tensor.dtype, name
        assert torch.equal(state[name], tensor), name


def theirs_from(folder: Path, kind: str = "GPTJForCausalLM") -> Any:
    model, report = getattr(transformers, kind).from_pretrained(folder, dtype="auto", output_loading_info=True)
    assert not any(report.values()), report
    return model


# Every format with every dtype, and each of both tied and untied.
ROUND_TRIPS = [(form, dtype, (i + j) % 2 == 1) for i, form in enumerate(FORMATS) for j, dtype in enumerate(DTYPES)]


@pytest.mark.parametrize(("form", "dtype", "tied"), ROUND_TRIPS)
def test_round_trip(tmp_path: Path, form: str, dtype: torch.dtype, tied: bool) -> None:
    reference = build_reference(tie_word_embeddings=tied).to(dtype)
    model = GPTJForCausalLM.from_pretrained(write_folder(reference, tmp_path / "theirs", form))
    assert_same_weights(model, reference)
    assert model.config.tie_word_embeddings == tied
    assert (model.lm_head.weight is model.transformer.wte.weight) == tied
    assert not model.training
    assert all(parameter.requires_grad for parameter in model.parameters())

    model.save_pretrained(tmp_path / "ours")
    back = theirs_from(tmp_path / "ours")
    assert_same_weights(back, reference)
    ids = random_ids()
    assert torch.equal(back(ids).logits, reference(ids).logits)
    again = GPTJForCausalLM.from_pretrained(tmp_path / "ours")
    assert torch.equal(again(ids).logits, model(ids).logits)
    assert_close(model(ids).logits, reference(ids).logits, 2e-5 if dtype == torch.float32 else 2e-2)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("form", FORMATS)
def test_trunk_from_the_folder_of_a_causal_lm(tmp_path: Path, form: str, tied: bool) -> None:
    reference = build_reference(tie_word_embeddings=tied)
    trunk = GPTJModel.from_pretrained(write_folder(reference, tmp_path / "theirs", form))
    assert_same_weights(trunk, reference.transformer)
    trunk.save_pretrained(tmp_path / "ours")
    assert_same_weights(theirs_from(tmp_path / "ours", "GPTJModel"), reference.transformer)


@pytest.mark.parametrize("form", FORMATS)
def test_trunk_from_its_own_folder(tmp_path: Path, form: str) -> None:
    reference = build_reference("GPTJModel")
    trunk = GPTJModel.from_pretrained(str(write_folder(reference, tmp_path, form)))
    assert_same_weights(trunk, reference)


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_dtype_conversion(tmp_path: Path, dtype: torch.dtype, form: str) -> None:
    reference = build_reference()
    write_folder(reference, tmp_path / "theirs", form)
    reference.to(dtype)
    model = GPTJForCausalLM.from_pretrained(tmp_path / "theirs", dtype=dtype)
    assert_same_weights(model, reference)
    GPTJForCausalLM.from_pretrained(tmp_path / "theirs").save_pretrained(tmp_path / "ours", dtype=dtype)
    assert_same_weights(theirs_from(tmp_path / "ours"), reference)
    config = read_json(tmp_path / "ours/config.json")
    assert config["dtype"] == config["torch_dtype"] == str(dtype).removeprefix("torch.")


@pytest.mark.parametrize("key", ["dtype", "torch_dtype"])
def test_either_dtype_key_is_read(tmp_path: Path, key: str) -> None:
    write_folder(build_reference().bfloat16(), tmp_path, "safetensors")
    edit_json(tmp_path / "config.json", **{"dtype": None, "torch_dtype": None, key: "bfloat16"})
    config = GPTJConfig.from_pretrained(tmp_path)
    assert config.dtype == "bfloat16"
    config.save_pretrained(tmp_path)
    assert read_json(tmp_path / "config.json")["torch_dtype"] == "bfloat16"
    assert transformers.GPTJConfig.from_pretrained(tmp_path).dtype == torch.bfloat16


def test_unknown_config_keys_are_kept(tmp_path: Path) -> None:
    unknown = {
        "summary_type": "cls_index",
        "task_specific_params": {"text-generation": {"do_sample": True, "max_length": 50}},
        "gradient_checkpointing": False,
        "scale_attn_weights": True,
        "extra": [1, {"two": "3"}],
    }
    odd = {"n_inner": 50, "attn_pdrop": 0.25, "activation_function": "relu", "eos_token_id": [3, 4]}
    write_folder(build_reference(**odd), tmp_path / "theirs", "safetensors")
    edit_json(tmp_path / "theirs/config.json", **unknown)
    before = read_json(tmp_path / "theirs/config.json")
    GPTJForCausalLM.from_pretrained(tmp_path / "theirs").save_pretrained(tmp_path / "ours")
    after = read_json(tmp_path / "ours/config.json")
    del before["transformers_version"]
    assert {key: after.get(key) for key in before} == before
    ours = transformers.GPTJConfig.from_pretrained(tmp_path / "ours").to_dict()
    theirs = transformers.GPTJConfig.from_pretrained(tmp_path / "theirs").to_dict()
    assert {key: ours[key] for key in theirs} == theirs


def test_config_reads_the_general_names() -> None:
    names = {"hidden_size": 48, "num_attention_heads": 3, "num_hidden_layers": 5, "max_position_embeddings": 99}
    config = GPTJConfig.from_dict(names | {"rotary_dim": 4})
    assert (config.n_embd, config.n_head, config.n_layer, config.n_positions) == (48, 3, 5, 99)
    assert {name: getattr(config, name) for name in names} == names
    assert config.extra == {}


def test_config_defaults_are_those_of_transformers() -> None:
    ours, theirs = GPTJConfig().to_dict(), transformers.GPTJConfig().to_dict()
    assert {key: ours[key] for key in ours.keys() & theirs.keys()} == {
        key: theirs[key] for key in ours.keys() & theirs.keys()
    }
    assert set(SMALL) <= ours.keys() & theirs.keys()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("limit", [1, 10_000, 30_000])
def test_sharded_save(tmp_path: Path, limit: int, dtype: torch.dtype) -> None:
    model, reference = build_pair(tie_word_embeddings=limit == 10_000)
    model.to(dtype).save_pretrained(tmp_path, max_shard_bytes=limit)
    index = read_json(tmp_path / "model.safetensors.index.json")
    parameters = dict(model.named_parameters())
    numel = sum(parameter.numel() for parameter in parameters.values())
    assert index["metadata"] == {"total_size": numel * dtype.itemsize, "total_parameters": numel}
    assert index["weight_map"].keys() == parameters.keys()
    files = sorted(path.name for path in tmp_path.glob("*.safetensors"))
    assert sorted(set(index["weight_map"].values())) == files
    assert files[0] == f"model-00001-of-{len(files):05}.safetensors"
    for file in files:
        with safe_open(tmp_path / file, framework="pt") as shard:
            tensors = [shard.get_tensor(name) for name in shard.keys()]  # noqa: SIM118
            assert shard.metadata() == {"format": "pt"}
        assert len(tensors) == 1 or sum(tensor.nbytes for tensor in tensors) <= limit
    assert_same_weights(theirs_from(tmp_path), reference.to(dtype))
    assert_same_weights(GPTJForCausalLM.from_pretrained(tmp_path), reference)


def test_plan_shards() -> None:
    sizes = {"a": 4, "b": 6, "c": 1, "d": 20, "e": 3}
    one, two, three = (f"model-0000{i}-of-00004.safetensors" for i in (1, 2, 3))
    four = "model-00004-of-00004.safetensors"
    assert plan_shards(sizes, 10) == {one: ["a", "b"], two: ["c"], three: ["d"], four: ["e"]}
    assert plan_shards(sizes, 34) == {"model.safetensors": list(sizes)}


def test_saving_again_replaces_the_weights(tmp_path: Path) -> None:
    (first, _), (second, reference) = build_pair(), build_pair()
    folder = tmp_path / "runs" / "export"  # Parents are created.
    first.save_pretrained(folder, max_shard_bytes=10_000)
    second.save_pretrained(folder)
    assert sorted(path.name for path in folder.iterdir()) == [
        "config.json",
        "generation_config.json",
        "model.safetensors",
    ]
    assert_same_weights(theirs_from(folder), reference)
    assert list(folder.parent.iterdir()) == [folder]  # No scratch folder remains.


def test_saving_over_the_folder_it_was_loaded_from(tmp_path: Path) -> None:
    for form in FORMATS:
        folder = tmp_path / form
        reference = build_reference()
        model = GPTJForCausalLM.from_pretrained(write_folder(reference, folder, form))
        model.save_pretrained(folder, max_shard_bytes=10_000)
        assert_same_weights(model, reference)  # Still in memory, though its file is gone.
        assert_same_weights(GPTJForCausalLM.from_pretrained(folder), reference)


def test_failed_save_leaves_the_old_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, reference = build_pair()
    model.save_pretrained(tmp_path / "export")

    def full_disk(*_: Any, **__: Any) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr("os.fsync", full_disk)
    with pytest.raises(OSError, match="No space left"):
        build_pair()[0].save_pretrained(tmp_path / "export")
    assert [path.name for path in tmp_path.iterdir()] == ["export"]
    assert_same_weights(theirs_from(tmp_path / "export"), reference)


def test_saving_into_a_folder_keeps_its_other_files(tmp_path: Path) -> None:
    model = GPTJForCausalLM(GPTJConfig(**SMALL))
    model.save_pretrained(tmp_path / "m", max_shard_bytes=10_000)
    (tmp_path / "m" / "tokenizer.json").write_text("{}")
    model.save_pretrained(tmp_path / "m")
    names = sorted(file.name for file in (tmp_path / "m").iterdir())
    assert names == ["config.json", "generation_config.json", "model.safetensors", "tokenizer.json"]
