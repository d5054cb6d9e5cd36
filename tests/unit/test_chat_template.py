"""Chat templates: what training stored is what Transformers' apply_chat_template gives, token for token."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from text_data import text_data
from transformers import AutoTokenizer

from gptj_train.data.chat_template import DEFAULT, TemplateFailedError, render, template_in, to_jinja
from gptj_train.data.corpus import prepare
from gptj_train.data.preparation import open_stores
from gptj_train.data.tokenizer import Tokenizer
from gptj_train.errors import UserError

ROWS = 360  # of the embedding: the tokenizer has 340 entries, the others are <|extratoken_N|>
CHAT = [
    {"role": "system", "content": "Be short."},
    {"role": "user", "content": "  The quick brown fox?\n\n"},
    {"role": "assistant", "content": " jumps over\n"},
    {"role": "user", "content": "Grüße 🙂 'quoted' \"twice\" \\n {content} {role}"},
    {"role": "assistant", "content": "don't panic"},
]
CHATML = (
    "{% for m in messages %}<|extratoken_1|>{{ m['role'] }}\n{{ m['content'] | trim }}<|extratoken_2|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|extratoken_1|>assistant\n{% endif %}"
)
EOS_AFTER_EACH_ANSWER = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'assistant' %} {{ m.content }}{{ eos_token }}"
    "{% else %}[INST] {{ m.content }} [/INST]{% endif %}{% endfor %}"
)
TEMPLATES = {
    "default": None,
    "no role": "{content}\n",
    "role after": "<{role}>\t{content} </{role}>\n",
    "quotes": 'it\'s "{role}" \\n {% raw'.replace("{% raw", "%}") + "{content}'",
    "special": "<|extratoken_1|>{role}\n{content}<|extratoken_2|>\n",
    "chatml": CHATML,
    "eos after each answer": EOS_AFTER_EACH_ANSWER,
}


@pytest.fixture(scope="module")
def folder(tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer")
    tokenizer.save(path, ROWS)
    return path


def write_chat(tmp_path: Path, messages: list[dict[str, str]]) -> Path:
    file = tmp_path / "chat.jsonl"
    file.write_text(json.dumps({"messages": messages}) + "\n")
    return file


def stored(tmp_path: Path, tokenizer: Tokenizer, template: str | None, messages: Any = CHAT) -> tuple[Any, Any, str]:
    """Token ids, targets and the exported template of a chat, prepared as a run prepares it."""
    data = text_data(
        train=str(write_chat(tmp_path, messages)), kind="chat", chat_template=template, cache_dir=str(tmp_path / "c")
    )
    text = prepare(data, tokenizer, 400)
    (window,) = [text.train.windows[""][0]]
    used = window.document_ids > 0
    assert text.chat_template is not None
    return window.tokens[used].tolist(), window.targets[used], text.chat_template


@pytest.mark.parametrize("name", TEMPLATES)
def test_apply_chat_template_gives_the_stored_tokens(folder: Path, tmp_path: Path, name: str) -> None:
    tokenizer = Tokenizer.load(folder)
    ids, targets, tokenizer.chat_template = stored(tmp_path, tokenizer, TEMPLATES[name])
    (tmp_path / "export").mkdir()
    tokenizer.save(tmp_path / "export", ROWS)
    theirs = AutoTokenizer.from_pretrained(tmp_path / "export")
    expected = theirs.apply_chat_template(CHAT, tokenize=True, return_dict=False)
    # The store ends each document with EOS, whether the template does or not.
    if expected[-1] != tokenizer.eos_id:
        expected = [*expected, tokenizer.eos_id]
    assert ids == expected
    # A prompt is the beginning of what training saw, and what follows is what it predicted.
    prompt = theirs.apply_chat_template(CHAT[:-1], add_generation_prompt=True, tokenize=False)
    answer = theirs.apply_chat_template(CHAT, tokenize=False).removeprefix(prompt)
    predicted = theirs.decode([token for token, target in zip(ids, targets, strict=True) if target])
    assert predicted.removesuffix("<|endoftext|>").endswith(answer.removesuffix("<|endoftext|>"))
    assert "quick brown" not in predicted
    assert "jumps over" in predicted
    # Training on from the export reads the same tokens again, by the template that it carries.
    (tmp_path / "again").mkdir()
    again, same_targets, _ = stored(tmp_path / "again", Tokenizer.load(tmp_path / "export"), None)
    assert again == ids
    assert (same_targets == targets).all()


def test_special_tokens_that_a_message_spells_are_text(folder: Path, tmp_path: Path) -> None:
    messages = [{"role": "user", "content": "<|extratoken_2|>"}, {"role": "assistant", "content": "<|endoftext|>"}]
    tokenizer = Tokenizer.load(folder)
    ids, _, _ = stored(tmp_path, tokenizer, TEMPLATES["special"], messages)
    names = {name: number for number, name in enumerate(["one", "two"], start=340)}
    assert [ids.count(names["one"]), ids.count(names["two"]), ids.count(0)] == [2, 2, 1]


def test_a_jinja_template_cannot_tell_them_apart_so_they_are_refused(folder: Path, tmp_path: Path) -> None:
    messages = [{"role": "user", "content": "<|extratoken_2|>"}, CHAT[-1]]
    with pytest.raises(UserError, match=r"chat.jsonl:1: a special token in a message"):
        stored(tmp_path, Tokenizer.load(folder), CHATML, messages)


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{{ messages.clear() }}", "SecurityError"),
        ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "SecurityError"),
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{% for %}", "TemplateSyntaxError"),
        ("{{ 1 + 'a' }}", "TypeError"),
        ("{% for i in range(10**9) %}{% endfor %}", "OverflowError"),
    ],
)
def test_a_hostile_or_broken_template_is_an_error_of_one_line(tmp_path: Path, template: str, reason: str) -> None:
    with pytest.raises(TemplateFailedError, match=reason):
        render(template, CHAT, add_generation_prompt=False)
    data = text_data(train=str(write_chat(tmp_path, CHAT)), kind="chat", chat_template=template)
    with pytest.raises(UserError, match=rf"chat.jsonl:1: messages that the chat template refuses; .*{reason}"):
        open_stores([tmp_path / "chat.jsonl"], data, Tokenizer.train(["a"], 257))


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, None),
        ({"tokenizer_config.json": "{}"}, None),
        ({"tokenizer_config.json": "no JSON"}, None),
        ({"tokenizer_config.json": '{"chat_template": "{{ 1 }}"}'}, "{{ 1 }}"),
        (
            {"tokenizer_config.json": '{"chat_template": [{"name": "rag", "template": "r"}, '
             '{"name": "default", "template": "d"}]}'},
            "d",
        ),
        ({"tokenizer_config.json": '{"chat_template": "{{ 1 }}"}', "chat_template.jinja": "{{ 2 }}"}, "{{ 2 }}"),
    ],
)  # fmt: skip
def test_where_a_template_stands(tmp_path: Path, files: dict[str, str], expected: str | None) -> None:
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    assert template_in(tmp_path) == expected


def test_the_default_template_in_jinja() -> None:
    messages = [{"role": "user", "content": "Hello"}]
    text = render(to_jinja(DEFAULT), messages, add_generation_prompt=True)
    assert text == "### user\nHello\n\n### assistant\n"
