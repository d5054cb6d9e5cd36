"""How a typed configuration is declared, a frozen dataclass, and how composed YAML becomes one."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from difflib import get_close_matches
from typing import Annotated, Any, TypeVar, dataclass_transform, get_args, get_origin, get_type_hints

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import ConfigDict, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from gptj_train.errors import UserError

T = TypeVar("T")

PlainText = Annotated[str, "plain text"]
"""Type of a key whose value on the command line is text to the letter: ``${...}`` does not interpolate."""

_SECRET = re.compile(r"(api|access|auth|private|secret)_?key|token$|secret|passw(or)?d|credential", re.IGNORECASE)


@dataclass_transform(kw_only_default=True, frozen_default=True)
def schema(cls: type[T]) -> type[T]:
    """Class decorator. Fields have no defaults: the values stand in configs/, the types here."""
    return dataclass(cls, frozen=True, kw_only=True, config=ConfigDict(extra="forbid", allow_inf_nan=False))  # type: ignore[return-value]


def validated(composed: DictConfig, cls: type[T]) -> T:
    """The composed YAML as the recipe's frozen dataclass.

    Raises:
        UserError: all unknown keys, all missing values, or all wrong values, in one line; or a secret, which
            config.yaml and Weights & Biases would show.
    """
    _refuse_secrets(OmegaConf.to_container(composed, resolve=False))
    try:
        values = OmegaConf.to_container(composed, resolve=True)
    except OmegaConfBaseException as error:
        raise UserError(f"config: {str(error).splitlines()[0]}") from None
    assert isinstance(values, dict)
    known = set(keys_of(cls))
    unknown = [key for key in _keys_in(values, cls) if key not in known]
    if unknown:
        raise UserError("; ".join(unknown_key_message(key, cls) for key in unknown))
    missing = [key for key in _keys_in(values, cls) if OmegaConf.is_missing(*_parent(composed, key))]
    if missing:
        raise UserError("missing: " + ", ".join(missing) + "; give " + " ".join(f"{key}=..." for key in missing))
    try:
        return TypeAdapter(cls).validate_python(values)
    except ValidationError as error:
        raise UserError("; ".join(_complaint(detail) for detail in error.errors())) from None


def _refuse_secrets(value: Any, key: str = "") -> None:
    """Raises UserError for what is named like one, in a key or an environment variable that a value asks for."""
    if isinstance(value, dict):
        for name, inner in value.items():
            _refuse_secrets(inner, f"{key}.{name}".lstrip("."))
        return
    if isinstance(value, list):
        for inner in value:
            _refuse_secrets(inner, key)
        return
    asked_for = re.findall(r"\$\{\s*oc\.env\s*:\s*(\w+)", value) if isinstance(value, str) else []
    if any(_SECRET.search(name) for name in (key.rpartition(".")[2], *asked_for)):
        raise UserError(
            f"{key} looks like a secret, and the config is written to config.yaml and Weights & Biases; leave it in "
            "the environment, where the libraries that need it look for it"
        )


def unknown_key_message(key: str, cls: type) -> str:
    """Names the nearest key that exists."""
    if any(f"{key}.".startswith(f"{name}.") for name in _open_keys(cls)):
        return f"{key!r} is not there yet; add it with +{key}=..."
    known = list(keys_of(cls))
    leaves = {name.rsplit(".", 1)[-1]: name for name in reversed(known)}
    own = key.rsplit(".", 1)[-1]
    near = [leaves[own]] if own in leaves else get_close_matches(key, known, n=1)
    near = near or [leaves[leaf] for leaf in get_close_matches(own, leaves, n=1)]
    hint = f"did you mean {near[0]!r}?" if near else "run with '--cfg job' to see all keys"
    return f"unknown config key {key!r}; {hint}"


def keys_of(cls: type, prefix: str = "") -> Iterator[str]:
    """Dotted names of a schema's keys, groups included."""
    hints = get_type_hints(cls)
    for field in fields(cls):  # type: ignore[arg-type]
        yield prefix + field.name
        if is_dataclass(hints[field.name]):
            yield from keys_of(hints[field.name], f"{prefix}{field.name}.")  # type: ignore[arg-type]


def text_keys(cls: type, prefix: str = "") -> set[str]:
    """Return the dotted names of the keys whose value is, or may be, a text."""
    text_types = (str, str | None, str | list[str], str | list[str] | None)
    keys = set()
    for name, hint in get_type_hints(cls).items():
        if hint in text_types:
            keys.add(prefix + name)
        elif is_dataclass(hint):
            keys |= text_keys(hint, f"{prefix}{name}.")  # type: ignore[arg-type]
    return keys


def plain_text_keys(cls: type) -> set[str]:
    """Return the names of the top-level keys of type ``PlainText``."""
    hints = get_type_hints(cls, include_extras=True)
    return {name for name, hint in hints.items() if PlainText in (hint, *get_args(hint))}


def _open_keys(cls: Any, prefix: str = "") -> Iterator[str]:
    """Dotted names of the keys whose value is a dict of whatever the user likes."""
    for name, hint in get_type_hints(cls).items():
        if get_origin(hint) is dict:
            yield prefix + name
        elif is_dataclass(hint):
            yield from _open_keys(hint, f"{prefix}{name}.")


def _keys_in(values: dict[Any, Any], cls: Any, prefix: str = "") -> Iterator[str]:
    hints = get_type_hints(cls)
    for key, value in values.items():
        yield f"{prefix}{key}"
        if isinstance(value, dict) and is_dataclass(hints.get(key)):
            yield from _keys_in(value, hints[key], f"{prefix}{key}.")


def _parent(composed: DictConfig, key: str) -> tuple[Any, str]:
    head, _, leaf = key.rpartition(".")
    return (OmegaConf.select(composed, head) if head else composed), leaf


def _complaint(detail: Any) -> str:
    key = ".".join(str(part) for part in detail["loc"])
    if detail["type"] == "value_error":
        message = str(detail["ctx"]["error"])
        return message if not key or key in message else f"{key}: {message}"
    if detail["type"] == "missing":
        return f"{key} is missing"
    return f"{key}: {detail['msg'][0].lower()}{detail['msg'][1:]}, got {detail['input']!r}"
