"""Passes over the data: their steps, their text, and the lines about too little data."""

from __future__ import annotations

import pytest

from gptj_train.data.sampler import Sampler
from gptj_train.epochs import Epochs


def epochs_of(sizes: dict[str, int], weights: list[float] | None = None, batch: int = 4) -> Epochs:
    sampler = Sampler(list(sizes.values()), weights=weights, seed=0, global_batch_size=batch, micro_batch_size=1)
    return Epochs(sizes, sampler, batch)


@pytest.mark.parametrize(
    ("windows", "epochs", "steps"),
    [(12, 1, 3), (12, 3, 9), (13, 1, 4), (13, 2, 7), (12, 0.5, 2), (12, 0.01, 1), (7, 4, 7), (3, 1, 1), (3, 100, 75)],
)
def test_steps_of_epochs_are_rounded_up(windows: int, epochs: float, steps: int) -> None:
    assert epochs_of({"": windows}).steps_of(epochs) == steps


def test_whole_epochs_have_no_step_more_than_they_need() -> None:
    for batch in range(1, 60):
        assert epochs_of({"": 7 * batch}, batch=batch).steps_of(3) == 21
        assert epochs_of({"": 7}, batch=batch).steps_of(batch) == 7


def test_the_text_names_components_of_a_mixture() -> None:
    assert epochs_of({"": 12}).describe(30) == "10.00 in 30 steps"
    # Of 120 positions three quarters are a's.
    assert epochs_of({"a": 30, "b": 6}, [3, 1]).describe(30) == "a 3.00, b 5.00 in 30 steps"
    assert epochs_of({"a": 30, "b": 6}).describe(1800) == "200.00 in 1,800 steps"


def test_too_little_data_is_pointed_out() -> None:
    assert list(epochs_of({"": 12}).warnings(60)) == []  # 20 epochs
    (line,) = epochs_of({"": 12}).warnings(63)
    assert line.startswith("more than 20 epochs (21): the model may learn these samples by heart; lower max_steps")
    (line,) = epochs_of({"a": 30, "b": 6}, [3, 1]).warnings(150)  # a 15 times, b 25 times
    assert "(b 25)" in line
    (line,) = epochs_of({"": 3}).warnings(2)
    assert line == (
        "data.train has 3 samples, fewer than global_batch_size=4: each step has some of them twice; "
        "lower global_batch_size"
    )
