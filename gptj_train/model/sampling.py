"""The choice of the next token from a model's logits: greedy or sampled."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from gptj_train.errors import UserError


@dataclass(frozen=True)
class Sampling:
    """How to choose the next token. Defaults and order of the steps are those of Transformers.

    Attributes:
        do_sample: draw from the distribution; otherwise take the likeliest token and ignore the next three.
        temperature: divides the logits; below 1 favours likely tokens.
        top_k: draw from the k likeliest tokens only; 0 means all.
        top_p: draw from the smallest set of likeliest tokens with at least this probability; 1 means all.
        repetition_penalty: factor that makes tokens of the text so far less likely (CTRL, arXiv 1909.05858).
        processors: functions of the text so far (B, T) and the scores (B, V) that return new scores; called after the
            penalty and before the temperature.
        fewest: number of tokens that top_k and top_p leave at least; a beam needs one besides the end tokens.

    Raises:
        UserError: a value outside its range.
    """

    do_sample: bool = False
    temperature: float = 1.0
    top_k: int = 50
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    processors: tuple[Callable[[Tensor, Tensor], Tensor], ...] = ()
    fewest: int = 1

    def __post_init__(self) -> None:
        if self.do_sample and self.temperature <= 0:
            raise UserError(f"temperature must be above 0, got {self.temperature} (do_sample=false is greedy)")
        if self.top_k < 0:
            raise UserError(f"top_k must be 0 (off) or more, got {self.top_k}")
        if not 0 < self.top_p <= 1:
            raise UserError(f"top_p must be in (0, 1], got {self.top_p}")
        if self.repetition_penalty <= 0:
            raise UserError(f"repetition_penalty must be above 0, got {self.repetition_penalty}")

    def pick(self, scores: Tensor, generator: torch.Generator | None) -> Tensor:
        """Return the next token (B) of each row; scores (B, V) are those of ``scores``."""
        if not self.do_sample:
            return scores.argmax(dim=-1)
        probabilities = scores.softmax(dim=-1)
        return torch.multinomial(probabilities, 1, generator=generator).squeeze(1)

    def scores(self, logits: Tensor, ids: Tensor, mask: Tensor | None = None) -> Tensor:
        """Apply repetition penalty, processors, temperature, top-k and top-p to logits, in this order.

        Args:
            logits: (B, V).
            ids: (B, T) the text so far.
            mask: (B, T), 0 on padding, which is not penalized; None without padding.

        Returns:
            (B, V) fp32; -inf at tokens that must not be drawn.
        """
        scores = logits.float()
        if self.repetition_penalty != 1.0:
            scores = _penalize(scores, ids, mask, self.repetition_penalty)
        for processor in self.processors:
            scores = processor(ids, scores)
        if not self.do_sample:
            return scores
        scores = scores / self.temperature
        if 0 < self.top_k < scores.shape[-1]:
            scores = _keep_top_k(scores, max(self.top_k, self.fewest))
        if self.top_p < 1:
            scores = _keep_top_p(scores, self.top_p, self.fewest)
        return scores


def _penalize(scores: Tensor, ids: Tensor, mask: Tensor | None, penalty: float) -> Tensor:
    vocabulary = scores.shape[1]
    if mask is not None:
        # Padding repeats no token: its penalty goes to an extra column, which is cut off again.
        ids = ids.masked_fill(mask == 0, vocabulary)
    scores = F.pad(scores, (0, 1))
    of_text = scores.gather(1, ids)
    # Both branches lower the score of a penalty above 1: dividing a negative one would raise it.
    penalized = torch.where(of_text < 0, of_text * penalty, of_text / penalty)
    # scatter, not scatter_add: a token is penalized once, however often the text repeats it.
    return scores.scatter(1, ids, penalized)[:, :vocabulary]


def _keep_top_k(scores: Tensor, top_k: int) -> Tensor:
    lowest_kept = scores.topk(min(top_k, scores.shape[-1])).values[:, -1:]
    # Tokens that tie with the last one stay, as in Transformers.
    return scores.masked_fill(scores < lowest_kept, -torch.inf)


def _keep_top_p(scores: Tensor, top_p: float, fewest: int) -> Tensor:
    # Ascending, as in Transformers: descending sums would round differently at the border.
    ascending, order = scores.sort(dim=-1)
    cumulative = ascending.softmax(dim=-1).cumsum(dim=-1)
    removed = cumulative <= 1 - top_p
    # The likeliest tokens always stay, even where rounding would remove them.
    removed[:, -fewest:] = False
    removed = removed.scatter(1, order, removed)
    return scores.masked_fill(removed, -torch.inf)
