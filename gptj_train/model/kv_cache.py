"""The cache of past keys and values that makes generating a token cheap."""

from __future__ import annotations

import torch
from torch import Tensor


class KVCache:
    """Keys and values of all past tokens, one pair of (B, N, T, H) tensors for each layer."""

    def __init__(self) -> None:
        self._layers: list[tuple[Tensor, Tensor]] = []

    def __len__(self) -> int:
        return len(self._layers)

    def __getitem__(self, layer: int) -> tuple[Tensor, Tensor]:
        return self._layers[layer]

    def get_seq_length(self) -> int:
        """Return the number of cached tokens."""
        if not self._layers:
            return 0
        first_key, _ = self._layers[0]
        return first_key.shape[2]

    def update(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Append new keys and values (B, N, T, H) to a layer and return all of the layer's."""
        if layer == len(self._layers):
            self._layers.append((key, value))
            return key, value
        past_key, past_value = self._layers[layer]
        key = torch.cat((past_key, key), dim=2)
        value = torch.cat((past_value, value), dim=2)
        self._layers[layer] = (key, value)
        return key, value

    def reorder(self, rows: Tensor) -> None:
        """Select batch rows: row i of the cache becomes the former ``rows[i]``."""
        for layer, (key, value) in enumerate(self._layers):
            self._layers[layer] = (key[rows], value[rows])
