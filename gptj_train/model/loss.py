"""Token losses. The vocabulary is large, so the logits of all tokens are never held at once."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from gptj_train.model.attention import document_starts

IGNORE = -100
"""Label of a token that is no target (torch's ``ignore_index``)."""

CHUNK = 512
"""Tokens whose logits exist at one time: 100 MB in fp32 at GPT-J's vocabulary."""


def next_token_targets(labels: Tensor, document_ids: Tensor | None = None) -> Tensor:
    """(B, T) labels -> (B, T) targets: each position's next label, IGNORE where there is none.

    With ``document_ids`` the first token of a document is nobody's target: what precedes it is
    another document.
    """
    if document_ids is not None:
        labels = labels.masked_fill(document_starts(document_ids), IGNORE)
    return F.pad(labels[:, 1:], (0, 1), value=IGNORE)


def linear_cross_entropy(hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor) -> Tensor:
    """Sum over targets of cross_entropy(hidden @ weight.T + bias), in chunks of tokens.

    Equal in value and gradient to computing all logits in the input's dtype and the softmax in fp32, as
    Transformers does, while only CHUNK x V fp32 numbers exist at a time. Gradients are formed during the
    forward, where the chunk's logits are at hand (the idea of Liger's fused loss, arXiv 2410.10989).

    Args:
        hidden: (M, D). weight: (V, D). bias: (V) or None.
        targets: (M) token ids, or IGNORE.

    Returns:
        Scalar fp32; exactly 0 when nothing is a target.
    """
    wanted = targets != IGNORE
    return _LinearCrossEntropy.apply(hidden[wanted], weight, bias, targets[wanted], torch.is_grad_enabled())


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, grad_enabled: bool
    ) -> Tensor:
        wants_hidden, wants_weight, wants_bias = (grad_enabled and need for need in ctx.needs_input_grad[:3])
        grad_hidden = torch.empty_like(hidden) if wants_hidden else None
        # Summed over chunks in fp32: bf16 sums would lose the small terms.
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if wants_weight else None
        grad_bias = torch.zeros_like(bias, dtype=torch.float32) if bias is not None and wants_bias else None
        loss = hidden.new_zeros((), dtype=torch.float32)
        for start in range(0, len(targets), CHUNK):
            rows = slice(start, start + CHUNK)
            target = targets[rows, None]
            logits = F.linear(hidden[rows], weight, bias).float()
            normaliser = logits.logsumexp(dim=-1, keepdim=True)
            loss += (normaliser - logits.gather(1, target)).sum()
            if not (wants_hidden or wants_weight or wants_bias):
                continue
            slope = logits.sub_(normaliser).exp_()  # softmax; minus one at the target: d loss / d logits
            slope.scatter_add_(1, target, torch.full_like(target, -1, dtype=slope.dtype))
            if grad_bias is not None:
                grad_bias += slope.sum(dim=0)
            slope = slope.to(hidden.dtype)
            if grad_hidden is not None:
                torch.mm(slope, weight, out=grad_hidden[rows])
            if grad_weight is not None:
                _add_product(grad_weight, slope.T, hidden[rows])
        ctx.gradients = (grad_hidden, grad_weight, grad_bias)
        ctx.dtypes = (hidden.dtype, weight.dtype, None if bias is None else bias.dtype)
        return loss

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        gradients, ctx.gradients = ctx.gradients, None
        scaled = (
            None if gradient is None else gradient.mul_(grad).to(dtype)
            for gradient, dtype in zip(gradients, ctx.dtypes, strict=True)
        )
        return *scaled, None, None


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    if right.dtype == total.dtype:
        total.addmm_(left, right)
    else:
        total += left @ right
