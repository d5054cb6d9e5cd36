"""Signatures of the heads' forwards that show the trunk's arguments too."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, TypeVar

ForwardT = TypeVar("ForwardT", bound=Callable[..., Any])


def with_arguments_of(trunk_forward: Callable[..., Any]) -> Callable[[ForwardT], ForwardT]:
    """Show the trunk's arguments in place of ``**inputs`` in a head's signature; the function stays as it is.

    Callers ask for it: HF Trainer drops the columns of a data set that ``inspect.signature(model.forward)`` does not
    name, ``attention_mask`` among them, and left padding would then be attended.
    """
    passed_on = inspect.signature(trunk_forward).parameters

    def decorate(forward: ForwardT) -> ForwardT:
        signature = inspect.signature(forward)
        own = [entry for entry in signature.parameters.values() if entry.kind is not inspect.Parameter.VAR_KEYWORD]
        added = []
        for name, entry in passed_on.items():
            if name not in signature.parameters:
                added.append(entry.replace(kind=inspect.Parameter.KEYWORD_ONLY))
        forward.__signature__ = signature.replace(parameters=[*own, *added])  # type: ignore[attr-defined]
        return forward

    return decorate
