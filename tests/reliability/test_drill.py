"""Short drills; the long ones are run by hand (drill.py --kills N, drill.py --points, recipe_drill.py --kills N)."""

from __future__ import annotations

from pathlib import Path

import pytest
from drill import SAVE_EVERY, drill
from recipe_drill import drill as recipe_drill
from recipe_drill import explode

pytestmark = pytest.mark.distributed


def test_a_run_that_is_killed_five_times() -> None:
    """Among them kills inside the save, of one rank and of all."""
    *_, result = drill(kills=5, seed=3, worlds=(2, 1))
    assert result["kills, all resumed and ended bitwise equal"] == 5
    assert 2 <= result["of these inside the save"] <= 3
    assert result["of these of all ranks"] >= 1
    assert result["most steps lost to a kill"] <= SAVE_EVERY


def test_the_real_command_is_killed_at_each_stage() -> None:
    """Of its imports, preparation, load and export, with whatever launched it."""
    stages = ["imports", "preparation", "load", "export"]
    *_, result = recipe_drill(kills=4, seed=5, stages=stages, launchers=["deepspeed"])
    assert result["kills, all resumed and ended bitwise equal"] == 4


def test_a_run_that_explodes_comes_back_as_its_message_says(tmp_path: Path) -> None:
    explode(tmp_path)
