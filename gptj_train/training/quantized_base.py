"""Build a model for training whose frozen block matrices are quantized: adapters in fp32 beside weights of few bits."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from gptj_train.errors import UserError
from gptj_train.model.layers import Linear
from gptj_train.model.lora import LoraConfig
from gptj_train.model.quantized import Quantization, bitsandbytes, quantize_blocks
from gptj_train.training.zero_config import EngineConfig
from gptj_train.weights.fingerprint import folder_fingerprint

if TYPE_CHECKING:
    from gptj_train.training.initial_weights import InitialWeights


def check_quantize(quantize: Quantization, lora: LoraConfig, engine: EngineConfig) -> None:
    """Refuse settings that mean nothing beside a quantized base.

    Raises:
        UserError: no adapters, or ZeRO-3.
    """
    if quantize == "none":
        return
    if not lora.rank:
        raise UserError(f"quantize={quantize} needs lora=adapters: weights of so few bits cannot be trained themselves")
    if engine.stage == 3:
        raise UserError(
            f"quantize={quantize} keeps the base whole on every rank, and engine.stage=3 partitions it; "
            "set engine=zero2"
        )


def check_base(quantize: Quantization, init_from: str | None) -> None:
    """Check that there is a base to quantize, and the package that does it.

    Raises:
        UserError: ``init_from`` is null, or bitsandbytes is not installed.
    """
    if quantize == "none":
        return
    if init_from is None:
        raise UserError(f"quantize={quantize} needs init_from: random weights are not worth freezing")
    bitsandbytes()


def base_settings(quantize: Quantization, lora: LoraConfig, init_from: str | None) -> dict[str, Any]:
    """Return what else decides the numbers of a run with adapters, for its checkpoints.

    These hold the adapters alone: resumed on another base, or with another factor, they are another model.
    """
    if not lora.rank:
        return {}
    values: dict[str, Any] = {f"lora.{name}": getattr(lora, name) for name in ("alpha", "dropout", "rslora")}
    values["quantize"] = quantize
    if init_from is not None:
        values["the files of init_from"] = folder_fingerprint(init_from)[:8]
    return values


def quantized_base_fact(quantize: Quantization) -> str:
    """Return what report and model card say of the base, since the exported model has another."""
    return (
        f"{quantize} in training: every loss here was measured on it; "
        "the export has the adapters merged into the unquantized weights"
    )


def build_quantized(
    build: Callable[[], nn.Module],
    initial: InitialWeights,
    *,
    quantize: Quantization,
    precision: torch.dtype,
    device: torch.device,
    seed: int,
) -> nn.Module:
    """Build a model without ever holding it unquantized: each matrix is read, quantized, and dropped.

    Args:
        build: makes the module; only its matrices in blocks and what is trained get values here.
        precision: of everything that is not quantized. Matrices are rounded to it first, as Transformers does.
        seed: decides the fresh adapters and heads, whatever the number of ranks.
    """
    with torch.device("meta"):
        model: Any = build()

    def read(name: str) -> Tensor:
        return initial.weights.read_whole(initial.names[name], precision)

    quantize_blocks(model, quantize, read, device)
    torch.manual_seed(seed)
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            memory = torch.empty(parameter.shape, dtype=precision)
            setattr(module, name, nn.Parameter(memory, requires_grad=parameter.requires_grad))
        # Adapters and a new head; the values of frozen parameters come from the file.
        if isinstance(module, Linear) and module.weight.requires_grad:
            module.draw()
    # The loop gave the two names of a tied weight one parameter each.
    model.tie_weights()
    return model  # type: ignore[no-any-return]
