"""A non-finite loss or gradient, on one rank in one micro-batch, changes no bit of the state on any rank."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from ranks import NOT_OFFLOADED, ON_HOST, Results, launch
from toy import sampler

pytestmark = pytest.mark.distributed

PLACES = {
    f"stage {stage} {place} {precision}": {"stage": stage, "precision": precision} | settings
    for stage in range(4)
    for place, settings in (("gpu", NOT_OFFLOADED), ("cpu", ON_HOST), ("both", {}))
    for precision in ("bf16", "fp32")
    if (place == "gpu" or stage > 0) and (place != "both" or stage == 3)
}


@pytest.fixture(scope="module")
def outcome(tmp_path_factory: pytest.TempPathFactory) -> tuple[Results, str]:
    folder = tmp_path_factory.mktemp("bad_numbers")
    # ZeRO-3 puts its own linear layer into torch for good: the other stages come first.
    jobs = [{"name": name, "engine": place} for name, place in PLACES.items()]
    return Results(folder), launch(2, folder, jobs, "bad_numbers_worker.py")


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("place", PLACES)
def test_a_non_finite_step_changes_nothing_and_the_next_step_equals_a_run_without_it(
    outcome: tuple[Results, str], place: str, rank: int
) -> None:
    result = outcome[0].of(place, rank)
    assert result["untouched"] == [True, True, True]
    assert [math.isfinite(line["grad_norm"]) for line in result["lines"]] == [False] * 3
    assert [math.isfinite(line["loss"]) for line in result["lines"]] == [False, False, True]
    assert [line["skipped_steps"] for line in result["lines"]] == [1, 2, 3]
    assert result["state"]["step"] == 6
    assert (result["state"]["skipped"], result["state"]["skipped_in_a_row"]) == (3, 0)
    assert result["next step is the same"]
    assert result["and so is what it left"]
    assert result["and it moved"]


@pytest.mark.parametrize("place", PLACES)
def test_a_non_finite_moment_is_found_on_every_rank(outcome: tuple[Results, str], place: str) -> None:
    for rank in (0, 1):
        assert outcome[0].of(place, rank)["finite"]
        assert not outcome[0].of(place, rank)["finite with a bad moment"]


def test_rank_0_names_the_bad_batch_of_any_rank(outcome: tuple[Results, str]) -> None:
    rows = [sampler(1).windows(step, rank=1, world_size=2)[-1] for step in (2, 3)]
    for line in (
        f"step 3: loss nan on rank 1 in rows {rows[0]} of the training data",
        "step 3: loss nan, gradient norm inf: non-finite, update skipped",
        f"step 4: loss inf on rank 1 in rows {rows[1]} of the training data",
    ):
        assert outcome[1].count(line) >= len(PLACES) / 2, line


def test_nothing_stays_in_shared_memory(outcome: tuple[Results, str]) -> None:
    """DeepSpeed's reduction over shared memory would leave a file for each rank, named by the port."""
    port = outcome[0].of("stage 0 gpu bf16")["port"]
    assert not list(Path("/dev/shm").glob(f"*_{port}_*"))
