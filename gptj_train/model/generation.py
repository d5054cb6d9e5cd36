"""Text generation with a KV cache: greedy, sampling and beam search."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional as F

from gptj_train.errors import UserError

if TYPE_CHECKING:
    from gptj_train.model.attention import KVCache
    from gptj_train.model.gptj_config import GPTJConfig


@dataclass(frozen=True)
class Sampling:
    """How the next token is drawn; the defaults are Transformers'. ``top_k=0`` and ``top_p=1`` switch off.

    Raises:
        UserError: a value outside its range.
    """

    do_sample: bool = False
    temperature: float = 1.0
    top_k: int = 50
    top_p: float = 1.0
    repetition_penalty: float = 1.0

    def __post_init__(self) -> None:
        if self.do_sample and self.temperature <= 0:
            raise UserError(f"temperature must be above 0, got {self.temperature} (do_sample=false is greedy)")
        if self.top_k < 0:
            raise UserError(f"top_k must be 0 (off) or more, got {self.top_k}")
        if not 0 < self.top_p <= 1:
            raise UserError(f"top_p must be in (0, 1], got {self.top_p}")
        if self.repetition_penalty <= 0:
            raise UserError(f"repetition_penalty must be above 0, got {self.repetition_penalty}")

    def scores(self, logits: Tensor, seen: Tensor, mask: Tensor | None = None) -> Tensor:
        """Logits (B, V) in fp32 with repetition penalty, temperature, top-k and top-p applied, in this order.

        Args:
            seen: (B, T) the tokens so far, which the penalty (CTRL, arXiv 1909.05858) makes less likely.
            mask: (B, T), 0 on padding, which has not been said; None where there is none.
        """
        scores = logits.float()
        if self.repetition_penalty != 1.0:
            vocabulary = scores.shape[1]
            said = seen if mask is None else seen.masked_fill(mask == 0, vocabulary)  # a column to drop again
            scores = F.pad(scores, (0, 1))
            past = scores.gather(1, said)
            penalised = torch.where(past < 0, past * self.repetition_penalty, past / self.repetition_penalty)
            scores = scores.scatter(1, said, penalised)[:, :vocabulary]
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

    def pick(
        self, logits: Tensor, seen: Tensor, generator: torch.Generator | None, mask: Tensor | None = None
    ) -> Tensor:
        """The next token of each row, (B)."""
        scores = self.scores(logits, seen, mask)
        if not self.do_sample:
            return scores.argmax(dim=-1)
        return torch.multinomial(scores.softmax(dim=-1), 1, generator=generator).squeeze(1)


@dataclass(frozen=True)
class Prompt:
    """A checked request: left-padded ids and mask (B, T), end ids, the filler after an end, the final length."""

    ids: Tensor
    mask: Tensor
    ends: list[int]
    filler: int
    stop: int


class GenerationMixin:
    """``generate`` for a causal-LM module."""

    config: GPTJConfig

    def generate(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, *, num_beams: int = 1, **options: Any
    ) -> Tensor:
        """Continue each prompt until its end token or the length limit.

        Args:
            input_ids: (B, T) prompts, padded on the left where they differ in length.
            attention_mask: (B, T), 0 on padding; by default found by ``pad_token_id``.
            num_beams: above 1, search for the likeliest text with so many beams, drawing nothing;
                ``length_penalty`` (1.0) then divides its log-probability by length to that power.
            **options: of ``stream``.

        Returns:
            (B, T + new) ids, prompts included, as ``transformers``' generate.

        Raises:
            UserError: an empty prompt, padding on the right, a limit beyond ``n_positions``, or a bad option.
        """
        if num_beams < 1:
            raise UserError(f"num_beams must be at least 1, got {num_beams}")
        if num_beams > 1:
            if options.pop("do_sample", False):
                raise UserError("beams draw nothing: give do_sample=False, or num_beams=1")
            searching = {name: value for name, value in options.items() if name not in ("seed", "use_cache")}
            return beam_search(self, input_ids, attention_mask, num_beams, **searching)
        options.pop("length_penalty", None)
        new = self.stream(input_ids, attention_mask, **options)
        return torch.cat([input_ids, *(token[:, None] for token in new)], dim=1)

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
        """Yield each new column of tokens (B) as it is chosen.

        Args:
            input_ids, attention_mask: see ``generate``.
            max_length: limit on prompt plus new tokens.
            max_new_tokens: limit on new tokens; wins over ``max_length``; 20 when neither limit is given.
            eos_token_id, pad_token_id: default to the config's; finished rows are filled with pad, else with eos.
            seed: makes sampling repeatable whatever was drawn before.
            **sampling: fields of ``Sampling``.
        """
        options = Sampling(**sampling)
        prompt = self._prompt(input_ids, attention_mask, max_length, max_new_tokens, eos_token_id, pad_token_id)
        ids, mask = prompt.ids, prompt.mask
        end_ids = torch.tensor(prompt.ends, device=ids.device, dtype=ids.dtype)
        generator = None if seed is None else torch.Generator(device=ids.device).manual_seed(seed)
        finished = torch.zeros(len(ids), dtype=torch.bool, device=ids.device)
        cache = None
        while ids.shape[1] < prompt.stop and not finished.all():
            logits, cache = self._next_logits(ids, mask, cache, use_cache)
            token = options.pick(logits, ids, generator, mask).masked_fill(finished, prompt.filler)
            finished = finished | torch.isin(token, end_ids)
            ids = torch.cat((ids, token[:, None]), dim=1)
            mask = torch.cat((mask, mask.new_ones(len(token), 1)), dim=1)
            yield token

    def _prompt(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None,
        max_length: int | None,
        max_new_tokens: int | None,
        eos_token_id: int | list[int] | None,
        pad_token_id: int | None,
    ) -> Prompt:
        pad = self.config.pad_token_id if pad_token_id is None else pad_token_id
        ends = _as_list(self.config.eos_token_id if eos_token_id is None else eos_token_id)
        mask = _mask_of(input_ids, pad, ends) if attention_mask is None else attention_mask
        _check_prompt(input_ids, mask)
        stop = _length_limit(input_ids.shape[1], max_length, max_new_tokens, self.config.n_positions)
        filler = pad if pad is not None else (ends[0] if ends else 0)
        return Prompt(input_ids, mask, ends, filler, stop)

    def _next_logits(
        self, ids: Tensor, mask: Tensor, cache: KVCache | None, use_cache: bool
    ) -> tuple[Tensor, KVCache | None]:
        """Logits (B, V) after the last token, feeding what the cache does not hold; and the cache."""
        fed = 0 if cache is None else cache.get_seq_length()
        positions = (mask.long().cumsum(dim=1) - 1).clamp(min=0)
        out = self(  # type: ignore[operator]
            input_ids=ids[:, fed:],
            attention_mask=mask,
            position_ids=positions[:, fed:],
            past_key_values=cache,
            use_cache=use_cache,
            return_dict=True,
            logits_to_keep=1,
        )
        return out.logits[:, -1], out.past_key_values  # gradient checkpointing keeps no cache while training


@torch.no_grad()
def beam_search(
    model: GenerationMixin,
    input_ids: Tensor,
    attention_mask: Tensor | None,
    num_beams: int,
    *,
    max_length: int | None = None,
    max_new_tokens: int | None = None,
    eos_token_id: int | list[int] | None = None,
    pad_token_id: int | None = None,
    length_penalty: float = 1.0,
    repetition_penalty: float = 1.0,
) -> Tensor:
    """The likeliest continuation of each prompt among ``num_beams`` hypotheses; arguments as of ``generate``.

    A row ends when it has ``num_beams`` finished texts and its best running one, at its present length, is no
    likelier than the worst of them (Transformers' ``early_stopping=False``).
    """
    options = Sampling(repetition_penalty=repetition_penalty)
    prompt = model._prompt(input_ids, attention_mask, max_length, max_new_tokens, eos_token_id, pad_token_id)
    rows, start = input_ids.shape
    device = input_ids.device
    offsets = torch.arange(rows, device=device)[:, None] * num_beams
    ids = input_ids.repeat_interleave(num_beams, dim=0)
    mask = prompt.mask.repeat_interleave(num_beams, dim=0)
    end_ids = torch.tensor(prompt.ends, device=device, dtype=ids.dtype)
    scores = torch.full((rows, num_beams), -1e9, device=device)
    scores[:, 0] = 0  # all beams are equal as yet: go on from one of them
    finished: list[list[tuple[float, Tensor]]] = [[] for _ in range(rows)]
    done = [False] * rows
    cache = None
    while ids.shape[1] < prompt.stop and not all(done):
        logits, cache = model._next_logits(ids, mask, cache, use_cache=True)
        logs = options.scores(logits.float().log_softmax(dim=-1), ids, mask).view(rows, num_beams, -1)
        vocabulary = logs.shape[-1]
        # Enough candidates that num_beams of them go on, whatever ends.
        wide = min(max(2, 1 + len(prompt.ends)) * num_beams, num_beams * vocabulary)
        best, places = (scores[:, :, None] + logs).flatten(1).topk(wide)
        tokens, parents = places % vocabulary, places // vocabulary + offsets
        length = ids.shape[1] + 1 - start
        ending = torch.isin(tokens, end_ids) | (ids.shape[1] + 1 == prompt.stop)
        for row in range(rows):
            if not done[row]:
                for at in ending[row, :num_beams].nonzero().flatten().tolist():
                    text = torch.cat((ids[parents[row, at]], tokens[row, at : at + 1]))
                    finished[row].append((best[row, at].item() / length**length_penalty, text))
                finished[row] = sorted(finished[row], key=lambda one: -one[0])[:num_beams]
        scores, chosen = best.masked_fill(ending, -1e9).topk(num_beams)
        parent = parents.gather(1, chosen).flatten()
        ids = torch.cat((ids[parent], tokens.gather(1, chosen).flatten()[:, None]), dim=1)
        mask = torch.cat((mask[parent], mask.new_ones(len(parent), 1)), dim=1)
        if cache is not None:
            cache.reorder(parent)
        for row, texts in enumerate(finished):
            hope = scores[row, 0].item() / length**length_penalty
            done[row] = done[row] or (len(texts) == num_beams and hope <= texts[-1][0])
    winners = [texts[0][1] for texts in finished]
    longest = max(len(text) for text in winners)
    return torch.stack([F.pad(text, (0, longest - len(text)), value=prompt.filler) for text in winners])


def _as_list(ids: int | list[int] | None) -> list[int]:
    return [] if ids is None else [ids] if isinstance(ids, int) else list(ids)


def _mask_of(input_ids: Tensor, pad: int | None, ends: list[int]) -> Tensor:
    # Where pad is also an end token, its presence in a prompt says nothing about padding.
    if pad is None or pad in ends:
        return torch.ones_like(input_ids)
    return (input_ids != pad).long()


def _check_prompt(input_ids: Tensor, attention_mask: Tensor) -> None:
    if input_ids.dim() != 2 or input_ids.shape[1] == 0:
        raise UserError("generate needs at least one prompt token in each row of input_ids (B, T)")
    if attention_mask.shape != input_ids.shape:
        raise UserError(f"attention_mask must be {tuple(input_ids.shape)}, got {tuple(attention_mask.shape)}")
    if not attention_mask[:, -1].all():
        raise UserError("prompts must be padded on the left for generation")


def _length_limit(prompt: int, max_length: int | None, max_new_tokens: int | None, n_positions: int) -> int:
    if max_new_tokens is not None:
        if max_new_tokens < 1:
            raise UserError(f"max_new_tokens must be at least 1, got {max_new_tokens}")
        stop = prompt + max_new_tokens
    else:
        stop = min(prompt + 20, n_positions) if max_length is None else max_length
        if stop <= prompt:
            raise UserError(f"max_length {stop} leaves no room after the prompt of {prompt} tokens")
    if stop > n_positions:
        raise UserError(f"prompt plus new tokens ({stop}) exceed the model's n_positions ({n_positions})")
    return stop
