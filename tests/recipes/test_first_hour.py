"""Every block of docs/first-hour.md runs, in its order, on a toy corpus."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

ROOT = Path(__file__).parents[2]
BLOCKS = re.findall(r"```bash\n(.*?)```", (ROOT / "docs" / "first-hour.md").read_text(encoding="utf-8"), re.DOTALL)
# Toy size: a model this small and one rank change nothing about what is tested.
SMALL = "model.n_embd=32 model.n_layer=1 model.n_head=2 model.rotary_dim=8"


def corpus(folder: Path) -> None:
    (folder / "my").mkdir()
    lines = [
        f"The cat number {number} sat on mat {number % 7} and looked at dog {number % 5}." for number in range(600)
    ]
    (folder / "my" / "text.txt").write_text("\n".join(lines))
    (folder / "my" / "held_out.txt").write_text("\n".join(lines[:100]))
    chats = [[{"role": "user", "content": "Hello"}, {"role": "assistant", "content": line}] for line in lines[:200]]
    (folder / "my" / "chats.jsonl").write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in chats))
    labels = [{"text": line, "label": "even" if number % 2 else "odd"} for number, line in enumerate(lines[:64])]
    (folder / "my" / "labels.jsonl").write_text("".join(json.dumps(label) + "\n" for label in labels))
    (folder / "recipes").symlink_to(ROOT / "recipes")


def test_every_block_runs(tmp_path: Path) -> None:
    corpus(tmp_path)
    assert len(BLOCKS) == 7
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = os.environ | {
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "DS_ACCELERATOR": "cpu",
        "OMP_NUM_THREADS": "1",
    }
    printed = []
    for block in BLOCKS:
        command = block.replace("--num_gpus 2", f"--num_gpus 1 --master_port {port}")
        if "runs/small " in command:
            command = command.rstrip() + f" {SMALL}"
        done = subprocess.run(
            ["bash", "-euc", command], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300
        )
        assert done.returncode == 0, f"{command}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
        printed.append(done.stdout)
    tokenizer, small, text, more, chats, chat, labels = printed
    assert "tokenizer of 600 entries" in tokenizer
    assert "Held-out: eval_loss" in small
    assert text.startswith("The ")
    assert "Held-out: eval_loss" in more
    assert "held out: 20 of 200 documents of data.train, 10.0%" in chats
    assert chat.strip() or chat == "\n"
    assert "48 texts to train on, 16 held out" in labels
    assert "by always answering" in labels
    config = (tmp_path / "runs" / "more" / "config.yaml").read_text()
    assert "n_embd: 32" in config
    assert "tokenizer: null" in config
    assert "Bokeh" in (tmp_path / "runs" / "more" / "report.html").read_text()
