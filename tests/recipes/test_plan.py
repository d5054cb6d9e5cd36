"""recipes/plan.py as a user runs it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
HOST = {"gptj_6b_zero3_offload": 133.1, "gptj_6b_lora": 12.2, "gptj_6b_qa": 133.1}  # GB in all


def plan(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "recipes/plan.py", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)


def rows(said: str) -> list[list[str]]:
    """Of the table: GPUs, accumulated, GB a GPU, "fits on", "GB", GB host, GB NVMe, seconds, hours."""
    return [line.split() for line in said.splitlines() if line.strip()[:1].isdigit()]


@pytest.mark.parametrize(("preset", "host"), HOST.items())
def test_a_preset_of_any_task(preset: str, host: float) -> None:
    done = plan(f"+config={preset}")
    assert done.returncode == 0, done.stderr
    assert "6,050,882,784 parameters" in done.stdout or "lora" in preset
    table = rows(done.stdout)
    assert [row[0] for row in table][:4] == ["1", "2", "4", "8"]
    sizes = [float(row[2]) for row in table]
    assert sizes == sorted(sizes, reverse=True)
    assert all(float(row[3]) >= size + 2 for row, size in zip(table, sizes, strict=True))
    assert float(table[0][5]) == host
    assert not list(ROOT.glob("runs/planned*")), "a plan writes nothing"


def test_a_batch_that_never_divides() -> None:
    done = plan("+config=gptj_6b_zero3", "global_batch_size=3", "micro_batch_size=2")
    assert done.returncode == 2
    assert done.stderr.startswith("error: global_batch_size 3 does not divide into micro_batch_size 2")
