"""Generate text with an exported, original or training checkpoint."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from gptj_train.data.tokenizer import Tokenizer
from gptj_train.errors import UserError
from gptj_train.inference.placement import place
from gptj_train.model.gptj_config import GPTJConfig
from gptj_train.model.heads import GPTJForCausalLM
from gptj_train.model.quantized import Quantization
from gptj_train.near_name import near_name
from gptj_train.weights.hf_writer import DTYPES

_REPLACEMENT = "\ufffd"  # U+FFFD, what the first bytes of a character decode to until its last byte is there

_NO_TEXT = ("GPTJForSequenceClassification", "GPTJForQuestionAnswering")


class TextGenerator:
    """The model and tokenizer of a folder, on the accelerator if there is one.

    Args:
        checkpoint: HF folder or training checkpoint of a causal LM.
        dtype: of the weights, a key of ``DTYPES``; None keeps the stored dtype.
        quantize: how the matrices of the blocks are stored.

    Raises:
        UserError: no model or tokenizer in the folder; from the methods, an empty prompt or an invalid option.
    """

    def __init__(self, checkpoint: str | Path, dtype: str | None = None, quantize: Quantization = "none") -> None:
        # Read the config first: its messages for a folder that is no model are better than the tokenizer's.
        for name in GPTJConfig.from_pretrained(checkpoint).architectures:
            if name in _NO_TEXT:
                raise UserError(
                    f"{checkpoint} is a {name}, which writes no text; give a GPTJForCausalLM, or measure this one with "
                    "recipes/evaluate.py"
                )
        self.tokenizer = Tokenizer.load(checkpoint)
        stored_as = DTYPES[dtype] if dtype else None
        self.model = GPTJForCausalLM.from_pretrained(checkpoint, stored_as, quantize=quantize)
        self.tokenizer.check_fits(self.model.config.vocab_size)
        self.device = place(self.model)

    def stream(self, prompt: str, stop: Sequence[str] = (), num_beams: int = 1, **options: Any) -> Iterator[str]:
        """Yield the continuation of a prompt in pieces, each as soon as later tokens cannot change it.

        Beam search yields one piece at the end.

        Args:
            stop: end before the first of these strings; special tokens may be among them.
            num_beams, **options: arguments of ``GPTJForCausalLM.generate``.
        """
        if num_beams > 1:
            yield from self.complete([prompt], stop, num_beams, **options)
            return
        ids = self.encode(prompt)
        prompt_length = len(self.tokenizer.decode(ids))
        end_ids, stop_strings = self._split_stop(stop)
        # The last characters may be the beginning of a stop string: hold back all but one character of the longest.
        held_back = max((len(string) - 1 for string in stop_strings), default=0)
        text = ""
        shown = 0
        tokens = self.model.stream(torch.tensor([ids], device=self.device), eos_token_id=end_ids, **options)
        for token in map(int, tokens):
            if token in end_ids:
                break
            ids.append(token)
            # Decode everything, not the token alone: characters span tokens.
            text = self.tokenizer.decode(ids)[prompt_length:]
            end = _first_stop(text, stop_strings)
            if end is not None:
                yield text[shown:end]
                return
            certain = len(text.rstrip(_REPLACEMENT)) - held_back
            if certain > shown:
                yield text[shown:certain]
                shown = certain
        yield text[shown:]

    def complete(self, prompts: list[str], stop: Sequence[str] = (), num_beams: int = 1, **options: Any) -> list[str]:
        """Return the continuation of each prompt, generated as one batch.

        Args:
            stop: cut each text before the first of these strings; special tokens may be among them.
            num_beams, **options: arguments of ``GPTJForCausalLM.generate``.
        """
        return self.complete_ids([self.encode(prompt) for prompt in prompts], stop, num_beams, **options)

    def complete_ids(
        self, prompts: list[list[int]], stop: Sequence[str] = (), num_beams: int = 1, **options: Any
    ) -> list[str]:
        """Return the continuation of each prompt, given as token ids; the other arguments are those of ``complete``."""
        end_ids, stop_strings = self._split_stop(stop)
        input_ids, mask = self.padded(prompts)
        options = {**options, "eos_token_id": end_ids}
        if num_beams > 1:
            # Beams change until the search is over, so that stop strings cannot end it early.
            sequences = self.model.generate(input_ids, mask, num_beams=num_beams, **options)
            assert isinstance(sequences, torch.Tensor)
            new_ids = sequences[:, input_ids.shape[1] :].tolist()
        else:
            new_ids = [[] for _ in prompts]
            for column in self.model.stream(input_ids, mask, **options):
                for row, token in zip(new_ids, column.tolist(), strict=True):
                    row.append(token)
                # The model itself stops once every row has an end token, but does not know the stop strings.
                if stop_strings and self._all_ended(prompts, new_ids, end_ids, stop_strings):
                    break
        texts = []
        for prompt, new in zip(prompts, new_ids, strict=True):
            text, _ = self._cut(prompt, new, end_ids, stop_strings)
            texts.append(text)
        return texts

    def encode(self, prompt: str) -> list[int]:
        """Return the token ids of a prompt.

        Raises:
            UserError: an empty prompt.
        """
        ids = self.tokenizer.encode(prompt)
        if not ids:
            raise UserError("the prompt is empty; give prompt='some text'")
        return ids

    def padded(self, prompts: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
        """Return input_ids and attention_mask of some prompts, (B, T) int64 each, padded on the left.

        On the left, so that the next token of every row comes in the same column.
        """
        length = max(len(ids) for ids in prompts)
        rows, mask = [], []
        for ids in prompts:
            padding = length - len(ids)
            rows.append([self.tokenizer.eos_id] * padding + ids)
            mask.append([0] * padding + [1] * len(ids))
        return torch.tensor(rows, device=self.device), torch.tensor(mask, device=self.device)

    def _split_stop(self, stop: Sequence[str]) -> tuple[list[int], list[str]]:
        """Split ``stop`` into the ids that end a text and the strings to look for.

        Special tokens do not show in decoded text: their ids are what to stop at.
        """
        special = self.tokenizer.special_tokens
        end_ids = [self.tokenizer.eos_id]
        stop_strings = []
        for string in stop:
            if string in special:
                end_ids.append(special[string])
            else:
                stop_strings.append(string)
        return end_ids, stop_strings

    def _all_ended(
        self, prompts: list[list[int]], new_ids: list[list[int]], end_ids: list[int], stop_strings: list[str]
    ) -> bool:
        for prompt, new in zip(prompts, new_ids, strict=True):
            _, ended = self._cut(prompt, new, end_ids, stop_strings)
            if not ended:
                return False
        return True

    def _cut(self, prompt: list[int], new: list[int], end_ids: list[int], stop_strings: list[str]) -> tuple[str, bool]:
        """Decode the new ids up to the first end id or stop string; also return whether there was one."""
        kept = new
        for index, token in enumerate(new):
            if token in end_ids:
                kept = new[:index]
                break
        # With the prompt, whose last bytes may belong to the first new character.
        prompt_length = len(self.tokenizer.decode(prompt))
        text = self.tokenizer.decode(prompt + kept)[prompt_length:]
        end = _first_stop(text, stop_strings)
        ended = len(kept) < len(new) or end is not None
        return text[:end], ended


def _first_stop(text: str, stop_strings: Sequence[str]) -> int | None:
    """Return where the first stop string begins, or None."""
    found = [text.find(string) for string in stop_strings]
    return min((index for index in found if index >= 0), default=None)


def read_prompts(file: str, batch_size: int) -> list[list[str]]:
    """Return the lines of a file in batches, blank lines left out.

    Raises:
        UserError: a file that cannot be read or holds no prompt, or a batch size below 1.
    """
    if batch_size < 1:
        raise UserError(f"batch_size must be at least 1, got {batch_size}")
    try:
        # Bytes, and only \n ends a line: prompts may contain Unicode's other line separators.
        lines = [line.removesuffix("\r") for line in Path(file).read_bytes().decode("utf-8-sig").split("\n")]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"prompts={file}: {near_name(file)}cannot be read as text ({error})") from None
    prompts = [line for line in lines if line.strip()]
    if not prompts:
        raise UserError(f"prompts={file}: holds no prompt; write one per line")
    return [prompts[start : start + batch_size] for start in range(0, len(prompts), batch_size)]


def sample_from(checkpoint: str | Path, prompt: str, seed: int) -> str:
    """Return a prompt with a short sampled continuation, which shows what a run has learned."""
    generator = TextGenerator(checkpoint)
    n_positions = generator.model.config.n_positions
    new_tokens = min(80, n_positions // 2)
    # The end of a long prompt: prompt and continuation together must fit the positions.
    ids = generator.encode(prompt)[new_tokens - n_positions :]
    (text,) = generator.complete_ids(
        [ids], max_new_tokens=new_tokens, do_sample=True, temperature=0.7, top_p=0.9, seed=seed
    )
    return prompt + text
