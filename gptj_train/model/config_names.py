"""The names by which Transformers code reads, sets and passes the fields of a GPTJConfig."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import fields
from difflib import get_close_matches
from typing import Any, ClassVar, TypeVar

from gptj_train.errors import UserError

ALIASES = {
    "max_position_embeddings": "n_positions",
    "hidden_size": "n_embd",
    "num_attention_heads": "n_head",
    "num_hidden_layers": "n_layer",
    "torch_dtype": "dtype",
}
"""The general names that newer Transformers code uses for GPT-J's own fields."""

# Keys of any Transformers config that change nothing in a GPT-J; they are kept and written back.
_KEPT = {
    *("task_specific_params", "tokenizer_class", "prefix", "chunk_size_feed_forward", "finetuning_task"),
    *("gradient_checkpointing", "scale_attn_weights", "summary_type", "summary_use_proj", "summary_activation"),
    *("summary_proj_to_labels", "summary_first_dropout", "rotary"),
}
# Derived, or written anew on saving.
_DERIVED = {"model_type", "transformers_version", "is_encoder_decoder"}

ConfigT = TypeVar("ConfigT")


class ConfigNames:
    """Attributes under Transformers' names, and labels that agree whatever is assigned.

    ``num_labels`` is settable: another number renews ``id2label``. ``label2id`` is always the inverse of ``id2label``.
    """

    model_type: ClassVar[str] = "gptj"
    is_encoder_decoder: ClassVar[bool] = False

    def __getattr__(self, name: str) -> Any:
        """Look up a name that is no field: an alias, ``label2id``, or a key of ``extra``."""
        # Through __dict__: while an object is unpickled there are no fields yet, and getattr would never end.
        values = self.__dict__
        if name in ALIASES and ALIASES[name] in values:
            return values[ALIASES[name]]
        if name == "label2id" and values.get("id2label") is not None:
            return {text: label for label, text in values["id2label"].items()}
        if name in values.get("extra", {}):
            return values["extra"][name]
        raise AttributeError(f"{type(self).__name__} has no {name!r}")

    def __setattr__(self, name: str, value: Any) -> None:
        name = ALIASES.get(name, name)
        if name == "label2id":
            name, value = "id2label", _inverse(value)
        if name == "dtype" and (isinstance(value, str) or type(value).__name__ == "dtype"):
            # A torch.dtype prints as "torch.bfloat16".
            value = str(value).removeprefix("torch.")
        # Only on a finished config: until then __post_init__ still checks what it was given.
        finished = "extra" in self.__dict__
        if finished and name == "num_labels" and value != len(self.__dict__["id2label"]):
            object.__setattr__(self, "id2label", default_labels(value))
        if finished and name == "id2label":
            value = default_labels(self.num_labels) if value is None else numbered(value)
            object.__setattr__(self, "num_labels", len(value))
        object.__setattr__(self, name, value)

    def get_text_config(self, **_: Any) -> Any:
        """Return the config itself: a GPT-J is its own language model."""
        return self


def default_labels(count: int) -> dict[int, str]:
    """Return the names that Transformers gives to labels without names."""
    if type(count) is not int or not 1 <= count <= 2**20:
        raise UserError(f"num_labels must be a whole number from 1 to {2**20}, got {count!r}")
    return {label: f"LABEL_{label}" for label in range(count)}


def numbered(id2label: Mapping[Any, Any]) -> dict[int, str]:
    """Return a label dictionary with integers as keys and text as names.

    The keys of JSON are strings. Configs from other tools hold integers, booleans or null as names.

    Raises:
        UserError: no dictionary, or a key that is no number.
    """
    try:
        return {int(label): _label_name(label, name) for label, name in id2label.items()}
    except (AttributeError, TypeError, ValueError):
        raise UserError(f"id2label must name the labels by number, got {id2label!r}") from None


def _label_name(label: Any, name: Any) -> str:
    """Return a label's name as text; a label without one gets the name that Transformers gives it."""
    if name is None:
        return f"LABEL_{label}"
    if isinstance(name, float) and name.is_integer():
        return str(int(name))
    return str(name)


def field_values(config_class: type, given: Mapping[str, Any]) -> dict[str, Any]:
    """Translate keyword arguments into fields of a config class.

    Raises:
        UserError: a name that no GPT-J config has, with the nearest one that it has; labels that contradict.
    """
    known = {entry.name for entry in fields(config_class)}
    values: dict[str, Any] = {}
    kept: dict[str, Any] = {}
    for key, value in given.items():
        name = ALIASES.get(key, key)
        if name in values and values[name] != value:
            raise UserError(f"{key}={value!r} contradicts {name}={values[name]!r}; give one of them")
        if name in known:
            values[name] = value
        elif name in _KEPT:
            kept[name] = value
        elif name != "label2id" and name not in _DERIVED:
            raise UserError(f"GPTJConfig has no {key!r}{nearest(key, known | ALIASES.keys() | {'label2id'})}")
    label2id = given.get("label2id")
    if label2id is not None:
        values["id2label"] = _checked_labels(label2id, values.get("id2label"))
    if kept:
        values["extra"] = {**kept, **values.get("extra", {})}
    return values


def nearest(name: str, known: set[str]) -> str:
    """Return ``; did you mean NAME?`` for a misspelt name, or nothing."""
    close = get_close_matches(name, sorted(known), n=1)
    return f"; did you mean {close[0]!r}?" if close else ""


def _inverse(label2id: Mapping[str, Any]) -> dict[int, str]:
    inverse = {}
    try:
        for name, label in sorted(label2id.items(), key=lambda pair: int(pair[1])):
            inverse[int(label)] = name
    except (AttributeError, TypeError, ValueError):
        raise UserError(f"label2id must give each label's number by its name, got {label2id!r}") from None
    return inverse


def _checked_labels(label2id: Mapping[str, Any], id2label: Mapping[Any, str] | None) -> dict[int, str]:
    inverse = _inverse(label2id)
    if id2label is not None and numbered(id2label) != inverse:
        raise UserError(f"label2id {label2id!r} must be the inverse of id2label {id2label!r}; give one of them")
    return inverse


def takes_aliases(config_class: type[ConfigT]) -> type[ConfigT]:
    """Let a dataclass's constructor take every name of ``field_values``; the signature stays that of the fields."""
    by_field: Callable[..., None] = config_class.__init__

    @functools.wraps(by_field)
    def by_any_name(self: ConfigT, *positional: Any, **given: Any) -> None:
        by_field(self, *positional, **field_values(config_class, given))

    config_class.__init__ = by_any_name  # type: ignore[method-assign,assignment]
    return config_class
