"""A folder that is not a whole, honest GPT-J is refused with a UserError of one line that names the cause."""

from __future__ import annotations

import json
import os
import pickle
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from gptj_train import GPTJConfig, GPTJForCausalLM, GPTJModel
from gptj_train.errors import UserError
from gptj_train.weights.hf_reader import HFWeights

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
    with pytest.raises(UserError, match=folder.name) as caught:
        kind.from_pretrained(folder)
    message = str(caught.value)
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
        ({"n_layer": 10**9}, "model.n_layer must be a whole number of at most 256, got 1000000000"),
        ({"n_positions": 10**10}, "model.n_positions must be a whole number of at most"),
        ({"num_labels": 10**10}, "model.num_labels must be a whole number of at most"),
        ({"id2label": ["a"]}, "id2label must name the labels by number, got ['a']"),
        ({"resid_pdrop": 7}, "model.resid_pdrop must be a number from 0 to below 1, got 7"),
        ({"layer_norm_epsilon": float("nan")}, "no readable GPT-J config.json here (NaN is not JSON)"),
        ({"layer_norm_epsilon": "x"}, "model.layer_norm_epsilon must be a number from 0"),
        ({"eos_token_id": "x"}, "eos_token_id must be a whole number from 0 to 16777216, or null, got 'x'"),
        ({"eos_token_id": [5, -1]}, "eos_token_id must be a whole number from 0 to 16777216, or null, got [5, -1]"),
        ({"bos_token_id": 10**10}, "bos_token_id must be a whole number"),
        ({"bos_token_id": [5]}, "bos_token_id must be a whole number"),
        ({"bos_token_id": {}}, "bos_token_id must be a whole number"),
        ({"pad_token_id": -5}, "pad_token_id must be a whole number"),
        ({"pad_token_id": True}, "pad_token_id must be a whole number"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings must be true or false, got 'yes'"),
        ({"use_cache": 1}, "use_cache must be true or false, got 1"),
        ({"return_dict": None}, "return_dict must be true or false, got None"),
        ({"activation_function": {}}, "activation_function must be text, got {}"),
        ({"problem_type": ["regression"]}, "problem_type must be text, got ['regression']"),
        ({"torch_dtype": 16}, "dtype must be text, got 16"),
        ({"id2label": {"1": "a", "2": "b"}}, "id2label must number the labels from 0 to 1, got [1, 2]"),
        ({"id2label": {"first": "a"}}, "config.json"),
        ({"extra_deep": json.loads("[" * 200 + "]" * 200)}, "it is nested too deeply"),
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


# --- files that are not what they seem ---


def hostile_safetensors(path: Path, header: bytes, length: int | None = None, data: bytes = b"") -> None:
    path.write_bytes((len(header) if length is None else length).to_bytes(8, "little") + header + data)


@pytest.mark.parametrize("length", [0, 1, 10**8 + 1, 2**40, 2**63, 2**64 - 1])
def test_absurd_header_length(folder: Path, length: int) -> None:
    hostile_safetensors(folder / "model.safetensors", b'{"a":{}}', length)
    assert "model.safetensors: cannot be read as weights" in refusal(folder)


@pytest.mark.parametrize(
    "places",
    [
        [0, 2**62],  # beyond the file
        [0, 8],  # smaller than the shape
        [8, 72],  # a gap before it
        [64, 0],
        [-64, 0],
        "everywhere",
    ],
)
def test_places_that_do_not_fit(folder: Path, places: Any) -> None:
    header = {"lm_head.bias": {"dtype": "F32", "shape": [16], "data_offsets": places}}
    hostile_safetensors(folder / "model.safetensors", json.dumps(header).encode(), data=bytes(64))
    assert "model.safetensors: cannot be read as weights" in refusal(folder)


def test_tensors_that_share_bytes(folder: Path) -> None:
    one = {"dtype": "F32", "shape": [16], "data_offsets": [0, 64]}
    header = {"lm_head.bias": one, "lm_head.weight": one}
    hostile_safetensors(folder / "model.safetensors", json.dumps(header).encode(), data=bytes(64))
    assert "model.safetensors: cannot be read as weights" in refusal(folder)


def test_bytes_behind_the_last_tensor(folder: Path) -> None:
    with (folder / "model.safetensors").open("ab") as file:
        file.write(b"PK")
    assert "model.safetensors: cannot be read as weights" in refusal(folder)


@pytest.mark.parametrize("kind", ["fifo", "folder", "dangling link", "loop"])
@pytest.mark.parametrize("file", ["model-00001-of-00007.safetensors", "model.safetensors.index.json"])
def test_what_is_no_file(sharded: Path, file: str, kind: str) -> None:
    """None of them may hang or be followed."""
    path = next(sharded.glob(file.replace("00007", "*")))
    path.unlink()
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    else:
        path.symlink_to(path.name if kind == "loop" else "nowhere")
    message = refusal(sharded)
    assert "is not a regular file" in message


@pytest.mark.parametrize("target", ["beside", "/dev/zero"])
@pytest.mark.parametrize("file", ["model.safetensors", "pytorch_model.bin"])
def test_links_that_leave_the_folder(folder: Path, file: str, target: str) -> None:
    state = load_file(folder / "model.safetensors")
    write(folder, file, state)
    outside = folder.parent / "outside"
    (folder / file).rename(outside)
    (folder / file).symlink_to(outside if target == "beside" else target)
    message = refusal(folder)
    assert f"{file}: refused, it is a link to outside" in message or "no model.safetensors" in message


def test_links_to_weights_beside_the_index(sharded: Path) -> None:
    file = min(sharded.glob("*.safetensors"))
    outside = sharded.parent / "outside"
    file.rename(outside)
    file.symlink_to(outside)
    assert f"{file.name}: refused, it is a link to outside" in refusal(sharded)


def test_links_of_a_hub_cache_are_followed(tmp_path: Path) -> None:
    snapshot, blobs = tmp_path / "models--gptj" / "snapshots" / "abc", tmp_path / "models--gptj" / "blobs"
    GPTJForCausalLM(CONFIG).save_pretrained(snapshot)
    blobs.mkdir()
    (snapshot / "model.safetensors").rename(blobs / "123")
    (snapshot / "model.safetensors").symlink_to("../../blobs/123")
    GPTJForCausalLM.from_pretrained(snapshot)
    (tmp_path / "link").symlink_to(snapshot)
    GPTJForCausalLM.from_pretrained(tmp_path / "link")


def test_deeply_nested_index(sharded: Path) -> None:
    (sharded / "model.safetensors.index.json").write_text("[" * 200_000)
    assert "not a readable weight index" in refusal(sharded)


def test_enormous_index(sharded: Path) -> None:
    os.truncate(sharded / "model.safetensors.index.json", 2**40)  # sparse
    assert "not a readable weight index (it has more than 50,000,000 bytes)" in refusal(sharded)


@FORMS
def test_quantized_weights(folder: Path, form: str) -> None:
    state = load_file(folder / "model.safetensors")
    write(folder, form, state | {"lm_head.weight": torch.zeros(31, 16, dtype=torch.int8)})
    assert "lm_head.weight is stored as" in refusal(folder)
    assert "quantized" in refusal(folder)


def test_bin_whose_storage_is_smaller_than_its_tensor(folder: Path) -> None:
    state = load_file(folder / "model.safetensors")
    write(folder, "pytorch_model.bin", state)
    path = folder / "pytorch_model.bin"
    with zipfile.ZipFile(path) as archive:
        entries = {item.filename: archive.read(item) for item in archive.infolist()}
    largest = max(entries, key=lambda name: len(entries[name]) if "/data/" in name else 0)
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in entries.items():
            archive.writestr(name, content[:8] if name == largest else content)
    assert "pytorch_model.bin: cannot be read as weights (its records" in refusal(folder)


def test_compressed_bin(folder: Path) -> None:
    write(folder, "pytorch_model.bin", load_file(folder / "model.safetensors"))
    path = folder / "pytorch_model.bin"
    with zipfile.ZipFile(path) as archive:
        entries = {item.filename: archive.read(item) for item in archive.infolist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in entries.items():
            archive.writestr(name, content)
    assert "pytorch_model.bin" in refusal(folder)


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


# --- what is there instead of a file ---

INSTEAD = {
    "Git LFS pointer": (
        b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 12216065\n",
        "it is a Git LFS pointer, not the file itself; run 'git lfs pull'",
    ),
    "HTML page": (b"\n<!DOCTYPE html><html></html>", "it is an HTML page, such as a login or error page"),
    "empty file": (b"", "it is an empty file; download it again"),
}


@pytest.mark.parametrize(("content", "reason"), INSTEAD.values(), ids=INSTEAD)
@pytest.mark.parametrize(
    "name", ["model.safetensors", "pytorch_model.bin", "model.safetensors.index.json", "pytorch_model.bin.index.json"]
)
def test_a_failed_download_is_called_what_it_is(folder: Path, name: str, content: bytes, reason: str) -> None:
    (folder / "model.safetensors").unlink()
    (folder / name).write_bytes(content)
    what = "not a readable weight index" if "index" in name else "cannot be read as weights"
    assert f"{name}: {what} ({reason}" in refusal(folder)


@pytest.mark.parametrize(("content", "reason"), INSTEAD.values(), ids=INSTEAD)
def test_a_config_that_is_a_failed_download(folder: Path, content: bytes, reason: str) -> None:
    (folder / "config.json").write_bytes(content)
    assert f"no readable GPT-J config.json here ({reason}" in refusal(folder)


def test_weights_that_torch_wrote_before_archives_are_read(folder: Path) -> None:
    expected = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save(expected, folder / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    found = GPTJForCausalLM.from_pretrained(folder).state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    data = (folder / "pytorch_model.bin").read_bytes()
    (folder / "pytorch_model.bin").write_bytes(data[:-100])
    assert "cannot be read as weights" in refusal(folder)


def test_old_weights_run_nothing(folder: Path, tmp_path: Path) -> None:
    class Stranger:
        def __reduce__(self) -> Any:
            return os.mkdir, (str(tmp_path / "ran"),)

    (folder / "model.safetensors").unlink()
    torch.save({"a": Stranger()}, folder / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    assert "refused, it holds more than tensors" in refusal(folder)
    assert not (tmp_path / "ran").exists()


def test_label_names_are_text(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["id2label"] = {"0": 5, "1": False, "2": None, "3": "x", "4": 1.0}
    (folder / "config.json").write_text("\ufeff" + json.dumps(config), encoding="utf-8")
    assert GPTJConfig.from_pretrained(folder).id2label == {0: "5", 1: "False", 2: "LABEL_2", 3: "x", 4: "1"}


@pytest.mark.parametrize("number", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@FORMS
def test_weights_with_nan_or_infinity_are_named(folder: Path, form: str, dtype: torch.dtype, number: float) -> None:
    state = {name: tensor.to(dtype) for name, tensor in load_file(folder / "model.safetensors").items()}
    state["transformer.h.1.mlp.fc_in.weight"][3, 2] = number
    write(folder, form, state)
    line = f"{form}: transformer.h.1.mlp.fc_in.weight contains NaN or infinity"
    assert line in refusal(folder)
    with HFWeights(folder) as weights:
        # A training rank reads its own part only: the first rows are good.
        weights.read("transformer.h.1.mlp.fc_in.weight", 0, torch.empty(48))
        with pytest.raises(UserError, match=line):
            weights.read("transformer.h.1.mlp.fc_in.weight", 32, torch.empty(32))


def test_values_that_only_look_infinite_in_their_sum(folder: Path) -> None:
    state = load_file(folder / "model.safetensors")
    write(folder, "model.safetensors", state | {"lm_head.bias": torch.full((31,), 3e38)})
    assert GPTJForCausalLM.from_pretrained(folder).lm_head.bias[0] == torch.tensor(3e38)
    with pytest.raises(UserError, match=r"lm_head\.bias has values beyond fp16's range; take bf16 or fp32"):
        GPTJForCausalLM.from_pretrained(folder, torch.float16)
