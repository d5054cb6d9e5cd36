"""A folder that is not a whole, honest GPT-J is refused with a ValueError of one line that names the cause."""

from __future__ import annotations

import json
import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from gptj_train import GPTJConfig, GPTJForCausalLM, GPTJModel

CONFIG = GPTJConfig(vocab_size=31, n_positions=16, n_embd=16, n_layer=2, n_head=2, rotary_dim=4)
FORMS = pytest.mark.parametrize("form", ["model.safetensors", "pytorch_model.bin"])


def write(folder: Path, form: str, state: dict[str, Tensor]) -> None:
    (folder / "model.safetensors").unlink(missing_ok=True)
    if form.endswith(".bin"):
        torch.save(state, folder / form)
    else:
        save_file(state, folder / form)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A good folder with one safetensors file, to be spoiled."""
    GPTJForCausalLM(CONFIG).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    """A good folder with several shards."""
    GPTJForCausalLM(CONFIG).save_pretrained(tmp_path / "model", max_shard_bytes=4000)
    return tmp_path / "model"


def refusal(folder: Path, kind: Any = GPTJForCausalLM) -> str:
    with pytest.raises(ValueError, match=folder.name) as caught:
        kind.from_pretrained(folder)
    message = str(caught.value)
    assert type(caught.value) is ValueError
    assert "\n" not in message
    return message


def edit_index(folder: Path, **weight_map: Any) -> None:
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"] |= weight_map
    path.write_text(json.dumps(index))


@FORMS
def test_missing_tensors(folder: Path, form: str) -> None:
    state = load_file(folder / "model.safetensors")
    del state["lm_head.bias"], state["transformer.h.1.attn.q_proj.weight"]
    write(folder, form, state)
    assert "missing: lm_head.bias, transformer.h.1.attn.q_proj.weight; unexpected: none" in refusal(folder)


@FORMS
@pytest.mark.parametrize("stranger", ["transformer.h.2.ln_1.weight", "transformer.h.0.attn.rotary", "score.weight"])
def test_unexpected_tensors(folder: Path, form: str, stranger: str) -> None:
    state = load_file(folder / "model.safetensors")
    write(folder, form, state | {stranger: torch.zeros(2)})
    assert f"missing: none; unexpected: {stranger}" in refusal(folder)


def test_many_names_are_counted(folder: Path) -> None:
    write(folder, "model.safetensors", {"stranger": torch.zeros(2)})
    message = refusal(folder)
    assert "and 20 more; unexpected: stranger" in message
    assert len(message) < 600


@FORMS
def test_wrong_shape(folder: Path, form: str) -> None:
    state = load_file(folder / "model.safetensors")
    write(folder, form, state | {"transformer.h.0.mlp.fc_in.weight": torch.zeros(16, 64)})
    assert "transformer.h.0.mlp.fc_in.weight has shape (16, 64), config.json says (64, 16)" in refusal(folder)


def test_a_trunk_has_no_head(tmp_path: Path) -> None:
    GPTJModel(CONFIG).save_pretrained(tmp_path / "model")
    assert "missing: lm_head.bias, lm_head.weight" in refusal(tmp_path / "model")


def test_a_trunk_refuses_strangers_inside_it(folder: Path) -> None:
    state = load_file(folder / "model.safetensors")
    write(folder, "model.safetensors", state | {"transformer.h.2.ln_1.weight": torch.zeros(2)})
    assert "unexpected: transformer.h.2.ln_1.weight" in refusal(folder, GPTJModel)


@pytest.mark.parametrize("file", ["../x.safetensors", "/x.safetensors", "..", "a/b.safetensors", ".x", "", 7, None])
def test_index_that_leaves_the_folder(sharded: Path, file: Any) -> None:
    victim = sharded.parent / "x.safetensors"
    save_file({"lm_head.bias": torch.zeros(31)}, victim)
    edit_index(sharded, **{"lm_head.bias": file})
    assert "model.safetensors.index.json" in refusal(sharded)


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"weight_map": []}', '{"weight_map": null}', "\xff"])
def test_unreadable_index(sharded: Path, text: str) -> None:
    (sharded / "model.safetensors.index.json").write_text(text, encoding="latin-1")
    assert "not a readable weight index" in refusal(sharded)


def test_index_names_a_file_that_is_not_there(sharded: Path) -> None:
    (sharded / "model-00002-of-00007.safetensors").unlink(missing_ok=True)
    edit_index(sharded, **{"lm_head.bias": "model-99999.safetensors"})
    assert "model-99999.safetensors" in refusal(sharded)


@FORMS
def test_index_names_a_tensor_that_its_file_lacks(sharded: Path, form: str) -> None:
    write(sharded, form, {"lm_head.weight": torch.zeros(31, 16)})
    edit_index(sharded, **{"lm_head.bias": form})
    assert "lm_head.bias" in refusal(sharded)


@pytest.mark.parametrize("kept", [0, 4, 100, 0.5, -1])
@FORMS
def test_truncated_file(folder: Path, form: str, kept: float) -> None:
    write(folder, form, load_file(folder / "model.safetensors"))
    path = folder / form
    size = path.stat().st_size
    os.truncate(path, int(size * kept) if isinstance(kept, float) else kept % size)
    assert f"{form}: cannot be read as weights" in refusal(folder)


class Bomb:
    """Unpickled, it would make a file."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.canary),)


