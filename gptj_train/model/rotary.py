"""Interleaved rotary position embedding (RoFormer, arXiv 2104.09864), as GPT-J applies it."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor
from torch.nn import functional as F

_BASE = 10000


# A constant of compiled graphs: tracing it would compute the table anew in every forward.
@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _table(n_positions: int, rotary_size: int, device: torch.device) -> tuple[Tensor, Tensor]:
    return _kept_table(n_positions, rotary_size, device)


@lru_cache(maxsize=8)
def _kept_table(n_positions: int, rotary_size: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return sine and cosine, fp32 (n_positions, rotary_size / 2), of position * base^(-2i / rotary_size)."""
    # A cached function instead of a module buffer: zero.Init and module.to(bfloat16) would round a buffer.
    # Not inference tensors, even if generation asks first: training could not save those for its backward.
    with torch.inference_mode(False), torch.no_grad():
        # int64 first, the same numbers as in Transformers: fp32 enters with the division and the cast alone.
        even = torch.tensor(range(0, rotary_size, 2), dtype=torch.int64)
        exponent = even / rotary_size
        frequency = 1.0 / _BASE ** exponent.float()
        position = torch.tensor(range(n_positions), dtype=torch.int64).float()
        angle = position[:, None] * frequency
        return angle.sin().to(device), angle.cos().to(device)


def rotary_angles(position_ids: Tensor, n_positions: int, rotary_size: int) -> tuple[Tensor, Tensor]:
    """Look up sine and cosine of each position's angles.

    Args:
        position_ids: (B, T) or (1, T) integers below ``n_positions``.
        n_positions: size of the table, for all positions of the model.
        rotary_size: dimensions of a head that rotate, an even number.

    Returns:
        Two fp32 tensors (B or 1, T, 1, rotary_size / 2), to broadcast over heads.
    """
    sin, cos = _table(n_positions, rotary_size, position_ids.device)
    # Not sin[position_ids]: an index below 0 would count from the end; a lookup fails, on a GPU and compiled too.
    sin = F.embedding(position_ids, sin)
    cos = F.embedding(position_ids, cos)
    return sin.unsqueeze(2), cos.unsqueeze(2)


def rotate(x: Tensor, sin: Tensor, cos: Tensor) -> Tensor:
    """Rotate the leading dimensions of each head, each even one with its odd neighbour, in fp32.

    Args:
        x: (B, T, N, H); its first ``2 * sin.shape[-1]`` dimensions rotate, the others stay.
        sin, cos: from ``rotary_angles``.

    Returns:
        A tensor of x's shape and dtype.
    """
    rotary_size = 2 * sin.shape[-1]
    # GPT-J pairs dimensions (0, 1), (2, 3), ...; NeoX and Llama pair the first half with the second.
    leading = x[..., :rotary_size].float()
    pairs = torch.unflatten(leading, -1, (-1, 2))
    even, odd = pairs.unbind(-1)
    rotated_even = even * cos - odd * sin
    rotated_odd = odd * cos + even * sin
    pairs = torch.stack((rotated_even, rotated_odd), dim=-1)
    rotated = pairs.flatten(-2).to(x.dtype)
    if rotary_size == x.shape[-1]:
        return rotated
    unrotated = x[..., rotary_size:]
    return torch.cat((rotated, unrotated), dim=-1)
