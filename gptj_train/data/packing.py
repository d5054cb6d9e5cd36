"""Pack documents into windows of a fixed number of tokens. Every token that is dropped is counted."""

from __future__ import annotations

from abc import ABC, abstractmethod
from bisect import bisect_left, insort
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from gptj_train.data.store import TokenStore

PADDING = 0
"""Document id of the padding; the documents of a window count from 1."""


class Window(NamedTuple):
    """One training sample.

    Attributes:
        tokens: (T) int64.
        document_ids: (T) int64; each window counts its documents from 1.
        targets: (T) bool; the tokens that are to be predicted.
    """

    tokens: np.ndarray
    document_ids: np.ndarray
    targets: np.ndarray


class Piece(NamedTuple):
    """A run of tokens of one document, which lies whole in one window."""

    document: int
    start: int
    length: int


class Documents:
    """The documents of several stores in order, or a part of them.

    Attributes:
        lengths: (D) int64, tokens of each document.
        bytes: UTF-8 bytes of all documents.
    """

    def __init__(
        self, stores: Sequence[TokenStore], component: str | None = None, part: Sequence[np.ndarray] | None = None
    ) -> None:
        """Select documents.

        Args:
            component: name of the only component; None selects all.
            part: a mask (D) bool for each store; None selects all.
        """
        self._stores = list(stores)
        self.bytes = 0
        starts, lengths, owners = [], [], []
        for number, store in enumerate(self._stores):
            document_ends = np.asarray(store.ends)
            document_starts = np.zeros_like(document_ends)
            document_starts[1:] = document_ends[:-1]
            selected = _documents_of(store, component)
            if part is not None:
                selected = selected & part[number]
            starts.append(document_starts[selected])
            lengths.append((document_ends - document_starts)[selected])
            owners.append(np.full(np.count_nonzero(selected), number, dtype=np.int32))
            self.bytes += int(store.bytes[selected].sum())
        self.lengths = np.concatenate(lengths)
        # Where each document begins, and in which of the stores.
        self._starts = np.concatenate(starts)
        self._owners = np.concatenate(owners)

    def __len__(self) -> int:
        return len(self.lengths)

    def part(self, document: int, start: int, length: int) -> tuple[np.ndarray, np.ndarray | bool]:
        """Return token ids and target flags of a run of a document; the flags are True if all are targets."""
        store = self._stores[self._owners[document]]
        first = int(self._starts[document]) + start
        span = slice(first, first + length)
        targets = True if store.targets is None else store.targets[span]
        return store.tokens[span], targets

    def has_targets_within(self, document: int, length: int) -> bool:
        """Return whether any of the first ``length`` tokens can be predicted.

        The first token never can: nothing precedes it.
        """
        predictable = min(length, int(self.lengths[document])) - 1
        if predictable < 1:
            return False
        _, targets = self.part(document, 1, predictable)
        return bool(np.any(targets))


def _documents_of(store: TokenStore, component: str | None) -> np.ndarray:
    """Return a mask (D) bool of a store's documents that belong to a component."""
    if component is None:
        return np.full(len(store.ends), True)
    if component not in store.names:
        return np.full(len(store.ends), False)
    own: np.ndarray = np.asarray(store.components) == store.names.index(component)
    return own


class Windows(ABC):
    """A sequence of windows over documents; ``windows[i]`` is put together when it is read.

    Attributes:
        documents: what is packed.
        length: T, tokens of a window.
        dropped: reason -> number of tokens in no window.
    """

    def __init__(self, documents: Documents, length: int, fill: int) -> None:
        """``fill``: token id of the padding."""
        self.documents = documents
        self.length = length
        self._fill = fill
        self.dropped: Counter[str] = Counter()

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def pieces(self, index: int) -> list[Piece]:
        """Return the pieces of documents in a window, in order; together at most T tokens."""

    @property
    def tokens(self) -> int:
        """Number of tokens of the documents, packed or dropped."""
        return int(self.documents.lengths.sum())

    @property
    def padding(self) -> int:
        """Number of positions that hold no token."""
        packed = self.tokens - self.dropped.total()
        return len(self) * self.length - packed

    def __getitem__(self, index: int) -> Window:
        tokens = np.full(self.length, self._fill, dtype=np.int64)
        document_ids = np.full(self.length, PADDING, dtype=np.int64)
        targets = np.full(self.length, False)
        used = 0
        for document_id, piece in enumerate(self.pieces(index), start=1):
            span = slice(used, used + piece.length)
            tokens[span], targets[span] = self.documents.part(*piece)
            document_ids[span] = document_id
            used += piece.length
        return Window(tokens, document_ids, targets)