@pytest.mark.parametrize("writer", ["torch", "torch without zip", "pickle"])
def test_pickle_with_code_never_runs(folder: Path, writer: str) -> None:
    canary = folder.parent / "canary"
    path = folder / "pytorch_model.bin"
    state = load_file(folder / "model.safetensors") | {"lm_head.bias": Bomb(canary)}
    (folder / "model.safetensors").unlink()
    if writer == "pickle":
        path.write_bytes(pickle.dumps(state))
    else:
        torch.save(state, path, _use_new_zipfile_serialization=writer == "torch")
    assert "pytorch_model.bin" in refusal(folder)
    assert not canary.exists()
    # The bomb is live: read without care, it goes off.
    if writer == "pickle":
        pickle.loads(path.read_bytes())
    else:
        torch.load(path, weights_only=False)
    assert canary.is_dir()


@pytest.mark.parametrize("content", [[1, 2], torch.zeros(3), {"model": {"a": torch.zeros(1)}}, {"lm_head.bias": 1.0}])
def test_bin_that_is_no_state_dict(folder: Path, content: Any) -> None:
    if isinstance(content, dict):
        content = load_file(folder / "model.safetensors") | content
    (folder / "model.safetensors").unlink()
    torch.save(content, folder / "pytorch_model.bin")
    assert "pytorch_model.bin: refused, it is not a plain dictionary of tensors" in refusal(folder)


def test_empty_bin(folder: Path) -> None:
    write(folder, "pytorch_model.bin", {})
    assert "and 20 more; unexpected: none" in refusal(folder)


def test_format_older_than_torch_1_6_is_named(folder: Path) -> None:
    state = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save(state, folder / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    assert "pytorch_model.bin: cannot be read as weights (mmap can only be used" in refusal(folder)


def test_no_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    assert "no model.safetensors, pytorch_model.bin or their index here" in refusal(folder)


def test_missing_config(folder: Path) -> None:
    (folder / "config.json").unlink()
    assert "config.json: no readable GPT-J config.json here" in refusal(folder)
    assert "config.json" in refusal(folder / "nowhere")


@pytest.mark.parametrize("text", ["", "{", "\xff\xfe"])
def test_unreadable_config(folder: Path, text: str) -> None:
    (folder / "config.json").write_text(text, encoding="latin-1")
    assert "no readable GPT-J config.json here" in refusal(folder)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "gpt2"}, "model_type must be 'gptj'"),
        ({"model_type": None}, "model_type must be 'gptj'"),
        ({"activation_function": "gelu_newest"}, "activation_function 'gelu_newest' is unknown"),
        ({"n_head": 3}, "n_embd (16) must be a multiple of n_head (3)"),
        ({"rotary_dim": 5}, "rotary_dim (5) must be even"),
        ({"rotary_dim": 10}, "rotary_dim (10) must be even and at most n_embd / n_head (8)"),
        ({"rotary_dim": 0}, "rotary_dim (0)"),
        ({"n_layer": 0}, "n_layer must be at least 1, got 0"),
        ({"n_embd": "wide"}, "config.json"),
        ({"n_embd": 32}, "config.json says (31, 32)"),
    ],
)
def test_config_that_does_not_fit(folder: Path, changes: dict[str, Any], message: str) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    assert message in refusal(folder)


def test_config_that_is_no_object(folder: Path) -> None:
    (folder / "config.json").write_text("[]")
    assert "config.json" in refusal(folder)
