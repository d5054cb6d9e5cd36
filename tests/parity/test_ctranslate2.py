"""An export runs outside Transformers: CTranslate2 converts it and computes the same logits and text."""

from __future__ import annotations

from pathlib import Path

import ctranslate2
import numpy as np
import torch
from pair import VOCAB, build_pair
from tokenizers import Tokenizer as Backend
from tokenizers.models import WordLevel

from gptj_train.data.tokenizer import Tokenizer
from gptj_train.training.model_files import ModelFiles

WORDS = 80


def test_ctranslate2_converts_and_agrees(tmp_path: Path) -> None:
    """The tokenizer has fewer words than the model rows; CTranslate2 refuses a folder in which they differ."""
    ids = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": VOCAB - 1}
    model, _ = build_pair(n_embd=64, n_head=2, rotary_dim=16, **ids)
    model.save_pretrained(tmp_path / "export")
    words = {"<|endoftext|>" if n == 0 else f"w{n}": n for n in range(WORDS)}
    backend = Backend(WordLevel(words, unk_token="w1"))
    ModelFiles(model.config, "GPTJForCausalLM", Tokenizer(backend)).save(tmp_path / "export", torch.float32)
    converted = ctranslate2.converters.TransformersConverter(str(tmp_path / "export")).convert(str(tmp_path / "ct2"))
    # One thread: its OpenMP threads would go on spinning and slow down every later test.
    generator = ctranslate2.Generator(converted, device="cpu", compute_type="float32", intra_threads=1)

    prompt = torch.randint(1, WORDS, (1, 11))
    logits = np.array(generator.forward_batch(prompt.tolist()))
    expected = model(prompt).logits.detach().numpy()
    assert np.abs(logits - expected).max() < 1e-4 * np.abs(expected).max()

    tokens = [f"w{n}" for n in prompt[0].tolist()]
    (result,) = generator.generate_batch([tokens], max_length=8, sampling_topk=1, include_prompt_in_result=False)
    ours = model.generate(prompt, max_new_tokens=8, do_sample=False)[0, 11:].tolist()
    assert result.sequences_ids[0] == ours[: len(result.sequences_ids[0])]
    assert len(result.sequences_ids[0]) > 0
