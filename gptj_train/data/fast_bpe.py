"""Byte-level BPE by tiktoken, five times as fast as ``tokenizers``, wherever it provably gives the same ids.

Both start from the bytes of a word and merge two neighbours at a time until none can be merged. They differ in which
neighbours can be merged:

* ``tokenizers`` has a list of rules (left, right). It applies the earliest rule that matches, at its leftmost match.
* tiktoken has no rules, only entries with ranks (here: their ids). It merges two neighbours if together they spell an
  entry, the lowest rank first, at its leftmost match.

``FastBPE.of`` accepts a vocabulary only if

1. every entry is a single byte or is made by exactly one rule;
2. later rules make entries with larger ids;
3. every entry, encoded by ``tokenizers`` as a text of its own, ends as that single entry.

Then both make the same merges, one after the other. Suppose they agree so far and are at the same list of parts:

* What a rule can merge, tiktoken can merge too: by 1 the result is an entry.
* What tiktoken can merge, a rule can merge too. Let neighbours x and y spell an entry e. No merge so far has crossed
  the borders of e in the text, so the merges inside it are those of e as a text of its own, up to a point. By 3 those
  end as e, so at that point they have not ended, and x and y, the only two parts that are left, are the last to be
  merged: by the rule (x, y).
* Both choose the same pair: by 2 the earliest rule makes the lowest id, and by 1 equal ids mean the same rule, for
  which both take the leftmost match.
"""

from __future__ import annotations

import json
import os
from itertools import pairwise, permutations
from typing import Any

import tiktoken
from tokenizers import Tokenizer as Backend

from gptj_train.launch.host import usable_cores

# How the ByteLevel pre-tokenizer splits a text into words, with possessive quantifiers (++): they match the same, and
# do not overflow the stack on long runs.
_WORDS = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"

# Each of them would change ids in a way that tiktoken does not know.
_UNSUPPORTED = (
    "dropout",
    "unk_token",
    "continuing_subword_prefix",
    "end_of_word_suffix",
    "byte_fallback",
    "ignore_merges",
)


class FastBPE:
    """Encodes texts in which special tokens are plain text."""

    def __init__(self, encoding: tiktoken.Encoding, within_text: frozenset[str]) -> None:
        """``within_text``: added tokens that are not special, and become one id wherever a text contains them."""
        self._encoding = encoding
        self._within_text = within_text
        self._threads = int(os.environ.get("RAYON_NUM_THREADS") or usable_cores())

    def encode_texts(self, texts: list[str]) -> list[list[int]]:
        """Encode texts on all cores.

        Raises:
            ValueError: a text that tiktoken cannot encode, such as a million spaces in a row.
        """
        return self._encoding.encode_batch(
            texts, num_threads=self._threads, allowed_special=self._within_text, disallowed_special=()
        )

    @classmethod
    def of(cls, backend: Backend) -> FastBPE | None:
        """Return the fast encoder of a tokenizer; None if it would not, or might not, give the same ids."""
        description = json.loads(backend.to_str())
        model, added = description["model"], description["added_tokens"]
        if not (_is_plain_byte_level(description) and _never_overlap([token["content"] for token in added])):
            return None
        ranks = _ranks(model, added)
        if ranks is None or not _all_reachable(backend, model["merges"]):
            return None
        ids = {token["content"]: token["id"] for token in added}
        within_text = frozenset(token["content"] for token in added if not token["special"])
        encoding = tiktoken.Encoding("own", pat_str=_WORDS, mergeable_ranks=ranks, special_tokens=ids)
        return cls(encoding, within_text)


def _is_plain_byte_level(description: dict[str, Any]) -> bool:
    """Return whether a text becomes bytes and words as in GPT-2, with nothing added or changed on the way."""
    model = description["model"]
    if model["type"] != "BPE" or any(model.get(option) for option in _UNSUPPORTED):
        return False
    if description["normalizer"] is not None:
        return False
    words = description["pre_tokenizer"] or {}
    if words.get("type") != "ByteLevel" or words.get("add_prefix_space") is not False:
        return False
    if words.get("use_regex") is not True:
        return False
    # An added token with one of these flags is matched with its surroundings.
    for token in description["added_tokens"]:
        if token["single_word"] or token["lstrip"] or token["rstrip"]:
            return False
    return True


def _never_overlap(tokens: list[str]) -> bool:
    """Return whether no text contains two added tokens that share characters: the two libraries might find another."""
    for one in tokens:
        # A token may overlap a copy of itself: "aba" in "ababa".
        if any(one.endswith(one[:size]) for size in range(1, len(one))):
            return False
    for one, other in permutations(tokens, 2):
        if other in one or any(one.endswith(other[:size]) for size in range(1, len(other))):
            return False
    return True


def _ranks(model: dict[str, Any], added: list[dict[str, Any]]) -> dict[bytes, int] | None:
    """Return the bytes and id of each entry; None unless conditions 1 and 2 hold."""
    added_tokens = {token["content"] for token in added}
    entries = {token: number for token, number in model["vocab"].items() if token not in added_tokens}
    byte_of = {character: byte for byte, character in _characters().items()}
    if not byte_of.keys() <= entries.keys():
        return None
    made = [-1]
    for left, right in model["merges"]:
        made.append(entries.get(left + right, -1))
    # Strictly ascending from -1: every rule makes an entry, and no two make the same one.
    if any(earlier >= later for earlier, later in pairwise(made)):
        return None
    if len(entries) != 256 + len(model["merges"]):
        return None  # some entry is neither a byte nor made by a rule
    ranks = {}
    for token, number in entries.items():
        if not all(character in byte_of for character in token):
            return None
        ranks[bytes(byte_of[character] for character in token)] = number
    return ranks


def _characters() -> dict[int, str]:
    """Return the character that stands for each byte in a byte-level vocabulary.

    Printable bytes stand for themselves; the others, in order, are the characters from 256.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    characters = {byte: chr(byte) for byte in printable}
    for byte in range(256):
        if byte not in characters:
            characters[byte] = chr(256 + len(characters) - len(printable))
    return characters


def _all_reachable(backend: Backend, merges: list[list[str]]) -> bool:
    """Check condition 3."""
    return all(len(backend.model.tokenize(left + right)) == 1 for left, right in merges)