class ContiguousWindows(Windows):
    """The concatenated documents, cut every T tokens: only the last window can contain padding.

    A document that crosses a border counts as another document in the next window: its attention and positions
    start afresh.
    """

    def __init__(self, documents: Documents, length: int, fill: int) -> None:
        super().__init__(documents, length, fill)
        # Where each document ends in the concatenation.
        self._ends = documents.lengths.cumsum()

    def __len__(self) -> int:
        return -(-self.tokens // self.length)

    def pieces(self, index: int) -> list[Piece]:
        at = index * self.length
        window_end = min(at + self.length, self.tokens)
        # The first document that ends after ``at``. Empty documents, which end where they begin, are passed over.
        document = int(np.searchsorted(self._ends, at, side="right"))
        pieces = []
        while at < window_end:
            document_end = int(self._ends[document])
            document_start = document_end - int(self.documents.lengths[document])
            piece_end = min(document_end, window_end)
            if piece_end > at:
                pieces.append(Piece(document, at - document_start, piece_end - at))
            at = piece_end
            document += 1
        return pieces


class BestFitWindows(Windows):
    """Whole documents, each in the window that it fills best (best-fit decreasing).

    No document that fits a window is cut. Longer plain text is cut every T tokens, and its pieces are packed. A
    longer example (a prompt with its response, or a chat) keeps its first T tokens; an example without a target
    among them is dropped.
    """

    def __init__(self, documents: Documents, length: int, fill: int, *, supervised: bool) -> None:
        """``supervised``: the documents are examples."""
        super().__init__(documents, length, fill)
        pieces = self._cut_examples() if supervised else self._cut_text()
        # Longest first, which best fit needs; stable sorts, so that the packing is the same on every machine.
        longest_first = pieces[np.argsort(-pieces[:, 2], kind="stable")]
        window_of = _best_fit(longest_first[:, 2].tolist(), length)
        windows = window_of.max(initial=-1) + 1
        by_window = np.argsort(window_of, kind="stable")
        self._pieces = longest_first[by_window]
        # Window i holds the pieces from _first_piece[i] up to _first_piece[i + 1].
        self._first_piece = np.searchsorted(window_of[by_window], np.arange(windows + 1))

    def __len__(self) -> int:
        return len(self._first_piece) - 1

    def pieces(self, index: int) -> list[Piece]:
        rows = self._pieces[self._first_piece[index] : self._first_piece[index + 1]]
        return [Piece(*row) for row in rows.tolist()]

    def _cut_text(self) -> np.ndarray:
        """Return (P, 3): document, start and length of each piece."""
        lengths = self.documents.lengths
        pieces_of = -(-lengths // self.length)
        document = np.repeat(np.arange(len(lengths)), pieces_of)
        # Number the pieces within their documents: the running number, less that of the document's first piece.
        first_piece_of = pieces_of.cumsum() - pieces_of
        number = np.arange(len(document)) - np.repeat(first_piece_of, pieces_of)
        start = number * self.length
        length = np.minimum(lengths[document] - start, self.length)
        return np.stack((document, start, length), axis=1)

    def _cut_examples(self) -> np.ndarray:
        """Return (P, 3) as ``_cut_text``, and count what is dropped."""
        lengths = self.documents.lengths
        kept = np.zeros(len(lengths), dtype=bool)
        for number in range(len(lengths)):
            kept[number] = self.documents.has_targets_within(number, self.length)
        document = np.flatnonzero(kept)
        beyond = (lengths[document] - self.length).clip(min=0)
        self.dropped["nothing to predict within sequence_length"] = int(lengths[~kept].sum())
        self.dropped["beyond sequence_length"] = int(beyond.sum())
        return np.stack((document, np.zeros_like(document), lengths[document] - beyond), axis=1)


def _best_fit(lengths: Sequence[int], capacity: int) -> np.ndarray:
    """Assign pieces to windows: each to the one with the least room that suffices, or else to a new one.

    It needs at most about 11/9 of the fewest possible windows (Johnson, 1973).

    Args:
        lengths: of the pieces, from the longest to the shortest, none above ``capacity``.

    Returns:
        (P) int64, the window of each piece.
    """
    window_of = np.empty(len(lengths), dtype=np.int64)
    # Open windows by the room that they have left. There are at most ``capacity`` rooms, however many windows: a
    # sorted list of rooms stays short, and the search takes log2(capacity) steps.
    windows_with: dict[int, list[int]] = {}
    rooms: list[int] = []
    opened = 0
    for piece, length in enumerate(lengths):
        at = bisect_left(rooms, length)
        if at == len(rooms):
            window, room = opened, capacity
            opened += 1
        else:
            room = rooms[at]
            window = windows_with[room].pop()
            if not windows_with[room]:
                del windows_with[room]
                del rooms[at]
        window_of[piece] = window
        left = room - length
        if left == 0:
            continue
        if left not in windows_with:
            windows_with[left] = []
            insort(rooms, left)
        windows_with[left].append(window)
    return window_of
