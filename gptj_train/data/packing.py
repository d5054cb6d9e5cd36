"""Pack documents into windows of a fixed number of tokens. Every token that is dropped is counted."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np

from gptj_train.data.best_fit import best_fit
from gptj_train.data.store import TokenStore

PADDING = 0
"""Document id of the padding; the documents of a window count from 1."""

PIECE = np.dtype([("store", np.uint32), ("start", np.int64), ("length", np.uint32)])
"""A run of tokens of one document: the number of its store, its first token there, and how many tokens it has."""


Method = Literal["contiguous", "text", "examples"]

LENGTHS = (2**4, 2**6, 2**8, 2**10, 2**12, 2**14)
"""Upper limits, in tokens, of the histogram of document lengths."""

_FLAGS_AT_ONCE = 2**24


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


class Packing(NamedTuple):
    """Where the pieces of the documents go.

    Attributes:
        pieces: (P) PIECE, window by window.
        first_piece: (W + 1) int64: window i holds the pieces from ``first_piece[i]`` up to ``first_piece[i + 1]``.
        facts: about the documents.
    """

    pieces: np.ndarray
    first_piece: np.ndarray
    facts: DocumentFacts


@dataclass(frozen=True)
class DocumentFacts:
    """What a table on screen says of packed documents.

    Attributes:
        documents: number of documents.
        bytes: UTF-8 bytes of all documents.
        tokens: of all documents, packed or dropped.
        length_counts: number of documents by tokens; a bin for each of ``LENGTHS``, and one for longer documents.
        dropped: reason -> number of tokens in no window.
    """

    documents: int
    bytes: int
    tokens: int
    length_counts: list[int]
    dropped: dict[str, int]


def pack(
    stores: Sequence[TokenStore],
    component: str | None,
    *,
    method: Method,
    length: int,
    own: np.ndarray | None = None,
) -> Packing:
    """Pack the documents of some stores in order.

    Args:
        component: name of the component whose documents are packed; None: all documents.
        method: "contiguous" for text in a row, "text" for whole texts, "examples" for prompts and chats.
        length: T, tokens of a window.
        own: mask (D) bool over the documents of all stores; the others are left out. None: no other is left out.
    """
    documents, size = _documents_of(stores, component, own)
    lengths = documents["length"]
    dropped: dict[str, int] = {}
    if method == "contiguous":
        pieces, first_piece = _contiguous(documents, length)
    elif method == "text":
        pieces, first_piece = _best_fit(_cut_text(documents, length), length)
    else:
        examples, dropped = _cut_examples(documents, length, _have_targets(stores, documents, length))
        pieces, first_piece = _best_fit(examples, length)
    # A length that equals a limit falls into the bin below it.
    bins = np.bincount(np.searchsorted(LENGTHS, lengths), minlength=len(LENGTHS) + 1)
    facts = DocumentFacts(len(documents), size, int(lengths.sum(dtype=np.int64)), bins.tolist(), dropped)
    return Packing(pieces, first_piece, facts)


def _documents_of(
    stores: Sequence[TokenStore], component: str | None, own: np.ndarray | None
) -> tuple[np.ndarray, int]:
    """Return the documents to pack as (D) PIECE, and their UTF-8 bytes."""
    documents = []
    size = 0
    before = 0  # documents of earlier stores
    for number, store in enumerate(stores):
        ends = np.asarray(store.ends)
        starts = np.concatenate(([0], ends))[: len(ends)]
        chosen = np.full(len(ends), True)
        if component is not None:
            known = component in store.names
            chosen = np.asarray(store.components) == (store.names.index(component) if known else -1)
        if own is not None:
            chosen &= own[before : before + len(ends)]
        before += len(ends)
        found = np.empty(np.count_nonzero(chosen), dtype=PIECE)
        found["store"] = number
        found["start"] = starts[chosen]
        found["length"] = (ends - starts)[chosen]
        documents.append(found)
        size += int(store.bytes[chosen].sum())
    return np.concatenate(documents), size


def _contiguous(documents: np.ndarray, length: int) -> tuple[np.ndarray, np.ndarray]:
    """Cut the concatenated documents every ``length`` tokens: only the last window can contain padding.

    A document that crosses a border counts as another document in the next window: its attention and positions
    start afresh.

    Returns:
        The pieces, and the first piece of each window, as in ``Packing``.
    """
    # Where each document ends in the concatenation.
    ends = documents["length"].cumsum(dtype=np.int64)
    total = int(ends[-1]) if len(ends) else 0
    # A piece ends where a document or a window does. Inserting keeps the order, without a sort.
    borders = np.arange(length, total, length)
    piece_ends = np.insert(ends, np.searchsorted(ends, borders), borders)
    # A document may end where a window does, and an empty one ends where it begins.
    piece_ends = piece_ends[np.diff(piece_ends, prepend=0) > 0]
    piece_starts = np.concatenate(([0], piece_ends))[:-1]
    owner = np.searchsorted(ends, piece_starts, side="right")
    pieces = documents[owner]
    document_starts = ends[owner] - pieces["length"]
    pieces["start"] += piece_starts - document_starts
    pieces["length"] = piece_ends - piece_starts
    windows = -(-total // length)
    first_piece = np.searchsorted(piece_starts, np.arange(windows + 1) * length)
    return pieces, first_piece


def _cut_text(documents: np.ndarray, length: int) -> np.ndarray:
    """Cut documents longer than a window every ``length`` tokens; no other is cut. Returns (P) PIECE."""
    lengths = documents["length"].astype(np.int64)
    pieces_of = -(-lengths // length)
    pieces = np.repeat(documents, pieces_of)
    # Number the pieces within their documents: the running number, less that of the document's first piece.
    first_piece_of = pieces_of.cumsum() - pieces_of
    offset = (np.arange(len(pieces)) - np.repeat(first_piece_of, pieces_of)) * length
    pieces["start"] += offset
    pieces["length"] = np.minimum(pieces["length"] - offset, length)
    return pieces


def _cut_examples(documents: np.ndarray, length: int, have_targets: np.ndarray) -> tuple[np.ndarray, dict[str, int]]:
    """Keep the first ``length`` tokens of each example (a prompt with its response, or a chat).

    Args:
        have_targets: (D) bool; examples without are dropped.

    Returns:
        (P) PIECE, and the number of tokens dropped for each reason.
    """
    lengths = documents["length"].astype(np.int64)
    pieces = documents[have_targets]
    kept = np.minimum(lengths[have_targets], length)
    dropped = {
        "nothing to predict within sequence_length": int(lengths[~have_targets].sum()),
        "beyond sequence_length": int((pieces["length"] - kept).sum()),
    }
    pieces["length"] = kept
    return pieces, dropped


def _have_targets(stores: Sequence[TokenStore], documents: np.ndarray, length: int) -> np.ndarray:
    """Return a mask (D) bool of documents with a target among their first ``length`` tokens.

    A first token is no target: nothing precedes it.
    """
    found = np.full(len(documents), False)
    for number, store in enumerate(stores):
        own = np.flatnonzero(documents["store"] == number)
        first = documents["start"][own] + 1
        end = first - 1 + np.minimum(documents["length"][own], length)
        if store.targets is None:
            found[own] = first < end
            continue
        # A part of the store at a time: the documents are in order, and their tokens may be more than memory holds.
        for batch in np.array_split(np.arange(len(own)), 1 + len(store.targets) // _FLAGS_AT_ONCE):
            if len(batch) == 0:
                continue
            begin = first[batch[0]]
            flags = store.targets[begin : end[batch].max()]
            targets_before = np.concatenate(([0], np.cumsum(flags, dtype=np.int64)))
            last = len(flags)
            counted = targets_before[end[batch] - begin] - targets_before[np.minimum(first[batch] - begin, last)]
            found[own[batch]] = counted > 0
    return found


def _best_fit(pieces: np.ndarray, length: int) -> tuple[np.ndarray, np.ndarray]:
    """Put each piece into the window that it fills best. Returns the same as ``_contiguous``."""
    # Longest first, which best fit needs; stable sorts, so that the packing is the same on every machine. Small
    # integers are sorted several times as fast.
    shortfall = (length - pieces["length"].astype(np.int64)).astype(np.min_scalar_type(length))
    longest_first = pieces[np.argsort(shortfall, kind="stable")]
    window_of = best_fit(longest_first["length"], length)
    windows = int(window_of.max(initial=-1)) + 1
    by_window = np.argsort(window_of, kind="stable")
    first_piece = np.searchsorted(window_of[by_window], np.arange(windows + 1))
    return longest_first[by_window], first_piece


class Windows:
    """A sequence of windows; ``windows[i]`` is put together when it is read.

    Attributes:
        length: T, tokens of a window.
        facts: about the documents.
    """

    def __init__(self, stores: Sequence[TokenStore], packing: Packing, *, length: int, fill: int) -> None:
        """``fill``: token id of the padding."""
        self.length = length
        self.facts = packing.facts
        self._stores = list(stores)
        self._pieces = packing.pieces
        self._first_piece = packing.first_piece
        self._fill = fill

    def __len__(self) -> int:
        return len(self._first_piece) - 1

    @property
    def padding(self) -> int:
        """Number of positions that hold no token."""
        packed = self.facts.tokens - sum(self.facts.dropped.values())
        return len(self) * self.length - packed

    def __getitem__(self, index: int) -> Window:
        tokens = np.full(self.length, self._fill, dtype=np.int64)
        document_ids = np.full(self.length, PADDING, dtype=np.int64)
        targets = np.full(self.length, False)
        first, end = self._first_piece[index : index + 2]
        used = 0
        for document_id, (store, start, length) in enumerate(self._pieces[first:end].tolist(), start=1):
            span = slice(used, used + length)
            tokens[span], targets[span] = self._stores[store].part(start, length)
            document_ids[span] = document_id
            used += length
        return Window(tokens, document_ids, targets)
