"""Documents -> windows of a fixed number of tokens. No token is lost without being counted."""

from __future__ import annotations

from abc import ABC, abstractmethod
from bisect import bisect_left, insort
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from gptj_train.data.store import TokenStore

PADDING = 0
"""Document id of the positions that fill a window up; real documents count from 1 in each window."""


class Window(NamedTuple):
    """tokens, document_ids (T) int64; targets (T) bool: the tokens that are to be predicted."""

    tokens: np.ndarray
    document_ids: np.ndarray
    targets: np.ndarray


class Documents:
    """The documents of several stores, or those of one component of them, in their order."""

    def __init__(self, stores: Sequence[TokenStore], component: str | None = None) -> None:
        """``component``: the name; None takes all."""
        self._stores = list(stores)
        starts, lengths, owners = [], [], []
        self.bytes = 0
        for number, store in enumerate(stores):
            ends = np.asarray(store.ends)
            begins = np.concatenate(([0], ends[:-1])) if len(ends) else ends
            wanted = np.full(len(ends), True)
            if component is not None:
                known = store.names.index(component) if component in store.names else -1
                wanted = np.asarray(store.components) == known
            starts.append(begins[wanted])
            lengths.append((ends - begins)[wanted])
            owners.append(np.full(int(wanted.sum()), number, dtype=np.int32))
            self.bytes += int(store.bytes[wanted].sum())
        self._starts, self.lengths, self._owners = (np.concatenate(parts) for parts in (starts, lengths, owners))

    def __len__(self) -> int:
        return len(self.lengths)

    def part(self, document: int, start: int, length: int) -> tuple[np.ndarray, np.ndarray | bool]:
        """Token ids and target flags of a stretch of a document."""
        store, begin = self._stores[self._owners[document]], int(self._starts[document]) + start
        span = slice(begin, begin + length)
        return store.tokens[span], True if store.targets is None else store.targets[span]

    def targets_within(self, document: int, length: int) -> bool:
        """Whether a token after the first one, and among the first ``length``, is to be predicted."""
        _, flags = self.part(document, 1, min(length, int(self.lengths[document])) - 1)
        return bool(np.any(flags)) and self.lengths[document] > 1


class Windows(ABC):
    """Windows over documents; ``windows[i]`` is put together when asked for.

    Attributes:
        dropped: reason -> tokens in no window.
        padding: positions that hold no token.
    """

    def __init__(self, documents: Documents, length: int, fill: int) -> None:
        """``length``: T; ``fill``: the id written where there is padding."""
        self.documents, self.length, self._fill = documents, length, fill
        self.dropped: Counter[str] = Counter()

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def pieces(self, index: int) -> list[tuple[int, int, int]]:
        """(document, first token, tokens) of what a window holds."""

    @property
    def tokens(self) -> int:
        """Of the documents, packed or dropped."""
        return int(self.documents.lengths.sum())

    @property
    def padding(self) -> int:
        return len(self) * self.length - (self.tokens - self.dropped.total())

    def __getitem__(self, index: int) -> Window:
        tokens = np.full(self.length, self._fill, dtype=np.int64)
        owners = np.full(self.length, PADDING, dtype=np.int64)
        targets = np.full(self.length, False)
        used = 0
        for owner, (document, start, length) in enumerate(self.pieces(index), start=1):
            span = slice(used, used + length)
            tokens[span], targets[span] = self.documents.part(document, start, length)
            owners[span] = owner
            used += length
        return Window(tokens, owners, targets)


class ContiguousWindows(Windows):
    """The joined stream of documents, cut every T tokens: only the last window can hold padding.

    A document that crosses a border goes on in the next window as a document of its own, whose attention and
    positions start afresh.
    """

    def __init__(self, documents: Documents, length: int, fill: int) -> None:
        super().__init__(documents, length, fill)
        self._ends = documents.lengths.cumsum()

    def __len__(self) -> int:
        return -(-self.tokens // self.length)

    def pieces(self, index: int) -> list[tuple[int, int, int]]:
        at, end = index * self.length, min((index + 1) * self.length, self.tokens)
        document = int(np.searchsorted(self._ends, at, side="right"))
        found = []
        while at < end:
            begin = int(self._ends[document] - self.documents.lengths[document])
            upto = min(int(self._ends[document]), end)
            if upto > at:
                found.append((document, at - begin, upto - at))
            at, document = upto, document + 1
        return found


class BestFitWindows(Windows):
    """Whole documents, each in the window that it fills best (best-fit decreasing); none that fits is cut.

    A longer document of plain text is cut every T tokens, and its last piece packed. A longer example of
    supervised text keeps its first T tokens; one that has no target among them is left out.
    """

    def __init__(self, documents: Documents, length: int, fill: int, supervised: bool) -> None:
        super().__init__(documents, length, fill)
        pieces = self._supervised_pieces() if supervised else self._text_pieces()
        order = np.argsort(-pieces[:, 2], kind="stable")
        window_of = _best_fit(pieces[order, 2].tolist(), length)
        by_window = np.argsort(window_of, kind="stable")
        self._pieces = pieces[order][by_window]
        self._starts = np.searchsorted(window_of[by_window], np.arange(window_of.max(initial=-1) + 2))

    def __len__(self) -> int:
        return len(self._starts) - 1

    def pieces(self, index: int) -> list[tuple[int, int, int]]:
        return [tuple(piece) for piece in self._pieces[self._starts[index] : self._starts[index + 1]].tolist()]

    def _text_pieces(self) -> np.ndarray:
        """(P, 3) document, first token, tokens."""
        lengths = self.documents.lengths
        counts = -(-lengths // self.length)
        document = np.repeat(np.arange(len(lengths)), counts)
        number = np.arange(len(document)) - np.repeat(counts.cumsum() - counts, counts)
        start = number * self.length
        return np.stack((document, start, np.minimum(lengths[document] - start, self.length)), axis=1)

    def _supervised_pieces(self) -> np.ndarray:
        lengths = self.documents.lengths
        learnable = np.array([self.documents.targets_within(i, self.length) for i in range(len(lengths))], dtype=bool)
        kept = np.flatnonzero(learnable)
        self.dropped["nothing to predict within sequence_length"] = int(lengths[~learnable].sum())
        self.dropped["beyond sequence_length"] = int((lengths[kept] - self.length).clip(min=0).sum())
        return np.stack((kept, np.zeros_like(kept), np.minimum(lengths[kept], self.length)), axis=1)


def _best_fit(lengths: Sequence[int], capacity: int) -> np.ndarray:
    """Window of each piece, in their order: the one with the least room that will do, or a new one.

    Args:
        lengths: from the longest to the shortest, none above ``capacity``.
    """
    window_of = np.empty(len(lengths), dtype=np.int64)
    with_room: dict[int, list[int]] = {}  # room -> windows
    rooms: list[int] = []  # the keys of with_room, sorted
    opened = 0
    for piece, length in enumerate(lengths):
        at = bisect_left(rooms, length)
        if at == len(rooms):
            window, room, opened = opened, capacity, opened + 1
        else:
            room = rooms[at]
            window = with_room[room].pop()
            if not with_room[room]:
                del with_room[room], rooms[at]
        window_of[piece] = window
        if left := room - length:
            if left not in with_room:
                with_room[left] = []
                insort(rooms, left)
            with_room[left].append(window)
    return window_of
