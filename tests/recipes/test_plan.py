"""recipes/plan.py as a user runs it."""

from __future__ import annotations

import runpy
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
HOST = {"gptj_6b_zero3_offload": 133.1, "gptj_6b_lora": 12.2, "gptj_6b_qa": 133.1}  # GB in all

# GPUs, GB of each, GB of host memory beside what libraries and the page cache need (128 GiB are 137 GB)
FITS = {
    "gptj_6b_1x80gb": (1, 80, 105),
    "gptj_6b_1x141gb": (1, 141, 0),
    "gptj_6b_1x24gb": (1, 24, 125),
    "gptj_6b_8x24gb": (8, 24, 105),
    "gptj_6b_8x80gb": (8, 80, 0),
    "gptj_6b_lora_24gb": (1, 24, 0),
}

Command = Callable[..., tuple[int, str, str]]


@pytest.fixture
def plan(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    """Run recipes/plan.py in this process; returns exit code, stdout and stderr."""

    def run(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["plan.py", *arguments])
        with pytest.raises(SystemExit) as caught:
            runpy.run_path(str(ROOT / "recipes" / "plan.py"), run_name="__main__")
        return int(caught.value.code or 0), *capsys.readouterr()

    return run


def rows(printed: str) -> list[list[str]]:
    """The table: GPUs, accumulated, GB a GPU, "fits on", "GB", GB host, GB NVMe, seconds, hours."""
    return [line.split() for line in printed.splitlines() if line.strip()[:1].isdigit()]


@pytest.mark.parametrize(("preset", "host"), HOST.items())
def test_a_preset_of_any_task(plan: Command, preset: str, host: float) -> None:
    code, printed, _ = plan(f"+config={preset}")
    assert code == 0
    assert "6,050,882,784 parameters" in printed or "lora" in preset
    table = rows(printed)
    assert [row[0] for row in table][:4] == ["1", "2", "4", "8"]
    sizes = [float(row[2]) for row in table]
    assert sizes == sorted(sizes, reverse=True)
    assert all(float(row[3]) >= size + 2 for row, size in zip(table, sizes, strict=True))
    assert float(table[0][5]) == host
    assert not list(ROOT.glob("runs/planned*")), "a plan writes nothing"


@pytest.mark.parametrize("preset", FITS)
def test_a_preset_fits_the_machine_of_its_name(plan: Command, preset: str) -> None:
    gpus, gpu, host = FITS[preset]
    code, printed, _ = plan(f"+config={preset}")
    assert code == 0
    (row,) = (row for row in rows(printed) if row[0] == str(gpus))
    assert float(row[2]) + 2 < gpu
    assert float(row[5]) <= host


def test_a_batch_that_divides_on_no_number_of_gpus(plan: Command) -> None:
    code, _, message = plan("+config=gptj_6b_zero3", "global_batch_size=3", "micro_batch_size=2")
    assert code == 2
    assert message.startswith("error: global_batch_size 3 does not divide into micro_batch_size 2")
