"""LoRA adapters in the layout of PEFT: adapter_config.json and adapter_model.safetensors."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from gptj_train.weights.hf_writer import write_file

_TASK_TYPES = {"GPTJForCausalLM": "CAUSAL_LM", "GPTJForSequenceClassification": "SEQ_CLS"}
_PREFIX = "base_model.model."


def save_adapter(
    folder: Path,
    tensors: Iterable[tuple[str, Tensor]],
    shapes: Mapping[str, torch.Size],
    *,
    rank: int,
    alpha: float,
    dropout: float,
    targets: Sequence[str],
    heads: Sequence[str],
    base: str | None,
    architecture: str,
) -> None:
    """Write what ``peft.PeftModel.from_pretrained(base_model, folder)`` reads, in fp32.

    Args:
        folder: an existing folder.
        tensors: (name, tensor) of everything that was trained, in the order of ``shapes``.
        heads: modules that were trained whole.
        base: where the frozen weights are.
    """
    named = ((_PREFIX + name, tensor) for name, tensor in tensors)
    placed = {_PREFIX + name: shape for name, shape in shapes.items()}
    write_file(folder / "adapter_model.safetensors", named, placed, torch.float32)
    config = {
        "peft_type": "LORA",
        "task_type": _TASK_TYPES.get(architecture, "QUESTION_ANS"),
        "base_model_name_or_path": base,
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": dropout,
        "target_modules": list(targets),
        "modules_to_save": list(heads) or None,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
    }
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n")
