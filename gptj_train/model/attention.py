"""Causal, padded, cached and document-isolated attention: one door to the kernels."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gptj_train.errors import UserError
from gptj_train.model.gptj_config import GPTJConfig
from gptj_train.model.layers import Linear
from gptj_train.model.rotary import rotate


class KVCache:
    """Keys and values of the tokens seen so far, one (B, N, T, H) pair a layer; grows as it is used."""

    def __init__(self) -> None:
        self._layers: list[tuple[Tensor, Tensor]] = []

    def __len__(self) -> int:
        return len(self._layers)

    def __getitem__(self, layer: int) -> tuple[Tensor, Tensor]:
        return self._layers[layer]

    def get_seq_length(self) -> int:
        """Tokens held."""
        return self._layers[0][0].shape[2] if self._layers else 0

    def update(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Append this layer's new keys and values (B, N, T, H); returns all of them."""
        if layer == len(self._layers):
            self._layers.append((key, value))
        else:
            past_key, past_value = self._layers[layer]
            self._layers[layer] = (torch.cat((past_key, key), dim=2), torch.cat((past_value, value), dim=2))
        return self._layers[layer]

    def reorder(self, rows: Tensor) -> None:
        """Keep these batch rows, in this order."""
        self._layers = [(key[rows], value[rows]) for key, value in self._layers]


@dataclass(frozen=True)
class AttentionPattern:
    """Who sees whom, worked out once a forward and shared by all layers.

    At most one of the fields is set; with none, attention is plainly causal.

    Attributes:
        mask: additive, (B or 1, 1, T, past + T): 0 where a query sees a key, else the dtype's lowest number.
        lengths: lengths of the documents in the flattened (B * T) batch, in order; none crosses a row.
    """

    mask: Tensor | None = None
    lengths: tuple[int, ...] | None = None

    def has_blind_rows(self) -> bool:
        """Some query sees no key, as left padding does.

        Such a row averages all keys. The fused kernels' backward recomputes its weights from a sum too coarse
        to hold log(S) beside the mask's number, and takes them for 1 instead of 1 / S.
        """
        if self.mask is None:
            return False
        return bool((self.mask <= torch.finfo(self.mask.dtype).min).all(dim=-1).any())


def document_lengths(document_ids: Tensor) -> tuple[int, ...]:
    """Lengths of the runs of equal ids in each row of (B, T), row after row."""
    starts = document_starts(document_ids).flatten().nonzero().flatten()
    ends = torch.cat((starts[1:], starts.new_tensor([document_ids.numel()])))
    return tuple((ends - starts).tolist())


def document_starts(document_ids: Tensor) -> Tensor:
    """(B, T) bool: True at the first token of each document; each row begins one."""
    changes = document_ids[:, 1:] != document_ids[:, :-1]
    return F.pad(changes, (1, 0), value=True)


def positions_in_documents(document_ids: Tensor) -> Tensor:
    """(B, T) position of each token in its own document, from 0."""
    index = torch.arange(document_ids.shape[1], device=document_ids.device).expand_as(document_ids)
    return index - torch.where(document_starts(document_ids), index, 0).cummax(dim=1).values


def attention_pattern(
    hidden: Tensor,
    past_length: int,
    attention_mask: Tensor | None,
    document_ids: Tensor | None,
    explicit: bool,
) -> AttentionPattern:
    """The pattern of one forward.

    Args:
        hidden: (B, T, D), for its sizes, dtype and device.
        past_length: tokens already in the cache.
        attention_mask: (B, past + T), nonzero for real tokens; or a finished (B, 1, T, past + T) mask,
            bool (True = seen) or additive.
        document_ids: (B, T); tokens see only tokens of their own run of equal ids.
        explicit: the caller computes scores itself, so a dense mask is wanted in any case.

    Raises:
        UserError: sizes that do not fit, or documents together with a cache.
    """
    batch, length = hidden.shape[:2]
    if document_ids is not None:
        if past_length:
            raise UserError("document_ids cannot be combined with past_key_values")
        if document_ids.shape != (batch, length):
            raise UserError(f"document_ids must be {(batch, length)}, got {tuple(document_ids.shape)}")
    total = past_length + length
    if attention_mask is not None:
        if attention_mask.dim() == 4:
            return AttentionPattern(mask=_additive(attention_mask, hidden.dtype))
        if attention_mask.shape != (batch, total):
            raise UserError(f"attention_mask must be {(batch, total)}, got {tuple(attention_mask.shape)}")
        if attention_mask.all():
            attention_mask = None
    if not explicit and attention_mask is None:
        if document_ids is not None:
            lengths = document_lengths(document_ids)
            return AttentionPattern(lengths=lengths if len(lengths) > batch else None)
        if past_length == 0 or length == 1:
            return AttentionPattern()
    query = torch.arange(past_length, total, device=hidden.device)
    seen = (torch.arange(total, device=hidden.device) <= query[:, None])[None, None]
    if attention_mask is not None:
        seen = seen & attention_mask.bool()[:, None, None, :]
    if document_ids is not None:
        runs = document_starts(document_ids).cumsum(dim=1)
        seen = seen & (runs[:, None, :, None] == runs[:, None, None, :])
    return AttentionPattern(mask=_additive(seen, hidden.dtype))


