"""Packed documents: where they start, how long they are, and their tokens' positions.

A document is a run of equal ids within a row. An id that returns later, or in another row, names another document.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def document_lengths(document_ids: Tensor) -> tuple[int, ...]:
    """Return the lengths of the runs of equal ids in each row of (B, T), row after row."""
    starts = document_starts(document_ids).flatten().nonzero().flatten()
    total = starts.new_tensor([document_ids.numel()])
    ends = torch.cat((starts[1:], total))
    return tuple((ends - starts).tolist())


def document_starts(document_ids: Tensor) -> Tensor:
    """Return (B, T) bool: True at the first token of each document. Every row starts one."""
    changes = document_ids[:, 1:] != document_ids[:, :-1]
    return F.pad(changes, (1, 0), value=True)


def positions_in_documents(document_ids: Tensor) -> Tensor:
    """Return the (B, T) int64 position of each token in its document, from 0."""
    length = document_ids.shape[1]
    index = torch.arange(length, device=document_ids.device).expand_as(document_ids)
    start_index = torch.where(document_starts(document_ids), index, 0)
    # The running maximum carries each document's start to all of its tokens.
    return index - start_index.cummax(dim=1).values


def documents_from_positions(position_ids: Tensor) -> Tensor:
    """Return document ids (B or 1, T) that start a document wherever ``position_ids`` does not rise by one."""
    before_first = position_ids[:, :1] - 1
    jumps = position_ids.diff(prepend=before_first) != 1
    return jumps.cumsum(1)
