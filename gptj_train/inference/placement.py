"""Where a model that only answers lives: on the accelerator, and what does not fit in host memory or files."""

from __future__ import annotations

import os

import torch
from accelerate import dispatch_model, infer_auto_device_map
from torch import nn

_FOR_WEIGHTS = 0.8  # of the accelerator's free memory; the rest is for activations and the KV cache


def place(model: nn.Module) -> torch.device:
    """Put a model on this process's accelerator, as far as it fits; returns the device its inputs go to.

    The blocks that do not fit stay where ``from_pretrained`` left them, in memory-mapped files that the host's
    memory caches, and visit the accelerator when their turn comes (accelerate's ``dispatch_model``). Without an
    accelerator everything stays.
    """
    if not torch.accelerator.is_available():
        return torch.device("cpu")
    index = int(os.environ.get("LOCAL_RANK", 0))
    torch.accelerator.set_device_index(index)
    device = torch.device(torch.accelerator.current_accelerator().type, index)  # type: ignore[union-attr]
    room = int(_FOR_WEIGHTS * torch.accelerator.get_memory_info(index)[0])
    placed = device_map(model, room, index)
    if set(placed.values()) == {index}:
        model.to(device)
    else:
        dispatch_model(model, placed, main_device=index)
    return device


def device_map(model: nn.Module, room: int, index: int) -> dict[str, int | str]:
    """Module name -> accelerator ``index`` or "cpu", filling ``room`` bytes in the order of the forward."""
    endless = {index: room, "cpu": 1 << 62}
    return infer_auto_device_map(model, max_memory=endless, no_split_module_classes=["GPTJBlock"])
