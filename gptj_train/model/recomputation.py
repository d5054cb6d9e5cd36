"""Recompute activations in the backward instead of keeping them, in degrees."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

from torch import nn
from torch.utils.checkpoint import checkpoint

Degree = Literal["none", "gelu", "mlp", "block"]
"""What the backward recomputes.

gelu: the MLP's activation; its output, of the MLP's inner size, is not kept. mlp: its first matrix, too; neither of the
two tensors of inner size is kept. block: everything; only a block's input is kept.
"""


def recompute(model: nn.Module, degree: Degree) -> None:
    """Set what the trunk of a model recomputes in training mode."""
    of_mlp = degree if degree in ("gelu", "mlp") else "none"
    # Any: to a type checker every attribute of a Module is a tensor or a module.
    module: Any
    for module in model.modules():
        if hasattr(module, "gradient_checkpointing"):
            module.gradient_checkpointing = degree == "block"
        if hasattr(module, "recomputes"):
            module.recomputes = of_mlp


def recomputed(function: Callable[..., Any], *args: Any, draws: bool) -> Any:
    """Call a function whose inner results the backward computes a second time.

    Args:
        draws: it draws random numbers, whose generator must be put back for the second time.
    """
    return checkpoint(function, *args, use_reentrant=False, preserve_rng_state=draws)


def has_dropout(module: nn.Module) -> bool:
    """Return whether a part of a block draws random numbers in training."""
    for part in module.modules():
        for name in ("attn_pdrop", "resid_pdrop", "dropout"):
            if getattr(part, name, 0) > 0:
                return True
    return False
