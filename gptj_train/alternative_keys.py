"""Pairs of keys of which only one counts: that of the command line replaces a preset's other one."""

from __future__ import annotations

from omegaconf import DictConfig, OmegaConf

from gptj_train.errors import UserError


def choose_alternatives(composed: DictConfig, given: set[str]) -> None:
    """Clear a preset's ``max_steps`` for a given ``epochs``, or the reverse; ``warmup_steps`` for ``warmup_ratio``.

    Args:
        given: keys that the command line itself sets.

    Raises:
        UserError: the command line gives both of a pair, or presets give both ``max_steps`` and ``epochs``.
    """
    _choose_length(composed, given)
    _choose_warmup(composed, given)


def _choose_length(composed: DictConfig, given: set[str]) -> None:
    steps, epochs = composed.get("max_steps"), composed.get("epochs")  # None for ??? too
    if epochs is None:
        return
    by_steps, by_epochs = "max_steps" in given, "epochs" in given
    if steps is not None and by_steps == by_epochs:
        where = "both given" if by_steps else "both set by presets"
        raise UserError(f"max_steps={steps} and epochs={epochs} are {where}; give one of them, and null to the other")
    if steps is not None and by_steps:
        composed.epochs = None
    else:
        # Not by assignment: ??? is no value that may be left, and the key may have been deleted.
        OmegaConf.update(composed, "max_steps", None, force_add=True)


def _choose_warmup(composed: DictConfig, given: set[str]) -> None:
    if "optim.warmup_ratio" not in given or composed.optim.get("warmup_steps") is None:
        return
    if "optim.warmup_steps" in given:
        raise UserError("optim.warmup_ratio and optim.warmup_steps are both given; give only one of them")
    composed.optim.warmup_steps = None
