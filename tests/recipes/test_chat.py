"""A run on chats: its export's template gives the tokens that training read, bit for bit."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml
from transformers import AutoTokenizer, pipeline

from gptj_train.data.corpus import prepare
from gptj_train.data.text_config import DataConfig
from gptj_train.data.tokenizer import Tokenizer

ROOT = Path(__file__).parents[2]
CHATS = [
    [{"role": "user", "content": f"  Say {word}!\n"}, {"role": "assistant", "content": f" {word}, “ja” 🙂 \n\n"}]
    for word in ("alpha", "beta", "gamma", "delta")
]
CHATS.append([{"role": "system", "content": "Be short."}, *CHATS[0], *CHATS[1]])
PRESET = """# @package _global_
model: {n_layer: 1, n_embd: 32, n_head: 2, rotary_dim: 4, vocab_size: 320, n_positions: 512}
sequence_length: 512
global_batch_size: 1
micro_batch_size: 1
max_steps: 1
optim: {warmup_steps: 0}
sample_prompt: null
"""


def test_a_run_on_chats(tmp_path: Path) -> None:
    (tmp_path / "chats.jsonl").write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in CHATS))
    (tmp_path / "tokenizer").mkdir()
    Tokenizer.train([json.dumps(chat, ensure_ascii=False) for chat in CHATS], 300).save(tmp_path / "tokenizer", 320)
    (tmp_path / "presets" / "config").mkdir(parents=True)
    (tmp_path / "presets" / "config" / "tiny.yaml").write_text(PRESET)
    values = {
        "output_dir": "run",
        "tokenizer": "tokenizer",
        "data.train": "chats.jsonl",
        "data.validation": "chats.jsonl",
        "data.cache_dir": "cache",
    }
    arguments = [f"{key}={tmp_path / name}" for key, name in values.items()]
    presets = ["--config-dir", str(tmp_path / "presets"), "+config=[quickstart,tiny]"]
    done = subprocess.run(
        [sys.executable, "recipes/clm.py", *presets, *arguments, "data.kind=chat"],
        cwd=ROOT,
        env=os.environ | {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr

    # The stores that the run has written: preparing again reads them.
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").rglob("*") if path.is_file()}
    settings = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())["data"]
    text = prepare(DataConfig(**settings), Tokenizer.load(tmp_path / "tokenizer"), 512)
    assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").rglob("*") if path.is_file()}
    (window,) = [text.train.windows[""][0]]
    stored = []
    for number in range(1, len(CHATS) + 1):
        stored.append(window.tokens[window.document_ids == number].tolist())
    assert sum(map(len, stored)) == (window.document_ids > 0).sum()

    theirs = AutoTokenizer.from_pretrained(tmp_path / "run" / "export")
    expected = [theirs.apply_chat_template(chat, tokenize=True, return_dict=False) for chat in CHATS]
    assert sorted(stored) == sorted(expected)
    assert all(tokens[-1] == theirs.eos_token_id for tokens in stored)
    # Programs that take messages work from the folder alone.
    generate: Any = pipeline("text-generation", model=str(tmp_path / "run" / "export"), device="cpu")
    answer = generate(CHATS[0][:1], max_new_tokens=3, do_sample=False)[0]["generated_text"]
    assert answer[0] == CHATS[0][0]
    assert answer[1]["role"] == "assistant"
    card = (tmp_path / "run" / "export" / "README.md").read_text()
    assert "tokenizer.apply_chat_template(chat, add_generation_prompt=True" in card
