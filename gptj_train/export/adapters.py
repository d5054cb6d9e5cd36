"""Write LoRA adapters in PEFT's layout, and merge those of a checkpoint into base weights."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from gptj_train.model.adapter_folder import PEFT_PREFIX
from gptj_train.weights.hf_writer import write_file
from gptj_train.weights.stored import StoredWeights, is_adapter

_TASK_TYPES = {"GPTJForCausalLM": "CAUSAL_LM", "GPTJForSequenceClassification": "SEQ_CLS"}


def save_adapter(
    folder: Path,
    tensors: Iterable[tuple[str, Tensor]],
    shapes: Mapping[str, torch.Size],
    *,
    rank: int,
    alpha: float,
    dropout: float,
    targets: Sequence[str],
    rslora: bool,
    heads: Sequence[str],
    base: str | None,
    architecture: str,
) -> None:
    """Write the two files that ``peft.PeftModel.from_pretrained(base_model, folder)`` reads, in fp32.

    Args:
        folder: an existing folder.
        tensors: (name, tensor) of everything that was trained, in the order of ``shapes``.
        heads: modules that were trained in full.
        base: the folder of the frozen weights.
    """
    prefixed_tensors = ((PEFT_PREFIX + name, tensor) for name, tensor in tensors)
    prefixed_shapes = {PEFT_PREFIX + name: shape for name, shape in shapes.items()}
    write_file(folder / "adapter_model.safetensors", prefixed_tensors, prefixed_shapes, dtype=torch.float32)
    config = {
        "peft_type": "LORA",
        "task_type": _TASK_TYPES.get(architecture, "QUESTION_ANS"),
        "base_model_name_or_path": base,
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": dropout,
        "use_rslora": rslora,
        "target_modules": list(targets),
        # PEFT tells "no modules" by null.
        "modules_to_save": list(heads) or None,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
    }
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n")


class MergedWeights(StoredWeights):
    """Frozen base weights with what was trained on top: adapters added, heads replaced.

    Args:
        base: the weights that training started from.
        trained: adapters and heads, of a checkpoint.
        scale: of an adapter's product, ``LoraConfig.scale``.
        precision: dtype of the base weights during training; fp32 beside a quantized base, which no dtype equals.
    """

    def __init__(self, base: StoredWeights, trained: StoredWeights, *, scale: float, precision: torch.dtype) -> None:
        self.folder = trained.folder
        self._base, self._trained, self._scale, self._precision = base, trained, scale, precision
        self._adapters = {name for name in trained.names() if is_adapter(name)}
        self._heads = set(trained.names()) - self._adapters

    def names(self) -> list[str]:
        frozen = self._base.names()
        # A new head replaces the whole head of the base, whatever its tensors are called.
        if self._heads:
            frozen = [name for name in frozen if name.startswith("transformer.")]
        return [*frozen, *sorted(self._heads)]

    def shape_and_dtype(self, name: str) -> tuple[tuple[int, ...], str]:
        source = self._trained if name in self._heads else self._base
        return source.shape_and_dtype(name)

    def tensor(self, name: str) -> Tensor:
        if name in self._heads:
            return self._trained.tensor(name)
        tensor = self._rounded(self._base.tensor(name))
        module = name.removesuffix(".weight")
        down, up = f"{module}.lora_A.weight", f"{module}.lora_B.weight"
        if down in self._adapters:
            tensor = tensor.float().addmm(self._trained.tensor(up), self._trained.tensor(down), alpha=self._scale)
        return tensor

    def read(self, name: str, start: int, into: Tensor) -> None:
        if name in self._heads:
            self._trained.read(name, start, into)
        elif f"{name.removesuffix('.weight')}.lora_A.weight" in self._adapters:
            into.copy_(self.tensor(name).view(-1)[start : start + into.numel()])
        else:
            # Without the rest of the tensor: of embedding and head, single rows are read.
            self._base.read(name, start, into)
            into.copy_(self._rounded(into))

    def _rounded(self, tensor: Tensor) -> Tensor:
        """Round as in training: the adapters were fitted to the rounded base, not to the stored one."""
        return tensor if self._precision == torch.float32 else tensor.to(self._precision)

    def close(self) -> None:
        self._base.close()
        self._trained.close()


class HeldTensors(StoredWeights):
    """Tensors in memory, in the place of a folder's."""

    def __init__(self, folder: Path, tensors: Mapping[str, Tensor]) -> None:
        self.folder, self._tensors = folder, tensors

    def names(self) -> list[str]:
        return list(self._tensors)

    def shape_and_dtype(self, name: str) -> tuple[tuple[int, ...], str]:
        return tuple(self._tensors[name].shape), "F32"

    def tensor(self, name: str) -> Tensor:
        return self._tensors[name]

    def read(self, name: str, start: int, into: Tensor) -> None:
        into.copy_(self._tensors[name].view(-1)[start : start + into.numel()])

    def close(self) -> None:
        """Nothing is open."""
