"""Causal language modelling on packed windows."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gptj_train.data.cache import PackedWindows
from gptj_train.data.loader import evaluation_batches, micro_batches_at
from gptj_train.data.packing import PADDING
from gptj_train.data.tokenizer import Tokenizer
from gptj_train.model.loss import IGNORE, next_token_targets


class CausalLM:
    """Next-token prediction; documents in a window neither see nor predict each other.

    Without ``train`` it only evaluates.
    """

    def __init__(
        self,
        train: PackedWindows | None,
        validation: PackedWindows | None,
        tokenizer: Tokenizer,
        seed: int,
        global_batch_size: int,
        micro_batch_size: int,
    ) -> None:
        self._train, self._validation = train, validation
        self._bytes_per_token = torch.from_numpy(tokenizer.bytes_per_token)
        self._seed = seed
        self._global_batch_size, self._micro_batch_size = global_batch_size, micro_batch_size

    def training_rows(self, step: int, rank: int, world_size: int) -> list[list[int]]:
        assert self._train is not None
        return micro_batches_at(
            step, len(self._train), self._seed, self._global_batch_size, self._micro_batch_size, rank, world_size
        )

    def training_batches(self, step: int, rank: int, world_size: int) -> list[dict[str, Tensor]]:
        assert self._train is not None
        return [_batch(self._train, rows) for rows in self.training_rows(step, rank, world_size)]

    def evaluation_batches(self, rank: int, world_size: int) -> Iterable[dict[str, Tensor]]:
        if self._validation is None:
            return
        for rows in evaluation_batches(len(self._validation), self._micro_batch_size, rank, world_size):
            yield _batch(self._validation, rows)

    def targets(self, batch: dict[str, Tensor]) -> int:
        return int((_targets(batch) != IGNORE).sum())

    def records(self, output: Any, batch: dict[str, Tensor]) -> list[tuple[float, int, int]]:
        """Summed loss, targets and the targets' bytes."""
        targets = _targets(batch)
        wanted = targets[targets != IGNORE]
        return [(output.loss.item(), len(wanted), int(self._bytes_per_token[wanted].sum()))]

    def metrics(self, records: list[tuple[float, int, int]]) -> dict[str, float]:
        """Loss in nats per token, its perplexity, and bits per UTF-8 byte, which compares across tokenizers."""
        summed_loss, tokens, size = (math.fsum(column) for column in zip(*records, strict=True))
        loss = summed_loss / tokens
        return {
            "eval_loss": loss,
            "perplexity": math.exp(min(loss, 700)),
            "bits_per_byte": summed_loss / math.log(2) / max(size, 1),
        }

    def write_predictions(self, folder: str | Path) -> None:
        """Nothing: losses are all there is."""


def _targets(batch: dict[str, Tensor]) -> Tensor:
    return next_token_targets(batch["labels"], batch["document_ids"])


def _batch(windows: PackedWindows, rows: Sequence[int | None]) -> dict[str, Tensor]:
    """input_ids, labels and document_ids, (B, T) int64; a row of None is a window of padding alone."""
    known = [0 if row is None else row for row in rows]
    input_ids = torch.from_numpy(windows.tokens[known].astype(np.int64))
    document_ids = torch.from_numpy(windows.document_ids[known].astype(np.int64))
    document_ids[[row is None for row in rows]] = PADDING
    labels = input_ids.masked_fill(document_ids == PADDING, IGNORE)
    return {"input_ids": input_ids, "labels": labels, "document_ids": document_ids}
