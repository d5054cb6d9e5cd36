"""One record -> the segments of text that make its document."""

from __future__ import annotations

import codecs
import json
import re
from typing import Any, NamedTuple

from gptj_train.data.text_config import DataConfig

_ROLE = re.compile(r"[\w -]+")


class Segment(NamedTuple):
    """A run of text in a document.

    Attributes:
        target: its tokens are to be predicted.
        template: it may contain special tokens; data may only spell them.
        last: it ends the document.
    """

    text: str
    component: str
    target: bool = True
    template: bool = False
    last: bool = True


class BadRecordError(ValueError):
    """A record that cannot be used.

    Bad records are counted by reason, so a reason must not contain anything of the record itself. The advice may.
    """

    def __init__(self, reason: str, advice: str) -> None:
        super().__init__(f"{reason}; {advice}")
        self.reason = reason


def document_of(record: Any, data: DataConfig, *, default_component: str) -> list[Segment]:
    """Return the segments of a record's document.

    Args:
        record: a line of JSON as bytes, or a row of a table.
        default_component: for a record that does not name its component.

    Raises:
        BadRecordError: the record cannot be used.
    """
    if isinstance(record, bytes):
        record = _parse(record)
    if not isinstance(record, dict):
        raise BadRecordError("not a record", "write a JSON object with a text in it")
    component = _component_of(record, data.component_field) or default_component
    if data.kind == "chat":
        return _chat(record.get(data.messages_field), component, data)
    if data.kind == "completion":
        prompt = _text_of(record, data.prompt_field, "data.prompt_field")
        response = _text_of(record, data.response_field, "data.response_field")
        return [Segment(prompt, component, target=False, last=False), Segment(response, component)]
    return [Segment(_text_of(record, data.text_field, "data.text_field"), component)]


def checked_text(text: str) -> str:
    """Return the text itself, if it is valid Unicode without NUL.

    Raises:
        BadRecordError: otherwise.
    """
    if "\0" in text:
        raise BadRecordError("a NUL character in the text", "remove it: this is not text, or was cut off")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise BadRecordError("a lone surrogate in the text", "this is not valid Unicode, correct it") from None
    return text


def _parse(line: bytes) -> Any:
    try:
        # A byte order mark stands at the start of a file, so in its first line.
        return json.loads(line.removeprefix(codecs.BOM_UTF8).decode())
    except UnicodeDecodeError as error:
        place = f"{error.reason} at byte {error.start} of the line"
        raise BadRecordError("not UTF-8 text", f"convert it ({place})") from None
    except (ValueError, RecursionError) as error:  # ValueError: JSON's own, or an integer with too many digits
        raise BadRecordError("not a line of JSON", f"each line must be one record ({error})") from None


def _component_of(record: dict[str, Any], field: str) -> str:
    """Return what a field such as "meta.pile_set_name" contains; empty if the record lacks it."""
    value: Any = record
    for name in field.split("."):
        value = value.get(name) if isinstance(value, dict) else None
    if not isinstance(value, str):
        return ""
    if not checked_text(value).isprintable():
        # Component names are printed: an escape sequence would reach the user's terminal.
        raise BadRecordError("a control character in the component's name", "remove it")
    return value


def _text_of(record: dict[str, Any], field: str, key: str) -> str:
    text = record.get(field)
    if not isinstance(text, str) or not text:
        advice = f"set {key} or correct the record"
        if isinstance(record.get("messages"), list):
            advice = "the record is a chat: set data.kind=chat"
        elif key == "data.text_field" and {"prompt", "response"} <= record.keys():
            advice = "the record has a prompt and a response: set data.kind=completion"
        raise BadRecordError(f"no text in field {field!r}", advice)
    return checked_text(text)


def _chat(messages: Any, component: str, data: DataConfig) -> list[Segment]:
    """Put each message between the two halves of the template.

    Targets are the assistant's messages, each with the second half: the model has to learn where to stop.
    """
    if not isinstance(messages, list) or not messages:
        raise BadRecordError("no messages", f"set data.messages_field (now {data.messages_field})")
    before, after = data.chat_template.split("{content}")
    segments = []
    for message in messages:
        fields = message if isinstance(message, dict) else {}
        role, content = fields.get("role"), fields.get("content")
        if not isinstance(role, str) or not isinstance(content, str):
            raise BadRecordError("a message without role and content", "give both, as strings")
        if not _ROLE.fullmatch(role):
            # A role becomes part of the template, where "<|endoftext|>" would be the special token.
            raise BadRecordError("a role that is no name", "write it in letters, digits, spaces, _ and -")
        target = role == "assistant"
        first_half, second_half = before.replace("{role}", role), after.replace("{role}", role)
        segments += [
            Segment(first_half, component, target=False, template=True, last=False),
            Segment(checked_text(content), component, target=target, last=False),
            Segment(second_half, component, target=target, template=True, last=False),
        ]
    if not any(segment.target for segment in segments):
        raise BadRecordError("nothing said by the assistant", "there is nothing to learn from it")
    # Empty segments have no tokens. The last segment stays even if it is empty: it carries the EOS token.
    *others, last = segments
    document = [segment for segment in others if segment.text]
    document.append(last._replace(last=True))
    return document
