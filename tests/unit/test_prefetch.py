"""Prefetched batches are those of the step that is asked for, built ahead in another thread."""

from __future__ import annotations

import threading
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from gptj_train.training.prefetch import PrefetchedBatches


def recording_task(built: list[int], *, bad_step: int = -1) -> Any:
    def training_batches(step: int, rank: int, world_size: int) -> list[dict[str, torch.Tensor]]:
        assert threading.current_thread() is not threading.main_thread()
        built.append(step)
        if step == bad_step:
            raise ValueError(f"step {step}")
        return [{"input_ids": torch.tensor([[step, rank, world_size]])}]

    return SimpleNamespace(training_batches=training_batches)


def ids(batches: list[dict[str, torch.Tensor]]) -> list[list[list[int]]]:
    return [batch["input_ids"].tolist() for batch in batches]


def test_steps_in_a_row_are_built_once_each_and_ahead() -> None:
    built: list[int] = []
    batches = PrefetchedBatches(recording_task(built), 1, 4)
    assert [ids(batches.at(step)) for step in range(3, 6)] == [[[[step, 1, 4]]] for step in range(3, 6)]
    batches._thread.shutdown(wait=True)
    assert built == [3, 4, 5, 6]


def test_another_step_than_the_next_one_is_built_when_asked_for() -> None:
    built: list[int] = []
    batches = PrefetchedBatches(recording_task(built), 0, 1)
    assert [ids(batches.at(step)) for step in (0, 7, 0)] == [[[[0, 0, 1]]], [[[7, 0, 1]]], [[[0, 0, 1]]]]


def test_a_mistake_in_the_data_is_raised_at_its_own_step() -> None:
    batches = PrefetchedBatches(recording_task([], bad_step=1), 0, 1)
    assert ids(batches.at(0)) == [[[0, 0, 1]]]
    with pytest.raises(ValueError, match="step 1"):
        batches.at(1)
