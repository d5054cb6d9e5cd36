"""Documents -> fixed windows. Every token lands in exactly one window."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np

PADDING = 0
"""Document id of the positions that fill up the last window; real documents count from 1 in each window."""


def pack(documents: Iterable[list[int]], length: int, fill: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Cut the stream of documents into windows; only the last one can hold padding.

    A document that crosses a border goes on in the next window as a document of its own, whose
    attention and positions start afresh.

    Args:
        documents: token ids, each document already ended by its end-of-text id.
        length: T, tokens in a window.
        fill: id written where there is padding.

    Yields:
        tokens and document ids, both (T) int64.
    """
    tokens, owners = np.full(length, fill), np.full(length, PADDING)
    used, owner = 0, 0
    for document in documents:
        ids = np.asarray(document)
        owner += 1
        while len(ids):
            part = ids[: length - used]
            tokens[used : used + len(part)], owners[used : used + len(part)] = part, owner
            used, ids = used + len(part), ids[len(part) :]
            if used == length:
                yield tokens, owners
                tokens, owners = np.full(length, fill), np.full(length, PADDING)
                used, owner = 0, 1 if len(ids) else 0
    if used:
        yield tokens, owners
