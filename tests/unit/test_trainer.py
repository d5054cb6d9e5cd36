"""When the training loop evaluates, saves, skips and ends early, on an engine that computes nothing."""

from __future__ import annotations

import contextlib
import json
import math
import os
import signal
import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
from typed_configs import config

from gptj_train.config import ClmConfig
from gptj_train.errors import UserError
from gptj_train.launch.preemption import Preempted
from gptj_train.tasks.task import EvaluationBatch
from gptj_train.tracking import Tracker
from gptj_train.training.state import TrainState
from gptj_train.training.trainer import Trainer

CONFIG = config(
    "clm",
    ClmConfig,
    *("max_steps=6", "global_batch_size=2", "micro_batch_size=2", "eval_every=2", "save_every=3", "keep_checkpoints=1"),
    *("max_skipped_steps=3", "hang_timeout=60", "export_of=last"),
)


class FakeEngine:
    """One rank. Losses and gradient norms come from lists, one entry a step; the last one stays."""

    rank, world_size, device, loss_scale = 0, 1, torch.device("cpu"), 1.0
    trained: ClassVar[dict[str, torch.Size]] = {}

    def __init__(self, losses: list[float], norms: list[float], finite: bool) -> None:
        self.losses, self.norms, self.finite = losses, norms, finite
        self.grad_norm = 1.0

    def forward(self, batch: dict[str, torch.Tensor], targets: float) -> Any:
        return SimpleNamespace(loss=torch.tensor(self.losses[0] if targets > 1 else 3.0))

    def backward(self, loss: torch.Tensor) -> None:
        pass

    def step(self, lr: float) -> None:
        self.grad_norm = self.norms.pop(0) if len(self.norms) > 1 else self.norms[0]
        if len(self.losses) > 1:
            self.losses.pop(0)

    def summed(self, values: list[float]) -> list[float]:
        return [float(value) for value in values]

    def gathered(self, rows: list[Any]) -> list[Any]:
        return rows

    def evaluating(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    def holds_only_finite(self) -> bool:
        return self.finite

    def peak_memory(self) -> float:
        return 1.0

    def wait(self) -> None:
        pass


class FakeTask:
    """Four evaluation batches; sends itself a signal in a chosen evaluation or step.

    ``results`` are the values of eval_loss, one entry an evaluation; without them it is the mean of the records.
    """

    targets_name = "labels"

    def __init__(
        self, signal_in_evaluation: int | None, signal_in_step: int | None, results: list[float] | None
    ) -> None:
        self.evaluations = 0
        self.results = results
        self.predicted: list[int] = []  # evaluations whose predictions were written
        self.signal_in_evaluation, self.signal_in_step = signal_in_evaluation, signal_in_step

    def training_rows(self, step: int, rank: int, world_size: int) -> list[list[int]]:
        return [[10 * step, 10 * step + 1]]

    def training_batches(self, step: int, rank: int, world_size: int) -> list[dict[str, torch.Tensor]]:
        return [{"input_ids": torch.tensor([[step]])}]

    def evaluation_batches(self, rank: int, world_size: int) -> Iterator[EvaluationBatch]:
        self.evaluations += 1
        for number in range(4):
            assert not (self.evaluations == self.signal_in_evaluation and number == 3), "not cut short"
            if self.evaluations == self.signal_in_evaluation and number == 1:
                os.kill(os.getpid(), signal.SIGUSR1)
            yield EvaluationBatch({}, None)

    def targets(self, batch: dict[str, torch.Tensor]) -> int:
        if batch["input_ids"].item() == self.signal_in_step:
            os.kill(os.getpid(), signal.SIGTERM)
        return 7

    def records(self, output: Any, batch: EvaluationBatch) -> list[float]:
        return [output.loss.item()]

    def metrics(self, records: list[float]) -> dict[str, float]:
        assert len(records) == 4
        return {"eval_loss": self.results.pop(0) if self.results else sum(records) / 4, "accuracy": 0.25}

    def write_predictions(self, folder: str | Path) -> None:
        self.predicted.append(self.evaluations)


class FakeCheckpoints:
    def __init__(self) -> None:
        self.saved: list[TrainState] = []
        self.seconds = 0.0

    def save(self, engine: Any, state: TrainState) -> str:
        time.sleep(self.seconds)
        self.saved.append(TrainState(**asdict(state)))
        return f"step_{state.step}"


class Run:
    """A trainer on these fakes, and what it left behind."""

    def __init__(
        self,
        folder: Path,
        losses: list[float] | None = None,
        norms: list[float] | None = None,
        finite: bool = True,
        signal_in_evaluation: int | None = None,
        signal_in_step: int | None = None,
        resumed_from: Run | None = None,
        evaluations: list[float] | None = None,
        **changes: Any,
    ) -> None:
        self.folder, self.checkpoints = folder, FakeCheckpoints()
        self.task = FakeTask(signal_in_evaluation, signal_in_step, evaluations)
        self.trainer = Trainer(
            config=replace(CONFIG, output_dir=str(folder), **changes),
            engine=FakeEngine(losses or [2.0], norms or [1.0], finite),  # type: ignore[arg-type]
            task=self.task,
            checkpoints=self.checkpoints,  # type: ignore[arg-type]
            tracker=Tracker(CONFIG.tracking, folder, {}, 0),
        )
        if resumed_from is not None and resumed_from.checkpoints.saved:
            self.checkpoints.saved = resumed_from.checkpoints.saved
            self.trainer.state = TrainState(**asdict(self.checkpoints.saved[-1]))

    @property
    def saved(self) -> list[int]:
        return [state.step for state in self.checkpoints.saved]

    def lines(self, name: str) -> dict[int, Any]:
        lines = [json.loads(line) for line in (self.folder / "metrics.jsonl").read_text().splitlines()]
        return {line["step"]: line[name] for line in lines if name in line}


@pytest.fixture(autouse=True)
def _no_slurm(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("SLURM_JOB_END_TIME", "TORCHELASTIC_RUN_ID", "CROSS_RANK"):
        monkeypatch.delenv(name, raising=False)


def test_an_uninterrupted_run(tmp_path: Path) -> None:
    run = Run(tmp_path)
    run.trainer.train()
    assert run.saved == [3, 6]
    assert list(run.lines("eval_loss")) == [0, 2, 4, 6]
    assert set(run.lines("skipped_steps").values()) == {0}
    assert {path.name for path in tmp_path.iterdir()} == {"config.yaml", "metrics.jsonl"}


def test_a_signal_in_a_step_ends_the_run_after_it(tmp_path: Path) -> None:
    run = Run(tmp_path, signal_in_step=3)
    with pytest.raises(Preempted, match="SIGTERM reached rank 0: preempted after step 4 of 6, saved"):
        run.trainer.train()
    assert run.saved == [3, 4]
    assert list(run.lines("eval_loss")) == [0, 2]  # step 4 is evaluated after the resume
    resumed = Run(tmp_path, resumed_from=run)
    resumed.trainer.train()
    assert list(run.lines("eval_loss")) == [0, 2, 4, 6]
    assert list(run.lines("loss")) == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize(("number", "step"), [(1, 0), (2, 2), (4, 6)])
def test_an_evaluation_that_was_cut_short_is_repeated_after_a_resume(tmp_path: Path, number: int, step: int) -> None:
    run = Run(tmp_path, signal_in_evaluation=number)
    with pytest.raises(Preempted, match=f"SIGUSR1 reached rank 0: preempted after step {step} of 6"):
        run.trainer.train()
    assert run.saved == [saved for saved in (3, step) if 0 < saved <= step]
    assert step not in run.lines("eval_loss")
    resumed = Run(tmp_path, resumed_from=run)
    resumed.trainer.train()
    assert list(run.lines("eval_loss")) == [0, 2, 4, 6]


def test_a_finished_run_does_nothing_when_rerun(tmp_path: Path) -> None:
    run = Run(tmp_path)
    run.trainer.train()
    again = Run(tmp_path, resumed_from=run)
    again.trainer.train()
    assert again.task.evaluations == 0
    assert again.saved == [3, 6]


def test_a_second_signal_during_the_save_does_no_harm(tmp_path: Path) -> None:
    run = Run(tmp_path, signal_in_step=3)
    save = run.checkpoints.save

    def disturbed(engine: Any, state: TrainState) -> str:
        os.kill(os.getpid(), signal.SIGTERM)
        return save(engine, state)

    run.checkpoints.save = disturbed  # type: ignore[method-assign]
    with pytest.raises(Preempted, match="saved"):
        run.trainer.train()
    assert run.saved == [3, 4]


def test_it_stops_in_time_before_slurm_kills_the_job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before a save has been timed it reserves for two of 5 minutes, and a minute."""
    monkeypatch.setenv("SLURM_JOB_END_TIME", str(int(time.time()) + 655))
    run = Run(tmp_path)
    with pytest.raises(
        Preempted, match=r"the Slurm job ends in 6[45]\d s: preempted after step 0 of 6, .*there is no checkpoint"
    ):
        run.trainer.train()  # found out in the first evaluation
    monkeypatch.setenv("SLURM_JOB_END_TIME", str(int(time.time()) + 755))
    Run(tmp_path).trainer.train()


def test_a_save_that_would_take_too_long_is_not_started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = time.time()
    monkeypatch.setenv("SLURM_JOB_END_TIME", str(now + 3600))
    run = Run(tmp_path)
    run.checkpoints.seconds = 0.2
    train_step = run.trainer.train_step

    def late_step() -> dict[str, float]:
        if run.trainer.state.step == 4:  # 0.1 s before the end; the save at step 3 took 0.2 s
            monkeypatch.setattr(time, "time", lambda: now + 3599.9)
        return train_step()

    monkeypatch.setattr(run.trainer, "train_step", late_step)
    with pytest.raises(Preempted, match=r"preempted after step 5 of 6, no time to save; last checkpoint: step 3"):
        run.trainer.train()
    assert run.saved == [3]


def test_max_hours_save_and_end_a_run(tmp_path: Path) -> None:
    run = Run(tmp_path, max_hours=1e-9, eval_every=0, save_every=0)
    run.trainer.state.evaluated = 0
    with pytest.raises(Preempted, match="max_hours=1e-09 have passed: preempted after step 1 of 6, saved"):
        run.trainer.train()
    assert run.saved == [1]


def test_a_stop_file_ends_a_run(tmp_path: Path) -> None:
    (tmp_path / "STOP").touch()
    run = Run(tmp_path, eval_every=0)
    run.trainer.state.evaluated = 0
    with pytest.raises(Preempted, match=r"found .*STOP; remove it before you rerun: preempted after step 1"):
        run.trainer.train()


def test_skipped_steps_are_counted_and_reported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = Run(tmp_path, losses=[2.0, math.nan, 2.0, 2.0], norms=[1.0, math.inf, math.inf, 1.0])
    run.trainer.train()
    assert run.lines("skipped_steps") == {1: 0, 2: 1, 3: 2, 4: 2, 5: 2, 6: 2}
    assert run.lines("loss")[2] is run.lines("grad_norm")[2] is None
    # The save of step 3 waits for step 4, the first that counts: weights may have exploded.
    saved = [(state.step, state.skipped, state.skipped_in_a_row) for state in run.checkpoints.saved]
    assert saved == [(4, 2, 0), (6, 2, 0)]
    output = capsys.readouterr().out
    assert "step 2: loss nan on rank 0 in rows [10, 11] of the training data\n" in output
    assert "step 2: loss nan, gradient norm inf: non-finite, update skipped\n" in output
    assert "step 3: loss 2, gradient norm inf: non-finite, update skipped\n" in output


def test_too_many_in_a_row_stop_the_run_before_a_save(tmp_path: Path) -> None:
    run = Run(tmp_path, norms=[1.0, math.inf], save_every=4)
    with pytest.raises(
        UserError, match=r"step 4: .* for 3 steps in a row \(max_skipped_steps\), no update since step 1"
    ):
        run.trainer.train()
    assert run.saved == []


def test_a_run_that_skips_every_step_saves_nothing_more(tmp_path: Path) -> None:
    run = Run(tmp_path, norms=[1.0, 1.0, math.inf], save_every=1, max_skipped_steps=4)
    with pytest.raises(UserError, match=r"no update since step 2; .*no checkpoint is good; resume=never starts over"):
        run.trainer.train()
    assert run.saved == [1, 2]


def test_non_finite_weights_are_never_saved(tmp_path: Path) -> None:
    run = Run(tmp_path, finite=False)
    with pytest.raises(UserError, match="step 3: weights or moments are non-finite and were not saved"):
        run.trainer.train()
    assert run.saved == []


# --- the best model ---


def best_of(run: Run) -> list[tuple[int, int, float | None, int]]:
    """(step, best step, best value, evaluations since) of each checkpoint."""
    found = []
    for state in run.checkpoints.saved:
        found.append((state.step, state.best_step, state.best_value, state.evaluations_since_best))
    return found


def test_each_better_evaluation_is_saved(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Evaluations at steps 0, 2, 4 and 6; the one before the first step is no result of the run."""
    run = Run(tmp_path, evaluations=[1.0, 3.0, 2.5, 2.75], export_of="best")
    run.trainer.train()
    assert best_of(run) == [(2, 2, 3.0, 0), (3, 2, 3.0, 0), (4, 4, 2.5, 0), (6, 4, 2.5, 1)]
    printed = capsys.readouterr().out
    assert "saved step_2, the best so far: eval_loss 3.0000\n" in printed
    assert "saved step_6\n" in printed


def test_predictions_are_those_of_the_exported_model(tmp_path: Path) -> None:
    for export_of, expected in (("best", [1, 2, 3]), ("last", [1, 2, 3, 4])):
        run = Run(tmp_path / export_of, evaluations=[1.0, 3.0, 2.5, 2.75], export_of=export_of)
        run.trainer.train()
        assert run.task.predicted == expected


def test_nan_is_never_the_best(tmp_path: Path) -> None:
    run = Run(tmp_path, evaluations=[1.0, math.nan, 2.5, math.inf], export_of="best", save_every=0)
    run.trainer.train()
    assert best_of(run) == [(4, 4, 2.5, 0), (6, 4, 2.5, 1)]


def test_higher_is_better_for_other_metrics(tmp_path: Path) -> None:
    run = Run(tmp_path, best_metric="accuracy", export_of="best", save_every=0)
    run.trainer.train()
    assert best_of(run) == [(2, 2, 0.25, 0), (6, 2, 0.25, 2)]
    with pytest.raises(UserError, match=r"best_metric=f1: the evaluation has no such number; it has eval_loss, acc"):
        Run(tmp_path / "other", best_metric="f1").trainer.train()


def test_a_step_that_was_skipped_is_not_the_best(tmp_path: Path) -> None:
    """Its weights may have exploded: such a state is not saved."""
    run = Run(tmp_path, evaluations=[4.0, 1.0, 2.0, 3.0], norms=[1.0, math.inf, 1.0], export_of="best", save_every=0)
    run.trainer.train()
    assert best_of(run) == [(4, 4, 2.0, 0), (6, 4, 2.0, 1)]


def test_patience_ends_a_run_and_saves_it(tmp_path: Path) -> None:
    run = Run(tmp_path, evaluations=[1.0, 2.0, 3.0, 4.0], patience=1, save_every=0)
    run.trainer.train()
    assert run.trainer.ended == "patience=1: no better eval_loss in 1 evaluation since step 2"
    assert best_of(run) == [(4, 2, 2.0, 1)]
    again = Run(tmp_path, resumed_from=run, patience=1)
    again.trainer.train()
    assert (again.task.evaluations, again.trainer.state.step, again.trainer.ended) == (0, 4, run.trainer.ended)
    longer = Run(tmp_path, resumed_from=run, patience=2, evaluations=[1.5])
    longer.trainer.train()
    assert longer.trainer.ended is None
    assert best_of(longer)[-1] == (6, 6, 1.5, 0)


def test_patience_at_the_last_step_is_the_usual_end(tmp_path: Path) -> None:
    run = Run(tmp_path, evaluations=[1.0, 2.0, 3.0, 4.0], patience=2, save_every=0)
    run.trainer.train()
    assert (run.trainer.ended, run.saved) == (None, [6])


def test_an_interrupted_evaluation_that_becomes_the_best_is_saved_at_its_step(tmp_path: Path) -> None:
    run = Run(tmp_path, evaluations=[5.0, 4.0], signal_in_evaluation=2, export_of="best", save_every=0)
    with pytest.raises(Preempted, match="preempted after step 2 of 6, saved"):
        run.trainer.train()
    assert best_of(run) == [(2, -1, None, 0)]
    resumed = Run(tmp_path, resumed_from=run, evaluations=[2.0, 3.0, 4.0], export_of="best", save_every=0)
    resumed.trainer.train()
    assert best_of(resumed) == [(2, -1, None, 0), (2, 2, 2.0, 0), (6, 2, 2.0, 2)]


def test_values_of_another_metric_are_not_compared(tmp_path: Path) -> None:
    run = Run(tmp_path, evaluations=[1.0, 0.1, 2.0, 3.0], save_every=2, max_steps=4)
    run.trainer.train()
    resumed = Run(tmp_path, resumed_from=run, best_metric="accuracy", save_every=0)
    resumed.trainer.train()
    state = resumed.checkpoints.saved[-1]
    assert (state.step, state.best_metric, state.best_step, state.best_value) == (6, "accuracy", 6, 0.25)
