"""Stored weights with some rows of the vocabulary replaced, as if the file held them so."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from gptj_train.weights.stored import StoredWeights

_TABLES = ("transformer.wte.weight", "lm_head.weight", "lm_head.bias")


class WithMeanRows(StoredWeights):
    """``weights``, in which rows of embedding and head are the mean of other rows.

    Args:
        rows: row -> the rows whose mean it is.
    """

    def __init__(self, weights: StoredWeights, rows: Mapping[int, Sequence[int]]) -> None:
        self.folder, self._weights, self._rows = weights.folder, weights, rows

    def names(self) -> list[str]:
        return self._weights.names()

    def form(self, name: str) -> tuple[tuple[int, ...], str]:
        return self._weights.form(name)

    def tensor(self, name: str) -> Tensor:
        whole = self._weights.tensor(name).clone()
        for row, mean in self._means(name):
            whole.view(-1)[row * len(mean) : (row + 1) * len(mean)] = mean
        return whole

    def read(self, name: str, start: int, into: Tensor) -> None:
        self._weights.read(name, start, into)
        for row, mean in self._means(name):
            first, last = max(row * len(mean), start), min((row + 1) * len(mean), start + len(into))
            if first < last:
                into[first - start : last - start] = mean[first - row * len(mean) : last - row * len(mean)]

    def close(self) -> None:
        self._weights.close()

    def _means(self, name: str) -> list[tuple[int, Tensor]]:
        """Each new row of a table and its values in fp32, (D)."""
        if name not in _TABLES:
            return []
        shape, _ = self._weights.form(name)
        width = shape[1] if len(shape) > 1 else 1
        means = []
        for row, others in self._rows.items():
            read = torch.empty(len(others), width)
            for other, values in zip(others, read, strict=True):
                self._weights.read(name, other * width, values)
            means.append((row, read.mean(dim=0)))
        return means
