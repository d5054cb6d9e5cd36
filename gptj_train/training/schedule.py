"""The learning rate as a pure function of the step, so that resuming restores no state of a scheduler."""

from __future__ import annotations

import math

from gptj_train.counted import counted
from gptj_train.errors import UserError
from gptj_train.training.optimizer import OptimConfig

Cycles = list[list[int]]
"""[start, end) of each cycle of the schedule, in steps, the oldest first; JSON knows lists only.

A run has one, from 0 to its last step. Another one begins where a run was extended with ``extend=rewarm``.
"""


def lr_at(step: int, max_steps: int, optim: OptimConfig) -> float:
    """Return the learning rate of optimizer step ``step`` (from 0) of ``max_steps``.

    Linear warm-up reaches ``lr`` at its last step. Then follows a cosine or linear decay to ``lr * final_lr_ratio`` at
    the last step, or a constant, or warm-up-stable-decay (``wsd``, arXiv 2404.06395): constant, then a linear decay
    over the last ``decay_steps``. Later steps have the rate of the last one.
    """
    warmup = warmup_of(optim, max_steps)
    if step < warmup:
        # step + 1: the first step already learns something.
        return optim.lr * (step + 1) / warmup
    if optim.schedule == "constant":
        return optim.lr
    first = warmup  # of the decay
    if optim.schedule == "wsd":
        first = max(first, max_steps - optim.decay_steps)
    last = max_steps - 1
    # The least length of 1 avoids a division by zero in runs of a single step.
    progress = (step - first) / max(last - first, 1)
    progress = min(max(progress, 0.0), 1.0)
    remaining = 1 - progress
    if optim.schedule == "cosine":
        remaining = (1 + math.cos(math.pi * progress)) / 2
    return optim.lr * (optim.final_lr_ratio + (1 - optim.final_lr_ratio) * remaining)


def warmup_of(optim: OptimConfig, max_steps: int) -> int:
    """Return the steps of warm-up in a run of ``max_steps``."""
    return round(optim.warmup_ratio * max_steps) if optim.warmup_steps is None else optim.warmup_steps


def check_warmup(optim: OptimConfig, max_steps: int, of: str = "the run") -> None:
    """Refuse a warm-up that is not shorter than the run: it would end at the highest learning rate."""
    warmup = warmup_of(optim, max_steps)
    if warmup == 0 or warmup < max_steps or max_steps == 0:
        return
    name = "warmup_ratio" if optim.warmup_steps is None else "warmup_steps"
    raise UserError(
        f"optim.{name}={getattr(optim, name)}: a warm-up of {counted(warmup, 'step')} is not shorter than {of} of "
        f"{counted(max_steps, 'step')}, which would end at its highest learning rate; lower optim.{name}"
    )


def lr_in(cycles: Cycles, step: int, optim: OptimConfig) -> float:
    """Return the learning rate of a step, from 0, in the cycle that it belongs to; after its end, the final rate."""
    begun = [cycle for cycle in cycles if cycle[0] <= step]
    start, end = begun[-1]
    return lr_at(step - start, end - start, optim)


def extended(cycles: Cycles, before: int, after: int, extend: str) -> Cycles:
    """Return the cycles of a run whose number of steps changes from ``before`` to ``after``.

    Args:
        extend: "stretch" the last cycle over the additional steps, keep its final rate "constant" in them, or "rewarm":
            warm up and decay once more. A shorter run always squeezes its last cycle.
    """
    if after > before and extend == "constant":
        return cycles
    if after > before and extend == "rewarm":
        return [*cycles, [before, after]]
    kept = [cycle for cycle in cycles if cycle[0] < after] or cycles[:1]
    start, end = kept[-1]
    # A cycle that ends before the run does is followed by its final rate, which a shorter run leaves as it is.
    end = after if after > before else min(end, after)
    return [*kept[:-1], [start, end]]


def extension_note(before: Cycles, now: Cycles, step: int, optim: OptimConfig, extend: str) -> str | None:
    """Return a line about what another ``max_steps`` does to the learning rate, or None if it changes nothing.

    Args:
        before, now: the cycles by the old and the new number of steps.
        step: steps done.
    """
    old, new = lr_in(before, step, optim), lr_in(now, step, optim)
    if before == now or math.isclose(old, new, rel_tol=1e-3):
        return None
    others = "; extend=constant keeps the final rate, extend=rewarm warms up and decays once more"
    return (
        f"another max_steps changes the schedule (extend={extend}): the learning rate of step {step + 1} is {new:.2e}, "
        f"it was {old:.2e}{others if extend == 'stretch' else ''}"
    )
