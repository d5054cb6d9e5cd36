"""Where ZeRO-3 sums the gradients of micro-batches in DeepSpeed 0.19.8, and the search for non-finite numbers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from gptj_train.training.deepspeed_internals import OptimizerState


@contextmanager
def sums_on(stage_3: Any, device: torch.device | None) -> Iterator[None]:
    """While an engine is built, let its stage 3 optimizer sum gradients on a device.

    DeepSpeed sums where the optimizer is. On the host each micro-batch then moves the fp32 sums to the GPU and back,
    and 4 bytes a parameter more are page-locked.

    Args:
        stage_3: DeepSpeed's class of the optimizer.
        device: of the sums; None leaves them where the optimizer is.
    """
    built = []
    initialize = stage_3.initialize_optimizer_states

    def initialize_then_sum_on(zero: Any) -> None:
        initialize(zero)
        built.append((zero, zero.device, zero.offload_optimizer_pin_memory))
        # DeepSpeed allocates the sums next, and would page-lock them. Replaced later, both copies would exist.
        if device is not None:
            zero.device = device
            zero.offload_optimizer_pin_memory = False

    stage_3.initialize_optimizer_states = initialize_then_sum_on
    try:
        yield
    finally:
        stage_3.initialize_optimizer_states = initialize
        for zero, place, pinned in built:
            zero.device = place
            zero.offload_optimizer_pin_memory = pinned
            if device is not None:
                # It meets the sums in one operation.
                zero.inf_or_nan_tracker = zero.inf_or_nan_tracker.to(device)
            _check_in_one_pass(zero)


def _check_in_one_pass(zero: Any) -> None:
    """Let the optimizer look for non-finite gradients in the sums' least and greatest value.

    DeepSpeed's isinf() and isnan() make a copy of all sums and two masks: 5 bytes a parameter for a moment, at the
    peak of a step.
    """
    check = zero.has_overflow

    def has_overflow(partition_gradients: bool = True) -> bool:
        sums = zero.grad_partitions_flat_buffer
        # NaN and infinities show there.
        extremes = torch.stack(sums.aminmax())
        if sums.is_cuda:
            # DeepSpeed reads them on another stream.
            torch.cuda.current_stream().synchronize()
        zero.grad_partitions_flat_buffer = extremes
        try:
            return bool(check(partition_gradients))
        finally:
            zero.grad_partitions_flat_buffer = sums

    zero.has_overflow = has_overflow


def spread_non_finite(loss: Tensor) -> Tensor:
    """Return the loss, with a graph that turns every gradient into NaN if the loss is non-finite.

    DeepSpeed looks for non-finite gradients only, and an infinite loss can have finite ones: its update would count.
    The factor is exactly 1 for a finite loss, and NaN for others.
    """
    return loss * (1 + 0 * loss.detach())


def count_non_finite(state: OptimizerState) -> int:
    """Return how many of this rank's buffers of masters and moments hold a NaN or infinity."""
    count = 0
    for section in state.sections:
        with section.buffers() as buffers:
            for flat in buffers.values():
                # A single pass without a copy: NaN and infinities show in the least or the greatest value.
                if flat.numel() and not torch.stack(flat.aminmax()).isfinite().all():
                    count += 1
    return count
