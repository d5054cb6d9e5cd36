"""Check the fields of a GPTJConfig that are no sizes: switches, token ids and labels."""

from __future__ import annotations

from typing import Any

from gptj_train.errors import UserError

_SWITCHES = ("use_cache", "tie_word_embeddings", "output_attentions", "output_hidden_states", "return_dict")
_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")
# A model's ids may lie beyond its vocabulary, since a small model often keeps the ids of 6B; this is beyond any.
_LARGEST_ID = 2**24


def check_fields(config: Any) -> None:
    """Check switches, token ids, texts and the numbering of labels.

    Raises:
        UserError: the first field with a value of another type, or outside its range.
    """
    for name in _SWITCHES:
        value = getattr(config, name)
        # "no" would count as true.
        if type(value) is not bool:
            raise UserError(f"{name} must be true or false, got {value!r}")
    for name in _TOKENS:
        value = getattr(config, name)
        ids = value if name == "eos_token_id" and isinstance(value, list) else [value]
        for number in ids:
            if number is not None and not _is_id(number):
                raise UserError(f"{name} must be a whole number from 0 to {_LARGEST_ID}, or null, got {value!r}")
    for name in ("activation_function", "problem_type", "dtype"):
        value = getattr(config, name)
        if not isinstance(value, str | None):
            raise UserError(f"{name} must be text, got {value!r}")
    labels = config.id2label or {}
    if set(labels) != set(range(len(labels))):
        raise UserError(f"id2label must number the labels from 0 to {len(labels) - 1}, got {sorted(labels)[:10]}")


def _is_id(value: Any) -> bool:
    # type, not isinstance: True is an int.
    return type(value) is int and 0 <= value <= _LARGEST_ID
