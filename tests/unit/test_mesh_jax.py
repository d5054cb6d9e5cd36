"""Original checkpoints become Transformers folders: weights, moments, and what is not such a checkpoint."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from mesh_checkpoints import Tree, random_parameters, write_checkpoint
from torch import Tensor

from gptj_train import GPTJConfig, GPTJForCausalLM
from gptj_train.errors import UserError
from gptj_train.export.from_mesh_jax import MeshCheckpoint, _leaves
from gptj_train.weights.hf_reader import HFWeights

LAYERS, WIDTH, VOCAB = 11, 16, 40  # eleven layers: the tree has layer_10 between layer_1 and layer_2
CONFIG = GPTJConfig(vocab_size=VOCAB, n_positions=16, n_embd=WIDTH, n_layer=LAYERS, n_head=4, rotary_dim=2)


def parameters(shards: int, seed: int = 0) -> list[Tree]:
    return random_parameters(np.random.default_rng(seed), LAYERS, WIDTH, VOCAB, shards)


def forward(shards: list[Tree], ids: Tensor) -> Tensor:
    """Logits (T, V) of the sharded model, computed shard by shard as its program does: the oracle.

    Written from mesh_transformer/layers.py: partial sums over shards where that says psum, and the first shard's
    norms everywhere.
    """
    trees = [
        {name.removeprefix("causal_transformer_shard/~/"): leaves for name, leaves in shard.items()} for shard in shards
    ]
    trees = [
        {name: {key: torch.from_numpy(x).double() for key, x in leaves.items()} for name, leaves in tree.items()}
        for tree in trees
    ]
    heads, size, rotary = CONFIG.n_head, WIDTH // CONFIG.n_head, 2
    rows = VOCAB // len(trees)

    def norm(x: Tensor, name: str) -> Tensor:
        scale, offset = trees[0][name]["scale"], trees[0][name]["offset"]
        centred = x - x.mean(-1, keepdim=True)
        return scale * centred * (x.var(-1, keepdim=True, unbiased=False) + 1e-5).rsqrt() + offset

    def rotated(x: Tensor) -> Tensor:
        x = x.clone()
        angle = torch.arange(len(ids)).double()[:, None] / 10000 ** (torch.arange(0, rotary, 2).double() / rotary)
        even, odd = x[..., 0:rotary:2].clone(), x[..., 1:rotary:2].clone()
        sin, cos = angle.sin()[:, None], angle.cos()[:, None]
        x[..., 0:rotary:2], x[..., 1:rotary:2] = even * cos - odd * sin, odd * cos + even * sin
        return x

    x = torch.zeros(len(ids), WIDTH, dtype=torch.float64)
    for rank, tree in enumerate(trees):
        own = torch.nn.functional.one_hot(ids, VOCAB).double()[:, rank * rows : (rank + 1) * rows]
        x = x + own @ tree["embedding_shard/~/linear"]["w"] + tree["embedding_shard/~/linear"]["b"]
    for layer in range(LAYERS):
        block = f"layer_{layer}/~/"
        normed = norm(x, f"{block}replicated_layer_norm")
        for tree in trees:
            q, v, k = (
                (normed @ tree[f"{block}linear{i}"]["w"]).view(len(ids), heads // len(trees), size)
                for i in ("", "_1", "_2")
            )
            scores = torch.einsum("thd,Thd->htT", rotated(q), rotated(k)) / size**0.5
            scores = scores.masked_fill(torch.ones(len(ids), len(ids)).triu(1).bool(), -1e10)
            seen = torch.einsum("htT,Thd->thd", scores.softmax(-1), v).flatten(1)
            inner = normed @ tree[f"{block}linear_4"]["w"] + tree[f"{block}linear_4"]["b"]
            inner = torch.nn.functional.gelu(inner, approximate="tanh")
            x = x + seen @ tree[f"{block}linear_3"]["w"]
            x = x + inner @ tree[f"{block}linear_5"]["w"] + tree[f"{block}linear_5"]["b"]
    normed = norm(x, "projection_shard/~/replicated_layer_norm")
    head = "projection_shard/~/linear"
    return torch.cat([normed @ tree[head]["w"] + tree[head]["b"] for tree in trees], dim=-1)


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("shards", [1, 2, 4])
def test_the_imported_model_computes_what_the_shards_do(tmp_path: Path, shards: int, half: bool) -> None:
    trees = parameters(shards)
    source = write_checkpoint(tmp_path / "step_7", trees, 7, half=half)
    checkpoint = MeshCheckpoint(source, CONFIG)
    assert (checkpoint.step, checkpoint.is_full) == (7, False)
    checkpoint.save_pretrained(tmp_path / "hf")
    ids = torch.randint(VOCAB, (13,))
    model = GPTJForCausalLM.from_pretrained(tmp_path / "hf")
    expected = forward(trees, ids)
    # The oracle computes in fp64; what is left is our model's fp32.
    assert (model(ids[None]).logits[0] - expected).abs().max() < 1e-4 * expected.abs().max()
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    assert (theirs(ids[None]).logits[0] - expected).abs().max() < 1e-4 * expected.abs().max()
    assert not (tmp_path / "hf" / "adam").exists()


def test_every_number_arrives_exactly(tmp_path: Path) -> None:
    """Sums of the small numbers are exact in fp32, so that one bit amiss would show."""
    trees = parameters(4)
    write_checkpoint(tmp_path / "slim", trees, 1, half=True)
    found = dict(MeshCheckpoint(tmp_path / "slim", CONFIG).tensors())

    def of(name: str, key: str) -> list[np.ndarray]:
        return [tree[f"causal_transformer_shard/~/{name}"][key] for tree in trees]

    expected = {
        "transformer.wte.weight": np.concatenate(of("embedding_shard/~/linear", "w"))
        + sum(of("embedding_shard/~/linear", "b")),
        "transformer.h.10.attn.q_proj.weight": np.concatenate(of("layer_10/~/linear", "w"), axis=1).T,
        "transformer.h.2.attn.v_proj.weight": np.concatenate(of("layer_2/~/linear_1", "w"), axis=1).T,
        "transformer.h.9.attn.k_proj.weight": np.concatenate(of("layer_9/~/linear_2", "w"), axis=1).T,
        "transformer.h.0.attn.out_proj.weight": np.concatenate(of("layer_0/~/linear_3", "w")).T,
        "transformer.h.1.mlp.fc_in.bias": np.concatenate(of("layer_1/~/linear_4", "b")),
        "transformer.h.3.mlp.fc_out.bias": sum(of("layer_3/~/linear_5", "b")),
        "transformer.h.4.ln_1.weight": of("layer_4/~/replicated_layer_norm", "scale")[0],
        "transformer.ln_f.bias": of("projection_shard/~/replicated_layer_norm", "offset")[0],
        "lm_head.bias": np.concatenate(of("projection_shard/~/linear", "b")),
    }
    for name, value in expected.items():
        assert torch.equal(found[name].float(), torch.from_numpy(np.ascontiguousarray(value))), name
    assert found["lm_head.weight"].dtype == torch.bfloat16


def test_moments_become_adam_s_state(tmp_path: Path) -> None:
    trees, first, second = parameters(2, 1), parameters(2, 2), parameters(2, 3)
    for tree in first, second:  # every copy of a summed bias sees the same gradient
        for name in tree[1]:
            if name.endswith("linear_5"):
                tree[1][name]["b"] = tree[0][name]["b"]
    source = write_checkpoint(tmp_path / "full", trees, 500, moments=(first, second))
    checkpoint = MeshCheckpoint(source, CONFIG)
    assert checkpoint.is_full
    assert checkpoint.step == 500
    checkpoint.save_pretrained(tmp_path / "hf", torch.bfloat16)
    assert json.loads((tmp_path / "hf/adam/state.json").read_text()) == {"step": 499}
    write_checkpoint(tmp_path / "slim", trees, 500)
    weights = dict(MeshCheckpoint(tmp_path / "slim", CONFIG).tensors())
    assert {name: tensor.tolist() for name, tensor in checkpoint.tensors()} == {
        name: tensor.tolist() for name, tensor in weights.items()
    }
    for moment, stored in (("exp_avg", first), ("exp_avg_sq", second)):
        with HFWeights(tmp_path / "hf/adam" / moment) as folder:
            places = folder.match({name: tensor.shape for name, tensor in weights.items()})
            found = {name: folder.tensor(place) for name, place in places.items()}
        assert {tensor.dtype for tensor in found.values()} == {torch.float32}
        of = [{name.removeprefix("causal_transformer_shard/~/"): x for name, x in tree.items()} for tree in stored]
        expected = {
            "transformer.wte.weight": np.concatenate([tree["embedding_shard/~/linear"]["w"] for tree in of]),
            "transformer.h.10.mlp.fc_out.weight": np.concatenate([tree["layer_10/~/linear_5"]["w"] for tree in of]).T,
            "transformer.h.2.mlp.fc_out.bias": of[0]["layer_2/~/linear_5"]["b"],
            "transformer.h.5.ln_1.weight": of[0]["layer_5/~/replicated_layer_norm"]["scale"],
        }
        for name, value in expected.items():
            assert torch.equal(found[name], torch.from_numpy(np.ascontiguousarray(value))), name


def test_the_6b_arithmetic() -> None:
    """6,053,381,344 numbers in eight shards; without the copies and the embedding's bias 6,050,882,784."""
    with torch.device("meta"):
        shapes = {name: parameter.shape for name, parameter in GPTJForCausalLM(GPTJConfig()).named_parameters()}
    leaves = _leaves(28)
    assert {leaf.name for leaf in leaves} - shapes.keys() == {"transformer.wte.bias"}
    sizes = {"transformer.wte.bias": 4096} | {name: shape.numel() for name, shape in shapes.items()}
    assert sum(shape.numel() for shape in shapes.values()) == 6_050_882_784
    assert sum(sizes[leaf.name] * (8 if leaf.cut is None else 1) for leaf in leaves) == 6_053_381_344


