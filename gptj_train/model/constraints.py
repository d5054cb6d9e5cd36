"""What a text must not contain, and when it must not end: processors of scores, as in Transformers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from gptj_train.errors import UserError
from gptj_train.model.generation_config import GenerationConfig
from gptj_train.model.prompt import Prompt

Processor = Callable[[Tensor, Tensor], Tensor]


def constraints_of(options: GenerationConfig, prompt: Prompt) -> list[Processor]:
    """Return the processors for a request, in Transformers' order.

    Raises:
        UserError: a size below 0, or an empty or negative bad word.
    """
    processors: list[Processor] = []
    if options.no_repeat_ngram_size < 0:
        raise UserError(f"no_repeat_ngram_size must be 0 (off) or more, got {options.no_repeat_ngram_size}")
    if options.no_repeat_ngram_size:
        processors.append(partial(_forbid_repetition, options.no_repeat_ngram_size))
    for word in options.bad_words_ids or []:
        if not word or min(word) < 0:
            raise UserError(f"bad_words_ids must be lists of token ids, got {word!r}")
        # The end token alone is no word: Transformers leaves it out as well.
        if not (len(word) == 1 and word[0] in prompt.end_ids.tolist()):
            processors.append(partial(_forbid_word, word))
    if prompt.min_length > prompt.ids.shape[1] and len(prompt.end_ids):
        processors.append(partial(_forbid_ends_before, prompt.min_length, prompt.end_ids))
    return processors


def _forbid_repetition(size: int, ids: Tensor, scores: Tensor) -> Tensor:
    """Forbid tokens that would complete a run of ``size`` tokens for the second time."""
    length = ids.shape[1]
    if length + 1 < size or length == 0:
        return scores
    runs = ids.unfold(1, size, 1)  # (B, length - size + 1, size)
    last = ids[:, length - size + 1 :]
    seen = (runs[..., :-1] == last[:, None]).all(dim=-1)
    # Runs that began otherwise forbid an extra column, which is cut off again.
    vocabulary = scores.shape[1]
    forbidden = runs[..., -1].masked_fill(~seen, vocabulary)
    return F.pad(scores, (0, 1)).scatter(1, forbidden, -torch.inf)[:, :vocabulary]


def _forbid_word(word: Sequence[int], ids: Tensor, scores: Tensor) -> Tensor:
    """Forbid the last token of a word after its first ones."""
    *before, last = word
    # Also a word as long as the text and one token is let through, as in Transformers.
    if len(word) > ids.shape[1] and before:
        return scores
    expected = torch.tensor(before, device=ids.device, dtype=ids.dtype)
    begun = (ids[:, ids.shape[1] - len(before) :] == expected).all(dim=-1)
    scores = scores.clone()
    scores[begun, last] = -torch.inf
    return scores


def _forbid_ends_before(length: int, end_ids: Tensor, ids: Tensor, scores: Tensor) -> Tensor:
    return scores.index_fill(1, end_ids, -torch.inf) if ids.shape[1] < length else scores


class StopStrings:
    """Tells which rows have just completed one of some strings; a stopping criterion.

    Args:
        strings: at least one.
        tokenizer: an object with ``decode(ids)``, such as a Transformers tokenizer.

    Raises:
        UserError: no tokenizer, or an empty string.
    """

    def __init__(self, strings: str | Sequence[str], tokenizer: Any) -> None:
        self._strings = [strings] if isinstance(strings, str) else list(strings)
        if tokenizer is None:
            raise UserError("stop_strings needs tokenizer=..., which turns the ids into text")
        if not all(self._strings):
            raise UserError("stop_strings must not be empty")
        self._tokenizer = tokenizer
        # A token is at least one byte, so that this many of them hold the longest string, and the token before it.
        self._window = max((len(string.encode()) for string in self._strings), default=0) + 1

    def __call__(self, ids: Tensor, scores: Tensor | None = None) -> Tensor:
        """Return (B) bool for texts (B, T)."""
        completed = []
        for row in ids[:, -self._window :].tolist():
            text = self._tokenizer.decode(row)
            known = len(self._tokenizer.decode(row[:-1]))
            # Those that ended before the last token were reported then.
            ends = [text.rfind(string) + len(string) for string in self._strings if string in text]
            completed.append(any(end > known for end in ends))
        return torch.tensor(completed, device=ids.device)
