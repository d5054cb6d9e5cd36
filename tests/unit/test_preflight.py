"""A run on a machine that is too small: a line before anything is loaded, or a refusal."""

from __future__ import annotations

from pathlib import Path

import pytest

from gptj_train.config import ClassificationConfig, ClmConfig, model_config_of
from gptj_train.errors import UserError
from gptj_train.launch import machine
from gptj_train.launch.command_line import compose
from gptj_train.planning.preflight import check_machine
from gptj_train.planning.run_plan import RunPlan

GIVEN = ["output_dir=out", "init_from=null", "data.train=a.jsonl", "max_steps=10"]


@pytest.fixture(autouse=True)
def this_machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """One rank on a host of 24 GB without a GPU."""
    monkeypatch.setattr(machine, "usable_memory", lambda: 24_000_000_000)
    monkeypatch.setenv("WORLD_SIZE", "1")
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    monkeypatch.delenv("LOCAL_SIZE", raising=False)
    monkeypatch.chdir(tmp_path)


def check(*overrides: str) -> None:
    cfg = compose("clm", [*GIVEN, *overrides], ClmConfig)
    check_machine(cfg, model_config_of(cfg.model, None))


def test_a_warning_with_what_helps(capsys: pytest.CaptureFixture[str]) -> None:
    check("+config=gptj_6b_zero3_offload")
    out, err = capsys.readouterr()
    assert out == ""
    # Random weights are no base to quantize.
    assert err == (
        "warning: this run does not fit: a host needs 145 GB, this machine has 24 (most of it: fp32 masters and Adam "
        "moments, 73 GB); try lora=adapters optim.lr=0.0002 engine.activation_checkpointing=mlp\n"
    )


def test_a_refusal() -> None:
    with pytest.raises(UserError, match=r"a host needs 145 GB, this machine has 24 .*set plan=warn"):
        check("+config=gptj_6b_zero3_offload", "plan=error")


def test_nothing_where_it_is_off_or_fits(capsys: pytest.CaptureFixture[str]) -> None:
    check("+config=gptj_6b_zero3_offload", "plan=off")
    check("+config=quickstart", "plan=error")
    assert capsys.readouterr() == ("", "")


def test_ranks_of_a_host_share_its_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    # On 16 hosts a rank of 0.6 billion parameters needs 8 GB; 16 of them on this one do not fit.
    shape = ["model.n_layer=1", "+config=gptj_6b_zero3", "sequence_length=256", "global_batch_size=64", "plan=error"]
    monkeypatch.setenv("WORLD_SIZE", "16")
    check(*shape)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "16")
    with pytest.raises(UserError, match="does not fit: a host needs"):
        check(*shape)


def test_the_head_of_the_recipe() -> None:
    cfg = compose("classification", [*GIVEN, "+config=gptj_6b_classification"], ClassificationConfig)
    plan = RunPlan.of(cfg, model_config_of(cfg.model, None))
    assert "score.weight" in plan.sizes.shapes
    assert "lm_head.weight" not in plan.sizes.shapes
