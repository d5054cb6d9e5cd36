"""scripts/loss_compare.py finds the first number in which two runs differ, and refuses half a run."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest

SCRIPT = Path(__file__).parents[2] / "scripts" / "loss_compare.py"


@pytest.fixture(scope="module")
def loss_compare() -> ModuleType:
    spec = importlib.util.spec_from_file_location("loss_compare", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["loss_compare"] = module  # its dataclass looks itself up there
    spec.loader.exec_module(module)
    return module


def write_run(run: Path, steps: int = 20, weights: bytes = b"weights", **of_step_7: float | None) -> Path:
    """Write a run folder as the recipe does: an evaluation, steps, an export."""
    (run / "export").mkdir(parents=True)
    lines = [{"step": 0, "tokens": 0, "eval_loss": 5.0}]
    for step in range(1, steps + 1):
        numbers = {"loss": 5.0 - step / 10, "grad_norm": 1.0 / step}
        lines.append({"step": step, "tokens": 100 * step} | numbers | (of_step_7 if step == 7 else {}))
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (run / "export" / "config.json").write_text("{}")
    (run / "export" / "model.safetensors").write_bytes(weights)
    return run


def compare(loss_compare: ModuleType, base: Path, tree: Path) -> str | None:
    outcomes = loss_compare.outcome(base, "BASE"), loss_compare.outcome(tree, "the working tree")
    loss_compare.print_table(*outcomes)
    return loss_compare.first_difference(*outcomes)


def test_equal_runs(loss_compare: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    # A step without a finite loss is null on both sides, and equal.
    runs = [write_run(tmp_path / name, loss=None) for name in ("base", "tree")]
    assert compare(loss_compare, *runs) is None
    assert "*" not in capsys.readouterr().out


def test_smallest_difference_of_a_number(
    loss_compare: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = write_run(tmp_path / "base", grad_norm=0.125)
    tree = write_run(tmp_path / "tree", grad_norm=0.12500000000000003, weights=b"others")
    expected = "grad_norm of step 7 is 0.125 at BASE and 0.12500000000000003 in the working tree"
    assert compare(loss_compare, base, tree) == expected
    marked = [line for line in capsys.readouterr().out.splitlines() if line.startswith("*")]
    assert [line.split()[1] for line in marked] == ["7", "model.safetensors:"]


def test_difference_in_the_export_alone(loss_compare: ModuleType, tmp_path: Path) -> None:
    base, tree = write_run(tmp_path / "base"), write_run(tmp_path / "tree", weights=b"others")
    difference = compare(loss_compare, base, tree)
    assert difference == "export/model.safetensors has other bytes; every loss and gradient norm is equal"
    (tree / "export" / "model.safetensors").rename(tree / "export" / "another.safetensors")
    assert compare(loss_compare, base, tree) == "BASE does not export another.safetensors"
    assert compare(loss_compare, tree, base) == "the working tree does not export another.safetensors"


def test_half_a_run_is_refused(loss_compare: ModuleType, tmp_path: Path) -> None:
    run = write_run(tmp_path / "short", steps=19)
    with pytest.raises(SystemExit, match=r"BASE recorded 19 steps in metrics\.jsonl, not 20"):
        loss_compare.outcome(run, "BASE")


def test_unknown_revision_is_refused_before_anything_runs(
    loss_compare: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["loss_compare.py", "--", "no-such-revision"])
    assert loss_compare.main() == 2
    assert capsys.readouterr().err.startswith("error: BASE=no-such-revision is no revision of this repository")
