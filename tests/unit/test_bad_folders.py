"""A folder that is not a whole, honest GPT-J is refused with a ValueError of one line that names the cause."""

from __future__ import annotations

import json
import os
import pickle
import struct
import sys
from collections.abc import Callable
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


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "{}", '{"weight_map": []}', '{"weight_map": null}', "\xff", '{"weight_map": ' + "[" * 100_000],
)
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


@pytest.mark.parametrize("text", ["", "{", "\xff\xfe", "[" * 100_000, '{"n_layer": ' + "9" * 10_000 + "}"])
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
        ({"n_embd": "wide"}, "model.n_embd must be a whole number of at most 1048576, got 'wide'"),
        ({"n_embd": 16.0}, "model.n_embd must be a whole number"),
        ({"n_layer": True}, "model.n_layer must be a whole number"),
        ({"n_head": [2]}, "model.n_head must be a whole number"),
        ({"vocab_size": None}, "model.vocab_size must be a whole number"),
        ({"rotary_dim": "4"}, "model.rotary_dim must be a whole number"),
        ({"n_inner": -5}, "model.n_inner must be at least 1, got -5"),
        ({"n_layer": 10**9}, "model.n_layer must be a whole number of at most 4096, got 1000000000"),
        ({"n_positions": 10**10}, "model.n_positions must be a whole number of at most"),
        ({"num_labels": 10**10}, "model.num_labels must be a whole number of at most"),
        ({"id2label": ["a"]}, "id2label must name the labels by number, got ['a']"),
        ({"resid_pdrop": 7}, "model.resid_pdrop must be a number from 0 to below 1, got 7"),
        ({"layer_norm_epsilon": float("nan")}, "model.layer_norm_epsilon must be a number from 0"),
        ({"layer_norm_epsilon": "x"}, "model.layer_norm_epsilon must be a number from 0"),
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


def pipe(path: Path) -> None:
    path.unlink(missing_ok=True)
    os.mkfifo(path)


def device(path: Path) -> None:
    path.unlink(missing_ok=True)
    path.symlink_to("/dev/zero")


def folder_instead(path: Path) -> None:
    path.unlink(missing_ok=True)
    path.mkdir()


def dangling(path: Path) -> None:
    path.unlink(missing_ok=True)
    path.symlink_to("nowhere")


NO_FILES = pytest.mark.parametrize("make", [pipe, device, folder_instead, dangling])


@NO_FILES
@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_what_is_no_file_is_not_waited_for(folder: Path, name: str, make: Callable[[Path], None]) -> None:
    make(folder / name)
    assert "no readable GPT-J config.json" in (said := refusal(folder)) or "no model.safetensors" in said


@NO_FILES
def test_a_shard_that_is_no_file_is_not_waited_for(sharded: Path, make: Callable[[Path], None]) -> None:
    make(sharded / "shard.safetensors")
    edit_index(sharded, **{"lm_head.bias": "shard.safetensors"})
    assert refusal(sharded).endswith("shard.safetensors: no such file")


def test_links_are_followed_as_in_the_hub_s_cache(folder: Path) -> None:
    """There every file of a snapshot is a link to ../../blobs/HASH."""
    blobs = folder.parent / "blobs"
    blobs.mkdir()
    for file in list(folder.iterdir()):
        file.rename(blobs / file.name)
        file.symlink_to(Path("../blobs") / file.name)
    assert GPTJForCausalLM.from_pretrained(folder).config.n_embd == 16


def described(kind: str, shape: list[int], offsets: list[int]) -> dict[str, Any]:
    return {"lm_head.bias": {"dtype": kind, "shape": shape, "data_offsets": offsets}}


HEADERS = {
    "no end": (2**63, b"{}"),
    "2 GB": (2**31, b"{}"),
    "just above the limit": (100_000_001, b"{}"),
    "longer than the file": (1000, b"{}"),
    "no JSON": (2, b"\x80\x04"),
    "deep": (50_005, b'{"a":' + b"[" * 50_000),
    "shape beyond the data": described("F32", [1000], [0, 4]),
    "shape that overflows": described("F32", [2**62], [0, 4]),
    "negative shape": described("F32", [-1], [0, 4]),
    "negative offset": described("F32", [1], [-4, 0]),
    "offsets swapped": described("F32", [1], [4, 0]),
    "offsets beyond the file": described("F32", [1], [2**40, 2**40 + 4]),
    "a gap": described("F32", [1], [4, 8]),
    "unknown type": described("PICKLE", [1], [0, 4]),
    "two tensors in one place": described("F32", [2], [0, 8])
    | {"lm_head.weight": {"dtype": "F32", "shape": [2], "data_offsets": [4, 12]}},
}


@pytest.mark.parametrize("header", HEADERS.values(), ids=HEADERS)
def test_a_safetensors_header_that_lies(folder: Path, header: Any) -> None:
    length, text = header if isinstance(header, tuple) else (len(text := json.dumps(header).encode()), text)
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", length) + text + bytes(8))
    assert "model.safetensors: cannot be read as weights" in refusal(folder)


@FORMS
@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.float8_e4m3fn, torch.complex64])
def test_tensors_that_are_no_weights(folder: Path, form: str, dtype: torch.dtype) -> None:
    state = load_file(folder / "model.safetensors")
    write(folder, form, state | {"lm_head.bias": state["lm_head.bias"].to(dtype)})
    assert "lm_head.bias holds " in refusal(folder)


def test_code_named_in_a_config_is_not_looked_at(folder: Path) -> None:
    canary = folder.parent / "canary"
    (folder / "evil.py").write_text(f"import os; os.mkdir({str(canary)!r})")
    path = folder / "config.json"
    named = {
        "_target_": "evil.Model",
        "auto_map": {"AutoModelForCausalLM": "evil.Model", "AutoConfig": "evil.Config"},
        "_attn_implementation_internal": "evil/kernel",
        "trust_remote_code": True,
    }
    path.write_text(json.dumps(json.loads(path.read_text()) | named))
    GPTJForCausalLM.from_pretrained(folder)
    assert "evil" not in sys.modules
    assert not canary.exists()
