"""Beam search: the likeliest continuation of each prompt, among several running hypotheses."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from gptj_train.errors import UserError
from gptj_train.model.generation_config import GenerationConfig
from gptj_train.model.outputs import GenerateOutput
from gptj_train.model.prompt import Prompt
from gptj_train.model.sampling import Sampling
from gptj_train.model.token_loop import NextLogits

_NEVER = -1e9
"""Score of a beam that must not be chosen: below every log-probability, but finite, so that sums stay ordered."""


@dataclass(frozen=True)
class Hypothesis:
    """A finished text (T) and its log-probability, divided by length ** length_penalty."""

    score: float
    ids: Tensor


@dataclass(frozen=True)
class Candidates:
    """The best one-token extensions of each row's beams, best first; drawn ones in the order of the draws.

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

    A row is done when it has K finished texts and, with ``early_stopping``

    * True: at once;
    * False: if its best running beam, at its present length, is no likelier than the worst of them;
    * "never": if it would be no likelier at the length that favours it most.
    """

    def __init__(
        self,
        prompt: Prompt,
        options: GenerationConfig,
        *,
        choice: Sampling,
        next_logits: NextLogits,
        criteria: Sequence[Callable[[Tensor, Tensor], Any]],
        generator: torch.Generator | None,
        cache: Any,
    ) -> None:
        if options.early_stopping not in (True, False, "never"):
            raise UserError(f'early_stopping must be True, False or "never", got {options.early_stopping!r}')
        num_beams = options.num_beams
        rows = len(prompt.ids) // num_beams
        device = prompt.ids.device
        self._prompt = prompt
        self._options = options
        self._choice = choice
        self._next_logits = next_logits
        self._criteria = criteria
        self._generator = generator
        self._cache = cache
        self._num_beams = num_beams
        self._ids = prompt.ids
        self._mask = prompt.mask
        # All beams of a row are still the same text: only the first may be extended.
        self._scores = torch.full((rows, num_beams), _NEVER, device=device)
        self._scores[:, 0] = 0
        self._first_beams = torch.arange(rows, device=device)[:, None] * num_beams
        self._finished: list[list[Hypothesis]] = [[] for _ in range(rows)]
        self._done = [False] * rows
        self._all_ended = False
        self._token_scores: list[Tensor] = []

    def output(self) -> Tensor | GenerateOutput:
        """Search, and return the best texts of each row, prompts included, filled up on the right."""
        while self._length < self._prompt.max_length and not all(self._done) and not self._all_ended:
            candidates = self._candidates()
            # A criterion, unlike end tokens, may leave no candidate to extend.
            self._all_ended = bool(candidates.ends.all())
            self._keep_finished(candidates)
            self._extend_beams(candidates)
            self._mark_done_rows()
        best: list[Hypothesis] = []
        for texts in self._finished:
            best.extend(texts[: self._options.num_return_sequences])
        longest = max(len(text.ids) for text in best)
        filled = [F.pad(text.ids, (0, longest - len(text.ids)), value=self._prompt.filler) for text in best]
        sequences = torch.stack(filled)
        if not self._options.return_dict_in_generate:
            return sequences
        return GenerateOutput(
            sequences=sequences,
            sequences_scores=torch.tensor([text.score for text in best], device=sequences.device),
            scores=tuple(self._token_scores) if self._options.output_scores else None,
            past_key_values=self._cache,
        )

    @property
    def _length(self) -> int:
        return self._ids.shape[1]

    def _candidates(self) -> Candidates:
        """Run the model and choose each row's best extensions."""
        rows, num_beams = self._scores.shape
        logits, self._cache = self._next_logits(self._ids, self._mask, self._cache)
        log_probabilities = logits.float().log_softmax(dim=-1)
        mask = self._mask[:, self._mask.shape[1] - self._length :]
        log_probabilities = self._choice.scores(log_probabilities, self._ids, mask)
        if self._options.output_scores:
            self._token_scores.append(log_probabilities)
        log_probabilities = log_probabilities.view(rows, num_beams, -1)
        vocabulary = log_probabilities.shape[-1]
        # A beam can end in E ways. With 1 + E candidates for each beam, K of them remain to be extended, whatever
        # ends; Transformers takes at least 2.
        per_beam = max(2, 1 + len(self._prompt.end_ids))
        count = min(per_beam, vocabulary) * num_beams
        sums = self._scores[:, :, None] + log_probabilities
        sums = sums.flatten(1)
        if self._choice.do_sample:
            # In the order of the draws, as in Transformers.
            index = torch.multinomial(sums.softmax(dim=-1), count, generator=self._generator)
            best = sums.gather(1, index)
        else:
            best, index = sums.topk(count)
        tokens = index % vocabulary
        beams = index // vocabulary + self._first_beams
        ends = self._ends(beams, tokens, best)
        return Candidates(scores=best, tokens=tokens, beams=beams, ends=ends)

    def _ends(self, beams: Tensor, tokens: Tensor, scores: Tensor) -> Tensor:
        """Return which candidates end their text, (R, C) bool."""
        at_limit = self._length + 1 == self._prompt.max_length
        ends = torch.isin(tokens, self._prompt.end_ids) | at_limit
        if self._criteria:
            texts = torch.cat((self._ids[beams.flatten()], tokens.view(-1, 1)), dim=1)
            for criterion in self._criteria:
                # One answer for the batch, or one for each candidate.
                answer = torch.as_tensor(criterion(texts, scores.flatten()), device=ends.device)
                ends = ends | answer.expand(ends.numel()).view_as(ends)
        return ends

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
            self._cache.reorder_cache(beams)

    def _mark_done_rows(self) -> None:
        stops_early = self._options.early_stopping
        length = self._length
        # A positive penalty raises the score of a longer text.
        if stops_early == "never" and self._options.length_penalty > 0:
            length = self._prompt.max_length
        for row, texts in enumerate(self._finished):
            if len(texts) < self._num_beams:
                continue
            best_running = self._normalized(self._scores[row, 0].item(), length)
            if stops_early is True or best_running <= texts[-1].score:
                self._done[row] = True

    def _normalized(self, score: float, length: int) -> float:
        """Divide a log-probability by the number of new tokens, to the power of the length penalty."""
        new_tokens = length - self._prompt.ids.shape[1]
        divisor: float = new_tokens**self._options.length_penalty
        return score / divisor
