"""lr_at against values computed by hand, at the ends of each schedule, and within its bounds everywhere."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from typed_configs import optim_config

from gptj_train.training.optimizer import OptimConfig
from gptj_train.training.schedule import lr_at

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
