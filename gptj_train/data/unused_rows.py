"""Unused embedding rows: rows of the embedding matrix without a token of the vocabulary.

GPT-2's tokenizer has 50257 entries and GPT-J's embedding 50400 rows; the other 143 are called ``<|extratoken_1|>`` to
``<|extratoken_143|>``. The last unused row is the padding token, and added tokens take the first ones. The embedding
is never resized.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass

from tokenizers import Tokenizer as Backend

from gptj_train.counted import counted
from gptj_train.errors import UserError

_UNUSED = re.compile(r"<\|extratoken_\d+\|>")
_PLAIN = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}  # of an added token


@dataclass(frozen=True)
class AddedToken:
    """A token to add, and the words whose rows it is initialized from: by their mean. Without any its row is kept."""

    name: str
    like: tuple[str, ...] = ()

    @classmethod
    def parse(cls, text: str) -> AddedToken:
        """Parse ``NAME`` or ``NAME = WORD WORD ...``.

        Raises:
            UserError: no name.
        """
        name, _, like = text.partition(" = ")
        if not name.strip():
            raise UserError(f'add_tokens: {text!r} has no name; write "NAME" or "NAME = WORDS"')
        return cls(name.strip(), tuple(like.split()))


def is_unused(token: str) -> bool:
    """Return whether a token is the name of an unused row."""
    return _UNUSED.fullmatch(token) is not None


def unused_rows(backend: Backend, rows: int) -> list[int]:
    """Return the unused ones of an embedding's rows, in order."""
    used = {number for token, number in backend.get_vocab().items() if not _UNUSED.fullmatch(token)}
    return [row for row in range(rows) if row not in used]


def pad_row(backend: Backend, rows: int) -> int | None:
    """Return the last unused row, which is the padding token; None if all rows are used."""
    return max(unused_rows(backend, rows), default=None)


def with_added_tokens(backend: Backend, names: list[str], rows: int) -> tuple[Backend, dict[str, int]]:
    """Give tokens that the tokenizer lacks its first unused rows.

    Text that spells an added token is encoded as its single id.

    Returns:
        The extended tokenizer, and the row of each token that is new to it.

    Raises:
        UserError: more new tokens than unused rows, of which the last one stays for padding.
    """
    new = [name for name in dict.fromkeys(names) if backend.token_to_id(name) is None]
    if not new:
        return backend, {}
    backend = with_all_rows_named(backend, rows)
    free = unused_rows(backend, rows)[:-1]  # the last one is for padding
    if len(new) > len(free):
        raise UserError(
            f"add_tokens: {counted(len(new), 'new token')}, but the vocabulary of {rows} has "
            f"{counted(len(free), 'unused row')} (besides the one for padding); add fewer"
        )
    places = dict(zip(new, free, strict=False))
    # Not special: special tokens are plain text in data, and added tokens are meant to be used there.
    return with_names(backend, {row: name for name, row in places.items()}, special=False), places


def with_all_rows_named(backend: Backend, rows: int) -> Backend:
    """Give every unused row without an entry GPT-J's name for it; some runtimes require an entry for each row."""
    taken = {token for token in backend.get_vocab() if _UNUSED.fullmatch(token)}
    names: dict[int, str] = {}
    for number, row in enumerate(unused_rows(backend, rows), start=1):
        if backend.id_to_token(row) is not None:
            continue
        # The place among the unused rows is the number, unless a vocabulary with holes has given that name away.
        while f"<|extratoken_{number}|>" in taken:
            number += 1
        names[row] = f"<|extratoken_{number}|>"
        taken.add(names[row])
    return with_names(backend, names, special=True)


def with_names(backend: Backend, names: dict[int, str], *, special: bool) -> Backend:
    """Return a copy of the tokenizer in which these rows are added tokens with these names."""
    # Through JSON: the library itself can neither rename a token nor choose an id.
    description = json.loads(backend.to_str())
    added = {token["id"]: token for token in description["added_tokens"]}
    for row, name in names.items():
        added[row] = {"id": row, "content": name, **_PLAIN, "special": special}
    description["added_tokens"] = [added[row] for row in sorted(added)]
    extended = Backend.from_str(json.dumps(description))
    if all(extended.token_to_id(name) == row for row, name in names.items()):
        return extended
    # The library numbers added tokens on from the size of the vocabulary, which is wrong where ids are left out. An
    # entry of the vocabulary itself keeps its id; without a merge no text becomes it.
    for row, name in names.items():
        description["model"]["vocab"][name] = row
    return Backend.from_str(json.dumps(description))
