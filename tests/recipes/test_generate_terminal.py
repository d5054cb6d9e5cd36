"""recipes/generate.py at a pseudo-terminal: Ctrl-C, history, prompts that are too long, conversations, empty texts."""

from __future__ import annotations

import os
import pty
import re
import select
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from gptj_train import GPTJConfig, GPTJForCausalLM
from gptj_train.data.tokenizer import Tokenizer

RECIPE = Path(__file__).parents[2] / "recipes" / "generate.py"
TEXTS = [f"The cat number {number} sat on the mat." for number in range(50)]
# Sessions follow each other in one process: importing torch takes longer than all of them.
CODE = """
import runpy, sys
recipe, *sessions = sys.argv[1:]
for session in sessions:
    sys.argv = [recipe, *session.split(";")]
    try:
        runpy.run_path(recipe, run_name="__main__")
    except SystemExit as ended:
        print(f"ended with {ended.code}", flush=True)
"""
CTRL_C, CTRL_D, UP = b"\x03", b"\x04", b"\x1b[A"
POSITIONS = 2048


class Terminal:
    """A process at a pseudo-terminal."""

    def __init__(self, *arguments: str) -> None:
        self._ours, theirs = pty.openpty()
        self._unread = ""
        command = [sys.executable, "-c", CODE, str(RECIPE), *arguments]
        environment = os.environ | {"TERM": "dumb", "INPUTRC": "/dev/null"}
        # A session of its own, whose controlling terminal is ours: only then does Ctrl-C become a signal.
        self.process = subprocess.Popen(
            command,
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            env=environment,
            start_new_session=True,
            preexec_fn=lambda: os.close(os.open(os.ttyname(0), os.O_RDWR)),
        )
        os.close(theirs)

    def type(self, keys: bytes) -> None:
        os.write(self._ours, keys)

    def until(self, end: str, seconds: float = 120) -> str:
        """Read up to ``end``, and return what came before it and it."""
        limit = time.monotonic() + seconds
        while end not in self._unread:
            left = limit - time.monotonic()
            ready, _, _ = select.select([self._ours], [], [], max(left, 0))
            assert ready, f"no {end!r} within {seconds} s in {self._unread!r}"
            self._unread += os.read(self._ours, 65536).decode(errors="replace")
        before, _, self._unread = self._unread.partition(end)
        return before + end

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self._ours)


@pytest.fixture(scope="module")
def terminal(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Terminal]:
    """Three sessions: plain prompts, a conversation, and a model that ends every text at once."""
    folder = tmp_path_factory.mktemp("models")
    torch.manual_seed(0)
    tokenizer = Tokenizer.train(TEXTS, 300)
    shape = {"vocab_size": 512, "n_embd": 32, "n_layer": 1, "n_head": 2, "rotary_dim": 8}
    for name, positions in (("plain", POSITIONS), ("short", 160), ("ends", 64)):
        model = GPTJForCausalLM(GPTJConfig(**shape, n_positions=positions))
        with torch.no_grad():
            # "ends" always chooses the end of the text, the others never.
            model.lm_head.bias[tokenizer.eos_id] = 1e4 if name == "ends" else -1e4
        model.save_pretrained(folder / name)
        tokenizer.save(folder / name)
    made = Terminal(
        f"checkpoint={folder}/plain;max_new_tokens={POSITIONS - 48};seed=0",
        f"checkpoint={folder}/short;max_new_tokens=8;seed=0;chat=true;chat_template=# {{role}}\\n{{content}}\\n\\n",
        f"checkpoint={folder}/ends;max_new_tokens=8",
    )
    yield made
    made.close()


@pytest.mark.slow
def test_sessions(terminal: Terminal) -> None:
    # --- plain prompts ---
    terminal.until("prompt> ")
    terminal.type(b"The cat\r")
    terminal.until("The cat")  # the echo
    terminal.until("The cat")  # the text begins with the prompt
    terminal.type(CTRL_C)
    said = terminal.until("prompt> ")
    assert "(stopped)" in said
    assert "Traceback" not in said

    terminal.type(b"the mat " * 60 + b"\r")
    said = terminal.until("prompt> ")
    assert re.search(rf"error: .*{POSITIONS}", said)
    assert "Traceback" not in said

    # The arrow brings back the prompt before; then Ctrl-C ends its text.
    terminal.type(b"sat on\r")
    terminal.until("sat on")
    terminal.until("sat on")
    terminal.type(CTRL_C)
    terminal.until("prompt> ")
    terminal.type(UP + b" again\r")
    terminal.until("sat on again")
    terminal.until("sat on again")
    terminal.type(CTRL_C)
    terminal.until("prompt> ")

    terminal.type(b"a half-typed line" + CTRL_C)
    assert "Ctrl-D, ends" in terminal.until("prompt> ")
    terminal.type(b"\r")
    terminal.until("prompt> ")
    terminal.type(CTRL_D)
    assert "ended with 0" in terminal.until("ended with 0")

    # --- a conversation: its messages are kept, so that they no longer fit after a while ---
    terminal.until("prompt> ")
    forgotten = []
    for number in range(12):
        terminal.type(f"cat {number}\r".encode())
        said = terminal.until("prompt> ")
        assert "Traceback" not in said
        assert "error" not in said
        forgotten.append("no longer fit and are forgotten" in said)
    assert not any(forgotten[:2])
    assert any(forgotten)
    terminal.type(CTRL_D)
    terminal.until("ended with 0")

    # --- a model that ends every text at once ---
    terminal.until("prompt> ")
    terminal.type(b"The cat\r")
    said = terminal.until("prompt> ")
    assert "(no text: the first token ends it)" in said
    assert re.search(r"The cat\s+\(no text", said)
    terminal.type(CTRL_C)
    terminal.until("prompt> ")
    terminal.type(CTRL_C)
    terminal.until("ended with 0")
    assert terminal.process.wait(timeout=60) == 0
