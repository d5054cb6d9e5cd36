"""Gradient accumulation: how many micro-batches make an optimizer step."""

from __future__ import annotations

from gptj_train.counted import counted
from gptj_train.errors import UserError


def accumulation_steps(global_batch_size: int, micro_batch_size: int, world_size: int) -> int:
    """Return the number of micro-batches that each rank processes in an optimizer step.

    Raises:
        UserError: ``global_batch_size`` is not a multiple of ``micro_batch_size * world_size``.
    """
    if min(global_batch_size, micro_batch_size) < 1:
        raise UserError("global_batch_size and micro_batch_size must be at least 1")
    windows_at_once = micro_batch_size * world_size
    if global_batch_size % windows_at_once:
        nearest = max(windows_at_once, round(global_batch_size / windows_at_once) * windows_at_once)
        raise UserError(
            f"global_batch_size {global_batch_size} does not divide into micro_batch_size {micro_batch_size} "
            f"x {counted(world_size, 'rank')}; the nearest that does is global_batch_size={nearest}"
        )
    return global_batch_size // windows_at_once