def refusal(folder: Path, config: GPTJConfig = CONFIG) -> str:
    with pytest.raises(ValueError, match=str(folder)) as caught:
        list(MeshCheckpoint(folder, config).tensors())
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_what_is_no_checkpoint(tmp_path: Path) -> None:
    assert "no shard_0 here; give the step_... folder" in refusal(tmp_path)
    (tmp_path / "shard_0").mkdir()
    assert "no 0.npz here" in refusal(tmp_path)


def test_another_model(tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "step_1", parameters(2), 1)
    fewer = GPTJConfig(vocab_size=VOCAB, n_embd=WIDTH, n_layer=10, n_head=4, rotary_dim=2)
    assert "117 arrays a shard; a model of 10 layers has 107 in a slim checkpoint, 321 in a full" in refusal(
        source, fewer
    )
    wider = GPTJConfig(vocab_size=VOCAB, n_embd=32, n_layer=LAYERS, n_head=4, rotary_dim=2)
    assert "transformer.wte.bias has shape (16,), the model's shape asks for (32,)" in refusal(source, wider)


@pytest.mark.parametrize("damage", ["missing shard", "missing piece", "cut", "flipped", "no zip", "code"])
def test_damaged_pieces(tmp_path: Path, damage: str) -> None:
    source = write_checkpoint(tmp_path / "step_1", parameters(4), 1)
    piece = source / "shard_3" / "8.npz"
    content = bytearray(piece.read_bytes())
    expected = "8.npz: cannot be read as a piece"
    if damage == "missing shard":
        (source / "shard_2").rename(source / "elsewhere")
        expected = "the model's shape asks for"
    elif damage == "missing piece":
        piece.unlink()
        expected = "arrays a shard"
    elif damage == "cut":
        piece.write_bytes(content[:-1000])
    elif damage == "flipped":
        content[200] ^= 4
        piece.write_bytes(content)
    elif damage == "no zip":
        piece.write_bytes(b"x")
    else:
        with np.load(piece) as arrays:
            stored = {name: arrays[name] for name in arrays}
        stored["arr_0"] = np.array(Bomb(tmp_path / "canary"), dtype=object).reshape(1)
        np.savez(piece, allow_pickle=True, **stored)
        expected = "shard_3"
    assert expected in refusal(source)
    assert not (tmp_path / "canary").exists()


