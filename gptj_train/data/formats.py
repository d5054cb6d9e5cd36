"""Recognise the format of records from the first ones of a split, and name the fields with text that nothing reads."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from gptj_train.data.files import kind_of
from gptj_train.data.parsing import value_of
from gptj_train.data.record_files import first_records
from gptj_train.data.sources import columns_of
from gptj_train.data.text_config import DataConfig

# Prompt and response of the formats in use, the most particular first. The fields of a list may be missing.
_COMPLETIONS: tuple[tuple[str | list[str], str], ...] = (
    (["instruction", "input"], "output"),  # Alpaca
    (["instruction", "input", "context"], "response"),  # Dolly has a context instead of an input
    ("prompt", "completion"),
    ("prompt", "response"),
)
_MESSAGES = ("messages", "conversations", "conversation")


def recognised(data: DataConfig, files: Sequence[Path], key: str) -> DataConfig:
    """Return the config of a split with the kind and the fields of its records, and print what was recognised.

    ``data.kind=auto`` takes the configured fields where the records have them, else one of the formats in use. A kind
    that is given stays; only the fields that it reads are recognised then, where the records lack the configured ones.

    Args:
        key: the config key that holds the files, for messages.
    """
    records: list[dict[str, Any]] = []
    for file in files:
        if kind_of(file) != ".txt":
            records = first_records(file)
            if records:
                break
    found = _recognised(data, records)
    if found is not data and found.kind != "text":
        say(f"{key}: records recognised as {describe(found)}; data.kind and data.*_field say it otherwise")
    say_unread(records, columns_of(found), key)
    return found


def describe(data: DataConfig) -> str:
    """Describe what is read of a record and what is predicted."""
    if data.kind == "chat":
        return f"chat (messages in {data.messages_field!r}; what the assistant says is predicted)"
    if data.kind == "completion":
        prompt = data.prompt_field if isinstance(data.prompt_field, str) else " and ".join(data.prompt_field)
        return f"completion (prompt from {prompt!r}, {data.response_field!r} predicted)"
    return f"text (in {data.text_field!r})"


def _recognised(data: DataConfig, records: list[dict[str, Any]]) -> DataConfig:
    if data.kind == "auto" and (not records or _holds_text(records, data.text_field)):
        return replace(data, kind="text")
    if data.kind in ("auto", "chat"):
        for name in (data.messages_field, *_MESSAGES):
            if any(isinstance(value_of(record, name), list) for record in records):
                changed = data.kind != "chat" or name != data.messages_field
                return replace(data, kind="chat", messages_field=name) if changed else data
        for name in _fields_of_messages(records):
            return replace(data, kind="chat", messages_field=name)
    if data.kind in ("auto", "completion"):
        configured = (data.prompt_field, data.response_field)
        for prompt, response in (configured, *_COMPLETIONS):
            needed = prompt[0] if isinstance(prompt, list) else prompt
            is_template = "{" in needed
            if (is_template or _holds_text(records, needed)) and _holds_text(records, response):
                changed = data.kind != "completion" or (prompt, response) != configured
                if not changed:
                    return data
                return replace(data, kind="completion", prompt_field=prompt, response_field=response)
    # Nothing known: the reader names the first record, and the fields that it lacks.
    return replace(data, kind="text") if data.kind == "auto" else data


def _holds_text(records: list[dict[str, Any]], field: str) -> bool:
    return any(isinstance(value_of(record, field), str) and value_of(record, field) for record in records)


def _fields_of_messages(records: list[dict[str, Any]]) -> Iterator[str]:
    """Yield the fields, also those inside another, that hold messages by another name than the usual ones."""
    for record in records:
        for name, value in record.items():
            inner = value.items() if isinstance(value, dict) else ()
            for field, messages in ((name, value), *((f"{name}.{key}", one) for key, one in inner)):
                first = messages[0] if isinstance(messages, list) and messages else None
                if isinstance(first, dict) and (
                    {"role", "content"} <= first.keys() or {"from", "value"} <= first.keys()
                ):
                    yield field


def say_unread(records: Iterable[dict[str, Any]], read: set[str], key: str) -> None:
    """Print the fields of these records that hold text and are not among those that are read."""
    unread = set()
    for record in records:
        for name, value in record.items():
            if name not in read and isinstance(value, str) and value.strip():
                unread.add(name)
    if unread:
        say(f"{key}: text that is not read, in the fields {', '.join(sorted(unread))}")


def say(line: str) -> None:
    """Print a line about the data, once for all ranks. Names of fields are data: control characters are escaped."""
    if os.environ.get("RANK", "0") == "0":
        print("".join(c if c.isprintable() else repr(c)[1:-1] for c in line), flush=True)
