"""recipes/plan.py as a user runs it."""

from __future__ import annotations

import runpy
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

# GPUs, GB of each, GB of a host (128 GiB are 137 GB)
FITS = {
    "gptj_6b_1x80gb": (1, 80, 137),
    "gptj_6b_1x141gb": (1, 141, 16),
    "gptj_6b_1x24gb": (1, 24, 137),
    "gptj_6b_8x24gb": (8, 24, 137),
    "gptj_6b_8x80gb": (8, 80, 16),
    "gptj_6b_lora_24gb": (1, 24, 16),
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


def rows(printed: str) -> dict[int, list[str]]:
    """The table by GPUs: accumulated, GB a GPU, "fits on", "GB", GB host, GB NVMe, seconds, hours."""
    table = printed.partition("GPUs  accumulated")[2].partition("\n\n")[0]
    lines = [line.split() for line in table.splitlines()[1:]]
    return {int(line[0]): line[1:] for line in lines}


def test_an_answer(plan: Command) -> None:
    code, printed, _ = plan("+config=gptj_6b_zero3_offload", "cluster=a100_40gb_x1", "global_batch_size=1024")
    assert code == 0
    lines = printed.splitlines()
    assert lines[0] == "model    GPTJForCausalLM, 6,050,882,784 parameters, 6,050,882,784 of them trained"
    assert lines[3].startswith("machine  1 x (1 x 40.0 GB GPU, 64.0 GB host)")
    assert lines[5] == (
        "DOES NOT FIT: a host needs 139.4 GB and has 64.0 (fp32 masters and Adam moments 72.6, gradients for Adam 24.2)"
    )
    assert lines[6].startswith("try      lora=adapters ")
    assert "            72.6  fp32 masters and Adam moments" in lines
    table = rows(printed)
    # every number that divides, beyond 64 too
    assert list(table) == [1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024]
    sizes = [float(row[1]) for row in table.values()]
    assert sizes == sorted(sizes, reverse=True)
    assert all(float(row[2]) >= size for row, size in zip(table.values(), sizes, strict=True))
    assert not list(ROOT.glob("runs/planned*")), "a plan writes nothing"


def test_nodes_are_whole(plan: Command) -> None:
    _, printed, _ = plan("+config=gptj_6b_zero3", "cluster=h100_80gb_2x8", "global_batch_size=96")
    assert list(rows(printed)) == [1, 2, 3, 4, 6, 8, 16, 24, 32, 48, 96]
    assert "FITS: " in printed


@pytest.mark.parametrize("preset", FITS)
def test_a_preset_fits_the_machine_of_its_name(plan: Command, preset: str) -> None:
    gpus, gpu, host = FITS[preset]
    code, printed, _ = plan(
        f"+config={preset}", f"gpus_per_node={gpus}", f"gpu_memory={gpu}", f"host_memory={host}", "tflops_per_gpu=1"
    )
    assert code == 0
    assert printed.splitlines()[5].startswith("FITS: ")


def test_a_batch_that_divides_on_no_number_of_gpus(plan: Command) -> None:
    given = ["global_batch_size=3", "micro_batch_size=2", "gpu_memory=200", "host_memory=100"]
    code, printed, _ = plan("+config=gptj_6b_zero3", *given)
    assert code == 0
    assert "DOES NOT RUN: global_batch_size 3 does not divide into micro_batch_size 2 x 1 ranks" in printed
    assert printed.splitlines()[6].startswith("try      ")
    assert "micro_batch_size=1" in printed.splitlines()[6]
    assert rows(printed) == {}
