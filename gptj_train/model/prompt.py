"""Check a request to generate text before the model runs."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from gptj_train.errors import UserError
from gptj_train.model.generation_config import GenerationConfig
from gptj_train.model.gptj_config import GPTJConfig

_DEFAULT_NEW_TOKENS = 20  # of Transformers


@dataclass(frozen=True)
class Prompt:
    """A checked batch of prompts and where its texts end.

    Attributes:
        ids: (B, T) int64, padded on the left; T is 0 if the prompt is given as E embeddings.
        mask: (B, E + T), 0 on padding.
        end_ids: (E) tokens that end a text.
        filler: token that fills a row after its end.
        max_length: limit on the length of ``ids`` plus new tokens.
        min_length: length of ``ids`` plus new tokens before which no text ends.
    """

    ids: Tensor
    mask: Tensor
    end_ids: Tensor
    filler: int
    max_length: int
    min_length: int

    def repeated(self, times: int) -> Prompt:
        """Return the prompts with each row repeated, copies side by side."""
        ids, mask = (tensor.repeat_interleave(times, dim=0) for tensor in (self.ids, self.mask))
        return replace(self, ids=ids, mask=mask)


def check_prompt(
    config: GPTJConfig,
    options: GenerationConfig,
    input_ids: Tensor | None,
    attention_mask: Tensor | None,
    inputs_embeds: Tensor | None,
) -> Prompt:
    """Fill in the defaults and check a request; the arguments are those of ``GenerationMixin.generate``.

    Raises:
        UserError: an empty prompt, padding on the right, or a limit beyond ``n_positions``.
    """
    embedded = 0 if inputs_embeds is None else inputs_embeds.shape[1]
    if inputs_embeds is not None:
        if input_ids is not None:
            raise UserError("give generate either input_ids or inputs_embeds")
        input_ids = torch.empty(len(inputs_embeds), 0, dtype=torch.long, device=inputs_embeds.device)
    if input_ids is None or input_ids.dim() != 2 or input_ids.shape[1] + embedded == 0:
        raise UserError("generate needs at least one prompt token in each row of input_ids (B, T)")
    pad = options.pad_token_id
    ends = _as_list(options.eos_token_id)
    shape = (len(input_ids), input_ids.shape[1] + embedded)
    mask = attention_mask
    if mask is None and inputs_embeds is not None:
        mask = torch.ones(shape, dtype=torch.long, device=input_ids.device)
    elif mask is None:
        mask = _mask_from_pad(input_ids, pad, ends)
    if mask.shape != shape:
        raise UserError(f"attention_mask must be {shape}, got {tuple(mask.shape)}")
    if not mask[:, -1].all():
        # The next token would be predicted from padding.
        raise UserError("prompts must be padded on the left for generation")
    first_end = ends[0] if ends else 0
    limit = _length_limit(shape[1], options.max_length, options.max_new_tokens, config.n_positions)
    return Prompt(
        ids=input_ids,
        mask=mask,
        end_ids=torch.tensor(ends, device=input_ids.device, dtype=input_ids.dtype),
        filler=first_end if pad is None else pad,
        max_length=limit - embedded,
        min_length=_least_length(shape[1], options) - embedded,
    )


def _least_length(prompt_length: int, options: GenerationConfig) -> int:
    if options.min_new_tokens is not None:
        return prompt_length + options.min_new_tokens
    return options.min_length


def _as_list(ids: int | list[int] | None) -> list[int]:
    if ids is None:
        return []
    return [ids] if isinstance(ids, int) else list(ids)


def _mask_from_pad(input_ids: Tensor, pad: int | None, ends: list[int]) -> Tensor:
    # A pad id that is also an end token may be text, so it tells nothing about padding.
    if pad is None or pad in ends:
        return torch.ones_like(input_ids)
    return (input_ids != pad).long()


def _length_limit(prompt_length: int, max_length: int | None, max_new_tokens: int | None, n_positions: int) -> int:
    if max_new_tokens is not None:
        if max_new_tokens < 1:
            raise UserError(f"max_new_tokens must be at least 1, got {max_new_tokens}")
        limit = prompt_length + max_new_tokens
    elif max_length is not None:
        limit = max_length
    else:
        # Only the default gives way to n_positions; a limit that the user gave is never cut silently.
        limit = min(prompt_length + _DEFAULT_NEW_TOKENS, n_positions)
    if limit <= prompt_length:
        raise UserError(f"max_length {limit} leaves no room after the prompt of {prompt_length} tokens; raise it")
    if limit > n_positions:
        raise UserError(
            f"prompt plus new tokens ({limit}) exceed the model's n_positions ({n_positions}); shorten the prompt, or "
            "lower max_new_tokens"
        )
    return limit
