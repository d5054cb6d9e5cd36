"""Runs of the worker that several tests read, launched once per session."""

from __future__ import annotations

import pytest
from ranks import NOT_OFFLOADED, ON_HOST, Results, job, launch

DEGREES = ("gelu", "mlp", "block")


@pytest.fixture(scope="session")
def results(tmp_path_factory: pytest.TempPathFactory) -> Results:
    """Jobs on 2 ranks in one launch; a second launch resumes; then the same batch on 1 rank and on 4."""
    folder = tmp_path_factory.mktemp("ranks")
    fp32 = {"precision": "fp32"}
    recomputed = []
    for degree in DEGREES:
        settings = fp32 | {"activation_checkpointing": degree}
        recomputed.append(job(f"recomputed {degree}", micro=1, engine=settings))
    dropout = {"dropout": 0.1, "run": "interrupted", "micro": 1}
    launch(
        2,
        folder,
        [
            job("fp32", micro=1, engine=fp32, evaluate=True, export=["fp32", "bf16"]),
            job("bf16", micro=1),
            *recomputed,
            job("straight", micro=1, dropout=0.1),
            job("first half", steps=5, save=True, **dropout),
            job("stage 0 fp32", micro=1, engine={"stage": 0, "precision": "fp32"} | NOT_OFFLOADED),
            *(job(f"stage {stage}", micro=1, steps=4, engine={"stage": stage} | NOT_OFFLOADED) for stage in range(4)),
            *(job(f"stage {stage} cpu", micro=1, steps=4, engine={"stage": stage} | ON_HOST) for stage in (1, 2, 3)),
            job("stage 3 both", micro=1, steps=4),
            job("stage 3 sums on the device", micro=1, steps=4, engine={"accumulate_on": "gpu"}),
        ],
    )
    start = str(folder / "fp32" / "export_fp32")
    launch(
        2,
        folder,
        [
            job("second half", **dropout),
            job("from fp32", steps=0, init_from=start, engine=fp32),
            job("from fp32 to bf16", steps=0, init_from=start),
        ],
    )
    launch(1, folder, [job("1 rank", micro=1, engine=fp32, evaluate=True)])
    launch(4, folder, [job("4 ranks", micro=1, engine=fp32, evaluate=True)])
    return Results(folder)
