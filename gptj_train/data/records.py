"""One record -> the segments of text that make its document."""

from __future__ import annotations

import re
from typing import Any, NamedTuple

from gptj_train.data.chat_template import ASSISTANT, DEFAULT, TemplateFailedError, is_jinja, render, special_tokens_of
from gptj_train.data.parsing import BadRecordError, parse_record, value_of
from gptj_train.data.text_config import DataConfig

_ROLE = re.compile(r"[\w -]+")
_SHAREGPT_ROLES = {
    "human": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
}
_PLACE = re.compile(r"\{([^{}]+)\}")  # of a field in a prompt template


class Segment(NamedTuple):
    """A run of text in a document.

    Attributes:
        target: its tokens are to be predicted.
        template: it may contain special tokens; data may only spell them.
        last: it ends the document.
        joined: it is tokenized together with the segment before it, as one text.
    """

    text: str
    component: str
    target: bool = True
    template: bool = False
    last: bool = True
    joined: bool = False


def document_of(record: Any, data: DataConfig, *, default_component: str) -> list[Segment]:
    """Return the segments of a record's document.

    Args:
        record: as ``parse_record`` takes it.
        default_component: for a record that does not name its component.

    Raises:
        BadRecordError: the record cannot be used.
    """
    record = parse_record(record)
    component = _component_of(record, data.component_field) or default_component
    if data.kind == "chat":
        return _chat(value_of(record, data.messages_field), component, data)
    if data.kind == "completion":
        prompt = _prompt_of(record, data.prompt_field)
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


def _component_of(record: dict[str, Any], field: str) -> str:
    """Return what the field contains; empty if the record lacks it."""
    value = value_of(record, field)
    if not isinstance(value, str):
        return ""
    if not checked_text(value).isprintable():
        # Component names are printed: an escape sequence would reach the user's terminal.
        raise BadRecordError("a control character in the component's name", "remove it")
    return value


def _text_of(record: dict[str, Any], field: str, key: str) -> str:
    text = value_of(record, field)
    if not isinstance(text, str) or not text:
        advice = f"set {key} or correct the record"
        if isinstance(record.get("messages"), list):
            advice = "the record is a chat: set data.kind=chat"
        elif key == "data.text_field" and {"prompt", "response"} <= record.keys():
            advice = "the record has a prompt and a response: set data.kind=completion"
        raise BadRecordError(f"no text in field {field!r}", advice)
    return checked_text(text)


# --- completion ---


def prompt_fields(prompt_field: str | list[str]) -> list[str]:
    """Return the fields that ``data.prompt_field`` reads: one, those of a list, or those of a template."""
    if isinstance(prompt_field, list):
        return prompt_field
    return _PLACE.findall(prompt_field) or [prompt_field]


def _prompt_of(record: dict[str, Any], prompt_field: str | list[str]) -> str:
    """Return the prompt: a field; the fields of a list, a line each; or a template with its fields filled in.

    Of several fields some may be empty or missing, as Alpaca's input is, but not all.
    """
    names = prompt_fields(prompt_field)
    if isinstance(prompt_field, str) and names == [prompt_field]:
        return _text_of(record, prompt_field, "data.prompt_field")
    texts = {}
    for name in names:
        text = value_of(record, name)
        if text is not None and not isinstance(text, str):
            raise BadRecordError(f"no text in field {name!r}", "set data.prompt_field or correct the record")
        texts[name] = checked_text(text or "")
    if not any(texts.values()):
        raise BadRecordError(f"no text in fields {', '.join(names)}", "set data.prompt_field or correct the record")
    if isinstance(prompt_field, list):
        # Each field ends its line: without a line feed the response would continue the last word of the prompt.
        return "".join(f"{text}\n" for text in texts.values() if text)
    # A shell passes \n on as two characters. Fields are filled in last: what they hold is no template.
    template = prompt_field.replace("\\n", "\n").replace("\\t", "\t")
    return _PLACE.sub(lambda place: texts[place[1]], template)


# --- chat ---


