"""Text generation with a KV cache: greedy, sampling and beam search."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gptj_train.errors import UserError
from gptj_train.model.beam_search import BeamSearch
from gptj_train.model.constraints import StopStrings, constraints_of
from gptj_train.model.generation_config import GenerationConfig, resolved
from gptj_train.model.gptj_config import GPTJConfig
from gptj_train.model.kv_cache import KVCache, past_length_of
from gptj_train.model.outputs import GenerateOutput
from gptj_train.model.prompt import check_prompt
from gptj_train.model.sampling import Sampling
from gptj_train.model.token_loop import TokenLoop


class GenerationMixin:
    """``generate`` and ``stream`` for a causal-LM module.

    Attributes:
        generation_config: defaults of the options, read from and written to ``generation_config.json``.
    """

    config: GPTJConfig
    generation_config: GenerationConfig
    get_input_embeddings: Callable[[], torch.nn.Embedding]
    is_gradient_checkpointing: bool
    training: bool

    def generate(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        *,
        streamer: Any = None,
        inputs: Tensor | None = None,
        **arguments: Any,
    ) -> Tensor | GenerateOutput:
        """Continue each prompt until its end token or the length limit.

        Args:
            input_ids, inputs: (B, T) prompts, padded on the left if they differ in length.
            attention_mask: (B, T), 0 on padding; by default derived from ``pad_token_id``.
            streamer: gets the prompts and each column of tokens by ``put``, and ``end`` at the end.
            **arguments: of ``stream``; and ``num_beams``, above 1 a search for the likeliest text with this many beams,
                which divides a text's log-probability by its length to the power of ``length_penalty``;
                ``num_return_sequences`` texts for each prompt; ``return_dict_in_generate``, ``output_scores``.

        Returns:
            (B, T + new) ids, prompts included, as Transformers' generate; or a GenerateOutput.

        Raises:
            UserError: an empty prompt, padding on the right, a limit beyond ``n_positions``, a bad option, or one that
                is not offered.
        """
        if input_ids is None:
            input_ids = inputs
        run = self._prepare(input_ids, attention_mask, **arguments)
        if isinstance(run, BeamSearch):
            if streamer is not None:
                raise UserError("beam search knows its text at the end only: streamer needs num_beams=1")
            with torch.no_grad():
                return run.output()
        if streamer is not None:
            streamer.put(run.ids.cpu())
        for token in run:
            if streamer is not None:
                streamer.put(token.cpu())
        if streamer is not None:
            streamer.end()
        return run.output()

    def stream(
        self, input_ids: Tensor | None = None, attention_mask: Tensor | None = None, **arguments: Any
    ) -> Iterator[Tensor]:
        """Yield each new column of tokens (B) as soon as it is chosen.

        Args:
            input_ids, attention_mask: as in ``generate``.
            **arguments: ``inputs_embeds``, (B, T, D) in place of ``input_ids``; ``past_key_values``, the cache of the
                first tokens of the prompt; ``generation_config``; ``logits_processor``, functions of ids (B, T) and
                scores (B, V) that return new scores; ``stopping_criteria``, functions of both that return whether a
                text, or each of (B), ends; ``stop_strings`` with ``tokenizer``; and options of ``GenerationConfig``:

                ``max_length`` limits prompt plus new tokens, ``max_new_tokens`` new ones, and wins; without either
                the limit is 20 new ones. ``eos_token_id``: tokens that end a text, by default the config's; None and
                [] name none. ``pad_token_id`` fills finished rows, by default the config's, else the first end token.
                ``seed`` makes sampling repeatable, whatever was drawn before. ``use_cache=False`` computes keys and
                values of past tokens again for each new one. ``do_sample``, ``temperature``, ``top_k``, ``top_p``,
                ``repetition_penalty``: see ``Sampling``.
        """
        run = self._prepare(input_ids, attention_mask, **arguments)
        if isinstance(run, BeamSearch):
            raise UserError("beam search knows its text at the end only: stream needs num_beams=1")
        yield from run

    def _prepare(
        self,
        input_ids: Tensor | None,
        attention_mask: Tensor | None,
        *,
        inputs_embeds: Tensor | None = None,
        past_key_values: Any = None,
        generation_config: Any = None,
        logits_processor: Iterable[Callable[[Tensor, Tensor], Tensor]] | None = None,
        stopping_criteria: Iterable[Callable[[Tensor, Tensor], Any]] | None = None,
        tokenizer: Any = None,
        **given: Any,
    ) -> TokenLoop | BeamSearch:
        """Check a request and return what will answer it."""
        options = resolved(self.generation_config, generation_config, given)
        for name in ("eos_token_id", "pad_token_id"):
            # An end token of None that was given means that no token ends a text.
            if name not in given and getattr(options, name) is None:
                setattr(options, name, getattr(self.config, name))
        prompt = check_prompt(self.config, options, input_ids, attention_mask, inputs_embeds)
        copies = _copies(options)
        past_length = past_length_of(past_key_values)
        if past_length and (copies > 1 or past_length >= prompt.mask.shape[1]):
            raise UserError(
                "past_key_values must hold fewer tokens than input_ids, which begin with them, "
                "and cannot be shared by several beams or sequences"
            )
        prompt = prompt.repeated(copies)
        if inputs_embeds is not None:
            inputs_embeds = inputs_embeds.repeat_interleave(copies, dim=0)
        criteria = list(stopping_criteria or [])
        if options.stop_strings:
            criteria.append(StopStrings(options.stop_strings, tokenizer))
        choice = Sampling(
            do_sample=options.do_sample,
            temperature=options.temperature,
            top_k=options.top_k,
            top_p=options.top_p,
            repetition_penalty=options.repetition_penalty,
            processors=(*constraints_of(options, prompt), *(logits_processor or [])),
            fewest=1 if options.num_beams == 1 else max(2, 1 + len(prompt.end_ids)),
        )
        generator = None
        if options.seed is not None:
            # A generator of its own leaves the global one, and so dropout and other draws, as they were.
            generator = torch.Generator(device=prompt.ids.device).manual_seed(options.seed)
        cache = past_key_values
        # Recomputed blocks keep no cache. Any other request knows its length, so that nothing is allocated later.
        recomputes = self.is_gradient_checkpointing and self.training
        if cache is None and options.use_cache and not recomputes:
            embedded = prompt.mask.shape[1] - prompt.ids.shape[1]
            cache = KVCache(room=embedded + prompt.max_length)
        kind = TokenLoop if options.num_beams == 1 else BeamSearch
        return kind(
            prompt,
            options,
            choice=choice,
            next_logits=partial(self._next_logits, inputs_embeds, options.use_cache),
            criteria=criteria,
            generator=generator,
            cache=cache,
        )

    def _next_logits(
        self, inputs_embeds: Tensor | None, use_cache: bool, ids: Tensor, mask: Tensor, cache: KVCache | None
    ) -> tuple[Tensor, KVCache | None]:
        """Return the logits (B, V) after the last token, and the cache.

        Only the tokens that the cache lacks go through the model: all at first, then one.
        """
        cached = past_length_of(cache)
        # Padding does not count: a padded prompt has the positions it has alone.
        positions = (mask.long().cumsum(dim=1) - 1).clamp(min=0)
        if inputs_embeds is not None and cached == 0:
            embedded = torch.cat((inputs_embeds, self.get_input_embeddings()(ids)), dim=1)
            new = {"inputs_embeds": embedded}
        else:
            # The mask also covers a prompt of embeddings, for which there are no ids.
            new = {"input_ids": ids[:, cached - mask.shape[1] :]}
        out = self(  # type: ignore[operator]
            **new,
            attention_mask=mask,
            position_ids=positions[:, cached:],
            past_key_values=cache,
            use_cache=use_cache,
            return_dict=True,
            logits_to_keep=1,
        )
        # The model's own cache, None while it recomputes blocks in training mode.
        return out.logits[:, -1], out.past_key_values

    def prepare_inputs_for_generation(
        self, input_ids: Tensor, past_key_values: Any = None, attention_mask: Tensor | None = None, **inputs: Any
    ) -> dict[str, Any]:
        """Return the arguments of the forward that predicts the next token, for code that generates by itself."""
        cached = past_length_of(past_key_values)
        new: dict[str, Any] = {"input_ids": input_ids[:, cached:]}
        if inputs.get("inputs_embeds") is not None and cached == 0:
            new = {"inputs_embeds": inputs["inputs_embeds"]}
        if attention_mask is not None and inputs.get("position_ids") is None:
            positions = (attention_mask.long().cumsum(dim=1) - 1).clamp(min=0)
            new["position_ids"] = positions[:, cached:]
        named = {"past_key_values": past_key_values, "attention_mask": attention_mask, "use_cache": True}
        kept = {name: value for name, value in inputs.items() if name not in ("inputs_embeds", "is_first_iteration")}
        return {**named, **kept, **new}

    def _read_generation_config(self, folder: str | Path) -> None:
        self.generation_config = GenerationConfig.from_pretrained(folder)

    def _write_generation_config(self, folder: Path) -> None:
        ids = {name: getattr(self.config, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
        for name in ids:
            own = getattr(self.generation_config, name)
            ids[name] = ids[name] if own is None else own
        # With the config's ids: Transformers takes them from this file alone.
        resolved(self.generation_config, None, ids).save_pretrained(folder)


def _copies(options: GenerationConfig) -> int:
    """Return the number of rows that the model sees for each prompt.

    Raises:
        UserError: numbers of beams and sequences that do not fit.
    """
    beams, wanted = options.num_beams, options.num_return_sequences
    if beams < 1:
        raise UserError(f"num_beams must be at least 1, got {beams}")
    if wanted < 1:
        raise UserError(f"num_return_sequences must be at least 1, got {wanted}")
    if beams > 1:
        if wanted > beams:
            raise UserError(f"num_return_sequences ({wanted}) must be at most num_beams ({beams})")
        return beams
    if wanted > 1 and not options.do_sample:
        raise UserError("num_return_sequences above 1 needs do_sample=True or beams: greedy texts are all the same")
    return wanted
