"""Typed configs for tests, composed from the YAML of the package: a new key needs no change here."""

from __future__ import annotations

from typing import TypeVar

from gptj_train.config import ClmConfig
from gptj_train.launch.command_line import compose
from gptj_train.model.lora import LoraConfig
from gptj_train.training.optimizer import OptimConfig
from gptj_train.training.zero_config import EngineConfig

T = TypeVar("T")

_BLANKS = ("output_dir=unused", "init_from=null", "max_steps=1", "data.train=unused")


def config(primary: str, cls: type[T], *overrides: str) -> T:
    """A fine-tuning recipe's config; what must be given is filled in, and nothing is read from disk."""
    return compose(primary, [*_BLANKS, *overrides], cls)


def optim_config(*overrides: str) -> OptimConfig:
    """As ``configs/optim/adamw.yaml``, with overrides such as "lr=0.1"."""
    # Longer than any warm-up.
    return config("clm", ClmConfig, "max_steps=100000", *(f"optim.{override}" for override in overrides)).optim


def engine_config(choice: str = "zero3", *overrides: str) -> EngineConfig:
    """As ``configs/engine/<choice>.yaml``, with overrides such as "stage=2"."""
    return config("clm", ClmConfig, f"engine={choice}", *(f"engine.{override}" for override in overrides)).engine


def lora_config(*overrides: str) -> LoraConfig:
    """As ``configs/lora/adapters.yaml``, with overrides such as "rank=4"."""
    return config("clm", ClmConfig, "lora=adapters", *(f"lora.{override}" for override in overrides)).lora