def _additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    # The lowest finite number, not -inf: a fully masked row (left padding) then averages its
    # keys, as in Transformers, where -inf would make it NaN.
    if mask.dtype != torch.bool:
        return mask.clamp(min=torch.finfo(dtype).min).to(dtype)  # fp32's lowest would become bf16's -inf
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(~mask, torch.finfo(dtype).min)


def attend(query: Tensor, key: Tensor, value: Tensor, pattern: AttentionPattern, dropout: float) -> Tensor:
    """Attention through torch's fused kernels; no (T, T) score matrix is stored.

    Args:
        query, key, value: (B, N, T, H), (B, N, S, H), (B, N, S, H), with S >= T.
        dropout: probability applied to the attention weights.

    Returns:
        (B, T, N, H).
    """
    if pattern.lengths is not None:
        return _attend_documents(query, key, value, pattern.lengths, dropout)
    causal = pattern.mask is None and query.shape[2] > 1
    out = F.scaled_dot_product_attention(query, key, value, attn_mask=pattern.mask, dropout_p=dropout, is_causal=causal)
    return out.transpose(1, 2)


def _attend_documents(query: Tensor, key: Tensor, value: Tensor, lengths: tuple[int, ...], dropout: float) -> Tensor:
    # One causal call a document does the least work and keeps the fast causal kernel (a dense mask
    # loses it at head size 256), and no other document can touch the result. split, not slicing:
    # its backward is one concatenation.
    batch, _, length, _ = query.shape
    per_document = (x.transpose(1, 2).flatten(0, 1).split(lengths) for x in (query, key, value))
    outs = [
        F.scaled_dot_product_attention(
            q.transpose(0, 1)[None], k.transpose(0, 1)[None], v.transpose(0, 1)[None], dropout_p=dropout, is_causal=True
        )
        for q, k, v in zip(*per_document, strict=True)
    ]
    return torch.cat([out.squeeze(0).transpose(0, 1) for out in outs]).unflatten(0, (batch, length))


def attend_explicitly(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor, dropout: float, head_mask: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Attention that also returns its weights: scores and softmax in fp32, as Transformers' eager GPT-J.

    Args:
        mask: additive (B or 1, 1, T, S).
        head_mask: broadcastable to (B, N, T, S); multiplies the weights.

    Returns:
        (B, T, N, H) and the weights (B, N, T, S).
    """
    scores = query.float() @ key.float().transpose(-1, -2) / math.sqrt(query.shape[-1])
    weights = F.dropout((scores + mask).softmax(dim=-1).to(value.dtype), dropout)
    if head_mask is not None:
        weights = weights * head_mask
    return (weights @ value).transpose(1, 2), weights


class GPTJAttention(nn.Module):
    """Multi-head self-attention with rotary positions; parameter names of Transformers."""

    def __init__(self, config: GPTJConfig, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.head_size = config.head_size
        self.attn_pdrop = config.attn_pdrop
        self.resid_pdrop = config.resid_pdrop
        size, std = config.n_embd, config.initializer_range
        self.k_proj = Linear(size, size, std, bias=False)
        self.v_proj = Linear(size, size, std, bias=False)
        self.q_proj = Linear(size, size, std, bias=False)
        self.out_proj = Linear(size, size, std, bias=False)

    def forward(
        self,
        hidden: Tensor,
        angles: tuple[Tensor, Tensor],
        pattern: AttentionPattern,
        cache: KVCache | None = None,
        head_mask: Tensor | None = None,
        explicit: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """(B, T, D) -> (B, T, D) and, when ``explicit``, the weights (B, N, T, S)."""
        query, key, value = (
            projection(hidden).unflatten(-1, (-1, self.head_size))
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        query, key = rotate(query, *angles).transpose(1, 2), rotate(key, *angles).transpose(1, 2)
        value = value.transpose(1, 2)
        if cache is not None:
            key, value = cache.update(self.layer, key, value)
        dropout = self.attn_pdrop if self.training else 0.0
        weights = None
        if explicit:
            assert pattern.mask is not None
            out, weights = attend_explicitly(query, key, value, pattern.mask, dropout, head_mask)
        else:
            out = attend(query, key, value, pattern, dropout)
        return F.dropout(self.out_proj(out.flatten(2)), self.resid_pdrop, self.training), weights
