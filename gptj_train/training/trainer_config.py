"""The settings of the training loop."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, replace
from typing import Any, Literal, TypeVar

from gptj_train.errors import UserError
from gptj_train.metric_order import check_metric
from gptj_train.schema import schema
from gptj_train.training.optimizer import OptimConfig
from gptj_train.training.schedule import check_warmup

T = TypeVar("T", bound="TrainerConfig")

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
    """The top-level settings of every training run. Either ``max_steps`` or ``epochs`` gives its length."""

    output_dir: str
    seed: int
    max_steps: int | None
    epochs: float | None
    extend: Literal["stretch", "constant", "rewarm"]
    global_batch_size: int
    micro_batch_size: int
    eval_every: int
    best_metric: str
    patience: int | None
    export_of: Literal["best", "last"]
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
            value = getattr(self, name)
            if value is not None and value < 0:
                raise UserError(f"{name} must be 0{meaning} or more, got {value}")
        for name, most in _MOST.items():
            value = getattr(self, name)
            if value is not None and value > most:
                raise UserError(f"{name} must be at most {most}, got {value}")
        self._check_length()
        self._check_best()
        if self.rendezvous_timeout <= 0:
            raise UserError(f"rendezvous_timeout must be above 0 seconds, got {self.rendezvous_timeout}")
        if self.max_hours is not None and self.max_hours <= 0:
            raise UserError(f"max_hours must be above 0, or null for no limit, got {self.max_hours}")

    def _check_length(self) -> None:
        if (self.max_steps is None) == (self.epochs is None):
            raise UserError("give either max_steps=... or epochs=..., and null to the other")
        if self.epochs is not None and self.epochs <= 0:
            raise UserError(f"epochs must be above 0, got {self.epochs}")
        if self.max_steps is not None:
            check_warmup(self.optim, self.max_steps)

    def _check_best(self) -> None:
        check_metric(self.best_metric)
        if self.patience is not None and self.patience < 1:
            raise UserError(f"patience must be at least 1, or null for no limit, got {self.patience}")
        if self.patience is not None and not self.eval_every:
            raise UserError(f"patience={self.patience} counts evaluations, but eval_every is 0; set eval_every")

    @property
    def steps(self) -> int:
        """The optimizer steps of the run, which has been given them by ``with_steps`` if it is by epochs."""
        assert self.max_steps is not None
        return self.max_steps

    def numeric_settings(self) -> dict[str, Any]:
        """Return the settings that decide the numbers of a run, as they come back from JSON."""
        names = ("seed", "max_steps", "global_batch_size", "micro_batch_size")
        values: dict[str, Any] = {name: getattr(self, name) for name in names}
        for name, value in asdict(self.optim).items():
            # betas are a tuple here, and a list in the checkpoint's JSON.
            values[f"optim.{name}"] = list(value) if isinstance(value, tuple) else value
        return values

    @property
    def saves_best_every(self) -> int:
        """Steps between evaluations whose model may be saved as the best; 0: none is saved for that."""
        return self.eval_every if self.export_of == "best" else 0


def with_steps(config: T, steps: int) -> T:
    """Return the config of a run whose epochs are this number of steps.

    Raises:
        UserError: too many steps, or a warm-up that is not shorter.
    """
    if steps > _MOST["max_steps"]:
        raise UserError(f"epochs={config.epochs:g} are {steps:,} steps, more than {_MOST['max_steps']:,}; lower epochs")
    check_warmup(config.optim, steps)
    return replace(config, max_steps=steps, epochs=None)


def is_due(step: int, every: int) -> bool:
    """Return whether something that happens every so many steps happens at this one; 0 for never."""
    return every > 0 and step % every == 0


def changed_settings(before: Mapping[str, Any], config: TrainerConfig) -> list[str]:
    """Return a text for each setting that decides the numbers of a run and differs from a checkpoint's."""
    changed = []
    for name, value in config.numeric_settings().items():
        # Checkpoints of earlier versions lack some settings.
        if name in before and before[name] != value:
            changed.append(f"{name} {before[name]} -> {value}")
    return changed
