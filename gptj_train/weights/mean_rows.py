"""Stored weights in which some rows of the vocabulary are replaced by the mean of others."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from gptj_train.weights.stored import StoredWeights

_TABLES = ("transformer.wte.weight", "lm_head.weight", "lm_head.bias")


class WithMeanRows(StoredWeights):
    """``weights``, as if their file held the mean of other rows in some rows of embedding and head.

    Args:
        rows: row -> the rows whose mean replaces it.
    """

    def __init__(self, weights: StoredWeights, rows: Mapping[int, Sequence[int]]) -> None:
        self.folder, self._weights, self._rows = weights.folder, weights, rows

    def names(self) -> list[str]:
        return self._weights.names()

    def shape_and_dtype(self, name: str) -> tuple[tuple[int, ...], str]:
        return self._weights.shape_and_dtype(name)

    def tensor(self, name: str) -> Tensor:
        # A copy: the stored tensor may be mapped from a file.
        whole = self._weights.tensor(name).clone()
        self._replace_rows(name, 0, whole.view(-1))
        return whole

    def check_finite(self, name: str, tensor: Tensor) -> None:
        self._weights.check_finite(name, tensor)

    def read(self, name: str, start: int, into: Tensor) -> None:
        self._weights.read(name, start, into)
        self._replace_rows(name, start, into)

    def _replace_rows(self, name: str, start: int, part: Tensor) -> None:
        """Put the means into a part of a flattened table, from its element ``start`` on."""
        end = start + len(part)
        for row, mean in self._means(name):
            row_start = row * len(mean)
            # A rank's slice may begin or end inside a row.
            first = max(row_start, start)
            last = min(row_start + len(mean), end)
            if first < last:
                part[first - start : last - start] = mean[first - row_start : last - row_start]

    def close(self) -> None:
        self._weights.close()

    def _means(self, name: str) -> list[tuple[int, Tensor]]:
        """Return each replaced row of a table with its values in fp32, (D), or (1) of a bias."""
        if name not in _TABLES:
            return []
        shape, _ = self._weights.shape_and_dtype(name)
        width = shape[1] if len(shape) > 1 else 1
        means = []
        for row, others in self._rows.items():
            # Read into fp32 row by row: a mean taken in bf16 would lose bits, the whole table memory.
            values = torch.empty(len(others), width)
            for other, into in zip(others, values, strict=True):
                self._weights.read(name, other * width, into)
            means.append((row, values.mean(dim=0)))
        return means
