"""Write model folders in every format that Transformers has written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

FORMATS = ("safetensors", "sharded safetensors", "bin", "sharded bin")


def write_folder(reference: Any, folder: Path, form: str) -> Path:
    """Save a Transformers model in one of FORMATS."""
    if form.endswith("safetensors"):
        reference.save_pretrained(folder, max_shard_size="16KB" if form.startswith("sharded") else "1GB")
    else:
        reference.config.save_pretrained(folder)
        write_bin(legacy_state(reference), folder, shards=3 if form.startswith("sharded") else 1)
    assert len(list(folder.glob("*.index.json"))) == form.startswith("sharded")
    return folder


def legacy_state(reference: Any) -> dict[str, Tensor]:
    """Return the state dict with the buffers that old versions saved beside the weights."""
    state = dict(reference.state_dict())
    prefix = "transformer." if any(name.startswith("transformer.") for name in state) else ""
    for layer in range(reference.config.n_layer):
        attention = f"{prefix}h.{layer}.attn."
        state[attention + "bias"] = torch.ones(1, 1, 64, 64, dtype=torch.bool).tril()
        state[attention + "masked_bias"] = torch.tensor(-1e9)
    return state


def write_bin(state: dict[str, Tensor], folder: Path, shards: int = 1) -> None:
    """Write ``pytorch_model.bin``, or its shards and their index."""
    if shards == 1:
        torch.save(state, folder / "pytorch_model.bin")
        return
    names = list(state)
    weight_map = {}
    for i in range(shards):
        file = f"pytorch_model-{i + 1:05}-of-{shards:05}.bin"
        torch.save({name: state[name] for name in names[i::shards]}, folder / file)
        weight_map |= dict.fromkeys(names[i::shards], file)
    index = {"metadata": {"total_size": sum(x.nbytes for x in state.values())}, "weight_map": weight_map}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))


def read_json(path: Path) -> Any:
    return json.loads(path.read_text())


def edit_json(path: Path, **changes: Any) -> None:
    """Set keys of a JSON file; a value of None removes the key."""
    values = {key: value for key, value in (read_json(path) | changes).items() if value is not None}
    path.write_text(json.dumps(values))
