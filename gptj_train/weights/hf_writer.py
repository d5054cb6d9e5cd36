"""Tensors into Transformers folders: safetensors in one file or several, and folders that appear whole."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
"""What a config may ask weights to be."""

MAX_SHARD_BYTES = 5_000_000_000

_SAFETENSORS_NAMES = {torch.bfloat16: "BF16", torch.float16: "F16", torch.float32: "F32"}
_WEIGHT_FILE = re.compile(r"(model|pytorch_model)(-\d+-of-\d+)?\.(safetensors|bin)(\.index\.json)?")


def plan_shards(sizes: Mapping[str, int], max_bytes: int = MAX_SHARD_BYTES) -> dict[str, list[str]]:
    """File name -> tensor names, filling each safetensors file up to ``max_bytes``, in the given order."""
    groups: list[list[str]] = [[]]
    used = 0
    for name, size in sizes.items():
        if groups[-1] and used + size > max_bytes:
            groups.append([])
            used = 0
        groups[-1].append(name)
        used += size
    if len(groups) == 1:
        return {"model.safetensors": groups[0]}
    return {f"model-{i:05}-of-{len(groups):05}.safetensors": group for i, group in enumerate(groups, start=1)}


def write_weights(
    folder: Path,
    tensors: Iterable[tuple[str, Tensor]],
    shapes: Mapping[str, torch.Size],
    dtype: torch.dtype,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> dict[str, str]:
    """Write named tensors as sharded safetensors, one tensor in memory at a time.

    Args:
        folder: an existing folder.
        tensors: (name, tensor) in the order of ``shapes``; each is cast to ``dtype`` as it comes.
        shapes: of every tensor that will come.

    Returns:
        The sha256 of each safetensors file, of the bytes that went out.
    """
    sizes = {name: shape.numel() * dtype.itemsize for name, shape in shapes.items()}
    shards = plan_shards(sizes, max_shard_bytes)
    stream = iter(tensors)
    written = {
        file: write_file(folder / file, stream, {name: shapes[name] for name in names}, dtype)
        for file, names in shards.items()
    }
    if len(shards) > 1:
        total = {"total_size": sum(sizes.values()), "total_parameters": sum(sizes.values()) // dtype.itemsize}
        weight_map = {name: file for file, names in shards.items() for name in names}
        text = json.dumps({"metadata": total, "weight_map": weight_map}, indent=2)
        (folder / "model.safetensors.index.json").write_text(text + "\n")
    return written


def write_file(
    path: Path, tensors: Iterable[tuple[str, Tensor]], shapes: Mapping[str, torch.Size], dtype: torch.dtype
) -> str:
    """Write the next tensors, as many as there are shapes, into one safetensors file; returns its sha256.

    The format (https://github.com/huggingface/safetensors#format) puts the places of all tensors first. The
    library's own save_file wants all of them in memory.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in shapes.items():
        begin, end = end, end + shape.numel() * dtype.itemsize
        header[name] = {"dtype": _SAFETENSORS_NAMES[dtype], "shape": list(shape), "data_offsets": [begin, end]}
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    with path.open("wb") as file:
        digest = hashlib.sha256(start := len(encoded).to_bytes(8, "little") + encoded)
        file.write(start)
        for expected, (name, tensor) in zip(shapes, tensors, strict=False):
            assert (name, tensor.shape) == (expected, shapes[expected]), f"{name} came where {expected} was announced"
            stored = tensor.detach().to("cpu", dtype).contiguous()
            data = stored.flatten().view(torch.uint8).numpy().data
            digest.update(data)
            file.write(data)
        assert file.tell() == 8 + len(encoded) + end, f"{path.name}: tensors are missing"
        file.flush()
        os.fsync(file.fileno())
    return digest.hexdigest()


def install_files(finished: Path, target: Path) -> None:
    """Move a finished folder's files into ``target``; weights of an earlier save go, other files stay."""
    target.mkdir(exist_ok=True)
    written = {file.name for file in finished.iterdir()}
    for old in target.iterdir():
        if _WEIGHT_FILE.fullmatch(old.name) and old.name not in written:
            old.unlink()
    for name in written:
        os.replace(finished / name, target / name)


def replace_folder(finished: Path, target: Path) -> None:
    """Put a finished folder in the place of ``target``; what stood there goes only afterwards."""
    old = target.with_name(f".{target.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if target.exists():
        target.rename(old)
    os.replace(finished, target)
    shutil.rmtree(old, ignore_errors=True)
