"""Is a written folder what it should be? Read again from the disk, one tensor or one block at a time."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gptj_train.model.attention import attention_pattern
from gptj_train.model.gptj import GPTJBlock
from gptj_train.model.gptj_config import GPTJConfig
from gptj_train.model.rotary import rotary_angles
from gptj_train.weights.hf_reader import HFWeights
from gptj_train.weights.stored import StoredWeights

_EXACT, _ROUNDED = 1e-3, 0.1  # of the logits' size, in fp32 and where half precision takes part
_ROWS = 4096  # of a head that are held at once


class ExportError(RuntimeError):
    """A folder that was just written does not hold what was to be written."""


def verify_folder(
    folder: Path, shapes: Mapping[str, torch.Size], dtype: torch.dtype, written: Mapping[str, str]
) -> dict[str, Any]:
    """Names, shapes, dtype and values of a folder's weights, and the hashes of all its files.

    Args:
        written: the sha256 of the bytes that went into each weight file.

    Returns:
        What export_report.json says of the folder.

    Raises:
        ExportError: anything missing or different, of another dtype, or not finite.
    """
    try:
        with HFWeights(folder) as weights:
            weights.match(shapes)
            for name, shape in shapes.items():
                assert shape.numel(), f"{name} is empty"
                _check_tensor(weights.tensor(name), name, dtype)
        size = sum(_weight_bytes(file) for file in folder.glob("*.safetensors"))
    except ValueError as error:
        raise ExportError(str(error)) from None
    count = sum(shape.numel() for shape in shapes.values())
    if size != count * dtype.itemsize:
        raise ExportError(f"{folder}: {size:,} bytes of weights, {count:,} parameters in {dtype} have another size")
    files = {file.name: {"bytes": file.stat().st_size, "sha256": sha256_of(file)} for file in sorted(folder.iterdir())}
    if changed := [name for name, digest in written.items() if files[name]["sha256"] != digest]:
        raise ExportError(f"{folder / changed[0]}: what is on the disk is not what was written; check the disk")
    return {
        "parameters": count,
        "dtype": str(dtype).removeprefix("torch."),
        "total_size": size,
        "tensors": len(shapes),
        "files": files,
    }


def _weight_bytes(file: Path) -> int:
    """Of a safetensors file without its header."""
    with file.open("rb") as opened:
        return file.stat().st_size - 8 - int.from_bytes(opened.read(8), "little")


def _check_tensor(tensor: Tensor, name: str, dtype: torch.dtype) -> None:
    if tensor.dtype != dtype:
        raise ExportError(f"{name} is stored as {tensor.dtype}, not {dtype}")
    if not tensor.isfinite().all():
        beyond = "; a weight is beyond fp16's range: use export_dtype=bf16" if dtype == torch.float16 else ""
        raise ExportError(f"{name} holds values that are not finite{beyond}")


def sha256_of(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def check_logits(folder: Path, input_ids: Tensor, expected: Tensor) -> dict[str, Any]:
    """Compare what the folder's model says of a prompt with what it should say.

    Half precision rounds every activation, so that only what is grossly wrong can be told from it: names that
    were mixed up, a transposed or forgotten tensor.

    Args:
        expected: (R, rows of the head), for the last R tokens.

    Raises:
        ExportError: another answer.
    """
    config = GPTJConfig.from_pretrained(folder)
    with HFWeights(folder) as weights:
        found, scale = streamed_logits(weights, config, input_ids)
    found = found[-len(expected) :]
    apart = (found - expected.float()).pow(2).mean().sqrt() / torch.maximum(found.pow(2).mean().sqrt(), scale)
    limit = _EXACT if expected.dtype == torch.float32 and config.dtype == "float32" else _ROUNDED
    if not apart <= limit:
        raise ExportError(f"{folder}: its logits differ by {apart:.3g} of their size from the trained model's")
    return {"prompt_ids": input_ids[0].tolist(), "relative_difference": round(apart.item(), 8), "limit": limit}


@torch.no_grad()
def streamed_logits(weights: StoredWeights, config: GPTJConfig, input_ids: Tensor) -> tuple[Tensor, Tensor]:
    """What the head says of every token, computed in fp32 with one block of the model in memory at a time.

    Args:
        input_ids: (1, T).

    Returns:
        (T, rows of the head): of the vocabulary, the labels, or start and end. And, scalar, the size that logits
        of this model would have by chance: where they are few, they may cancel to far less.
    """
    width = config.n_embd
    hidden = torch.empty(1, input_ids.shape[1], width)
    for position, row in enumerate(input_ids[0].tolist()):
        weights.read("transformer.wte.weight", row * width, hidden[0, position])
    angles = rotary_angles(torch.arange(input_ids.shape[1])[None], config.n_positions, config.rotary_size)
    pattern = attention_pattern(hidden)
    for layer in range(config.n_layer):
        with torch.device("meta"):
            block = GPTJBlock(config, layer).eval()
        hidden, _ = _filled(block, weights, f"transformer.h.{layer}.")(hidden, angles, pattern)
    norm = _filled(nn.LayerNorm(width, config.layer_norm_epsilon, device="meta"), weights, "transformer.ln_f.")
    return _head(norm(hidden)[0], weights)


def _filled(module: nn.Module, weights: StoredWeights, prefix: str) -> Any:
    state = {name: weights.tensor(prefix + name).float() for name, _ in module.named_parameters()}
    module.load_state_dict(state, assign=True)
    return module


def _head(hidden: Tensor, weights: StoredWeights) -> tuple[Tensor, Tensor]:
    names = [name for name in weights.names() if not name.startswith("transformer.")]
    weight = next((name for name in names if name.endswith("weight")), "transformer.wte.weight")  # tied
    rows, width = weights.form(weight)[0]
    logits, squares = torch.empty(len(hidden), rows), 0.0
    for start in range(0, rows, _ROWS):
        part = torch.empty(min(_ROWS, rows - start), width)
        weights.read(weight, start * width, part.view(-1))
        squares += part.pow(2).sum().item()
        logits[:, start : start + len(part)] = F.linear(hidden, part)
    for bias in (name for name in names if name.endswith("bias")):
        logits += weights.tensor(bias).float()
    return logits, hidden.pow(2).mean().sqrt() * (squares / rows) ** 0.5
