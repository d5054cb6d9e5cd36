"""GPT-J's self-attention: causal, padded, cached, and isolated between packed documents."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gptj_train.errors import UserError
from gptj_train.model.batch_facts import BatchFacts
from gptj_train.model.document_positions import document_lengths, document_starts
from gptj_train.model.gptj_config import GPTJConfig
from gptj_train.model.kv_cache import KVCache, TrimmedCache
from gptj_train.model.layers import Linear
from gptj_train.model.rotary import rotate


@dataclass(frozen=True)
class AttentionPattern:
    """Which keys each query attends to, and by which implementation; computed once for all layers.

    Without ``mask`` and ``lengths`` attention is plainly causal. At most one of the two is set.

    Attributes:
        mask: additive attention mask (B or 1, 1, T, past + T): 0 to attend, the dtype's lowest number not to.
        lengths: lengths of the packed documents in the flattened (B * T) batch; no document crosses a row.
        eager: compute the score matrix in plain torch instead of a fused kernel; needs ``mask``.
    """

    mask: Tensor | None = None
    lengths: tuple[int, ...] | None = None
    eager: bool = False


def attention_pattern(
    hidden: Tensor,
    *,
    past_length: int = 0,
    attention_mask: Tensor | None = None,
    document_ids: Tensor | None = None,
    eager: bool = False,
    facts: BatchFacts | None = None,
) -> AttentionPattern:
    """Build the attention pattern of one forward: the cheapest that masks what must be masked.

    Args:
        hidden: (B, T, D); only its shape, dtype and device are used.
        past_length: number of cached tokens.
        attention_mask: (B, past + T), nonzero for real tokens; or a complete (B or 1, 1, T, past + T) mask,
            bool (True = attend) or additive.
        document_ids: (B, T); tokens attend only within their run of equal ids.
        eager: ask for eager attention, for its weights or to scale heads.
        facts: of the batch; without them the host waits for the device to read masks and documents.

    Raises:
        UserError: shapes that do not match, or documents together with a cache.
    """
    batch, length = hidden.shape[:2]
    total = past_length + length
    if document_ids is not None:
        _check_documents(document_ids, (batch, length), past_length)
    if attention_mask is not None and attention_mask.dim() == 4:
        # A complete mask is the caller's: causality and documents are not added to it, as in Transformers.
        return _masked(_additive(attention_mask, hidden.dtype), eager)
    if attention_mask is not None:
        attention_mask = _without_padding_is_none(attention_mask, (batch, total), facts)
    if attention_mask is None and not eager:
        # The two patterns that the fused kernels know without a dense mask, which would cost them their speed.
        # A compiled graph must not depend on the values of a tensor, so it isolates documents by a mask.
        if document_ids is not None and not torch.compiler.is_compiling():
            lengths = None if facts is None else facts.document_lengths
            if lengths is None:
                lengths = document_lengths(document_ids)
            one_per_row = len(lengths) == batch
            return AttentionPattern() if one_per_row else AttentionPattern(lengths=lengths)
        if document_ids is None and (past_length == 0 or length == 1):
            return AttentionPattern()
    key_index = torch.arange(total, device=hidden.device)
    query_index = torch.arange(past_length, total, device=hidden.device)
    attends = (key_index <= query_index[:, None])[None, None]
    if attention_mask is not None:
        attends = attends & attention_mask.bool()[:, None, None, :]
    if document_ids is not None:
        # Numbered runs, not the ids: an id that returns later in a row names another document.
        runs = document_starts(document_ids).cumsum(dim=1)
        attends = attends & (runs[:, None, :, None] == runs[:, None, None, :])
    # The first token of a row is seen by all of its queries, unless documents hide it.
    seen = facts is not None and facts.starts_real is True and document_ids is None
    return _masked(_additive(attends, hidden.dtype), eager, every_query_sees_a_key=seen)


def _check_documents(document_ids: Tensor, shape: tuple[int, int], past_length: int) -> None:
    if past_length:
        raise UserError("document_ids cannot be combined with past_key_values")
    if document_ids.shape != shape:
        raise UserError(f"document_ids must be {shape}, got {tuple(document_ids.shape)}")


def _without_padding_is_none(
    attention_mask: Tensor,
    shape: tuple[int, int],
    facts: BatchFacts | None,
) -> Tensor | None:
    """Return None for a mask without padding, which masks nothing that causality does not."""
    if attention_mask.shape != shape:
        raise UserError(f"attention_mask must be {shape}, got {tuple(attention_mask.shape)}")
    if torch.compiler.is_compiling():
        return attention_mask
    padded = None if facts is None else facts.padded
    if padded is None:
        padded = not bool(attention_mask.all())
    return attention_mask if padded else None


def _additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    # The lowest finite number, not -inf: the softmax of a fully masked row (left padding) is then uniform over
    # all keys, as in Transformers. With -inf it would be NaN.
    lowest = torch.finfo(dtype).min
    if mask.dtype != torch.bool:
        # Clamped before the cast, because fp32's lowest number would round to bf16's -inf.
        return mask.clamp(min=lowest).to(dtype)
    zeros = torch.zeros(mask.shape, dtype=dtype, device=mask.device)
    return zeros.masked_fill_(~mask, lowest)


def _masked(mask: Tensor, eager: bool, every_query_sees_a_key: bool = False) -> AttentionPattern:
    # The fused kernels' backward recomputes the softmax from its saved log-sum-exp. In a fully masked row that
    # sum is lowest + log(S), which rounds to lowest, so every weight would come back as 1 instead of 1 / S.
    if not eager and not every_query_sees_a_key and torch.is_grad_enabled():
        # A compiled graph cannot look for such rows, so it takes the way that is right for them.
        eager = torch.compiler.is_compiling() or has_fully_masked_rows(mask)
    return AttentionPattern(mask=mask, eager=eager)


def has_fully_masked_rows(mask: Tensor) -> bool:
    """Return whether an additive mask (..., T, S) hides every key from some query, as left padding does."""
    hidden_keys = mask <= torch.finfo(mask.dtype).min
    return bool(hidden_keys.all(dim=-1).any())


def fused_attention(query: Tensor, key: Tensor, value: Tensor, *, pattern: AttentionPattern, dropout: float) -> Tensor:
    """Attend by torch's fused kernels, which store no (T, S) score matrix.

    Args:
        query: (B, N, T, H).
        key, value: (B, N, S, H) with S >= T.
        dropout: probability of dropping an attention weight.

    Returns:
        (B, T, N, H) in the dtype of the inputs.
    """
    if pattern.lengths is not None:
        return _document_attention(query, key, value, lengths=pattern.lengths, dropout=dropout)
    # A single query attends to the whole cache. is_causal would show it the first key alone.
    causal = pattern.mask is None and query.shape[2] > 1
    out = F.scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=pattern.mask,
        dropout_p=dropout,
        is_causal=causal,
    )
    return out.transpose(1, 2)


def _document_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    lengths: tuple[int, ...],
    dropout: float,
) -> Tensor:
    # One causal call for each document does the least work and keeps the fast causal kernel, which a dense mask
    # rules out at GPT-J's head size of 256. No other document can touch the result.
    batch, _, length, _ = query.shape
    outs = []
    documents = zip(
        _split_documents(query, lengths),
        _split_documents(key, lengths),
        _split_documents(value, lengths),
        strict=True,
    )
    for one_query, one_key, one_value in documents:
        out = F.scaled_dot_product_attention(one_query, one_key, one_value, dropout_p=dropout, is_causal=True)
        outs.append(out.squeeze(0).transpose(0, 1))
    return torch.unflatten(torch.cat(outs), 0, (batch, length))


def _split_documents(x: Tensor, lengths: tuple[int, ...]) -> list[Tensor]:
    """Split (B, N, T, H) into one (1, N, length, H) for each document."""
    tokens = x.transpose(1, 2).flatten(0, 1)
    # split, not slices: its backward is one concatenation, while each slice's would fill a tensor of full size.
    pieces = torch.split(tokens, list(lengths))
    return [piece.transpose(0, 1)[None] for piece in pieces]


def eager_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    mask: Tensor,
    dropout: float,
    head_mask: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Attend by explicit scores and return the attention weights too, as Transformers' eager GPT-J.

    Args:
        query: (B, N, T, H).
        key, value: (B, N, S, H).
        mask: additive (B or 1, 1, T, S).
        dropout: probability of dropping an attention weight.
        head_mask: broadcastable to (B, N, T, S); multiplies the weights.

    Returns:
        (B, T, N, H) and the weights (B, N, T, S), both in the value's dtype.
    """
    # fp32 as in Transformers: in bf16 the scores of long rows would lose the small differences.
    scores = query.float() @ key.float().transpose(-1, -2)
    scores = scores / math.sqrt(query.shape[-1])
    weights = (scores + mask).softmax(dim=-1)
    weights = weights.to(value.dtype)
    weights = F.dropout(weights, dropout)
    if head_mask is not None:
        weights = weights * head_mask
    out = weights @ value
    return out.transpose(1, 2), weights


