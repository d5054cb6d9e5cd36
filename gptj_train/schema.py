"""Declare typed configs as frozen dataclasses, and convert composed YAML to them."""

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
from gptj_train.other_names import NO_KEY, OUR_KEYS

T = TypeVar("T")

PlainText = Annotated[str, "plain text"]
"""Type of a key whose value on the command line is literal text: ``${...}`` is not interpolated."""

_SECRET = re.compile(r"(api|access|auth|private|secret)_?key|token$|secret|passw(or)?d|credential", re.IGNORECASE)
_ENVIRONMENT_VARIABLE = re.compile(r"\$\{\s*oc\.env\s*:\s*(\w+)")


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
    # Before interpolation, which would replace ${oc.env:NAME} by the secret itself.
    _refuse_secrets(OmegaConf.to_container(composed, resolve=False))
    try:
        values = OmegaConf.to_container(composed, resolve=True)
    except OmegaConfBaseException as error:
        raise UserError(f"config: {str(error).splitlines()[0]}") from None
    assert isinstance(values, dict)
    known = set(keys_of(cls))
    present = list(_keys_in(values, cls))
    unknown = [key for key in present if key not in known]
    if unknown:
        raise UserError("; ".join(unknown_key_message(key, cls) for key in unknown))
    missing = [key for key in present if _is_missing(composed, key)]
    if missing:
        settings = " ".join(f"{key}=..." for key in missing)
        raise UserError(f"missing: {', '.join(missing)}; give {settings}")
    try:
        return TypeAdapter(cls).validate_python(values)
    except ValidationError as error:
        messages = dict.fromkeys(_invalid_value_message(detail, known) for detail in error.errors())
        raise UserError("; ".join(messages)) from None


def _refuse_secrets(value: Any, key: str = "") -> None:
    """Search a config for secrets, by the names of its keys and of the environment variables that it reads.

    Raises:
        UserError: such a name.
    """
    if isinstance(value, dict):
        for name, inner in value.items():
            _refuse_secrets(inner, f"{key}.{name}".lstrip("."))
        return
    if isinstance(value, list):
        for inner in value:
            _refuse_secrets(inner, key)
        return
    names = [key.rpartition(".")[2]]
    if isinstance(value, str):
        names += _ENVIRONMENT_VARIABLE.findall(value)
    if any(_SECRET.search(name) for name in names):
        raise UserError(
            f"{key} looks like a secret, and the config is written to config.yaml and Weights & Biases; leave it in "
            "the environment, where the libraries that need it look for it"
        )


def unknown_key_message(key: str, cls: type) -> str:
    """Return an error message for a key that the schema does not have, with the nearest one that it has."""
    for free in _free_keys(cls):
        if key == free or key.startswith(f"{free}."):
            return f"{key!r} is not there yet; add it with +{key}=..."  # Hydra's override needs the plus
    known = list(keys_of(cls))
    full_names: dict[str, str] = {}
    for name in known:
        full_names.setdefault(name.rpartition(".")[2], name)  # the first one, of several in different groups
    last_part = key.rpartition(".")[2]
    if last_part in NO_KEY and last_part not in full_names:
        return f"unknown config key {key!r}; {NO_KEY[last_part]}"
    ours = [name for name in OUR_KEYS.get(last_part, ()) if name in known]
    if ours and last_part not in full_names:
        return f"unknown config key {key!r}; here it is {' or '.join(ours)}"
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
    """Return the names of the keys whose value is a list of texts, which must be at the top level."""
    return {name for name, hint in get_type_hints(cls).items() if hint == list[str]}


def plain_text_keys(cls: type) -> set[str]:
    """Return the names of the keys of type ``PlainText``, which must be at the top level."""
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
