"""The loop that generates a token for each row at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from gptj_train.model.generation_config import GenerationConfig
from gptj_train.model.outputs import GenerateOutput
from gptj_train.model.prompt import Prompt
from gptj_train.model.sampling import Sampling

NextLogits = Callable[[Tensor, Tensor, Any], tuple[Tensor, Any]]
"""From ids (B, T), mask (B, T) and the cache to the logits (B, V) after the last token, and the cache."""


class TokenLoop:
    """One run of greedy or sampled generation, an iterator over columns of tokens (B).

    Attributes:
        ids: (B, T) the texts so far, a view of memory for the longest text.
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
        new_tokens = prompt.max_length - prompt.ids.shape[1]
        # Filled in place: a concatenation for each token would copy the whole text each time.
        self._texts = F.pad(prompt.ids, (0, new_tokens), value=prompt.filler)
        self._mask = F.pad(prompt.mask, (0, new_tokens), value=1)
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
        embedded = prompt.mask.shape[1] - prompt.ids.shape[1]
        finished = torch.zeros(len(self.ids), dtype=torch.bool, device=self.ids.device)
        while self.ids.shape[1] < prompt.max_length and not finished.all():
            length = self.ids.shape[1]
            mask = self._mask[:, : embedded + length]
            logits, self._cache = self._next_logits(self.ids, mask, self._cache)
            scores = self._choice.scores(logits, self.ids, mask[:, embedded:])
            if self._options.output_scores:
                self._scores.append(scores)
            token = self._choice.pick(scores, self._generator)
            token = token.masked_fill(finished, prompt.filler)
            self._texts[:, length] = token
            self.ids = self._texts[:, : length + 1]
            finished = finished | torch.isin(token, prompt.end_ids)
            for criterion in self._criteria:
                # One answer for the batch, or one for each row.
                finished = finished | torch.as_tensor(criterion(self.ids, scores), device=finished.device)
            yield token

    def output(self) -> Tensor | GenerateOutput:
        """Return the texts so far as the options ask for them."""
        # Without the memory of a text that ended early.
        sequences = self.ids.clone()
        if not self._options.return_dict_in_generate:
            return sequences
        return GenerateOutput(
            sequences=sequences,
            scores=tuple(self._scores) if self._options.output_scores else None,
            past_key_values=self._cache,
        )
