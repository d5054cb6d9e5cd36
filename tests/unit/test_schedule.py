"""lr_at against values computed by hand, at the ends of each schedule, and within its bounds everywhere."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from typed_configs import optim_config

from gptj_train.errors import UserError
from gptj_train.training.optimizer import OptimConfig
from gptj_train.training.schedule import check_warmup, extended, extension_note, lr_at, lr_in, warmup_of

BASE = optim_config("lr=2", "warmup_steps=4", "decay_steps=5")  # cosine, final_lr_ratio 0.1
STEPS = 13


def optim(**changes: Any) -> OptimConfig:
    return replace(BASE, **changes)


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant", "wsd"])
def test_warm_up_rises_in_equal_steps_to_lr(schedule: str) -> None:
    rates = [lr_at(step, STEPS, optim(schedule=schedule)) for step in range(5)]
    assert rates == pytest.approx([0.5, 1.0, 1.5, 2.0, 2.0])


# After warm-up: steps 4 to 12, so step 8 is the middle and step 6 the first quarter.
@pytest.mark.parametrize(
    ("schedule", "at_6", "at_8", "at_10", "at_12"),
    [
        ("cosine", 1.7363961, 1.1, 0.4636039, 0.2),  # 0.2 + 1.8 * (1 + cos(pi * share)) / 2
        ("linear", 1.55, 1.1, 0.65, 0.2),
        ("constant", 2.0, 2.0, 2.0, 2.0),
        ("wsd", 2.0, 2.0, 1.1, 0.2),  # decay_steps = 5: down from step 8
    ],
)
def test_descent_by_hand(schedule: str, at_6: float, at_8: float, at_10: float, at_12: float) -> None:
    rates = [lr_at(step, STEPS, optim(schedule=schedule)) for step in (6, 8, 10, 12)]
    assert rates == pytest.approx([at_6, at_8, at_10, at_12])


@pytest.mark.parametrize("schedule", ["cosine", "linear", "wsd"])
@pytest.mark.parametrize("ratio", [0.0, 0.1, 1.0])
def test_without_warm_up_from_lr_to_the_final_rate(schedule: str, ratio: float) -> None:
    settings = optim(schedule=schedule, warmup_steps=0, final_lr_ratio=ratio)
    assert lr_at(0, STEPS, settings) == pytest.approx(2.0)
    assert lr_at(STEPS - 1, STEPS, settings) == pytest.approx(2.0 * ratio)


def test_wsd_without_decay_is_constant() -> None:
    assert [lr_at(step, STEPS, optim(schedule="wsd", decay_steps=0)) for step in (4, 12)] == [2.0, 2.0]


def test_wsd_whose_decay_covers_the_warm_up_goes_down_after_it() -> None:
    settings = optim(schedule="wsd", decay_steps=100)
    assert lr_at(3, STEPS, settings) == lr_at(4, STEPS, settings) == 2.0
    assert lr_at(8, STEPS, settings) == pytest.approx(1.1)
    assert lr_at(12, STEPS, settings) == pytest.approx(0.2)


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant", "wsd"])
def test_one_step(schedule: str) -> None:
    assert lr_at(0, 1, optim(schedule=schedule, warmup_steps=0, decay_steps=0)) == 2.0
    assert lr_at(0, 1, optim(schedule=schedule, warmup_steps=1)) == 2.0
    assert lr_at(0, 1, optim(schedule=schedule, warmup_steps=4)) == 0.5


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant", "wsd"])
def test_warm_up_as_long_as_the_run_or_longer(schedule: str) -> None:
    assert lr_at(12, STEPS, optim(schedule=schedule, warmup_steps=13)) == 2.0
    assert lr_at(12, STEPS, optim(schedule=schedule, warmup_steps=26)) == pytest.approx(1.0)


@st.composite
def runs(draw: st.DrawFn) -> tuple[OptimConfig, int]:
    settings = optim(
        lr=draw(st.floats(1e-8, 10.0)),
        schedule=draw(st.sampled_from(["cosine", "linear", "constant", "wsd"])),
        warmup_steps=draw(st.integers(0, 40)),
        decay_steps=draw(st.integers(0, 40)),
        final_lr_ratio=draw(st.floats(0.0, 1.0)),
    )
    return settings, draw(st.integers(1, 40))


@given(runs())
def test_it_rises_to_lr_and_then_falls(run: tuple[OptimConfig, int]) -> None:
    settings, max_steps = run
    rates = [lr_at(step, max_steps, settings) for step in range(max_steps)]
    assert all(0 <= rate <= settings.lr * (1 + 1e-12) for rate in rates)
    assert settings.warmup_steps is not None
    warm = min(settings.warmup_steps, max_steps)
    assert rates[:warm] == sorted(rates[:warm])
    assert rates[warm:] == sorted(rates[warm:], reverse=True)
    assert all(rate >= settings.lr * settings.final_lr_ratio * (1 - 1e-12) for rate in rates[warm:])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lr": 0.0}, "lr must be above 0, got 0.0"),
        ({"lr": -1e-5}, "lr must be above 0, got -1e-05"),
        ({"betas": (0.9, 1.0)}, r"betas must be in \[0, 1\), got \(0.9, 1.0\)"),
        ({"betas": (-0.1, 0.9)}, r"betas must be in \[0, 1\)"),
        ({"warmup_steps": -1}, "warmup_steps must be 0 or more, got -1"),
        ({"warmup_ratio": -0.1}, r"warmup_ratio must be at least 0 and below 1, got -0.1"),
        ({"decay_steps": -1}, "decay_steps must be 0 or more, got -1"),
        ({"clip_norm": -1.0}, "clip_norm must be 0 or more, got -1.0"),
        ({"weight_decay": -0.1}, "weight_decay must be 0 or more, got -0.1"),
        ({"final_lr_ratio": -0.1}, "final_lr_ratio must be 0 or more, got -0.1"),
        ({"schedule": "cosin"}, "'cosine', 'linear', 'constant' or 'wsd'"),
    ],
)
def test_settings_out_of_range(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        optim(**changes)


# --- warm-up as a share ---


@pytest.mark.parametrize(
    ("ratio", "steps", "warmup"),
    [(0.05, 1000, 50), (0.05, 400, 20), (0.05, 20, 1), (0.05, 1, 0), (0.05, 9, 0), (0.1667, 120, 20), (0.0, 1000, 0)],
)
def test_warm_up_as_a_share_of_the_run(ratio: float, steps: int, warmup: int) -> None:
    assert warmup_of(optim(warmup_steps=None, warmup_ratio=ratio), steps) == warmup
    assert warmup_of(optim(warmup_steps=7, warmup_ratio=ratio), steps) == 7


def test_a_warm_up_as_long_as_the_run_is_refused() -> None:
    check_warmup(optim(warmup_steps=12), 13)
    check_warmup(optim(warmup_steps=0), 0)
    check_warmup(optim(warmup_steps=5), 0)  # max_steps=0 exports the initial weights
    with pytest.raises(
        UserError, match=r"optim\.warmup_steps=13: a warm-up of 13 steps is not shorter than the run of 13 "
    ):
        check_warmup(optim(warmup_steps=13), 13)
    with pytest.raises(UserError, match=r"optim\.warmup_ratio=0\.9: a warm-up of 4 steps .* lower optim\.warmup_ratio"):
        check_warmup(optim(warmup_steps=None, warmup_ratio=0.9), 4)


# --- runs that are extended ---


@pytest.mark.parametrize(
    ("cycles", "before", "after", "extend", "expected"),
    [
        ([[0, 10]], 10, 10, "stretch", [[0, 10]]),
        ([[0, 10]], 10, 30, "stretch", [[0, 30]]),
        ([[0, 10]], 10, 30, "constant", [[0, 10]]),
        ([[0, 10]], 10, 30, "rewarm", [[0, 10], [10, 30]]),
        # Extended again: after a constant rate, and after a second warm-up.
        ([[0, 10]], 30, 40, "rewarm", [[0, 10], [30, 40]]),
        ([[0, 10]], 30, 40, "stretch", [[0, 40]]),
        ([[0, 10], [10, 30]], 30, 40, "stretch", [[0, 10], [10, 40]]),
        ([[0, 10], [10, 30]], 30, 40, "constant", [[0, 10], [10, 30]]),
        # Shortened, whatever extend is.
        ([[0, 10]], 10, 8, "constant", [[0, 8]]),
        ([[0, 10]], 30, 20, "stretch", [[0, 10]]),
        ([[0, 10], [10, 30]], 30, 20, "rewarm", [[0, 10], [10, 20]]),
        ([[0, 10], [10, 30]], 30, 9, "stretch", [[0, 9]]),
    ],
)
def test_cycles_of_a_run_of_another_length(
    cycles: list[list[int]], before: int, after: int, extend: str, expected: list[list[int]]
) -> None:
    assert extended(cycles, before, after, extend) == expected


def test_rates_in_cycles() -> None:
    settings = optim()  # warm-up of 4 steps to 2.0, then a cosine to 0.2
    one = [lr_in([[0, 13]], step, settings) for step in range(13)]
    assert one == [lr_at(step, 13, settings) for step in range(13)]
    assert [lr_in([[0, 13]], step, settings) for step in (13, 14, 99)] == pytest.approx([0.2, 0.2, 0.2])
    two = [lr_in([[0, 13], [20, 33]], step, settings) for step in range(33)]
    assert two[:13] == two[20:] == one
    assert two[13:20] == pytest.approx([0.2] * 7)


def test_a_changed_rate_is_announced() -> None:
    settings = optim()
    line = extension_note([[0, 13]], [[0, 26]], 13, settings, "stretch")
    assert line is not None
    assert f"learning rate of step 14 is {lr_at(13, 26, settings):.2e}, it was 2.00e-01; extend=constant keeps" in line
    line = extension_note([[0, 13]], [[0, 13], [13, 26]], 13, settings, "rewarm")
    assert line is not None
    assert line.startswith("another max_steps changes the schedule (extend=rewarm): ")
    assert line.endswith("the learning rate of step 14 is 5.00e-01, it was 2.00e-01")
    assert extension_note([[0, 13]], [[0, 13]], 13, settings, "constant") is None
    # Constant schedules stay what they are.
    assert extension_note([[0, 13]], [[0, 26]], 13, optim(schedule="constant"), "stretch") is None
