"""The settings of the training loop."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any, Literal

from gptj_train.errors import UserError
from gptj_train.schema import schema
from gptj_train.training.optimizer import OptimConfig

_MOST = {
    # The names of checkpoints have eight digits, so that they sort by step.
    "max_steps": 99_999_999,
    # The samples of a step are drawn at once.
    "global_batch_size": 10_000_000,
    # Seconds: a longer wait than 292 years overflows in Python's threads.
    "hang_timeout": 10_000_000,
}


@schema
class TrainerConfig:
    """The top-level settings of every training run."""

    output_dir: str
    seed: int
    max_steps: int
    global_batch_size: int
    micro_batch_size: int
    eval_every: int
    save_every: int
    keep_checkpoints: int
    keep_every: int
    failed_save: Literal["continue", "stop"]
    max_hours: float | None
    max_skipped_steps: int
    hang_timeout: float
    rendezvous_timeout: float
    optim: OptimConfig

    def __post_init__(self) -> None:
        for name in ("global_batch_size", "micro_batch_size", "keep_checkpoints", "max_skipped_steps"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} must be at least 1, got {getattr(self, name)}")
        meaning_of_0 = {
            "max_steps": "",
            "seed": "",
            "eval_every": " (only at the end)",
            "save_every": " (only at the end)",
            "keep_every": " (none)",
            "hang_timeout": " (never)",
        }
        for name, meaning in meaning_of_0.items():
            if getattr(self, name) < 0:
                raise UserError(f"{name} must be 0{meaning} or more, got {getattr(self, name)}")
        for name, most in _MOST.items():
            if getattr(self, name) > most:
                raise UserError(f"{name} must be at most {most}, got {getattr(self, name)}")
        if self.rendezvous_timeout <= 0:
            raise UserError(f"rendezvous_timeout must be above 0 seconds, got {self.rendezvous_timeout}")
        if self.max_hours is not None and self.max_hours <= 0:
            raise UserError(f"max_hours must be above 0, or null for no limit, got {self.max_hours}")


def is_due(step: int, every: int) -> bool:
    """Return whether something that happens every so many steps happens at this one; 0 for never."""
    return every > 0 and step % every == 0


def check_not_past(step: int, max_steps: int) -> None:
    """Refuse a ``max_steps`` that a checkpoint has already passed."""
    if step > max_steps:
        raise UserError(
            f"max_steps={max_steps} is below the checkpoint's step {step}; give a larger max_steps, resume=PATH of an "
            "earlier checkpoint, or another output_dir"
        )


def changed_settings(before: Mapping[str, Any], config: TrainerConfig) -> list[str]:
    """Return a text for each setting that decides the numbers of a run and differs from a checkpoint's."""
    changed = []
    for name, value in numeric_settings(config).items():
        if before.get(name) != value:
            changed.append(f"{name} {before.get(name)} -> {value}")
    return changed


def numeric_settings(config: TrainerConfig) -> dict[str, Any]:
    """Return the settings that decide the numbers of a run, as they come back from JSON."""
    values = {name: getattr(config, name) for name in ("seed", "max_steps", "global_batch_size", "micro_batch_size")}
    for name, value in asdict(config.optim).items():
        # betas are a tuple here, and a list in the checkpoint's JSON.
        values[f"optim.{name}"] = list(value) if isinstance(value, tuple) else value
    return values
