"""Text from an exported or original checkpoint."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from gptj_train.data.tokenizer import Tokenizer
from gptj_train.weights.pretrained import GPTJForCausalLM

_UNFINISHED = "\ufffd"  # what the bytes of a character decode to until all have come


class TextGenerator:
    """The model and tokenizer of an HF folder, on the GPU if there is one.

    Raises:
        ValueError: a folder without model or tokenizer; later, an empty prompt or a bad option.
    """

    def __init__(self, checkpoint: str | Path) -> None:
        self._tokenizer = Tokenizer.load(checkpoint)
        self._device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
        self._model = GPTJForCausalLM.from_pretrained(checkpoint)
        if self._device is not None:
            self._model.to(self._device)

    def stream(self, prompt: str, stop: Sequence[str] = (), **options: Any) -> Iterator[str]:
        """Yield the continuation of a prompt piece by piece, as its characters are certain.

        Args:
            stop: end before the first of these strings.
            **options: of ``GPTJForCausalLM.stream``.
        """
        ids = self._encode(prompt)
        before = len(self._tokenizer.decode(ids))
        held_back = max(map(len, stop), default=1) - 1  # may be the beginning of a stop string
        text, shown = "", 0
        columns = self._model.stream(
            torch.tensor([ids], device=self._device), eos_token_id=self._tokenizer.end_id, **options
        )
        for token in columns:
            ids.append(int(token))
            text = self._tokenizer.decode(ids)[before:]
            cut = _first(text, stop)
            if cut is not None:
                yield text[shown:cut]
                return
            certain = len(text.rstrip(_UNFINISHED)) - held_back
            if certain > shown:
                yield text[shown:certain]
                shown = certain
        yield text[shown:]

    def complete(self, prompts: list[str], stop: Sequence[str] = (), **options: Any) -> list[str]:
        """The continuation of each prompt, all generated as one batch.

        Args:
            stop: cut before the first of these strings.
            **options: of ``GPTJForCausalLM.generate``.
        """
        ids = [self._encode(prompt) for prompt in prompts]
        longest = max(map(len, ids))
        end_id = self._tokenizer.end_id
        padded = torch.tensor([[end_id] * (longest - len(row)) + row for row in ids], device=self._device)
        mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in ids], device=self._device)
        generated = self._model.generate(padded, mask, eos_token_id=end_id, **options)
        texts = []
        for row, own in zip(generated.tolist(), ids, strict=True):
            text = self._tokenizer.decode(row[longest - len(own) :])[len(self._tokenizer.decode(own)) :]
            texts.append(text[: _first(text, stop)])
        return texts

    def room(self, prompt: str) -> int:
        """Tokens that fit behind a prompt."""
        return self._model.config.n_positions - len(self._encode(prompt))

    def _encode(self, prompt: str) -> list[int]:
        if not (ids := self._tokenizer.encode(prompt)):
            raise ValueError("the prompt is empty; give prompt='some text'")
        return ids


def prompts_in(file: str, batch_size: int) -> list[list[str]]:
    """The lines of a file in batches, empty ones left out.

    Raises:
        ValueError: no such file, no prompt in it, or a batch size below 1.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    try:
        prompts = [line for line in Path(file).read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"prompts={file}: cannot be read as text ({error})") from None
    if not prompts:
        raise ValueError(f"prompts={file}: holds no prompt; write one a line")
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
        raise ValueError("no prompt: give prompt='some text', prompts=FILE, or type them")


def _first(text: str, stop: Sequence[str]) -> int | None:
    return min((at for one in stop if (at := text.find(one)) >= 0), default=None)


def sample_from(checkpoint: str | Path, prompt: str, seed: int) -> str:
    """A prompt with a short continuation that shows what a run has learnt."""
    writer = TextGenerator(checkpoint)
    options: dict[str, Any] = {"do_sample": True, "temperature": 0.7, "top_p": 0.9, "seed": seed}
    return prompt + writer.complete([prompt], max_new_tokens=min(80, writer.room(prompt)), **options)[0]
