"""Check a written model folder by reading it again from disk, one tensor or one block at a time."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gptj_train.errors import UserError
from gptj_train.model.attention import attention_pattern
from gptj_train.model.gptj import GPTJBlock
from gptj_train.model.gptj_config import GPTJConfig
from gptj_train.model.rotary import rotary_angles
from gptj_train.weights.hf_reader import HFWeights
from gptj_train.weights.safetensors_file import count_tensor_bytes
from gptj_train.weights.stored import StoredWeights

# Largest difference of logits, relative to their size: in fp32, and where half precision takes part. Half precision
# rounds every activation, so that only gross faults can be seen: mixed-up names, a transposed or forgotten tensor.
_FP32_LIMIT, _HALF_LIMIT = 1e-3, 0.1

_HEAD_ROWS = 4096  # of a head that are in memory at once


class ExportError(UserError):
    """A model folder could not be written, or does not hold what was to be written; an earlier export is unchanged."""


def verify_folder(
    folder: Path, shapes: Mapping[str, torch.Size], *, dtype: torch.dtype, written: Mapping[str, str]
) -> dict[str, Any]:
    """Check names, shapes, dtype and values of a folder's weights, and hash all its files.

    Args:
        written: file name -> sha256 of the bytes that were sent to the disk.

    Returns:
        Parameter count, sizes and hashes, for export_report.json.

    Raises:
        ExportError: a tensor that is missing, unexpected, of another shape or dtype, or has NaN or infinity; a file
            whose bytes are not those that were sent.
    """
    try:
        _check_tensors(folder, shapes, dtype)
        size = sum(count_tensor_bytes(file) for file in folder.glob("*.safetensors"))
    except ExportError:
        raise
    except ValueError as error:
        raise ExportError(str(error)) from None
    count = sum(shape.numel() for shape in shapes.values())
    # A tensor in a file that no index names is seen by its bytes alone.
    if size != count * dtype.itemsize:
        raise ExportError(f"{folder}: {size:,} bytes of weights, {count:,} parameters in {dtype} have another size")
    files = {}
    for file in sorted(folder.iterdir()):
        files[file.name] = {"bytes": file.stat().st_size, "sha256": _sha256_of(file)}
    for name, expected_hash in written.items():
        if files[name]["sha256"] != expected_hash:
            raise ExportError(f"{folder / name}: the disk does not hold the bytes that were written; check the disk")
    return {
        "parameters": count,
        "dtype": str(dtype).removeprefix("torch."),
        "total_size": size,
        "tensors": len(shapes),
        "files": files,
    }


def _check_tensors(folder: Path, shapes: Mapping[str, torch.Size], dtype: torch.dtype) -> None:
    with HFWeights(folder) as weights:
        weights.match(shapes)
        for name, shape in shapes.items():
            # Under ZeRO-3 a parameter that was not gathered is an empty tensor.
            assert shape.numel(), f"{name} is empty"
            _check_tensor(weights.tensor(name), name, dtype)


def _check_tensor(tensor: Tensor, name: str, dtype: torch.dtype) -> None:
    if tensor.dtype != dtype:
        raise ExportError(f"{name} is stored as {tensor.dtype}, not {dtype}")
    if not tensor.isfinite().all():
        hint = "; a weight is beyond fp16's range: use export_dtype=bf16" if dtype == torch.float16 else ""
        raise ExportError(f"{name} contains NaN or infinity{hint}")


def _sha256_of(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def check_logits(folder: Path, input_ids: Tensor, expected: Tensor) -> dict[str, Any]:
    """Compare the logits of the folder's model for a prompt with those that it should have.

    Args:
        input_ids: (1, T).
        expected: (R, rows of the head), of the last R tokens.

    Returns:
        The prompt, the relative difference and its limit, for export_report.json.

    Raises:
        ExportError: the logits differ by more than rounding explains.
    """
    config = GPTJConfig.from_pretrained(folder)
    with HFWeights(folder) as weights:
        found, chance_size = streamed_logits(weights, config, input_ids)
    found = found[-len(expected) :]
    size = torch.maximum(_rms(found), chance_size)
    difference = _rms(found - expected.float()) / size
    in_fp32 = expected.dtype == torch.float32 and config.dtype == "float32"
    limit = _FP32_LIMIT if in_fp32 else _HALF_LIMIT
    # "not <=", since a NaN is greater than nothing.
    if not difference <= limit:
        raise ExportError(f"{folder}: its logits differ by {difference:.3g} of their size from the trained model's")
    return {"prompt_ids": input_ids[0].tolist(), "relative_difference": round(difference.item(), 8), "limit": limit}


def relative_difference(logits: Tensor, expected: Tensor) -> float:
    """Return the size of the difference of two tensors of logits, relative to the expected ones' size."""
    return float(_rms(logits.float() - expected) / _rms(expected))


