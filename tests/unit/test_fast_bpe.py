"""The fast encoder against ``tokenizers``: the same ids for any text, or none where that is not known."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken
from tokenizers import Tokenizer as Backend

from gptj_train.data.fast_bpe import FastBPE
from gptj_train.data.tokenizer import Tokenizer

TEXTS = ["def learn(self, x):\n    return x * 0.5  # naïve\n", "the cat sat on the mat, the hat that he had"] * 20


def trained() -> Backend:
    backend = Backend.from_str(Tokenizer.train(TEXTS, 400).to_json())
    backend.add_tokens([AddedToken(f"<|extratoken_{number}|>", normalized=True) for number in (1, 2)])
    backend.encode_special_tokens = True
    return backend


BACKEND = trained()
FAST = FastBPE.of(BACKEND)


def assert_same(texts: list[str]) -> None:
    assert FAST is not None
    expected = [encoding.ids for encoding in BACKEND.encode_batch(texts, add_special_tokens=False)]
    assert FAST.encode_texts(texts) == expected


def test_every_character_in_every_neighbourhood() -> None:
    # Planes 4 to 13 are unassigned and 15 to 16 private: a part of them stands for all.
    assigned = [*range(0xD800), *range(0xE000, 0x40000), *range(0xE0000, 0xE1000)]
    characters = [chr(code) for code in (*assigned, *range(0x40000, 0x110000, 251))]
    blocks = ["".join(characters[at : at + 64]) for at in range(0, len(characters), 64)]
    forms = [[f"a{c}1 {c}{c}-" for c in block] for block in blocks]
    assert_same(["".join(block) for block in forms])


@settings(max_examples=300, deadline=None)
@given(
    st.text(st.sampled_from("theca \n\t\u00a0'sdr.,0¹é東🙂<|>")),
    st.sampled_from(["", "<|extratoken_1|>", "<|endoftext|>"]),
)
def test_any_text(text: str, token: str) -> None:
    assert_same([text + token + text, token + token, text])


@pytest.mark.parametrize(
    "text", ["a" * 200_000, " " * 200_000, "x" + "\n" * 100_000 + "y", "the" * 50_000, "東" * 50_000]
)
def test_long_runs(text: str) -> None:
    assert_same([text])


def changed(change: Callable[[dict[str, Any]], None]) -> Backend:
    description = json.loads(trained().to_str())
    change(description)
    return Backend.from_str(json.dumps(description))


@pytest.mark.parametrize(
    "change",
    [
        lambda description: description["pre_tokenizer"].update(add_prefix_space=True),
        lambda description: description.update(normalizer={"type": "NFC"}),
        lambda description: description["model"].update(ignore_merges=True),
        lambda description: description["model"]["merges"].reverse(),
        lambda description: description["added_tokens"][-1].update(lstrip=True),
        lambda description: description["added_tokens"][-1].update(content="|><|"),
    ],
)
def test_refused_where_ids_could_differ(change: Callable[[dict[str, Any]], None]) -> None:
    assert FastBPE.of(changed(lambda description: None)) is not None
    assert FastBPE.of(changed(change)) is None


def test_refused_where_an_entry_does_not_end_as_itself() -> None:
    """ "xyz" is an entry by x + yz, but the rule x + y comes first: tiktoken would join xy + z."""

    def unreachable(description: dict[str, Any]) -> None:
        model = description["model"]
        model["merges"] = [["x", "y"], ["y", "z"], ["x", "yz"]]
        letters = [token for token in model["vocab"] if len(token) == 1]
        made = ["<|endoftext|>", *letters, "xy", "yz", "xyz"]
        model["vocab"] = {token: number for number, token in enumerate(made)}
        description["added_tokens"] = description["added_tokens"][:1]

    backend = changed(unreachable)
    assert backend.encode("xyz").tokens == ["xy", "z"]
    assert FastBPE.of(backend) is None


def test_texts_that_tiktoken_cannot_encode() -> None:
    tokenizer = Tokenizer.train(["some text " * 20], 300)
    text = "a" + " " * 1_100_000 + "b"
    found = tokenizer.encode_texts([text])
    assert found == [[*tokenizer.encode(text)]]
