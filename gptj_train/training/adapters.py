"""LoRA in a run: its settings, the adapted model, and the weights that come out of it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TypeVar

from torch import Tensor, nn

from gptj_train.model.lora import add_lora, is_adapter, merged
from gptj_train.schema import schema
from gptj_train.training.engine import Engine
from gptj_train.weights.adapters import save_adapter

M = TypeVar("M", bound=nn.Module)


@schema
class LoraConfig:
    """Thin matrices beside frozen weights; with ``rank`` 0 there are none and all weights are trained."""

    rank: int
    alpha: float
    dropout: float
    targets: list[str]

    def __post_init__(self) -> None:
        if self.rank < 0:
            raise ValueError(f"lora.rank must be 0 (all weights are trained) or more, got {self.rank}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"lora.dropout must be in [0, 1), got {self.dropout}")


def adapted(model: M, lora: LoraConfig) -> M:
    """The model, with adapters if the run has them.

    Raises:
        ValueError: targets that no block has.
    """
    return add_lora(model, lora.rank, lora.alpha, lora.dropout, lora.targets) if lora.rank else model


def trained_beside(engine: Engine, lora: LoraConfig) -> dict[str, Tensor]:
    """Adapters and new heads, whole and in fp32 on the host; empty without LoRA. Collective."""
    if not lora.rank:
        return {}
    return {name: tensor.cpu().clone() for name, tensor in engine.full_parameters(set(engine.trained))}


def whole_weights(engine: Engine, lora: LoraConfig, trained: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Every parameter of the model without LoRA, in fp32, with the adapters' products added. Collective."""
    adapters = {name: tensor.to(engine.device) for name, tensor in trained.items() if is_adapter(name)}
    return merged(engine.full_parameters(), adapters, lora.alpha / max(lora.rank, 1))


def write_adapter(
    folder: Path, trained: Mapping[str, Tensor], lora: LoraConfig, base: str | None, architecture: str
) -> None:
    """PEFT's two files, in a folder that exists."""
    save_adapter(
        folder,
        trained.items(),
        {name: tensor.shape for name, tensor in trained.items()},
        rank=lora.rank,
        alpha=lora.alpha,
        dropout=lora.dropout,
        targets=lora.targets,
        heads=sorted({name.partition(".")[0] for name in trained if not is_adapter(name)}),
        base=base,
        architecture=architecture,
    )
