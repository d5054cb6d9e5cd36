"""A run so small that a cluster's start and end are what a test waits for."""

from __future__ import annotations

import json
from pathlib import Path

from gptj_train.data.tokenizer import Tokenizer

TEXT = "One for sorrow, two for joy, three for a girl, four for a boy. "
STEPS = 300


def make_inputs(folder: Path, text: str = TEXT) -> None:
    """Write the data and the tokenizer of the run."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "train.jsonl").write_text(json.dumps({"text": text * 20}) + "\n")
    (folder / "tokenizer").mkdir(exist_ok=True)
    Tokenizer.train([text], 300).save(folder / "tokenizer")


def arguments(inputs: Path, output_dir: Path, *more: str) -> list[str]:
    """Return the command line of recipes/clm.py."""
    tiny = ["model.n_layer=1", "model.n_embd=16", "model.n_head=2", "model.rotary_dim=4", "model.vocab_size=300"]
    short = ["model.n_positions=16", "sequence_length=16", "global_batch_size=2", "micro_batch_size=1"]
    settings = [f"max_steps={STEPS}", "eval_every=0", "save_every=0", "optim.lr=1e-4", "hang_timeout=120"]
    without = ["sample_prompt=null", "data.validation=null"]
    paths = [f"tokenizer={inputs}/tokenizer", f"data.train={inputs}/train.jsonl", f"data.cache_dir={inputs}/cache"]
    return ["+config=quickstart", *tiny, *short, *settings, *without, *paths, f"output_dir={output_dir}", *more]
