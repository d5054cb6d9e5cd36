"""The cache of past keys and values that makes generating a token cheap."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from gptj_train.errors import UserError


class KVCache:
    """Keys and values of all past tokens, one pair of (B, N, T, H) tensors for each layer.

    New tokens are written behind the past, into memory that is there already: appending a token moves that token
    alone, where a concatenation would copy the whole past.

    Args:
        room: tokens that the memory of a layer holds, allocated by the layer's first update. 0 keeps this update as it
            comes, and the next one allocates twice what it needs.
    """

    def __init__(self, room: int = 0) -> None:
        self._room = room
        self._keys: list[Tensor] = []  # (B, N, T, H), views of the memory's first T tokens
        self._values: list[Tensor] = []
        self._memory: dict[int, tuple[Tensor, Tensor]] = {}  # layer -> (B, N, room, H)

    def __len__(self) -> int:
        return len(self._keys)

    def __getitem__(self, layer: int) -> tuple[Tensor, Tensor]:
        return self._keys[layer], self._values[layer]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Return the number of cached tokens."""
        return self._keys[layer_idx].shape[2] if layer_idx < len(self._keys) else 0

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *_: Any) -> tuple[Tensor, Tensor]:
        """Append new keys and values (B, N, T, H) to a layer and return all of the layer's."""
        is_first = layer_idx == len(self._keys)
        if is_first:
            self._keys.append(key_states)
            self._values.append(value_states)
        # Autograd, and a compiler's graph, keep the past as it was: nothing may be written into it.
        in_place = not torch.is_grad_enabled() and not torch.compiler.is_compiling()
        if is_first:
            if in_place and self._room > key_states.shape[2]:
                self._allocate(layer_idx, self._room)
            return self[layer_idx]
        past_key, past_value = self[layer_idx]
        if not in_place:
            key = torch.cat((past_key, key_states), dim=2)
            value = torch.cat((past_value, value_states), dim=2)
        else:
            key, value = self._append(layer_idx, key_states, value_states)
        self._keys[layer_idx], self._values[layer_idx] = key, value
        return key, value

    def _append(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        past = self.get_seq_length(layer)
        end = past + key.shape[2]
        memory = self._memory.get(layer)
        if memory is None or not _is_writable(memory[0], end):
            self._allocate(layer, 2 * end)
        keys, values = self._memory[layer]
        keys[:, :, past:end] = key
        values[:, :, past:end] = value
        return keys[:, :, :end], values[:, :, :end]

    def _allocate(self, layer: int, room: int) -> None:
        """Move a layer into memory for so many tokens."""
        key, value = self[layer]
        length = key.shape[2]
        keys, values = _with_room(key, room), _with_room(value, room)
        self._memory[layer] = keys, values
        self._keys[layer], self._values[layer] = keys[:, :, :length], values[:, :, :length]

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Select batch rows: row i of the cache becomes the former ``beam_idx[i]``."""
        for layer in range(len(self)):
            key, value = self[layer]
            # Only the tokens that are there move, not the room behind them.
            new_key, new_value = key.index_select(0, beam_idx), value.index_select(0, beam_idx)
            memory = self._memory.get(layer)
            same_rows = len(beam_idx) == len(key)
            if memory is not None and same_rows and _is_writable(memory[0], key.shape[2]):
                key.copy_(new_key)
                value.copy_(new_value)
            else:
                self._memory.pop(layer, None)
                self._keys[layer], self._values[layer] = new_key, new_value

    def crop(self, max_length: int) -> None:
        """Forget all but the first tokens; a negative length counts from the end."""
        length = self.get_seq_length()
        kept = max_length if max_length >= 0 else length + max_length
        for layer in range(len(self)):
            self._keys[layer] = self._keys[layer][:, :, :kept]
            self._values[layer] = self._values[layer][:, :, :kept]


def _is_writable(memory: Tensor, end: int) -> bool:
    # Memory made in inference mode cannot be written outside of it.
    frozen = memory.is_inference() and not torch.is_inference_mode_enabled()
    return memory.shape[2] >= end and not frozen


def _with_room(past: Tensor, room: int) -> Tensor:
    batch, heads, length, size = past.shape
    memory = past.new_empty(batch, heads, room, size)
    memory[:, :, :length] = past
    return memory


class TrimmedCache:
    """Another library's cache, reduced to the tokens that are there: static ones return their whole memory.

    Args:
        cache: an object with ``update(key, value, layer)`` and ``get_seq_length()``, as Transformers' caches.
        total: tokens that it holds after this forward.
    """

    def __init__(self, cache: Any, total: int) -> None:
        self._cache = cache
        self._total = total

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int) -> tuple[Tensor, Tensor]:
        """Append to a layer of the cache and return the layer's keys and values without spare room."""
        key, value = self._cache.update(key_states, value_states, layer_idx)
        return key[:, :, : self._total], value[:, :, : self._total]


def past_length_of(cache: Any) -> int:
    """Return the number of cached tokens; 0 without a cache.

    Raises:
        UserError: an object that is no cache, such as the tuples of old Transformers versions.
    """
    if cache is None:
        return 0
    if not (hasattr(cache, "update") and hasattr(cache, "get_seq_length")):
        raise UserError(
            f"past_key_values must be a cache with update and get_seq_length, got {type(cache).__name__}; "
            "give the past_key_values of an earlier output"
        )
    return int(cache.get_seq_length())


def _flatten(cache: KVCache) -> tuple[list[Tensor], None]:
    return [*cache._keys, *cache._values], None


def _unflatten(tensors: Any, _: None) -> KVCache:
    cache = KVCache()
    tensors = list(tensors)
    half = len(tensors) // 2
    cache._keys, cache._values = tensors[:half], tensors[half:]
    return cache


# torch.export, FSDP2 and static DDP look for the tensors of an output, this cache among them, in this registry.
pytree.register_pytree_node(KVCache, _flatten, _unflatten, serialized_type_name="gptj_train.KVCache")
