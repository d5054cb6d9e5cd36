"""Tokenize the segments of a chat as one text, so that training sees the tokens that a server makes of it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from gptj_train.data.records import Segment
from gptj_train.data.tokenizer import Tokenizer


@dataclass
class _Run:
    """Plain text between two special tokens of templates: parts of one segment or several."""

    parts: list[str] = field(default_factory=list)
    owners: list[int] = field(default_factory=list)  # the segment of each part


def encode_joined(
    segments: Sequence[Segment], tokenizer: Tokenizer, *, special_tokens: bool = False
) -> list[list[int]]:
    """Return the token ids of each segment; those of joined segments are the tokens of their joint text.

    Special tokens in templates cut the text, as in every tokenizer; in data they are plain text
    unless ``special_tokens`` is set. A token that lies
    in two segments belongs to the later one: the first token of an answer is to be learned with the space before it.
    """
    # What comes in which order: a run of text, or (segment, special id).
    sequence: list[_Run | tuple[int, int]] = []
    for number, segment in enumerate(segments):
        if not segment.joined:
            sequence.append(_Run())
        for text, special_id in _split(segment, tokenizer, special_tokens):
            if special_id is not None:
                sequence += [(number, special_id), _Run()]
                continue
            run = sequence[-1]
            assert isinstance(run, _Run)  # a special token is followed by one
            run.parts.append(text)
            run.owners.append(number)
    # All at once: the tokenizer spreads texts over the cores.
    runs = [item for item in sequence if isinstance(item, _Run)]
    encoded = iter(tokenizer.encode_texts(["".join(run.parts) for run in runs]))
    ids: list[list[int]] = [[] for _ in segments]
    for item in sequence:
        if isinstance(item, _Run):
            _share_out(item, next(encoded), ids, tokenizer)
        else:
            owner, special_id = item
            ids[owner].append(special_id)
    return ids


def _split(segment: Segment, tokenizer: Tokenizer, special_tokens: bool) -> list[tuple[str, int | None]]:
    """Return the texts and special ids of a segment, in order."""
    if not (segment.template or special_tokens) or not tokenizer.special_tokens:
        return [(segment.text, None)]
    # The longest first: one special token may begin another.
    names = sorted(tokenizer.special_tokens, key=len, reverse=True)
    pattern = "|".join(re.escape(name) for name in names)
    parts = re.split(f"({pattern})", segment.text)
    return [(part, tokenizer.special_tokens.get(part)) for part in parts if part]


def _share_out(run: _Run, run_ids: list[int], ids: list[list[int]], tokenizer: Tokenizer) -> None:
    """Append the ids of a run to those of the segments that hold their last byte."""
    part_ends = np.cumsum([len(part.encode()) for part in run.parts])
    token_ends = tokenizer.bytes_per_token[np.array(run_ids, dtype=np.int64)].cumsum()
    if len(run_ids) and token_ends[-1] != part_ends[-1]:
        # The tokenizer changes the text, so that a token's place in it is unknown: each part by itself.
        for owner, part_ids in zip(run.owners, tokenizer.encode_texts(run.parts), strict=True):
            ids[owner] += part_ids
        return
    for token, end in zip(run_ids, token_ends.tolist(), strict=True):
        part = int(np.searchsorted(part_ends, end, side="left"))
        ids[run.owners[part]].append(token)