def _chat(messages: Any, component: str, data: DataConfig) -> list[Segment]:
    """Put each message between the two halves of the template.

    Targets are the assistant's messages, each with the second half: the model has to learn where to stop. A message
    with ``weight: 0`` or ``train: false`` is read and not predicted.
    """
    if not isinstance(messages, list) or not messages:
        raise BadRecordError("no messages", f"set data.messages_field (now {data.messages_field})")
    template = data.chat_template or DEFAULT
    if is_jinja(template):
        return _chat_by_jinja(messages, component, template)
    before, after = template.split("{content}")
    segments = []
    for message in messages:
        fields = message if isinstance(message, dict) else {}
        role, content = _role_and_content(fields)
        if not isinstance(role, str) or not isinstance(content, str):
            raise BadRecordError("a message without role and content", "give both, as strings")
        if not _ROLE.fullmatch(role):
            # A role becomes part of the template, where "<|endoftext|>" would be the special token.
            raise BadRecordError("a role that is no name", "write it in letters, digits, spaces, _ and -")
        target = role == ASSISTANT and _is_trained_on(fields)
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
    return _joined(document)


def _chat_by_jinja(messages: list[Any], component: str, template: str) -> list[Segment]:
    """Render the chat message by message: what an assistant's message adds to the text is a target."""
    eos_token, special_tokens = special_tokens_of(template)
    for message in messages:
        # In the rendered text they could not be told from those of the template.
        if any(token in str(message) for token in special_tokens):
            raise BadRecordError("a special token in a message", "remove it: only the chat template may contain it")
    segments: list[Segment] = []
    text = ""

    def append(longer: str, *, target: bool) -> None:
        nonlocal text
        # EOS at the end of every chat is not at the end of its first half.
        if segments and not longer.startswith(text) and text.endswith(eos_token):
            text = text.removesuffix(eos_token)
            segments[-1] = segments[-1]._replace(text=segments[-1].text.removesuffix(eos_token))
        if not longer.startswith(text):
            raise BadRecordError(
                "a chat template that changes earlier text when a message is added", "set data.chat_template"
            )
        added = checked_text(longer.removeprefix(text))
        segments.append(Segment(added, component, target=target, template=True, last=False))
        text = longer

    # Templates know OpenAI's names only.
    messages = [_with_openai_names(message) for message in messages]
    try:
        for number, message in enumerate(messages):
            target = isinstance(message, dict) and message.get("role") == ASSISTANT and _is_trained_on(message)
            if target:
                # The opening of an answer belongs to the prompt, so it is not predicted.
                append(render(template, messages[:number], add_generation_prompt=True), target=False)
            append(render(template, messages[: number + 1], add_generation_prompt=False), target=target)
    except TemplateFailedError as error:
        raise BadRecordError("messages that the chat template refuses", f"correct them ({error})") from None
    if not any(segment.target for segment in segments):
        raise BadRecordError("nothing said by the assistant", "there is nothing to learn from it")
    *others, last = segments
    # The end of the document brings an EOS token by itself.
    last = last._replace(text=last.text.removesuffix(eos_token), last=True)
    return _joined([*(segment for segment in others if segment.text), last])


def _joined(document: list[Segment]) -> list[Segment]:
    # A server tokenizes the whole rendered chat; tokens of training that end with each message would be others.
    first, *others = document
    return [first, *(segment._replace(joined=True) for segment in others)]


def _with_openai_names(message: Any) -> Any:
    if not isinstance(message, dict) or message.get("from") is None or message.get("role") is not None:
        return message
    role, content = _role_and_content(message)
    return {**message, "role": role, "content": content}


def _role_and_content(message: dict[str, Any]) -> tuple[Any, Any]:
    """Return role and content in OpenAI's names; ShareGPT calls them from and value, and has other role names."""
    if message.get("from") is not None and message.get("role") is None:
        role = message["from"]
        if isinstance(role, str):
            role = _SHAREGPT_ROLES.get(role.lower(), role)
        return role, message.get("value")
    if message.get("tool_calls") or message.get("function_call"):
        # Written as something else than text, so that the model would learn an answer without its call.
        raise BadRecordError("a message with tool calls", "write the call as text in its content")
    content = message.get("content")
    if isinstance(content, list) and content and all(isinstance(part, dict) for part in content):
        for part in content:
            if (part.get("type") or "text") != "text" or not isinstance(part.get("text"), str):
                raise BadRecordError("a message with parts that are no text", "leave out images and sound")
        content = "".join(part["text"] for part in content)
    return message.get("role"), content


def _is_trained_on(message: dict[str, Any]) -> bool:
    """Return what a message says about itself, as ``weight`` or ``train``.

    Raises:
        BadRecordError: a weight between 0 and 1, which the loss does not have.
    """
    for name in ("weight", "train"):
        value = message.get(name)
        if value is None:
            continue
        if value not in (0, 1):
            raise BadRecordError(f"a message whose {name} is neither 0 nor 1", "a message is learned from or not")
        if not value:
            return False
    return True
