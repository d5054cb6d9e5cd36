"""Interleaved rotary position embedding (RoFormer, arXiv 2104.09864), as GPT-J applies it."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor


@lru_cache(maxsize=8)
def _table(n_positions: int, rotary_size: int, device: torch.device) -> tuple[Tensor, Tensor]:
    # A cached function of its arguments, not a module buffer: zero.Init and module.to(bfloat16)
    # would round a buffer, and the table must stay fp32.
    with torch.inference_mode(False), torch.no_grad():
        exponent = torch.tensor(range(0, rotary_size, 2), dtype=torch.int64) / rotary_size
        angle = torch.tensor(range(n_positions), dtype=torch.int64).float()[:, None] * (1.0 / 10000 ** exponent.float())
        return angle.sin().to(device), angle.cos().to(device)


def rotary_angles(position_ids: Tensor, n_positions: int, rotary_size: int) -> tuple[Tensor, Tensor]:
    """Sine and cosine of each position's angles.

    Args:
        position_ids: (B, T) or (1, T) integers below ``n_positions``.

    Returns:
        Two fp32 tensors (B, T, 1, rotary_size / 2), to broadcast over heads.
    """
    sin, cos = _table(n_positions, rotary_size, position_ids.device)
    return sin[position_ids].unsqueeze(2), cos[position_ids].unsqueeze(2)


def rotate(x: Tensor, sin: Tensor, cos: Tensor) -> Tensor:
    """Rotate the leading dimensions of each head, pair by neighbouring pair, in fp32.

    Args:
        x: (B, T, N, H); its first ``2 * sin.shape[-1]`` dimensions rotate, the rest pass through.

    Returns:
        A tensor of x's shape and dtype.
    """
    size = 2 * sin.shape[-1]
    even, odd = x[..., :size].float().unflatten(-1, (-1, 2)).unbind(-1)
    rotated = torch.stack((even * cos - odd * sin, odd * cos + even * sin), dim=-1).flatten(-2).to(x.dtype)
    return torch.cat((rotated, x[..., size:]), dim=-1) if size < x.shape[-1] else rotated
