"""Text from an exported, original or training checkpoint."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from gptj_train.data.tokenizer import Tokenizer
from gptj_train.errors import UserError
from gptj_train.inference.placement import place
from gptj_train.model.gptj_config import GPTJConfig
from gptj_train.model.heads import GPTJForCausalLM
from gptj_train.weights.hf_writer import DTYPES

_UNFINISHED = "\ufffd"  # what the bytes of a character decode to until all have come


class TextGenerator:
    """The model and tokenizer of a folder, on the accelerator if there is one.

    Args:
        dtype: of the weights, a key of ``DTYPES``; None keeps what is stored.

    Raises:
        UserError: a folder without model or tokenizer; later, an empty prompt or a bad option.
    """

    def __init__(self, checkpoint: str | Path, dtype: str | None = None) -> None:
        GPTJConfig.from_pretrained(checkpoint)  # says what is wrong with a folder that is no model's
        self.tokenizer = Tokenizer.load(checkpoint)
        self.model = GPTJForCausalLM.from_pretrained(checkpoint, DTYPES[dtype] if dtype else None)
        self.tokenizer.check_fits(self.model.config.vocab_size)
        self.device = place(self.model)

    def stream(self, prompt: str, stop: Sequence[str] = (), num_beams: int = 1, **options: Any) -> Iterator[str]:
        """Yield the continuation of a prompt piece by piece, as its characters are certain; of beams at the end.

        Args:
            stop: end before the first of these strings, special tokens among them.
            num_beams, **options: of ``GPTJForCausalLM.generate``.
        """
        if num_beams > 1:
            yield from self.complete([prompt], stop, num_beams, **options)
            return
        ids = self.encode(prompt)
        before = len(self.tokenizer.decode(ids))
        ends, stop = self._ends(stop)
        held_back = max(map(len, stop), default=1) - 1  # may be the beginning of a stop string
        text, shown = "", 0
        columns = self.model.stream(torch.tensor([ids], device=self.device), eos_token_id=ends, **options)
        for token in map(int, columns):
            if token in ends:
                break
            ids.append(token)
            text = self.tokenizer.decode(ids)[before:]
            cut = _first(text, stop)
            if cut is not None:
                yield text[shown:cut]
                return
            certain = len(text.rstrip(_UNFINISHED)) - held_back
            if certain > shown:
                yield text[shown:certain]
                shown = certain
        yield text[shown:]

    def complete(self, prompts: list[str], stop: Sequence[str] = (), num_beams: int = 1, **options: Any) -> list[str]:
        """The continuation of each prompt, all generated as one batch; it ends when every text has.

        Args:
            stop: cut before the first of these strings, special tokens among them.
            num_beams, **options: of ``GPTJForCausalLM.generate``.
        """
        return self.complete_ids([self.encode(prompt) for prompt in prompts], stop, num_beams, **options)

    def complete_ids(
        self, ids: list[list[int]], stop: Sequence[str] = (), num_beams: int = 1, **options: Any
    ) -> list[str]:
        """As ``complete``, of prompts that are token ids."""
        ends, stop = self._ends(stop)
        padded, mask = self.padded(ids)
        options |= {"eos_token_id": ends}
        new: list[list[int]] = [[] for _ in ids]
        if num_beams > 1:
            new = self.model.generate(padded, mask, num_beams=num_beams, **options)[:, padded.shape[1] :].tolist()
        else:
            for column in self.model.stream(padded, mask, **options):
                for row, token in zip(new, column.tolist(), strict=True):
                    row.append(token)
                if stop and all(self._cut(*pair, ends, stop)[1] for pair in zip(ids, new, strict=True)):
                    break
        return [self._cut(*pair, ends, stop)[0] for pair in zip(ids, new, strict=True)]

    def padded(self, ids: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
        """Prompts of different lengths as input_ids and attention_mask (B, T) int64, padded on the left."""
        longest = max(map(len, ids))
        rows = [[self.tokenizer.end_id] * (longest - len(row)) + row for row in ids]
        mask = [[0] * (longest - len(row)) + [1] * len(row) for row in ids]
        return torch.tensor(rows, device=self.device), torch.tensor(mask, device=self.device)

    def _ends(self, stop: Sequence[str]) -> tuple[list[int], list[str]]:
        """Ids that end a text, special tokens that are to stop it among them, and the other stop strings."""
        special = self.tokenizer.special_tokens
        return [self.tokenizer.end_id, *(special[one] for one in stop if one in special)], [
            one for one in stop if one not in special
        ]

    def _cut(self, prompt: list[int], new: list[int], ends: list[int], stop: Sequence[str]) -> tuple[str, bool]:
        """The new text up to an end or a stop string, and whether there was one."""
        at = next((at for at, token in enumerate(new) if token in ends), None)
        text = self.tokenizer.decode(prompt + new[:at])[len(self.tokenizer.decode(prompt)) :]
        cut = _first(text, stop)
        return text[:cut], at is not None or cut is not None

    def encode(self, prompt: str) -> list[int]:
        """Ids of a prompt; an empty one is a ValueError."""
        if not (ids := self.tokenizer.encode(prompt)):
            raise UserError("the prompt is empty; give prompt='some text'")
        return ids


def prompts_in(file: str, batch_size: int) -> list[list[str]]:
    """The lines of a file in batches, empty ones left out.

    Raises:
        UserError: no such file, no prompt in it, or a batch size below 1.
    """
    if batch_size < 1:
        raise UserError(f"batch_size must be at least 1, got {batch_size}")
    try:
        prompts = [line for line in Path(file).read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"prompts={file}: cannot be read as text ({error})") from None
    if not prompts:
        raise UserError(f"prompts={file}: holds no prompt; write one a line")
    return [prompts[start : start + batch_size] for start in range(0, len(prompts), batch_size)]


def typed_prompts() -> Iterator[str]:
    """Prompts from the keyboard, or from a pipe, until its end."""
    asking = sys.stdin.isatty()
    typed = 0
    while True:
        try:
            prompt = input("prompt> " if asking else "")
        except EOFError:
            break
        if prompt.strip():
            typed += 1
            yield prompt
    if not typed and not asking:
        raise UserError("no prompt: give prompt='some text', prompts=FILE, or type them")


def _first(text: str, stop: Sequence[str]) -> int | None:
    return min((at for one in stop if (at := text.find(one)) >= 0), default=None)


def sample_from(checkpoint: str | Path, prompt: str, seed: int) -> str:
    """A prompt with a short continuation that shows what a run has learnt."""
    writer = TextGenerator(checkpoint)
    options: dict[str, Any] = {"do_sample": True, "temperature": 0.7, "top_p": 0.9, "seed": seed}
    n_positions = writer.model.config.n_positions
    new = min(80, n_positions // 2)
    seen = writer.encode(prompt)[new - n_positions :]  # of a long prompt the end
    return prompt + writer.complete_ids([seen], max_new_tokens=new, **options)[0]
