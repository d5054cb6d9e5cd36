"""From stored weights into what this rank keeps of them, without anything whole on the way.

What is trained goes into the optimizer's fp32 master, which holds a file's fp32 as it is; the weights of compute
follow from it. What is frozen goes where DeepSpeed keeps its part. Its attributes are used without importing it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from gptj_train.training.deepspeed_internals import OptimizerState
from gptj_train.weights.moments import StoredMoments
from gptj_train.weights.stored import StoredWeights


def fill_masters(state: OptimizerState, weights: StoredWeights, stored: Mapping[str, str]) -> None:
    """Read this rank's slices of the trained parameters.

    Args:
        stored: name in ``weights`` of each parameter that is in there.
    """
    with state.changing():
        for section in state.sections:
            with section.buffers(changing=True) as buffers:
                for (name, start, numel), offset in zip(section.slices, section.offsets, strict=True):
                    if name in stored:
                        weights.read(stored[name], start, buffers["master"].narrow(0, offset, numel))


def fill_moments(state: OptimizerState, moments: StoredMoments) -> None:
    """Read this rank's slices of Adam's moments, and go on counting updates where they end."""
    with state.changing():
        for section in state.sections:
            with section.buffers(changing=True) as buffers:
                for (name, start, numel), offset in zip(section.slices, section.offsets, strict=True):
                    if name in moments.names:
                        for moment, stored in moments.of.items():
                            stored.read(moments.names[name], start, buffers[moment].narrow(0, offset, numel))
    state.set_counters({"steps": moments.steps, "loss_scale": {}})


def fill_frozen(model: nn.Module, weights: StoredWeights, stored: Mapping[str, str], rank: int) -> None:
    """Read the parameters that are not trained; before DeepSpeed wraps the model, which copies some of them."""
    for name, parameter in model.named_parameters():
        if parameter.requires_grad or name not in stored:
            continue
        if hasattr(parameter, "ds_tensor"):
            _fill_partition(parameter, weights, stored[name], rank)
        else:
            weights.read(stored[name], 0, parameter.data.view(-1))


def _fill_partition(parameter: Any, weights: StoredWeights, name: str, rank: int) -> None:
    """This rank's part under ZeRO-3; the last rank's may end in padding."""
    swapper = parameter.nvme_swapper if parameter.ds_tensor.final_location == "nvme" else None
    if swapper is not None:
        swapper.swap_in([parameter], async_op=False)
    start = rank * parameter.partition_numel()
    numel = min(parameter.partition_numel(), parameter.ds_numel - start)
    if numel > 0:
        weights.read(name, start, parameter.ds_tensor.data.narrow(0, 0, numel))
    if swapper is not None:
        swapper.swap_out_and_release([parameter])
