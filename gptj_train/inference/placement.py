"""Device placement for inference: the accelerator, and host memory for what does not fit."""

from __future__ import annotations

import os

import torch
from accelerate import dispatch_model, infer_auto_device_map
from torch import nn

_WEIGHTS_SHARE = 0.8  # of the accelerator's free memory; activations and the KV cache need the rest


def place(model: nn.Module) -> torch.device:
    """Move a model to this process's accelerator, as far as it fits, and return the device of its inputs.

    Blocks that do not fit stay where ``from_pretrained`` left them, in memory-mapped files that the host caches,
    and are copied to the accelerator for their forward (accelerate's ``dispatch_model``). Without an accelerator
    the model stays on the CPU.
    """
    if not torch.accelerator.is_available():
        return torch.device("cpu")
    index = int(os.environ.get("LOCAL_RANK", 0))  # evaluation runs one rank for each accelerator of the host
    torch.accelerator.set_device_index(index)
    device = torch.device(torch.accelerator.current_accelerator().type, index)  # type: ignore[union-attr]
    free, _ = torch.accelerator.get_memory_info(index)
    devices = device_map(model, int(_WEIGHTS_SHARE * free), index)
    if set(devices.values()) == {index}:
        model.to(device)  # no hooks, which cost time in every module's forward
    else:
        dispatch_model(model, devices, main_device=index)
    return device


def device_map(model: nn.Module, size: int, index: int) -> dict[str, int | str]:
    """Map module names to accelerator ``index``, until ``size`` bytes are full in the order of the forward, or "cpu".

    Blocks are not split: a block's residual connections need all its parts on one device.
    """
    limits = {index: size, "cpu": 1 << 62}  # the files on disk back the CPU's part: no limit
    devices: dict[str, int | str] = infer_auto_device_map(
        model, max_memory=limits, no_split_module_classes=["GPTJBlock"]
    )
    return devices
