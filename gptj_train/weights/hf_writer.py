"""Write tensors into Transformers folders, as safetensors in one file or several."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor

from gptj_train.atomic_write import install_files
from gptj_train.errors import UserError
from gptj_train.weights.safetensors_file import SafetensorsWriter

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
"""The names of dtypes in configs."""

MAX_SHARD_BYTES = 5_000_000_000

_SIZE = re.compile(r"(\d+(?:\.\d+)?) ?([MG])B", re.IGNORECASE)
_WEIGHT_FILE = re.compile(r"(model|pytorch_model)(-\d+-of-\d+)?\.(safetensors|bin)(\.index\.json)?")


def parse_size(text: str) -> int:
    """Return the bytes of a size such as "5GB" or "500MB", in powers of 1000 as Transformers counts them.

    Raises:
        UserError: no such size, or less than a megabyte.
    """
    found = _SIZE.fullmatch(text.strip())
    size = 0
    if found is not None:
        size = int(float(found[1]) * {"M": 10**6, "G": 10**9}[found[2].upper()])
    if size < 10**6:
        raise UserError(f"export_shard_size must be a size from 1MB on, such as 5GB or 500MB, got {text!r}")
    return size


def plan_shards(sizes: Mapping[str, int], max_bytes: int = MAX_SHARD_BYTES) -> dict[str, list[str]]:
    """Return file name -> tensor names: tensors in the given order, each file filled up to ``max_bytes``."""
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
    # Transformers' own names, which other tools look for.
    count = len(groups)
    return {f"model-{number:05}-of-{count:05}.safetensors": group for number, group in enumerate(groups, start=1)}


def write_weights(
    folder: Path,
    tensors: Iterable[tuple[str, Tensor]],
    shapes: Mapping[str, torch.Size],
    *,
    dtype: torch.dtype | Mapping[str, torch.dtype],
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> dict[str, str]:
    """Write named tensors as sharded safetensors, one tensor in memory at a time.

    Args:
        folder: an existing folder.
        tensors: (name, tensor) in the order of ``shapes``; each is cast to its dtype as it comes.
        shapes: of every tensor that will come.
        dtype: of all written tensors; or name -> dtype.

    Returns:
        File name -> sha256 of the bytes that were sent to the disk.
    """
    dtypes = dict.fromkeys(shapes, dtype) if isinstance(dtype, torch.dtype) else dtype
    sizes = {name: shape.numel() * dtypes[name].itemsize for name, shape in shapes.items()}
    shards = plan_shards(sizes, max_shard_bytes)
    # One stream through all files: each tensor may exist only while it is at its head.
    stream = iter(tensors)
    hashes = {}
    for file, names in shards.items():
        in_file = {name: shapes[name] for name in names}
        hashes[file] = write_file(folder / file, stream, in_file, dtype=dtypes)
    if len(shards) > 1:
        elements = sum(shape.numel() for shape in shapes.values())
        _write_index(folder, shards, total_size=sum(sizes.values()), elements=elements)
    return hashes


def _write_index(folder: Path, shards: Mapping[str, list[str]], *, total_size: int, elements: int) -> None:
    metadata = {"total_size": total_size, "total_parameters": elements}
    weight_map: dict[str, str] = {}
    for file, names in shards.items():
        weight_map |= dict.fromkeys(names, file)
    text = json.dumps({"metadata": metadata, "weight_map": weight_map}, indent=2)
    (folder / "model.safetensors.index.json").write_text(text + "\n")


def write_file(
    path: Path,
    tensors: Iterator[tuple[str, Tensor]],
    shapes: Mapping[str, torch.Size],
    *,
    dtype: torch.dtype | Mapping[str, torch.dtype],
) -> str:
    """Write the next tensors of a stream, as many as there are shapes, into one file; return its sha256."""
    # Transformers refuses a file without this format in its metadata.
    with SafetensorsWriter(path, shapes, dtype=dtype, metadata={"format": "pt"}) as file:
        for name, tensor in islice(tensors, len(shapes)):
            file.add(name, tensor)
        return file.finish().sha256


def install_model(finished: Path, target: Path) -> None:
    """Move a finished model's files into ``target``: earlier weights are removed, other files stay."""
    written = {file.name for file in finished.iterdir()}
    install_files(finished, target)
    # Last: until here the folder is never without weights.
    for old in target.iterdir():
        if _WEIGHT_FILE.fullmatch(old.name) and old.name not in written:
            old.unlink()
