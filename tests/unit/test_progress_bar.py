"""The progress bar fits a terminal of 80 columns, measured at a pseudo-terminal of that width."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import struct
import subprocess
import sys
import termios
from pathlib import Path

import pytest

COLUMNS = 80
CODE = """
import sys
from gptj_train.tracking import Tracker, TrackingConfig
folder, total, loss, speed, memory, seconds = sys.argv[1], int(sys.argv[2]), *map(float, sys.argv[3:])
config = TrackingConfig(tensorboard=False, wandb="disabled", project="x", run_name=None)
tracker = Tracker(config, folder, {}, 0)
tracker.start(total - 2, total)
for step in (total - 1, total):
    if tracker._bar is not None:
        tracker._bar.start_t -= seconds  # a slow machine: the remaining time is long
        tracker._bar.refresh()
    tracker.step(dict(step=step, loss=loss, lr=1e-4, grad_norm=1.0, tokens=step, tokens_per_second=speed,
                      step_seconds=seconds, skipped_steps=0, memory_gib=memory))
tracker.evaluation(dict(step=total, tokens=total, eval_loss=loss, perplexity=1.0))
tracker.finish()
"""


def screen(folder: Path, *arguments: str, columns: int = COLUMNS) -> str:
    """Return what the code writes to a terminal of so many columns."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    command = [sys.executable, "-c", CODE, str(folder), *arguments]
    with subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs) as process:
        os.close(theirs)
        seen = b""
        try:
            while piece := os.read(ours, 65536):
                seen += piece
        except OSError:  # Linux answers so when the other end is closed
            pass
    os.close(ours)
    assert process.returncode == 0, seen.decode()
    return seen.decode()


@pytest.mark.parametrize(
    "arguments",
    [
        ("12", "7.688", "1143", "0.6", "3"),
        ("999999", "12.345", "1234567", "123.4", "359999"),
        ("400", "11.0", "9999", "79.55", "86399"),
    ],
    ids=["quickstart", "a million steps on a large node", "a slow machine"],
)
def test_every_frame_fits_and_is_whole(tmp_path: Path, arguments: tuple[str, ...]) -> None:
    text = screen(tmp_path, *arguments)
    frames = [frame for frame in re.split(r"[\r\n]+", text) if "left" in frame]
    assert len(frames) >= 2
    for frame in frames:
        assert len(frame.rstrip()) < COLUMNS, frame  # the last column would wrap on some terminals
        assert re.search(r"\d+/\d+.* left *$", frame), frame
    total = arguments[0]
    last = frames[-1]
    assert f"{total}/{total}, loss {float(arguments[1]):#.4g} lr 1.0e-04" in last
    assert "tok/s" in last


def test_a_terminal_that_does_not_know_its_width_gets_lines(tmp_path: Path) -> None:
    text = screen(tmp_path, "12", "7.688", "1143", "0.6", "3", columns=0)
    assert "step 12/12  loss 7.6880  lr 1.00e-04  1,143 tokens/s  0.6 GiB" in text
