"""Windows rendered for reading: where documents begin, and what is not predicted."""

from __future__ import annotations

import sys
from collections.abc import Iterator

import numpy as np

from gptj_train.data.corpus import Split
from gptj_train.data.packing import PADDING, Window
from gptj_train.data.sampler import sample_at
from gptj_train.data.tokenizer import Tokenizer

_DIM, _RESET = "\033[2m", "\033[0m"
_COLOURS = ("\033[36m", "\033[33m")  # documents in turn
# Data may contain escape sequences, which a terminal would obey: control characters are written as \x1b.
_CONTROL = {code: f"\\x{code:02x}" for code in (*range(32), *range(127, 160)) if chr(code) not in "\n\t"}


def render_windows(split: Split, tokenizer: Tokenizer, *, count: int, seed: int) -> Iterator[str]:
    """Render ``count`` random windows of each component, in colours if stdout is a terminal.

    ``[1]``, ``[2]``, ... begin documents, ``{...}`` is not predicted, and a special token that is a single id stands in
    ``⟦...⟧``: text that only spells it does not.
    """
    colours = sys.stdout.isatty()
    for name, windows in split.windows.items():
        for position in range(min(count, len(windows))):
            index = sample_at(position, len(windows), seed)
            title = f"--- window {index:,} of {len(windows):,} {name}".rstrip()
            yield f"{title} ---\n{_render(windows[index], tokenizer, colours)}"


def _render(window: Window, tokenizer: Tokenizer, colours: bool) -> str:
    tokens, document_ids, targets = window
    # A run of tokens ends where the document or the target flag changes.
    new_document = np.diff(document_ids, prepend=-1) != 0
    new_flag = np.diff(targets, prepend=targets[0]) != 0
    starts = np.flatnonzero(new_document | new_flag)
    ends = [*starts[1:], len(tokens)]
    rendered = []
    current = PADDING
    for start, end in zip(starts, ends, strict=True):
        document_id = document_ids[start]
        if document_id == PADDING:
            rendered.append(_painted(f"[{end - start:,} of padding]", _DIM, colours))
            continue
        if document_id != current:
            current = document_id
            rendered.append(f"\n[{document_id}] ")
        text = _spelt(tokens[start:end].tolist(), tokenizer).translate(_CONTROL)
        if targets[start]:
            rendered.append(_painted(text, _COLOURS[document_id % 2], colours))
        else:
            rendered.append(_painted("{" + text + "}", _DIM, colours))
    return "".join(rendered).lstrip("\n")


def _spelt(ids: list[int], tokenizer: Tokenizer) -> str:
    """Decode ids, with a mark around each special token."""
    special = {number: token for token, number in tokenizer.special_tokens.items()}
    parts = []
    run: list[int] = []
    for number in ids:
        if number not in special:
            run.append(number)
            continue
        # Decoded together: a character may span several ids.
        parts += [tokenizer.decode_all(run), f"⟦{special[number]}⟧"]
        run = []
    return "".join([*parts, tokenizer.decode_all(run)])


def _painted(text: str, paint: str, colours: bool) -> str:
    return f"{paint}{text}{_RESET}" if colours else text
