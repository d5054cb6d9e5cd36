"""Declare typed configs as frozen dataclasses, and convert composed YAML to them."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from difflib import get_close_matches
from typing import Annotated, Any, Literal, TypeVar, dataclass_transform, get_args, get_origin, get_type_hints

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import ConfigDict, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from gptj_train.errors import UserError
from gptj_train.other_names import MEANINGS, NO_KEY, OUR_KEYS
from gptj_train.secrecy import refuse_secrets

T = TypeVar("T")

PlainText = Annotated[str, "plain text"]
"""Type of a key whose value on the command line is literal text: ``${...}`` is not interpolated."""

_LARGEST_COUNT = 2**31 - 1
"""Far more than there is of anything that a key counts; beyond it, loops would not end and arrays not fit."""

_LARGEST_SEED = 2**53
"""A seed counts nothing; beyond this number JSON readers lose digits."""

_LARGEST_NUMBER = 3.4e38
"""The largest of fp32, in which optimizer and model compute."""


@dataclass_transform(kw_only_default=True, frozen_default=True)
def schema(cls: type[T]) -> type[T]:
    """Make a class a typed config: a frozen dataclass. Fields have types here and values in configs/, no defaults."""
    return dataclass(cls, frozen=True, kw_only=True, config=ConfigDict(extra="forbid", allow_inf_nan=False))  # type: ignore[return-value]


def validated(composed: DictConfig, cls: type[T]) -> T:
    """Convert a composed config to its schema.

    Raises:
        UserError: one line with all unknown keys, or all missing values, or all invalid values; an interpolation
            that fails; or a secret, which config.yaml and W&B would publish.
    """
    try:
        values = OmegaConf.to_container(composed, resolve=True)
    except OmegaConfBaseException as error:
        raise UserError(_interpolation_message(error)) from None
    assert isinstance(values, dict)
    refuse_secrets(values, plain_text_keys(cls))
    for key in text_keys(cls) - plain_text_keys(cls):
        _expand_home(values, key)
    known = set(keys_of(cls))
    present = list(_keys_in(values, cls))
    unknown = [key for key in present if key not in known]
    if unknown:
        raise UserError("; ".join(unknown_key_message(key, cls) for key in unknown))
    missing = [key for key in present if _is_missing(composed, key)]
    if missing:
        settings = " ".join(f"{key}=..." for key in missing)
        raise UserError(f"missing: {', '.join(missing)}; give {settings}")
    wrong = list(_wrong_numbers(values, cls))
    if wrong:
        raise UserError("; ".join(wrong))
    try:
        return TypeAdapter(cls).validate_python(values)
    except ValidationError as error:
        messages = dict.fromkeys(_invalid_value_message(detail, known) for detail in error.errors())
        raise UserError("; ".join(messages)) from None


def _expand_home(values: dict[Any, Any], key: str) -> None:
    """Replace a ~ that begins a path by the home folder: a shell does so only where a word begins with it."""
    *groups, name = key.split(".")
    group: Any = values
    for part in groups:
        group = group.get(part) if isinstance(group, dict) else None
    if not isinstance(group, dict) or name not in group:
        return
    value = group.get(name)
    if isinstance(value, list):
        group[name] = [_with_home(item) for item in value]
    else:
        group[name] = _with_home(value)


def _with_home(value: Any) -> Any:
    is_path = isinstance(value, str) and re.match(r"~[\w.-]*/", value)
    return os.path.expanduser(value) if is_path else value


def _interpolation_message(error: OmegaConfBaseException) -> str:
    """Return OmegaConf's first line, or that of a resolver of ours, which it only wraps."""
    line = str(error).splitlines()[0]
    ours = line.partition("UserError raised while resolving interpolation: ")[2]
    return f"{error.full_key}: {ours}" if ours else f"config: {line}"


def _wrong_numbers(values: dict[Any, Any], cls: Any, prefix: str = "") -> Iterator[str]:
    """Yield a message for each number that pydantic would accept and nothing could compute with."""
    for name, hint in get_type_hints(cls).items():
        value = values.get(name)
        if is_dataclass(hint):
            if isinstance(value, dict):
                yield from _wrong_numbers(value, hint, f"{prefix}{name}.")
            continue
        types = _types_within(hint)
        if not {int, float} & types:
            continue
        largest = _LARGEST_SEED if name == "seed" else _LARGEST_COUNT
        for number in _leaves(value):
            # To pydantic, as to Python, true is 1.
            if isinstance(number, bool) and bool not in types:
                yield f"{prefix}{name} must be a number, got {str(number).lower()}"
            elif float not in types and _is_above(number, largest):
                yield f"{prefix}{name} must be at most {largest}, got {number}"
            elif _is_above(number, _LARGEST_NUMBER):
                yield f"{prefix}{name} must be at most {_LARGEST_NUMBER}, got {number}"


def _types_within(hint: Any) -> set[Any]:
    """Return the types that a hint is made of, those of its arguments included."""
    if get_origin(hint) is Literal:
        return {type(choice) for choice in get_args(hint)}
    types = {hint}
    for argument in get_args(hint):
        types |= _types_within(argument)
    return types


def _leaves(value: Any) -> Iterator[Any]:
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        for inner in value:
            yield from _leaves(inner)
    else:
        yield value