class Bomb:
    """Unpickled, it would make a file."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> tuple[object, ...]:
        return Path.touch, (self.canary,)


def test_the_recipe(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "step_3", parameters(2), 3)
    shape = [f"model.vocab_size={VOCAB}", f"model.n_embd={WIDTH}", f"model.n_layer={LAYERS}", "model.n_head=4"]
    command = [
        sys.executable,
        "recipes/import_mesh.py",
        f"source={tmp_path / 'step_3'}",
        f"output_dir={tmp_path / 'hf'}",
    ]
    command += [*shape, "model.rotary_dim=2", "model.n_positions=16", "dtype=bf16"]
    root = Path(__file__).parents[2]
    done = subprocess.run(command, capture_output=True, text=True, cwd=root, check=False)
    assert done.returncode == 0, done.stderr
    count = sum(parameter.numel() for parameter in GPTJForCausalLM(CONFIG).parameters())
    assert f"{count:,} parameters of step 3 in {tmp_path / 'hf'}" in done.stdout
    assert GPTJForCausalLM.from_pretrained(tmp_path / "hf").lm_head.weight.dtype == torch.bfloat16
    with pytest.raises(UserError, match="exists and is not empty; give another output_dir"):
        MeshCheckpoint(tmp_path / "step_3", CONFIG).save_pretrained(tmp_path / "hf")
