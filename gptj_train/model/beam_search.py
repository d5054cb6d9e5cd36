"""Beam search: the likeliest continuation of each prompt, among several running hypotheses."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from gptj_train.model.kv_cache import KVCache
from gptj_train.model.prompt import Prompt
from gptj_train.model.sampling import Sampling

_NEVER = -1e9
"""Score of a beam that must not be chosen: below every log-probability, but finite, so that sums stay ordered."""

NextLogits = Callable[[Tensor, Tensor, KVCache | None, bool], tuple[Tensor, KVCache | None]]


@dataclass(frozen=True)
class Hypothesis:
    """A finished text (T) and its log-probability, divided by length ** length_penalty."""

    score: float
    ids: Tensor


@dataclass(frozen=True)
class Candidates:
    """The best one-token extensions of each row's beams, best first.

    Attributes:
        scores: (R, C) fp32 summed log-probabilities.
        tokens: (R, C) the new token.
        beams: (R, C) the extended beam, an index into the R * K beams of the batch.
        ends: (R, C) bool, whether the text ends with this token.
    """

    scores: Tensor
    tokens: Tensor
    beams: Tensor
    ends: Tensor


class BeamSearch:
    """One search over R prompts with K beams each; the model sees R * K rows, a prompt's beams side by side.

    A row is done when it has K finished texts and its best running beam, at its present length, is no likelier
    than the worst of them (Transformers' ``early_stopping=False``).
    """

    def __init__(
        self,
        prompt: Prompt,
        *,
        next_logits: NextLogits,
        num_beams: int,
        length_penalty: float,
        scoring: Sampling,
    ) -> None:
        rows = len(prompt.ids)
        device = prompt.ids.device
        self._prompt = prompt
        self._next_logits = next_logits
        self._num_beams = num_beams
        self._length_penalty = length_penalty
        self._scoring = scoring
        self._ids = prompt.ids.repeat_interleave(num_beams, dim=0)
        self._mask = prompt.mask.repeat_interleave(num_beams, dim=0)
        self._cache: KVCache | None = None
        # All beams of a row are still the same text: only the first may be extended.
        self._scores = torch.full((rows, num_beams), _NEVER, device=device)
        self._scores[:, 0] = 0
        self._first_beams = torch.arange(rows, device=device)[:, None] * num_beams
        self._finished: list[list[Hypothesis]] = [[] for _ in range(rows)]
        self._done = [False] * rows

    def run(self) -> Tensor:
        """Return the best text of each row (R, T), prompts included, filled up on the right."""
        while self._length < self._prompt.max_length and not all(self._done):
            candidates = self._candidates()
            self._keep_finished(candidates)
            self._extend_beams(candidates)
            self._mark_done_rows()
        best = [texts[0].ids for texts in self._finished]
        longest = max(len(ids) for ids in best)
        filled = [F.pad(ids, (0, longest - len(ids)), value=self._prompt.filler) for ids in best]
        return torch.stack(filled)

    @property
    def _length(self) -> int:
        return self._ids.shape[1]

    def _candidates(self) -> Candidates:
        """Run the model and choose each row's best extensions."""
        rows, num_beams = self._scores.shape
        logits, self._cache = self._next_logits(self._ids, self._mask, self._cache, True)
        log_probabilities = logits.float().log_softmax(dim=-1)
        log_probabilities = self._scoring.scores(log_probabilities, self._ids, self._mask)
        log_probabilities = log_probabilities.view(rows, num_beams, -1)
        vocabulary = log_probabilities.shape[-1]
        # A beam can end in E ways. With 1 + E candidates for each beam, K of them remain to be extended, whatever
        # ends; Transformers takes at least 2.
        per_beam = max(2, 1 + len(self._prompt.end_ids))
        count = min(per_beam, vocabulary) * num_beams
        sums = self._scores[:, :, None] + log_probabilities
        best, index = sums.flatten(1).topk(count)
        tokens = index % vocabulary
        at_limit = self._length + 1 == self._prompt.max_length
        return Candidates(
            scores=best,
            tokens=tokens,
            beams=index // vocabulary + self._first_beams,
            ends=torch.isin(tokens, self._prompt.end_ids) | at_limit,
        )

    def _keep_finished(self, candidates: Candidates) -> None:
        """Add the ending candidates to the finished texts, of which each row keeps the K best."""
        length = self._length + 1
        for row, texts in enumerate(self._finished):
            if self._done[row]:
                continue
            # Only the K best candidates may finish: a worse one would not have been a beam either.
            ending = candidates.ends[row, : self._num_beams].nonzero().flatten()
            for index in ending.tolist():
                beam = candidates.beams[row, index]
                ids = torch.cat((self._ids[beam], candidates.tokens[row, index : index + 1]))
                score = candidates.scores[row, index].item()
                texts.append(Hypothesis(self._normalized(score, length), ids))
            texts.sort(key=lambda text: text.score, reverse=True)
            del texts[self._num_beams :]

    def _extend_beams(self, candidates: Candidates) -> None:
        """Replace the beams by each row's K best candidates that do not end."""
        running = candidates.scores.masked_fill(candidates.ends, _NEVER)
        self._scores, chosen = running.topk(self._num_beams)
        beams = candidates.beams.gather(1, chosen).flatten()
        tokens = candidates.tokens.gather(1, chosen).flatten()
        self._ids = torch.cat((self._ids[beams], tokens[:, None]), dim=1)
        self._mask = torch.cat((self._mask[beams], self._mask.new_ones(len(beams), 1)), dim=1)
        if self._cache is not None:
            self._cache.reorder(beams)

    def _mark_done_rows(self) -> None:
        for row, texts in enumerate(self._finished):
            best_running = self._normalized(self._scores[row, 0].item(), self._length)
            if len(texts) == self._num_beams and best_running <= texts[-1].score:
                self._done[row] = True

    def _normalized(self, score: float, length: int) -> float:
        """Divide a log-probability by the number of new tokens, to the power of the length penalty."""
        new_tokens = length - self._prompt.ids.shape[1]
        divisor: float = new_tokens**self._length_penalty
        return score / divisor
