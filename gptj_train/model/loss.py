"""The next-token loss, computed in chunks so that the logits of all tokens never exist at once.

At GPT-J's vocabulary of 50400, one sequence of 2048 tokens has 0.4 GB of fp32 logits, and their gradient takes as
much again. Here the forward turns a chunk's logits into the chunk's loss and gradients, and reuses their memory.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from gptj_train.model.document_positions import document_starts

IGNORE = -100
"""Label of a token that is no target (torch's ``ignore_index``)."""

CHUNK = 1024
"""Tokens in a chunk.

A chunk's fp32 logits take 206 MB at GPT-J's vocabulary. Larger chunks take memory in proportion. Smaller ones take
time: each chunk but the first adds to the head's whole fp32 gradient (V, D), however few its tokens.
benchmarks/NOTES.md has the times.
"""


def next_token_targets(labels: Tensor, document_ids: Tensor | None = None) -> Tensor:
    """Shift labels (B, T) to targets (B, T): each position's next label, IGNORE where there is none.

    With ``document_ids`` (B, T) no document's first token is a target, because another document precedes it.
    """
    if document_ids is not None:
        labels = labels.masked_fill(document_starts(document_ids), IGNORE)
    return F.pad(labels[:, 1:], (0, 1), value=IGNORE)


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    target_index: Tensor | None = None,
) -> Tensor:
    """Sum cross_entropy(hidden @ weight.T + bias, targets) over the targets, in chunks of tokens.

    Values and gradients equal those of all logits in the input's dtype with an fp32 softmax, as Transformers
    computes them. The forward also forms the gradients, while a chunk's logits exist (the idea of Liger's fused
    loss, arXiv 2410.10989), so that the backward computes no logits a second time.

    Args:
        hidden: (M, D).
        weight: (V, D).
        bias: (V) or None.
        targets: (M) int64 token ids, or IGNORE.
        target_index: (N) int64 positions of the targets that are not IGNORE; by default they are searched, for
            which the host waits for the device.

    Returns:
        Scalar fp32; exactly 0 without any target.
    """
    # Prompts and padding are no targets; their logits are not computed at all.
    if target_index is None:
        target_index = (targets != IGNORE).nonzero().flatten()
    # Grad mode is passed on because it is always off within an autograd Function.
    return _LinearCrossEntropy.apply(  # type: ignore[no-untyped-call,no-any-return]
        hidden[target_index],
        weight,
        bias,
        targets[target_index],
        torch.is_grad_enabled(),
    )


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        grad_enabled: bool,
    ) -> Tensor:
        needs_hidden, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        needs_any = grad_enabled and (needs_hidden or needs_weight or needs_bias)
        # A token's gradient is written once, in the input's dtype.
        grad_hidden = torch.empty_like(hidden) if grad_enabled and needs_hidden else None
        grad_weight = None
        grad_bias = None
        loss = hidden.new_zeros((), dtype=torch.float32)
        # At least one chunk: without any target it is empty, and its gradients are zeros.
        for start in range(0, max(len(targets), 1), CHUNK):
            rows = slice(start, start + CHUNK)
            target = targets[rows, None]
            logits = F.linear(hidden[rows], weight, bias).float()
            # Softmax in the logits' own memory, with a single exp. Without the maximum exp would overflow.
            logits.sub_(logits.amax(dim=-1, keepdim=True))
            target_logit = logits.gather(1, target)
            sums = logits.exp_().sum(dim=-1, keepdim=True)
            loss += (sums.log() - target_logit).sum()
            if not needs_any:
                continue
            # d loss / d logits = softmax - one_hot(target).
            grad_logits = logits.div_(sums)
            minus_one = torch.full_like(target, -1, dtype=grad_logits.dtype)
            grad_logits.scatter_add_(1, target, minus_one)
            if needs_bias:
                grad_bias = _add(grad_bias, grad_logits.sum(dim=0))
            # The products run in the input's dtype, as autograd's would.
            grad_logits = grad_logits.to(hidden.dtype)
            if grad_hidden is not None:
                torch.mm(grad_logits, weight, out=grad_hidden[rows])
            if needs_weight:
                grad_weight = _add_product(grad_weight, grad_logits.T, hidden[rows])
        ctx.gradients = (grad_hidden, grad_weight, grad_bias)
        ctx.dtypes = (hidden.dtype, weight.dtype, None if bias is None else bias.dtype)
        return loss

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        gradients = ctx.gradients
        # Scaled in place and handed over: a second backward would have to find the first one's numbers.
        ctx.gradients = None
        scaled: list[Tensor | None] = []
        for gradient, dtype in zip(gradients, ctx.dtypes, strict=True):
            # The loss is a scalar, so the chain rule is one factor.
            scaled.append(None if gradient is None else gradient.mul_(grad).to(dtype))
        return *scaled, None, None


def _add(total: Tensor | None, term: Tensor) -> Tensor:
    """Add a chunk's term to the total, in fp32 from the second chunk on: bf16 sums would lose the small terms.

    The first term is the total: filling a tensor of the weight's size with zeros and adding to it would take as long
    as the softmax.
    """
    if total is None:
        return term
    return total.float().add_(term)


def _add_product(total: Tensor | None, left: Tensor, right: Tensor) -> Tensor:
    """Add left @ right to the total, as ``_add`` does."""
    if total is not None and left.dtype == total.dtype == torch.float32:
        # Without a temporary of the total's size; addmm_ takes no bf16 factors for an fp32 total.
        return total.addmm_(left, right)
    return _add(total, left @ right)
