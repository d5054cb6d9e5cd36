"""Which steps are reported, and which end a run."""

from __future__ import annotations

import math

import numpy as np
import pytest

from gptj_train.errors import UserError
from gptj_train.training.health import Health
from gptj_train.training.state import TrainState


def judged(losses: list[float]) -> list[str]:
    """What Health reports of a run with these losses and finite gradients."""
    health, state, messages = Health(3, "unused"), TrainState(), []
    for loss in losses:
        state.step += 1
        messages.append(health.judge(state, loss=loss, grad_norm=1.0, loss_scale=1.0))
    return [message for message in messages if message]


def descending(steps: int, noise: float) -> list[float]:
    """A loss curve with the noise of small batches."""
    random = np.random.default_rng(0)
    return [float(2 + 3 * math.exp(-step / 50) + noise * random.standard_normal()) for step in range(steps)]


@pytest.mark.parametrize("noise", [0.0, 0.05, 0.3])
def test_noise_is_no_spike(noise: float) -> None:
    assert judged(descending(2000, noise)) == []


def test_a_spike_is_reported_once() -> None:
    losses = descending(200, 0.05)
    losses[120:125] = [6.0] * 5
    losses[150] = 9.0
    first, second = judged(losses)
    assert first.startswith("step 121: loss spike: 6.0000 after a median of 2.")
    assert second.startswith("step 151: loss spike: 9.0000 after")


def test_a_new_level_is_reported_once() -> None:
    assert len(judged([2.0] * 60 + [4.0] * 200)) == 1


def test_fp16_overflows_do_not_count() -> None:
    """Losses are finite, and DeepSpeed halves the scale with every overflow."""
    health, state = Health(3, "unused"), TrainState()
    for power in range(15, 0, -1):
        state.step += 1
        message = health.judge(state, loss=4.0, grad_norm=math.inf, loss_scale=2.0**power)
        assert message == f"step {state.step}: fp16 overflow, update skipped; the loss scale is now {2.0**power:g}"
    assert (state.skipped, state.skipped_in_a_row) == (15, 0)
    for _ in range(2):
        health.judge(state, loss=math.nan, grad_norm=math.inf, loss_scale=2.0)
    with pytest.raises(UserError, match=r"for 3 steps in a row"):
        health.judge(state, loss=4.0, grad_norm=math.inf, loss_scale=1.0)


def test_a_good_step_ends_the_row() -> None:
    health, state = Health(2, "unused"), TrainState()
    for norm in (math.nan, 1.0, math.inf, 1.0, math.nan):
        health.judge(state, loss=2.0, grad_norm=norm, loss_scale=1.0)
    assert (state.skipped, state.skipped_in_a_row) == (3, 1)