def _is_above(value: Any, limit: float) -> bool:
    return isinstance(value, int | float) and abs(value) > limit


def unknown_key_message(key: str, cls: type) -> str:
    """Return an error message for a key that the schema does not have, with the nearest one that it has."""
    for free in _free_keys(cls):
        if key == free or key.startswith(f"{free}."):
            return f"{key!r} is not there yet; add it with +{key}=..."  # Hydra's override needs the plus
    known = list(keys_of(cls))
    if key in known:  # its group was removed by ~GROUP or replaced by a plain value
        return (
            f"{key!r}: groups of keys are not removed or replaced; set single keys, GROUP.KEY=..., or give GROUP=NAME"
        )
    full_names: dict[str, str] = {}
    for name in known:
        full_names.setdefault(name.rpartition(".")[2], name)  # the first one, of several in different groups
    last_part = key.rpartition(".")[2]
    ours = [name for name in OUR_KEYS.get(last_part, ()) if name in known]
    if ours and last_part not in full_names:
        # A meaning helps only where there is a choice.
        named = [f"{name} ({MEANINGS[name]})" if len(ours) > 1 and name in MEANINGS else name for name in ours]
        return f"unknown config key {key!r}; here it is {' or '.join(named)}"
    if last_part in NO_KEY and last_part not in full_names:
        return f"unknown config key {key!r}; {NO_KEY[last_part]}"
    # Best of all is the same name in another group (lr for optim.lr), then a similar full name (optim.lrr), then a
    # similar last part (warmup_step for optim.warmup_steps).
    near = []
    if last_part in full_names:
        near = [full_names[last_part]]
    if not near:
        near = get_close_matches(key, known, n=1)
    if not near:
        near = [full_names[name] for name in get_close_matches(last_part, full_names, n=1)]
    advice = f"did you mean {near[0]!r}?" if near else "run with --help to see all keys"
    return f"unknown config key {key!r}; {advice}"


def keys_of(cls: type, prefix: str = "") -> Iterator[str]:
    """Yield the dotted names of a schema's keys, groups included."""
    hints = get_type_hints(cls)
    for field in fields(cls):
        yield prefix + field.name
        if is_dataclass(hints[field.name]):
            yield from keys_of(hints[field.name], f"{prefix}{field.name}.")


def text_keys(cls: type, prefix: str = "") -> set[str]:
    """Return the dotted names of the keys whose value can be text.

    On the command line their values need no quotes; ``launch.command_line`` adds them.
    """
    text_types = (str, str | None, str | list[str], str | list[str] | None)
    keys = set()
    for name, hint in get_type_hints(cls).items():
        if hint in text_types:
            keys.add(prefix + name)
        elif is_dataclass(hint):
            keys |= text_keys(hint, f"{prefix}{name}.")  # type: ignore[arg-type]
    return keys


def list_keys(cls: type) -> set[str]:
    """Return the names of the keys whose value is a list of texts; only top-level keys are looked at."""
    return {name for name, hint in get_type_hints(cls).items() if hint == list[str]}


def plain_text_keys(cls: type) -> set[str]:
    """Return the names of the keys of type ``PlainText``; only top-level keys are looked at."""
    keys = set()
    for name, hint in get_type_hints(cls, include_extras=True).items():
        if hint == PlainText or PlainText in get_args(hint):  # PlainText | None
            keys.add(name)
    return keys


def _free_keys(cls: Any, prefix: str = "") -> Iterator[str]:
    """Yield the dotted names of the keys whose value is a dict with any keys."""
    for name, hint in get_type_hints(cls).items():
        if get_origin(hint) is dict:
            yield prefix + name
        elif is_dataclass(hint):
            yield from _free_keys(hint, f"{prefix}{name}.")


def _keys_in(values: dict[Any, Any], cls: Any, prefix: str = "") -> Iterator[str]:
    """Yield the dotted names of a config's keys, as deep as the schema goes."""
    hints = get_type_hints(cls)
    for key, value in values.items():
        yield f"{prefix}{key}"
        if isinstance(value, dict) and is_dataclass(hints.get(key)):
            yield from _keys_in(value, hints[key], f"{prefix}{key}.")


def _is_missing(composed: DictConfig, key: str) -> bool:
    """Return whether a key's value is ???, which must be given."""
    group, _, name = key.rpartition(".")
    parent = OmegaConf.select(composed, group) if group else composed
    return OmegaConf.is_missing(parent, name)


def _invalid_value_message(detail: Any, known: set[str]) -> str:
    """Return one of pydantic's errors as "key: what is wrong, got value"."""
    key = ".".join(str(part) for part in detail["loc"])
    group = key.rpartition(".")[0]
    if detail["input"] is None and key not in known and group in known:
        # Of a union pydantic reports each type, with the type's name behind the key.
        return f"missing: {group}; give {group}=..."
    if detail["type"] == "value_error":  # from a __post_init__, whose message may name the key already
        message = str(detail["ctx"]["error"])
        return message if not key or key in message else f"{key}: {message}"
    if detail["type"] == "missing":
        return f"{key} is missing"
    if detail["type"] == "list_type" and isinstance(detail["input"], str):
        return f"{key}: takes a list; write {key}=[{detail['input']}]"
    message = detail["msg"][0].lower() + detail["msg"][1:]
    return f"{key}: {message}, got {detail['input']!r}"
