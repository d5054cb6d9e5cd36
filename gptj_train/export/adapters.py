"""LoRA adapters in and out: the layout of PEFT, and weights with the adapters' products added."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from gptj_train.weights.hf_writer import write_file
from gptj_train.weights.stored import StoredWeights, is_adapter

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


class MergedWeights(StoredWeights):
    """The weights that were frozen, with those that were trained beside them: adapters added, heads in place.

    Args:
        base: as they were read from.
        trained: of a checkpoint.
        scale: of an adapter's product.
        precision: that the base was rounded to while it was trained with.
    """

    def __init__(self, base: StoredWeights, trained: StoredWeights, scale: float, precision: torch.dtype) -> None:
        self.folder = trained.folder
        self._base, self._trained, self._scale, self._precision = base, trained, scale, precision
        self._adapters = set(filter(is_adapter, trained.names()))
        self._heads = set(trained.names()) - self._adapters

    def names(self) -> list[str]:
        frozen = [name for name in self._base.names() if name.startswith("transformer.") or not self._heads]
        return [*frozen, *sorted(self._heads)]

    def form(self, name: str) -> tuple[tuple[int, ...], str]:
        return (self._trained if name in self._heads else self._base).form(name)

    def tensor(self, name: str) -> Tensor:
        if name in self._heads:
            return self._trained.tensor(name)
        tensor = self._base.tensor(name).to(self._precision).float()
        module = name.removesuffix(".weight")
        down, up = (f"{module}.lora_{side}.weight" for side in "AB")
        if down in self._adapters:
            tensor = tensor.addmm(self._trained.tensor(up), self._trained.tensor(down), alpha=self._scale)
        return tensor

    def read(self, name: str, start: int, into: Tensor) -> None:
        into.copy_(self.tensor(name).view(-1)[start : start + into.numel()])

    def close(self) -> None:
        self._base.close()
        self._trained.close()
