"""The loop that generates a token for each row at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from gptj_train.model.generation_config import GenerationConfig
from gptj_train.model.outputs import GenerateOutput
from gptj_train.model.prompt import Prompt
from gptj_train.model.sampling import Sampling

NextLogits = Callable[[Tensor, Tensor, Any], tuple[Tensor, Any]]
"""From ids (B, T), mask (B, T) and the cache to the logits (B, V) after the last token, and the cache."""


class TokenLoop:
    """One run of greedy or sampled generation, an iterator over columns of tokens (B).

    Attributes:
        ids: (B, T) the texts so far.
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
        self.ids = prompt.ids
        self._prompt = prompt
        self._options = options
        self._choice = choice
        self._next_logits = next_logits
        self._criteria = criteria
        self._generator = generator
        self._cache = cache
        self._scores: list[Tensor] = []

    @torch.no_grad()
    def __iter__(self) -> Iterator[Tensor]:
        prompt = self._prompt
        mask = prompt.mask
        finished = torch.zeros(len(self.ids), dtype=torch.bool, device=self.ids.device)
        while self.ids.shape[1] < prompt.max_length and not finished.all():
            logits, self._cache = self._next_logits(self.ids, mask, self._cache)
            scores = self._choice.scores(logits, self.ids, mask[:, mask.shape[1] - self.ids.shape[1] :])
            if self._options.output_scores:
                self._scores.append(scores)
            token = self._choice.pick(scores, self._generator)
            token = token.masked_fill(finished, prompt.filler)
            self.ids = torch.cat((self.ids, token[:, None]), dim=1)
            mask = torch.cat((mask, mask.new_ones(len(token), 1)), dim=1)
            finished = finished | torch.isin(token, prompt.end_ids)
            for criterion in self._criteria:
                # One answer for the batch, or one for each row.
                finished = finished | torch.as_tensor(criterion(self.ids, scores), device=finished.device)
            yield token

    def output(self) -> Tensor | GenerateOutput:
        """Return the texts so far as the options ask for them."""
        if not self._options.return_dict_in_generate:
            return self.ids
        return GenerateOutput(
            sequences=self.ids,
            scores=tuple(self._scores) if self._options.output_scores else None,
            past_key_values=self._cache,
        )
