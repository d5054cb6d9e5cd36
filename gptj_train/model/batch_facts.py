"""Facts about a batch that decide how it is computed, read while it is still on the host.

Read from a GPU, each of them would wait until the device has finished everything before it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from gptj_train.model.document_positions import document_lengths
from gptj_train.model.loss import IGNORE, next_token_targets


@dataclass(frozen=True, kw_only=True)
class BatchFacts:
    """What a forward would otherwise read from ``document_ids``, ``labels`` and ``attention_mask``.

    A fact of an input that the batch lacks is None.

    Attributes:
        document_lengths: lengths of the packed documents, row after row.
        target_index: (M) int64, the tokens of the flattened (B * T) batch that have a next-token target.
        padded: the attention mask hides a token.
        right_padded: padding comes after the real tokens only, in every row.
        starts_real: every row begins with a real token, so that each query sees a key.
    """

    document_lengths: tuple[int, ...] | None = None
    target_index: Tensor | None = None
    padded: bool | None = None
    right_padded: bool | None = None
    starts_real: bool | None = None

    @staticmethod
    def of(batch: Mapping[str, Tensor]) -> BatchFacts:
        """Read the facts of a batch, the keyword arguments of a model's forward, on the CPU."""
        facts = BatchFacts()
        documents = batch.get("document_ids")
        if documents is not None:
            facts = replace(facts, document_lengths=document_lengths(documents))
        labels = batch.get("labels")
        # Labels of the shape of the tokens are next-token labels; those of a classification have one a row.
        if labels is not None and labels.shape == batch["input_ids"].shape and not labels.is_floating_point():
            is_target = next_token_targets(labels, documents) != IGNORE
            facts = replace(facts, target_index=is_target.flatten().nonzero().flatten())
        mask = batch.get("attention_mask")
        if mask is not None:
            real = mask != 0
            returns = real[:, 1:] & ~real[:, :-1]  # a real token after padding
            facts = replace(
                facts,
                padded=not bool(real.all()),
                right_padded=not bool(returns.any()),
                starts_real=bool(real[:, 0].all()),
            )
        return facts


def inputs_on(device: torch.device, batch: Mapping[str, Tensor]) -> dict[str, Any]:
    """Return a batch of the host as arguments of a model's forward on a device, with ``facts`` beside them."""
    facts = BatchFacts.of(batch)
    if facts.target_index is not None:
        facts = replace(facts, target_index=_moved(facts.target_index, device))
    moved = {name: _moved(tensor, device) for name, tensor in batch.items()}
    return {**moved, "facts": facts}


def _moved(tensor: Tensor, device: torch.device) -> Tensor:
    if device.type == "cuda":
        # From pageable memory the copy would block the host.
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)
