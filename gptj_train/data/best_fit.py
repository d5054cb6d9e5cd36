"""Best-fit decreasing: which window each piece of text goes into."""

from __future__ import annotations

from bisect import bisect_left, insort

import numpy as np


def best_fit(lengths: np.ndarray, capacity: int) -> np.ndarray:
    """Assign pieces to windows: each to the one with the least room that suffices, or else to a new one.

    It needs at most about 11/9 of the fewest possible windows (Johnson, 1973). Pieces of one length are placed
    together, so that the time depends on ``capacity``, and hardly on the number of pieces.

    Args:
        lengths: (P) of the pieces, from the longest to the shortest, from 1 to ``capacity``.

    Returns:
        (P) int64, the window of each piece.
    """
    window_of = np.empty(len(lengths), dtype=np.int64)
    open_windows = _OpenWindows(capacity)
    for first, end in _runs(lengths):
        length = int(lengths[first])
        while first < end:
            room, windows = open_windows.best(length, pieces=end - first)
            # The best window stays the best until the next piece no longer fits: it takes all that fit.
            each = room // length
            placed = min(len(windows) * each, end - first)
            window_of[first : first + placed] = np.repeat(windows, each)[:placed]
            full, rest = divmod(placed, each)
            open_windows.add(room - each * length, windows[:full])
            if rest:
                open_windows.add(room - rest * length, windows[full : full + 1])
            first += placed
    return window_of


class _OpenWindows:
    """Windows by the room that they have left.

    There are at most ``capacity`` rooms, however many windows: a sorted list of rooms stays short.
    """

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._rooms: list[int] = []  # sorted
        # For each room a stack of arrays of windows: the last window of the last array is the next to be filled.
        self._stacks: dict[int, list[np.ndarray]] = {}
        self._opened = 0

    def best(self, length: int, *, pieces: int) -> tuple[int, np.ndarray]:
        """Take windows of the least room that suffices, in the order to fill; without one, open new windows.

        Returns:
            The room, and at most as many windows as all ``pieces`` need.
        """
        at = bisect_left(self._rooms, length)
        if at == len(self._rooms):
            needed = -(-pieces // (self._capacity // length))
            first = self._opened
            self._opened += needed
            return self._capacity, np.arange(first, self._opened)
        room = self._rooms[at]
        needed = -(-pieces // (room // length))
        stack = self._stacks[room]
        top = stack.pop()
        if len(top) > needed:
            stack.append(top[:-needed])
            top = top[-needed:]
        if not stack:
            del self._stacks[room]
            del self._rooms[at]
        return room, top[::-1]

    def add(self, room: int, windows: np.ndarray) -> None:
        """Put windows back, in this order; full ones are forgotten."""
        if room == 0 or len(windows) == 0:
            return
        if room not in self._stacks:
            self._stacks[room] = []
            insort(self._rooms, room)
        self._stacks[room].append(windows)


def _runs(lengths: np.ndarray) -> list[tuple[int, int]]:
    """Return (first, end) of each run of equal lengths."""
    if len(lengths) == 0:
        return []
    borders = (np.flatnonzero(np.diff(lengths)) + 1).tolist()
    return list(zip([0, *borders], [*borders, len(lengths)], strict=True))
