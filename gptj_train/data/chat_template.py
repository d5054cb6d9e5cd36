"""Chat templates: ours with {role} and {content}, a tokenizer's in Jinja, and one turned into the other."""

from __future__ import annotations

import ast
import functools
import json
import re
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from jinja2 import Template, TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment

from gptj_train.errors import UserError

DEFAULT = "### {role}\n{content}\n\n"
"""The template of a chat run that names none, and whose tokenizer has none."""

ASSISTANT = "assistant"

_JINJA = re.compile(r"\{\{|\{%")
_SETTINGS = re.compile(
    r"\{% set eos_token = (.*?) %\}\{% set bos_token = eos_token %\}\{% set special_tokens = (\[.*?\]) %\}"
)
_LARGEST_FILE = 2**20  # bytes; templates in use have a few thousand


class TemplateFailedError(ValueError):
    """A Jinja template cannot render a chat."""


def is_jinja(template: str) -> bool:
    """Return whether a template is Jinja, and not ours."""
    return bool(_JINJA.search(template))


def template_in(folder: str | Path) -> str | None:
    """Return the Jinja chat template of a tokenizer's folder, or None if it has none.

    Transformers writes it to chat_template.jinja, earlier versions to tokenizer_config.json.

    Raises:
        UserError: a template file that is too large or no text.
    """
    folder = Path(folder)
    file = folder / "chat_template.jinja"
    if file.is_file():
        if file.stat().st_size > _LARGEST_FILE:
            raise UserError(f"{file}: larger than {_LARGEST_FILE:,} bytes, so no chat template; remove it")
        try:
            return file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"{file}: cannot be read ({error})") from None
    config_file = folder / "tokenizer_config.json"
    # is_file: opening a named pipe would wait forever.
    if not config_file.is_file():
        return None
    try:
        template = json.loads(config_file.read_text(encoding="utf-8")).get("chat_template")
    except (OSError, ValueError, AttributeError, RecursionError):
        return None  # the tokenizer's own reader reports a broken file
    if isinstance(template, list):
        # Several templates by name; "default" is the one for chats without tools.
        named = {entry.get("name"): entry.get("template") for entry in template if isinstance(entry, dict)}
        template = named.get("default")
    return template if isinstance(template, str) else None


def to_jinja(template: str) -> str:
    """Return the Jinja template that writes a chat as training reads it, EOS at its end included.

    Args:
        template: ours, with {content} once and {role} any number of times. Jinja is returned unchanged.
    """
    if is_jinja(template):
        return template
    before, after = template.split("{content}")
    message = f"{_concatenated(before)} + message['content'] + {_concatenated(after)}"
    prompt = before.replace("{role}", ASSISTANT)
    # The text that training saw ends with EOS. A prompt must not: the assistant's answer follows.
    return (
        f"{{% for message in messages %}}{{{{ {message} }}}}{{% endfor %}}"
        f"{{% if add_generation_prompt %}}{{{{ {prompt!r} }}}}{{% else %}}{{{{ eos_token }}}}{{% endif %}}"
    )


def _concatenated(text: str) -> str:
    """Return a Jinja expression for a text, with the message's role in place of each {role}."""
    # Python's escapes are Jinja's: it decodes a string by unicode-escape.
    return " + message['role'] + ".join(repr(part) for part in text.split("{role}"))


def with_special_tokens(template: str, eos_token: str, special_tokens: Sequence[str]) -> str:
    """Return a Jinja template that sets the special tokens itself, which Transformers passes to it by name."""
    return (
        f"{{% set eos_token = {eos_token!r} %}}{{% set bos_token = eos_token %}}"
        f"{{% set special_tokens = {list(special_tokens)!r} %}}{template}"
    )


def special_tokens_of(template: str) -> tuple[str, list[str]]:
    """Return the EOS token and all special tokens that ``with_special_tokens`` put into a template."""
    found = _SETTINGS.match(template)
    if found is None:
        return "", []
    return ast.literal_eval(found[1]), ast.literal_eval(found[2])


def render(template: str, messages: Sequence[Mapping[str, Any]], *, add_generation_prompt: bool) -> str:
    """Render a chat by a Jinja template, which is untrusted text: in a sandbox, with Transformers' settings.

    Raises:
        TemplateFailedError: the template is invalid, fails, or refuses these messages.
    """
    try:
        return _compiled(template).render(messages=messages, add_generation_prompt=add_generation_prompt)
    # A template can raise anything by a wrong operation, such as a TypeError by 1 + "a".
    except Exception as error:
        raise TemplateFailedError(f"{type(error).__name__}: {error}") from None


@functools.cache
def _compiled(template: str) -> Template:
    # Immutable: a template may not change the messages either. The settings and names are those that templates rely
    # on in Transformers.
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return environment.from_string(template)


def _tojson(value: Any, indent: int | None = None) -> str:
    # Jinja's own escapes <, > and & for HTML.
    return json.dumps(value, ensure_ascii=False, indent=indent)


def _raise(message: str) -> None:
    raise TemplateError(message)
