"""The real engine page-locks what the plan says, sums gradients where it is told, and copies none to check them."""

from __future__ import annotations

import pytest
from ranks import Results, launch

pytestmark = pytest.mark.distributed

BYTES_A_PARAMETER = {
    "all on the host": 2 + 4 + 4,
    "sums on the GPU": 2 + 4,
    "weights and sums on the GPU": 4,
}
JOBS = [
    {"name": "all on the host", "engine": {}},
    {"name": "sums on the GPU", "engine": {"accumulate_on": "gpu"}},
    {"name": "weights and sums on the GPU", "engine": {"accumulate_on": "gpu", "offload_parameters": "none"}},
]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Results:
    folder = tmp_path_factory.mktemp("host_memory")
    launch(1, folder, JOBS, "host_memory_worker.py")
    return Results(folder)


@pytest.mark.parametrize("name", BYTES_A_PARAMETER)
def test_page_locked_bytes_are_those_planned(found: Results, name: str) -> None:
    result = found.of(name)
    assert result["planned"] == BYTES_A_PARAMETER[name] * result["parameters"]
    assert result["locked"] == pytest.approx(result["planned"], rel=0.02)
    assert result["planned"] < result["host"]


def test_sums_are_allocated_where_they_stay(found: Results) -> None:
    result = found.of("sums")
    assert result["asked for"] == [result["engine"]]
    assert result["sums"] == "meta"
    assert result["tracker"] == "meta"
    assert result["rest"] == ["cpu"]
    assert result["optimizer on the host"]


def test_a_step_copies_no_gradients_to_check_them(found: Results) -> None:
    result = found.of("step")
    assert result["step"] < result["parameters"] / 2
    assert result["isinf of 1000"] == 1000  # the instrument sees DeepSpeed's own way
