"""Text generation with a KV cache: greedy, sampling and beam search."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from gptj_train.errors import UserError
from gptj_train.model.beam_search import BeamSearch
from gptj_train.model.gptj_config import GPTJConfig
from gptj_train.model.kv_cache import KVCache
from gptj_train.model.prompt import check_prompt
from gptj_train.model.sampling import Sampling


class GenerationMixin:
    """``generate`` and ``stream`` for a causal-LM module."""

    config: GPTJConfig

    def generate(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        *,
        num_beams: int = 1,
        length_penalty: float = 1.0,
        **options: Any,
    ) -> Tensor:
        """Continue each prompt until its end token or the length limit.

        Args:
            input_ids: (B, T) prompts, padded on the left if they differ in length.
            attention_mask: (B, T), 0 on padding; by default derived from ``pad_token_id``.
            num_beams: above 1, search for the likeliest text with this many beams. Beam search does not sample: of
                the sampling options it takes ``repetition_penalty`` alone.
            length_penalty: beam search divides a text's log-probability by its length to this power.
            **options: of ``stream``.

        Returns:
            (B, T + new) ids, prompts included, as Transformers' generate.

        Raises:
            UserError: an empty prompt, padding on the right, a limit beyond ``n_positions``, or a bad option.
        """
        if num_beams < 1:
            raise UserError(f"num_beams must be at least 1, got {num_beams}")
        if num_beams == 1:
            columns = [token[:, None] for token in self.stream(input_ids, attention_mask, **options)]
            return torch.cat([input_ids, *columns], dim=1)
        if options.pop("do_sample", False):
            raise UserError("beam search does not sample: give do_sample=False, or num_beams=1")
        # Without draws a seed changes nothing; without a cache the search would only be slower.
        options.pop("seed", None)
        options.pop("use_cache", None)
        return self._search(input_ids, attention_mask, num_beams, length_penalty, **options)

    @torch.no_grad()
    def stream(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        *,
        max_length: int | None = None,
        max_new_tokens: int | None = None,
        eos_token_id: int | list[int] | None = None,
        pad_token_id: int | None = None,
        seed: int | None = None,
        use_cache: bool = True,
        **sampling: Any,
    ) -> Iterator[Tensor]:
        """Yield each new column of tokens (B) as soon as it is chosen.

        Args:
            input_ids, attention_mask: as in ``generate``.
            max_length: limit on prompt plus new tokens.
            max_new_tokens: limit on new tokens; wins over ``max_length``. Without either the limit is 20.
            eos_token_id: tokens that end a text; None means the config's, [] none.
            pad_token_id: fills finished rows, by default the config's, else the first end token.
            seed: makes sampling repeatable, whatever was drawn before.
            use_cache: keep keys and values of past tokens instead of computing them again for each new one.
            **sampling: fields of ``Sampling``.
        """
        options = Sampling(**sampling)
        prompt = check_prompt(
            self.config,
            input_ids,
            attention_mask,
            max_length=max_length,
            max_new_tokens=max_new_tokens,
            eos_token_id=eos_token_id,
            pad_token_id=pad_token_id,
        )
        ids = prompt.ids
        mask = prompt.mask
        generator = None
        if seed is not None:
            # A generator of its own leaves the global one, and so dropout and other draws, as they were.
            generator = torch.Generator(device=ids.device).manual_seed(seed)
        finished = torch.zeros(len(ids), dtype=torch.bool, device=ids.device)
        cache = None
        while ids.shape[1] < prompt.max_length and not finished.all():
            logits, cache = self._next_logits(ids, mask, cache, use_cache)
            token = options.pick(logits, ids, generator, mask)
            token = token.masked_fill(finished, prompt.filler)
            finished = finished | torch.isin(token, prompt.end_ids)
            ids = torch.cat((ids, token[:, None]), dim=1)
            mask = torch.cat((mask, mask.new_ones(len(token), 1)), dim=1)
            yield token

    @torch.no_grad()
    def _search(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None,
        num_beams: int,
        length_penalty: float,
        *,
        max_length: int | None = None,
        max_new_tokens: int | None = None,
        eos_token_id: int | list[int] | None = None,
        pad_token_id: int | None = None,
        repetition_penalty: float = 1.0,
    ) -> Tensor:
        """Generate by beam search; its signature refuses the options that need sampling."""
        prompt = check_prompt(
            self.config,
            input_ids,
            attention_mask,
            max_length=max_length,
            max_new_tokens=max_new_tokens,
            eos_token_id=eos_token_id,
            pad_token_id=pad_token_id,
        )
        search = BeamSearch(
            prompt,
            next_logits=self._next_logits,
            num_beams=num_beams,
            length_penalty=length_penalty,
            scoring=Sampling(repetition_penalty=repetition_penalty),
        )
        return search.run()

    def _next_logits(
        self,
        ids: Tensor,
        mask: Tensor,
        cache: KVCache | None,
        use_cache: bool,
    ) -> tuple[Tensor, KVCache | None]:
        """Return the logits (B, V) after the last token, and the cache.

        Only the tokens that the cache lacks go through the model: all at first, then one.
        """
        cached = 0 if cache is None else cache.get_seq_length()
        # Padding does not count: a padded prompt has the positions it has alone.
        positions = (mask.long().cumsum(dim=1) - 1).clamp(min=0)
        out = self(  # type: ignore[operator]
            input_ids=ids[:, cached:],
            attention_mask=mask,
            position_ids=positions[:, cached:],
            past_key_values=cache,
            use_cache=use_cache,
            return_dict=True,
            logits_to_keep=1,
        )
        # The model's own cache, None while it recomputes blocks in training mode.
        return out.logits[:, -1], out.past_key_values
