"""Byte-level BPE by tiktoken, five times as fast as ``tokenizers``, where it is known to give the same ids.

Both merge the pair of the lowest rank first, the leftmost of equal ones. They differ in what a pair is: a rule in a
list of merges, or any two neighbours that together spell an entry. Where ids ascend with the rules, and each entry,
taken as a text of its own, ends as itself, that is no difference: two neighbours between borders that no merge has
crossed are a state on the one way to that entry, and the last before it, so a rule joins them.
"""

from __future__ import annotations

import json
import os
from itertools import pairwise, product
from typing import Any

import tiktoken
from tokenizers import Tokenizer as Backend

from gptj_train.launch.host import usable_cores

# What tokenizers' ByteLevel cuts words by, with possessive quantifiers, which need no stack for long runs.
_WORDS = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"


class FastBPE:
    """Ids of texts that are taken as text, whatever special tokens they spell."""

    def __init__(self, encoding: tiktoken.Encoding, within_text: frozenset[str]) -> None:
        """``within_text``: added tokens that are no special ones, and stand for themselves also within a text."""
        self._encoding, self._within_text = encoding, within_text
        self._threads = int(os.environ.get("RAYON_NUM_THREADS") or usable_cores())

    def encode_texts(self, texts: list[str]) -> list[list[int]]:
        return self._encoding.encode_batch(
            texts, num_threads=self._threads, allowed_special=self._within_text, disallowed_special=()
        )

    @classmethod
    def of(cls, backend: Backend) -> FastBPE | None:
        """None where the ids would not be, or are not known to be, those of ``backend``."""
        told = json.loads(backend.to_str())
        ranks = _ranks(told)
        if ranks is None or not _plain(told) or not _end_as_themselves(backend, told):
            return None
        added = {token["content"]: token["id"] for token in told["added_tokens"]}
        within = {token["content"] for token in told["added_tokens"] if not token["special"]}
        encoding = tiktoken.Encoding("own", pat_str=_WORDS, mergeable_ranks=ranks, special_tokens=added)
        return cls(encoding, frozenset(within))


def _plain(told: dict[str, Any]) -> bool:
    """Only a byte-level BPE, and added tokens that are found wherever they are spelt, one at most at a place."""
    model, before = told["model"], told["pre_tokenizer"] or {}
    unused = "dropout", "unk_token", "continuing_subword_prefix", "end_of_word_suffix", "byte_fallback", "ignore_merges"
    added = [token["content"] for token in told["added_tokens"]]
    return (
        told["normalizer"] is None
        and (before.get("type"), before.get("add_prefix_space"), before.get("use_regex")) == ("ByteLevel", False, True)
        and not any(model.get(name) for name in unused)
        and not any(token[flag] for token in told["added_tokens"] for flag in ("single_word", "lstrip", "rstrip"))
        and not any(_overlap(one, other) for one, other in product(added, repeat=2))
    )


def _overlap(one: str, other: str) -> bool:
    """Some text spells both, and shares letters between them."""
    return (one != other and other in one) or any(one.endswith(other[:size]) for size in range(1, len(other)))


def _ranks(told: dict[str, Any]) -> dict[bytes, int] | None:
    """Bytes of each entry -> id; None unless each is a byte, or made by one rule, and later rules make larger ids."""
    model = told["model"]
    if model["type"] != "BPE":
        return None
    byte_of = {letter: value for value, letter in _letters().items()}
    added = {token["content"] for token in told["added_tokens"]}
    entries = {token: number for token, number in model["vocab"].items() if token not in added}
    made = [entries.get("".join(pair), -1) for pair in model["merges"]]
    known = all(letter in byte_of for token in entries for letter in token)
    ascending = all(earlier < later for earlier, later in pairwise([-1, *made]))
    if not (known and ascending and byte_of.keys() <= entries.keys() and len(entries) == 256 + len(made)):
        return None
    return {bytes(byte_of[letter] for letter in token): number for token, number in entries.items()}


def _letters() -> dict[int, str]:
    """Byte -> the character that stands for it in a byte-level vocabulary."""
    shown = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [value for value in range(256) if value not in shown]
    return {value: chr(value) for value in shown} | {value: chr(256 + at) for at, value in enumerate(hidden)}


def _end_as_themselves(backend: Backend, told: dict[str, Any]) -> bool:
    model = backend.model
    return all(len(model.tokenize("".join(pair))) == 1 for pair in told["model"]["merges"])
