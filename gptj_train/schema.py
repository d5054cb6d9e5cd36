"""How a typed configuration is declared: a frozen dataclass that refuses unknown keys and wrong types."""

from __future__ import annotations

from typing import TypeVar, dataclass_transform

from pydantic import ConfigDict
from pydantic.dataclasses import dataclass

T = TypeVar("T")


@dataclass_transform(kw_only_default=True, frozen_default=True)
def schema(cls: type[T]) -> type[T]:
    """Class decorator. Fields have no defaults: the values stand in configs/, the types here."""
    return dataclass(cls, frozen=True, kw_only=True, config=ConfigDict(extra="forbid", allow_inf_nan=False))  # type: ignore[return-value]
