"""Text generation with a KV cache: greedy and sampling."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from gptj_train.model.config import GPTJConfig


@dataclass(frozen=True)
class Sampling:
    """How the next token is drawn; the defaults are Transformers'. ``top_k=0`` and ``top_p=1`` switch off.

    Raises:
        ValueError: a value outside its range.
    """

    do_sample: bool = False
    temperature: float = 1.0
    top_k: int = 50
    top_p: float = 1.0
    repetition_penalty: float = 1.0

    def __post_init__(self) -> None:
        if self.temperature <= 0:
            raise ValueError(f"temperature must be above 0, got {self.temperature} (do_sample=false is greedy)")
        if self.top_k < 0:
            raise ValueError(f"top_k must be 0 (off) or more, got {self.top_k}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be in (0, 1], got {self.top_p}")
        if self.repetition_penalty <= 0:
            raise ValueError(f"repetition_penalty must be above 0, got {self.repetition_penalty}")

    def scores(self, logits: Tensor, seen: Tensor) -> Tensor:
        """Logits (B, V) in fp32 with repetition penalty, temperature, top-k and top-p applied, in this order.

        Args:
            seen: (B, T) the tokens so far, which the penalty (CTRL, arXiv 1909.05858) makes less likely.
        """
        scores = logits.float()
        if self.repetition_penalty != 1.0:
            past = scores.gather(1, seen)
            penalised = torch.where(past < 0, past * self.repetition_penalty, past / self.repetition_penalty)
            scores = scores.scatter(1, seen, penalised)
        if not self.do_sample:
            return scores
        scores = scores / self.temperature
        if 0 < self.top_k < scores.shape[-1]:
            lowest = scores.topk(self.top_k).values[:, -1:]
            scores = scores.masked_fill(scores < lowest, -torch.inf)
        if self.top_p < 1:
            ascending, order = scores.sort(dim=-1)
            tail = ascending.softmax(dim=-1).cumsum(dim=-1) <= 1 - self.top_p
            tail[:, -1] = False
            scores = scores.masked_fill(tail.scatter(1, order, tail), -torch.inf)
        return scores

    def pick(self, logits: Tensor, seen: Tensor, generator: torch.Generator | None) -> Tensor:
        """The next token of each row, (B)."""
        scores = self.scores(logits, seen)
        if not self.do_sample:
            return scores.argmax(dim=-1)
        return torch.multinomial(scores.softmax(dim=-1), 1, generator=generator).squeeze(1)


class GenerationMixin:
    """``generate`` for a causal-LM module."""

    config: GPTJConfig

    def generate(
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
    ) -> Tensor:
        """Continue each prompt until its end token or the length limit.

        Args:
            input_ids: (B, T) prompts, padded on the left where they differ in length.
            attention_mask: (B, T), 0 on padding; by default found by ``pad_token_id``.
            max_length: limit on prompt plus new tokens.
            max_new_tokens: limit on new tokens; wins over ``max_length``; 20 when neither limit is given.
            eos_token_id, pad_token_id: default to the config's; finished rows are filled with pad, else with eos.
            seed: makes sampling repeatable whatever was drawn before.
            **sampling: fields of ``Sampling``.

        Returns:
            (B, T + new) ids, prompts included, as ``transformers``' generate.

        Raises:
            ValueError: an empty prompt, padding on the right, a limit beyond ``n_positions``, or a bad option.
        """
        tokens = [input_ids]
        for token in self.stream(
            input_ids,
            attention_mask,
            max_length=max_length,
            max_new_tokens=max_new_tokens,
            eos_token_id=eos_token_id,
            pad_token_id=pad_token_id,
            seed=seed,
            use_cache=use_cache,
            **sampling,
        ):
            tokens.append(token[:, None])
        return torch.cat(tokens, dim=1)

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
        """Yield each new column of tokens (B) as it is chosen. Arguments: see ``generate``."""
        options = Sampling(**sampling)
        config = self.config
        pad_token_id = config.pad_token_id if pad_token_id is None else pad_token_id
        ends = _as_list(config.eos_token_id if eos_token_id is None else eos_token_id)
        if attention_mask is None:
            attention_mask = _mask_of(input_ids, pad_token_id, ends)
        _check_prompt(input_ids, attention_mask)
        stop = _length_limit(input_ids.shape[1], max_length, max_new_tokens, config.n_positions)
        filler = pad_token_id if pad_token_id is not None else (ends[0] if ends else 0)
        end_ids = torch.tensor(ends, device=input_ids.device, dtype=input_ids.dtype)
        generator = None
        if seed is not None:
            generator = torch.Generator(device=input_ids.device).manual_seed(seed)

        finished = torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)
        cache, fed = None, 0
        while input_ids.shape[1] < stop and not finished.all():
            positions = (attention_mask.long().cumsum(dim=1) - 1).clamp(min=0)
            out = self(  # type: ignore[operator]
                input_ids=input_ids[:, fed:],
                attention_mask=attention_mask,
                position_ids=positions[:, fed:],
                past_key_values=cache,
                use_cache=use_cache,
                return_dict=True,
                logits_to_keep=1,
            )
            if out.past_key_values is not None:  # gradient checkpointing keeps none while training
                cache, fed = out.past_key_values, input_ids.shape[1]
            token = options.pick(out.logits[:, -1], input_ids, generator).masked_fill(finished, filler)
            finished = finished | torch.isin(token, end_ids)
            input_ids = torch.cat((input_ids, token[:, None]), dim=1)
            attention_mask = torch.cat((attention_mask, attention_mask.new_ones(len(token), 1)), dim=1)
            yield token


def _as_list(ids: int | list[int] | None) -> list[int]:
    return [] if ids is None else [ids] if isinstance(ids, int) else list(ids)


def _mask_of(input_ids: Tensor, pad: int | None, ends: list[int]) -> Tensor:
    # Where pad is also an end token, its presence in a prompt says nothing about padding.
    if pad is None or pad in ends:
        return torch.ones_like(input_ids)
    return (input_ids != pad).long()


def _check_prompt(input_ids: Tensor, attention_mask: Tensor) -> None:
    if input_ids.dim() != 2 or input_ids.shape[1] == 0:
        raise ValueError("generate needs at least one prompt token in each row of input_ids (B, T)")
    if attention_mask.shape != input_ids.shape:
        raise ValueError(f"attention_mask must be {tuple(input_ids.shape)}, got {tuple(attention_mask.shape)}")
    if not attention_mask[:, -1].all():
        raise ValueError("prompts must be padded on the left for generation")


def _length_limit(prompt: int, max_length: int | None, max_new_tokens: int | None, n_positions: int) -> int:
    if max_new_tokens is not None:
        if max_new_tokens < 1:
            raise ValueError(f"max_new_tokens must be at least 1, got {max_new_tokens}")
        stop = prompt + max_new_tokens
    else:
        stop = min(prompt + 20, n_positions) if max_length is None else max_length
        if stop <= prompt:
            raise ValueError(f"max_length {stop} leaves no room after the prompt of {prompt} tokens")
    if stop > n_positions:
        raise ValueError(f"prompt plus new tokens ({stop}) exceed the model's n_positions ({n_positions})")
    return stop
