"""Tensors in and out of Transformers folders: safetensors or legacy .bin, one file or sharded."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

MAX_SHARD_BYTES = 5_000_000_000

_PLAIN_NAME = re.compile(r"[A-Za-z0-9][\w.-]*")
_WEIGHT_FILE = re.compile(r"(model|pytorch_model)(-\d+-of-\d+)?\.(safetensors|bin)(\.index\.json)?")
# Buffers that old Transformers versions saved; they hold no weights.
_LEGACY_BUFFER = re.compile(r"(transformer\.)?h\.\d+\.attn\.(bias|masked_bias|embed_positions)")
_PREFIX = "transformer."
_FLOATS = {"F64", "F32", "F16", "BF16", torch.float64, torch.float32, torch.float16, torch.bfloat16}


class HFWeights:
    """The tensors of a Transformers folder, read one at a time from memory-mapped files.

    Raises:
        ValueError: no weights in the folder, or an index or file that cannot be trusted or read.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self._open: dict[str, Any] = {}
        self._file_of = self._locate()

    def _locate(self) -> dict[str, str]:
        for single, index in (
            ("model.safetensors", "model.safetensors.index.json"),
            ("pytorch_model.bin", "pytorch_model.bin.index.json"),
        ):
            if (self.folder / single).is_file():
                return dict.fromkeys(self._handle(single).keys(), single)
            if (self.folder / index).is_file():
                return self._read_index(self.folder / index)
        raise ValueError(
            f"{self.folder}: no model.safetensors, pytorch_model.bin or their index here; "
            "give the folder that Transformers' save_pretrained or our export wrote"
        )

    @staticmethod
    def _read_index(path: Path) -> dict[str, str]:
        try:
            weight_map = json.loads(path.read_text())["weight_map"]
            plain = all(_PLAIN_NAME.fullmatch(file) for file in weight_map.values())
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise ValueError(f"{path}: not a readable weight index ({error})") from None
        if not plain:
            raise ValueError(f"{path}: weight_map may name files of its own folder only")
        return weight_map

    def _handle(self, file: str) -> Any:
        if file not in self._open:
            path = self.folder / file
            if not path.is_file():  # a pipe would be waited for without end
                raise ValueError(f"{path}: no such file")
            try:
                if file.endswith(".safetensors"):
                    self._open[file] = safe_open(path, framework="pt").__enter__()
                else:
                    self._open[file] = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
            except (OSError, SafetensorError, RuntimeError, ValueError, EOFError) as error:
                raise ValueError(f"{path}: cannot be read as weights ({error})") from None
            except Exception as error:  # torch raises pickle.UnpicklingError for anything but tensors
                raise ValueError(f"{path}: refused, it holds more than tensors ({type(error).__name__})") from None
            if file.endswith(".bin") and not _is_state_dict(self._open[file]):
                raise ValueError(f"{path}: refused, it is not a plain dictionary of tensors")
        return self._open[file]

    def close(self) -> None:
        """Release the mapped files; tensors already read stay valid."""
        for handle in self._open.values():
            if hasattr(handle, "__exit__"):
                handle.__exit__(None, None, None)
        self._open.clear()

    def __enter__(self) -> HFWeights:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def match(
        self, shapes: Mapping[str, torch.Size], tied: frozenset[str] = frozenset(), new_head: bool = False
    ) -> dict[str, str]:
        """Stored name of each wanted parameter, after checking that exactly these are here.

        A trunk without head reads a folder with head and leaves the head. ``tied`` names may be stored
        though nobody wants them. With ``new_head`` a folder of another task will do: the parameters outside
        the trunk are then left out.

        Raises:
            ValueError: missing or unexpected tensors, or other shapes, all listed.
        """
        stored = {name for name in self._file_of if not _LEGACY_BUFFER.fullmatch(name)} - tied
        trunk_only = not any(name.startswith(_PREFIX) for name in shapes)
        prefix = _PREFIX if trunk_only and any(name.startswith(_PREFIX) for name in stored) else ""
        wanted = {name: prefix + name for name in shapes}
        head = {name for name in shapes if not trunk_only and not name.startswith(_PREFIX)}
        if new_head and head.isdisjoint(stored):
            wanted = {name: name for name in shapes if name not in head}
            stored = {name for name in stored if name.startswith(_PREFIX)}
        missing = sorted(set(wanted.values()) - stored)
        unexpected = sorted(name for name in stored - set(wanted.values()) if name.startswith(prefix))
        if missing or unexpected:
            raise ValueError(
                f"{self.folder}: the weights are not this model's; "
                f"missing: {_some(missing)}; unexpected: {_some(unexpected)}"
            )
        for name, place in wanted.items():
            (found, dtype), shape = self._stored(place), tuple(shapes[name])
            if found != shape:
                raise ValueError(f"{self.folder}: {name} has shape {found}, config.json says {shape}")
            if dtype not in _FLOATS:
                raise ValueError(f"{self.folder}: {name} holds {dtype}, not weights in fp16, bf16, fp32 or fp64")
        return wanted

    def _stored(self, name: str) -> tuple[tuple[int, ...], Any]:
        """Shape and type of a stored tensor."""
        handle = self._handle(self._file_of[name])
        if name not in handle.keys():  # noqa: SIM118 (a safetensors handle is no mapping)
            raise ValueError(f"{self.folder}: the index places {name} in {self._file_of[name]}, which lacks it")
        if isinstance(handle, dict):
            return tuple(handle[name].shape), handle[name].dtype
        part = handle.get_slice(name)
        return tuple(part.get_shape()), part.get_dtype()

    def tensor(self, name: str) -> Tensor:
        """One stored tensor, as stored."""
        handle = self._handle(self._file_of[name])
        return handle[name] if isinstance(handle, dict) else handle.get_tensor(name)


def _is_state_dict(loaded: Any) -> bool:
    return isinstance(loaded, dict) and all(isinstance(value, Tensor) for value in loaded.values())


def _some(names: list[str]) -> str:
    shown = ", ".join(names[:5]) or "none"
    return f"{shown} and {len(names) - 5} more" if len(names) > 5 else shown


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
    numels: Mapping[str, int],
    dtype: torch.dtype,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Write named tensors as sharded safetensors, holding one shard in memory at a time.

    Args:
        folder: an existing folder.
        tensors: (name, tensor) in the order of ``numels``; each is cast to ``dtype`` as it comes.
        numels: element count of every tensor that will come.
    """
    shards = plan_shards({name: numel * dtype.itemsize for name, numel in numels.items()}, max_shard_bytes)
    stream = iter(tensors)
    for file, names in shards.items():
        shard = {}
        for expected, (name, tensor) in zip(names, stream, strict=False):
            assert name == expected, f"{name} came where {expected} was announced"
            shard[name] = tensor.detach().to("cpu", dtype, copy=True).contiguous()
        save_file(shard, folder / file, metadata={"format": "pt"})
    if len(shards) > 1:
        count = sum(numels.values())
        index = {
            "metadata": {"total_size": count * dtype.itemsize, "total_parameters": count},
            "weight_map": {name: file for file, names in shards.items() for name in names},
        }
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")


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
