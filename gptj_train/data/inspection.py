"""Windows as a person reads them: where documents begin, and what is not to be predicted."""

from __future__ import annotations

import sys
from collections.abc import Iterator

import numpy as np

from gptj_train.data.corpus import Part
from gptj_train.data.packing import PADDING, Window
from gptj_train.data.sampler import sample_at
from gptj_train.data.tokenizer import Tokenizer

_DIM, _RESET = "\033[2m", "\033[0m"
_COLOURS = ("\033[36m", "\033[33m")  # documents in turn
# Spelt out: a terminal would obey them.
_CONTROL = {code: f"\\x{code:02x}" for code in (*range(32), *range(127, 160)) if chr(code) not in "\n\t"}


def shown(part: Part, tokenizer: Tokenizer, count: int, seed: int) -> Iterator[str]:
    """``count`` windows of each component, drawn by the seed, with colours on a terminal and without elsewhere.

    A document begins with ``[1]``, ``[2]``, ...; what is not to be predicted stands in ``{...}``.
    """
    for name, windows in part.windows.items():
        for position in range(min(count, len(windows))):
            index = sample_at(position, len(windows), seed)
            title = f"--- window {index:,} of {len(windows):,} {name}".rstrip()
            yield f"{title} ---\n{_drawn(windows[index], tokenizer, sys.stdout.isatty())}"


def _drawn(window: Window, tokenizer: Tokenizer, colour: bool) -> str:
    tokens, owners, targets = window
    starts = np.flatnonzero((np.diff(owners, prepend=-1) != 0) | (np.diff(targets, prepend=targets[0]) != 0))
    drawn, owner = [], PADDING
    for start, end in zip(starts, [*starts[1:], len(tokens)], strict=True):
        if owners[start] == PADDING:
            drawn.append(_painted(f"[{end - start:,} of padding]", _DIM, colour))
            continue
        if owners[start] != owner:
            owner = owners[start]
            drawn.append(f"\n[{owner}] ")
        text = tokenizer.decode_all(tokens[start:end].tolist()).translate(_CONTROL)
        paint = _COLOURS[owner % 2] if targets[start] else _DIM
        drawn.append(_painted(text if targets[start] else "{" + text + "}", paint, colour))
    return "".join(drawn).lstrip("\n")


def _painted(text: str, paint: str, colour: bool) -> str:
    return f"{paint}{text}{_RESET}" if colour else text
