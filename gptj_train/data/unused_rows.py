"""The rows of the embedding that no word uses: they are renamed, never removed or added to.

GPT-2's tokenizer has 50257 entries and GPT-J 50400 rows, the rest called ``<|extratoken_1|>`` to
``<|extratoken_143|>``. The last of them pads; new words take the first.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass

from tokenizers import Tokenizer as Backend

from gptj_train.errors import UserError

_SPARE = re.compile(r"<\|extratoken_\d+\|>")


@dataclass(frozen=True)
class AddedToken:
    """A word to be added, and the words the mean of whose rows it starts from; none: the row stays as it is."""

    name: str
    like: tuple[str, ...] = ()

    @classmethod
    def parse(cls, text: str) -> AddedToken:
        """From ``NAME`` or ``NAME = WORD WORD ...``.

        Raises:
            UserError: no name.
        """
        name, _, like = text.partition(" = ")
        if not name.strip():
            raise UserError(f'add_tokens: {text!r} has no name; write "NAME" or "NAME = WORDS"')
        return cls(name.strip(), tuple(like.split()))


def unused_rows(backend: Backend, rows: int) -> list[int]:
    """Rows without a word of their own, in order."""
    named = {number for word, number in backend.get_vocab().items() if not _SPARE.fullmatch(word)}
    return [row for row in range(rows) if row not in named]


def pad_row(backend: Backend, rows: int) -> int | None:
    """The spare row that pads: the last one, None when every row has a word."""
    return max(unused_rows(backend, rows), default=None)


def with_added_tokens(backend: Backend, names: list[str], rows: int) -> tuple[Backend, dict[str, int]]:
    """The tokenizer with these words in its first spare rows, and where they are; it knows some already.

    Text that spells a new word becomes that one id, and is decoded to it again.

    Raises:
        UserError: more words than spare rows, of which the last stays for padding.
    """
    new = [name for name in dict.fromkeys(names) if backend.token_to_id(name) is None]
    if not new:
        return backend, {}
    backend = filled(backend, rows)
    spare = unused_rows(backend, rows)[:-1]
    if len(new) > len(spare):
        raise UserError(
            f"add_tokens: {len(new)} new words, but the vocabulary of {rows} has {len(spare)} spare rows "
            "(one more pads); add fewer"
        )
    places = dict(zip(new, spare, strict=False))
    return _renamed(backend, {row: (name, False) for name, row in places.items()}), places


def filled(backend: Backend, rows: int) -> Backend:
    """The tokenizer with an entry for every row: the nameless ones get GPT-J's names for them."""
    entries = backend.get_vocab_size()
    nameless = [row for row in unused_rows(backend, rows) if backend.id_to_token(row) is None]
    first = 1 + len(unused_rows(backend, rows)) - len(nameless)
    names = {row: (f"<|extratoken_{number}|>", True) for number, row in enumerate(nameless, start=first)}
    assert not nameless or nameless == list(range(entries, rows)), "rows in the middle have no word"
    return _renamed(backend, names)


def _renamed(backend: Backend, names: dict[int, tuple[str, bool]]) -> Backend:
    """A copy in which rows have these (word, is special)."""
    described = json.loads(backend.to_str())
    added = {token["id"]: token for token in described["added_tokens"]}
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    for row, (name, special) in names.items():
        added[row] = {"id": row, "content": name, **plain, "special": special}
    described["added_tokens"] = [added[row] for row in sorted(added)]
    return Backend.from_str(json.dumps(described))
