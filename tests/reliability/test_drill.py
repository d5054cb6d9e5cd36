"""A short drill; the long ones are run by hand (drill.py --kills N, drill.py --points)."""

from __future__ import annotations

import pytest
from drill import SAVE_EVERY, drill

pytestmark = pytest.mark.distributed


def test_a_run_that_is_killed_five_times() -> None:
    """Among them kills inside the save, of one rank and of all."""
    *_, result = drill(kills=5, seed=3, worlds=(2, 1))
    assert result["kills, all resumed and ended bitwise equal"] == 5
    assert 2 <= result["of these inside the save"] <= 3
    assert result["of these of all ranks"] >= 1
    assert result["most steps lost to a kill"] <= SAVE_EVERY