def _rms(x: Tensor) -> Tensor:
    return x.pow(2).mean().sqrt()


@torch.no_grad()
def streamed_logits(weights: StoredWeights, config: GPTJConfig, input_ids: Tensor) -> tuple[Tensor, Tensor]:
    """Compute a model's logits for every token in fp32, with one block of it in memory at a time.

    Args:
        input_ids: (1, T).

    Returns:
        (T, rows of the head): logits of the vocabulary, of the labels, or of start and end. And, scalar, the size
        that logits of such weights have by chance: a head of few rows may happen to give far smaller ones.
    """
    width = config.n_embd
    length = input_ids.shape[1]
    hidden = torch.empty(1, length, width)
    # Only the prompt's rows are read: the embedding of 6B would take 0.8 GB.
    for position, row in enumerate(input_ids[0].tolist()):
        weights.read("transformer.wte.weight", row * width, hidden[0, position])
    angles = rotary_angles(torch.arange(length)[None], config.n_positions, config.rotary_size)
    pattern = attention_pattern(hidden)
    for layer in range(config.n_layer):
        # On the meta device: fresh weights would be made only to be replaced.
        with torch.device("meta"):
            block = GPTJBlock(config, layer).eval()
        block = _filled(block, weights, prefix=f"transformer.h.{layer}.")
        hidden, _ = block(hidden, angles, pattern)
    norm = nn.LayerNorm(width, config.layer_norm_epsilon, device="meta")
    norm = _filled(norm, weights, prefix="transformer.ln_f.")
    hidden = norm(hidden)
    return _head_logits(hidden[0], weights)


def _filled(module: nn.Module, weights: StoredWeights, prefix: str) -> Any:
    """Return a module from the meta device with its stored weights, in fp32."""
    state = {name: weights.tensor(prefix + name).float() for name, _ in module.named_parameters()}
    module.load_state_dict(state, assign=True)
    return module


def _head_logits(hidden: Tensor, weights: StoredWeights) -> tuple[Tensor, Tensor]:
    in_head = [name for name in weights.names() if not name.startswith("transformer.")]
    # A tied head is the embedding, which is stored once.
    matrices = [name for name in in_head if name.endswith("weight")] or ["transformer.wte.weight"]
    (rows, width), _ = weights.shape_and_dtype(matrices[0])
    logits = torch.empty(len(hidden), rows)
    squares = 0.0
    for start in range(0, rows, _HEAD_ROWS):
        end = min(start + _HEAD_ROWS, rows)
        part = torch.empty(end - start, width)
        weights.read(matrices[0], start * width, part.view(-1))
        squares += part.pow(2).sum().item()
        logits[:, start:end] = F.linear(hidden, part)
    for name in in_head:
        if name.endswith("bias"):
            logits += weights.tensor(name).float()
    # A row's product with a hidden state, were their signs random: the size of the one times that of the other.
    chance_size = _rms(hidden) * (squares / rows) ** 0.5
    return logits, chance_size
