"""Text from an exported or original checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from gptj_train.data.tokenizer import Tokenizer
from gptj_train.weights.pretrained import GPTJForCausalLM


def complete(checkpoint: str | Path, prompts: list[str], **options: Any) -> list[str]:
    """Continue each prompt with the model in an HF folder, on the GPU if there is one.

    Args:
        **options: of ``GPTJForCausalLM.generate``.

    Returns:
        Each prompt with its continuation, up to the end-of-text token.

    Raises:
        ValueError: a folder without model or tokenizer, an empty prompt, or a bad option.
    """
    tokenizer = Tokenizer.load(checkpoint)
    ids = [tokenizer.encode(prompt) for prompt in prompts]
    if not all(ids):
        raise ValueError("the prompt is empty; give prompt='some text'")
    model = GPTJForCausalLM.from_pretrained(checkpoint)
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")
    model.to(device)  # type: ignore[arg-type]
    longest = max(map(len, ids))
    padded = torch.tensor([[tokenizer.end_id] * (longest - len(row)) + row for row in ids], device=device)
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in ids], device=device)
    generated = model.generate(padded, mask, eos_token_id=tokenizer.end_id, **options)
    return [tokenizer.decode(row[longest - len(own) :].tolist()) for row, own in zip(generated, ids, strict=True)]


def sample_from(checkpoint: str | Path, prompt: str, seed: int) -> str:
    """A short continuation that shows what a run has learnt."""
    return complete(checkpoint, [prompt], max_new_tokens=80, do_sample=True, temperature=0.7, top_p=0.9, seed=seed)[0]
