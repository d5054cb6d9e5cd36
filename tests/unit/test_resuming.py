"""The best evaluation of a resumed run counts only if later ones can be compared with it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from typed_configs import config

from gptj_train.config import ClmConfig
from gptj_train.tasks.task import EvaluationBatch
from gptj_train.training import resuming
from gptj_train.training.resuming import held_out_hash, next_batch, resumed_state
from gptj_train.training.state import TrainState


def task_with(*held_out: list[int]) -> Any:
    def evaluation_batches(rank: int, world_size: int) -> Any:
        for row in held_out:
            yield EvaluationBatch({"input_ids": torch.tensor([row])}, None)

    return SimpleNamespace(
        training_batches=lambda step, rank, world_size: [{"input_ids": torch.tensor([[step]])}],
        evaluation_batches=evaluation_batches,
    )


TASK = task_with([1, 2], [3, 4])


def resumed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, task: Any, run: str = "run") -> tuple[TrainState, str]:
    """Resume step 4 of ``run``, whose best was step 2, as "run"; return the state and what was said."""
    cfg = replace(config("clm", ClmConfig), output_dir=str(tmp_path / "run"), max_steps=8)
    state = TrainState(
        step=4,
        next_batch=next_batch(TASK, 4),
        settings={"max_steps": 8},
        held_out=held_out_hash(TASK),
        best_metric="eval_loss",
        best_value=3.0,
        best_step=2,
        evaluations_since_best=1,
    )
    monkeypatch.setattr(resuming, "load", lambda *_: state)
    lines: list[str] = []
    folders = [tmp_path / run / "checkpoints" / "step_00000004"]
    found = resumed_state(
        SimpleNamespace(),  # type: ignore[arg-type]
        folders,
        config=cfg,
        task=task,
        data={},
        held_out=held_out_hash(task),
        note=lines.append,
    )
    return found, " ".join(line for line in lines if "best" in line)


def best_of(state: TrainState) -> tuple[int, float | None, int]:
    return state.best_step, state.best_value, state.evaluations_since_best


def test_the_best_goes_on_counting_in_its_own_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    state, said = resumed(tmp_path, monkeypatch, task=task_with([1, 2], [3, 4]))
    assert (best_of(state), said) == ((2, 3.0, 1), "")


@pytest.mark.parametrize("held_out", [[[1, 5]], []])
def test_other_held_out_data_start_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, held_out: list[list[int]]
) -> None:
    state, said = resumed(tmp_path, monkeypatch, task=task_with(*held_out))
    assert best_of(state) == (-1, None, 0)
    assert said == "other held-out data than before: the best of step 2 no longer counts"


def test_the_best_of_another_run_does_not_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    state, said = resumed(tmp_path, monkeypatch, task=TASK, run="other")
    assert best_of(state) == (-1, None, 0)
    assert said == "the best of step 2 is another run's, and no longer counts"
