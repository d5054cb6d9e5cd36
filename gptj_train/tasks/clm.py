"""Causal language modelling on packed windows."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from gptj_train.data.corpus import FORGETTING
from gptj_train.data.loader import Mixture, evaluation_batches, micro_positions_at
from gptj_train.data.packing import PADDING, Window, Windows
from gptj_train.data.tokenizer import Tokenizer
from gptj_train.model.loss import IGNORE, next_token_targets


class Record(NamedTuple):
    """Of an evaluation batch: its component, summed loss, targets and the targets' bytes."""

    component: str
    loss: float
    targets: int
    bytes: int


class CausalLM:
    """Next-token prediction; with ``isolate``, documents in a window neither see nor predict each other.

    Without ``train`` it only evaluates.
    """

    def __init__(
        self,
        train: Mapping[str, Windows] | None,
        weights: Sequence[float] | None,
        held_out: Mapping[str, Windows],
        tokenizer: Tokenizer,
        isolate: bool,
        seed: int,
        global_batch_size: int,
        micro_batch_size: int,
    ) -> None:
        """``weights`` are those of ``train``'s components; ``held_out`` may have a component ``FORGETTING``."""
        self._train = train or {}
        self._mixture = Mixture([len(windows) for windows in self._train.values()], weights, seed) if train else None
        self._held_out = held_out
        self._bytes_per_token = torch.from_numpy(tokenizer.bytes_per_token)
        self._fill, self._isolate = tokenizer.end_id, isolate
        self._global_batch_size, self._micro_batch_size = global_batch_size, micro_batch_size

    def training_rows(self, step: int, rank: int, world_size: int) -> list[list[Any]]:
        """Numbers of windows, or "component:number" where there are several."""
        names = list(self._train)
        places = self._places(step, rank, world_size)
        return [[f"{names[c]}:{window}" if names[c] else window for c, window in batch] for batch in places]

    def training_batches(self, step: int, rank: int, world_size: int) -> list[dict[str, Tensor]]:
        components = list(self._train.values())
        places = self._places(step, rank, world_size)
        return [self._batch([components[component][window] for component, window in batch]) for batch in places]

    def _places(self, step: int, rank: int, world_size: int) -> list[list[tuple[int, int]]]:
        """(component, window) of each row of this rank's micro-batches."""
        assert self._mixture is not None
        positions = micro_positions_at(step, self._global_batch_size, self._micro_batch_size, rank, world_size)
        return [[self._mixture.at(position) for position in batch] for batch in positions]

    def epochs(self, steps: int) -> str:
        """How often so many steps go through the data, or through each component of a mixture."""
        assert self._mixture is not None
        times = self._mixture.epochs(steps * self._global_batch_size)
        return ", ".join(f"{name} {count:.2f}".strip() for name, count in zip(self._train, times, strict=True))

    def evaluation_batches(self, rank: int, world_size: int) -> Iterator[dict[str, Tensor]]:
        for component, windows in self._held_out.items():
            for rows in evaluation_batches(len(windows), self._micro_batch_size, rank, world_size):
                nothing = Window(*(np.zeros(windows.length, dtype) for dtype in (np.int64, np.int64, np.bool_)))
                chosen = [nothing if row is None else windows[row] for row in rows]
                yield _Batch(self._batch(chosen), component)

    def targets(self, batch: dict[str, Tensor]) -> int:
        return int((_targets(batch) != IGNORE).sum())

    def records(self, output: Any, batch: dict[str, Tensor]) -> list[Record]:
        assert isinstance(batch, _Batch)
        targets = _targets(batch)
        wanted = targets[targets != IGNORE]
        size = int(self._bytes_per_token[wanted].sum())
        return [Record(batch.component, output.loss.item(), len(wanted), size)]

    def metrics(self, records: list[Record]) -> dict[str, float]:
        """Loss in nats per token, its perplexity, and bits per UTF-8 byte, which compares across tokenizers.

        Over all of the validation data, and, where there are several components, ``.../NAME`` of each.
        """
        of_component: defaultdict[str, list[Record]] = defaultdict(list)
        for record in records:
            of_component[record.component].append(record)
        validation = [record for record in records if record.component != FORGETTING]
        found = _measured(validation or records)
        if len(of_component) > 1:
            for name, own in of_component.items():
                found |= {f"{metric}/{name}": value for metric, value in _measured(own).items()}
        return found

    def write_predictions(self, folder: str | Path) -> None:
        """Nothing: losses are all there is."""

    def _batch(self, windows: Iterable[Window]) -> dict[str, Tensor]:
        """input_ids, labels and document_ids, (B, T) int64."""
        input_ids, document_ids, predicted = (torch.from_numpy(np.stack(rows)) for rows in zip(*windows, strict=True))
        labels = input_ids.masked_fill(~predicted, IGNORE)
        if not self._isolate:
            document_ids = (document_ids != PADDING).long()
        return {"input_ids": input_ids, "labels": labels, "document_ids": document_ids}


class _Batch(dict[str, Tensor]):
    """A held-out batch that knows its component."""

    def __init__(self, tensors: dict[str, Tensor], component: str) -> None:
        super().__init__(tensors)
        self.component = component


def _measured(records: list[Record]) -> dict[str, float]:
    loss_sum = math.fsum(record.loss for record in records)
    tokens, size = sum(record.targets for record in records), sum(record.bytes for record in records)
    loss = loss_sum / max(tokens, 1)
    return {
        "eval_loss": loss,
        "perplexity": math.exp(min(loss, 700)),
        "bits_per_byte": loss_sum / math.log(2) / max(size, 1),
    }


def _targets(batch: dict[str, Tensor]) -> Tensor:
    return next_token_targets(batch["labels"], batch["document_ids"])