class GPTJAttention(nn.Module):
    """Multi-head self-attention with rotary positions. Parameter names are those of Transformers."""

    def __init__(self, config: GPTJConfig, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.head_size = config.head_size
        self.attn_pdrop = config.attn_pdrop
        self.resid_pdrop = config.resid_pdrop
        size = config.n_embd
        std = config.initializer_range
        # The order decides which random numbers each matrix gets from a seed.
        self.k_proj = Linear(size, size, std, bias=False)
        self.v_proj = Linear(size, size, std, bias=False)
        self.q_proj = Linear(size, size, std, bias=False)
        self.out_proj = Linear(size, size, std, bias=False)

    def forward(
        self,
        hidden: Tensor,
        angles: tuple[Tensor, Tensor],
        pattern: AttentionPattern,
        cache: KVCache | TrimmedCache | None = None,
        head_mask: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Attend and project.

        Args:
            hidden: (B, T, D) after the LayerNorm.
            angles: sine and cosine of the positions, from ``rotary_angles``.
            cache: extended by this layer's new keys and values.
            head_mask: broadcastable to (B, N, T, S); used by eager attention only.

        Returns:
            (B, T, D), and the attention weights (B, N, T, S) of eager attention or None.
        """
        # Rotation takes heads behind tokens (B, T, N, H), attention before them (B, N, T, H).
        query = rotate(self._heads(self.q_proj(hidden)), *angles).transpose(1, 2)
        key = rotate(self._heads(self.k_proj(hidden)), *angles).transpose(1, 2)
        value = self._heads(self.v_proj(hidden)).transpose(1, 2)
        if cache is not None:
            key, value = cache.update(key, value, self.layer)
        dropout = self.attn_pdrop if self.training else 0.0
        weights = None
        if pattern.eager:
            assert pattern.mask is not None
            out, weights = eager_attention(
                query,
                key,
                value,
                mask=pattern.mask,
                dropout=dropout,
                head_mask=head_mask,
            )
        else:
            out = fused_attention(query, key, value, pattern=pattern, dropout=dropout)
        out = self.out_proj(out.flatten(2))
        return F.dropout(out, self.resid_pdrop, self.training), weights

    def _heads(self, x: Tensor) -> Tensor:
        """(B, T, D) -> (B, T, N, H)."""
        return torch.unflatten(x, -1, (-1, self.head_size))
