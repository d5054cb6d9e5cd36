"""A seeded selection of the fuzz; the long ones are run by hand (fuzz.py --inputs N)."""

from __future__ import annotations

import pytest
from fuzz import TARGETS, fuzz


@pytest.mark.parametrize("target", [*TARGETS, "command line"])
def test_random_changes_end_in_acceptance_or_one_line(target: str) -> None:
    result = fuzz(inputs=15, seed=7, targets=[target])[target]
    assert result["faults"] == []
    assert result["accepted"] + result["refused"] == 15
