"""A checkpoint under DeepSpeed: written and read by every stage and place of offload, by 1, 2 and 4 ranks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import NOT_OFFLOADED, ON_HOST, Results, job, launch
from torch import Tensor
from toy import windows_in_order

from gptj_train.weights.manifest import KINDS, Manifest
from gptj_train.weights.slices import SliceReader

pytestmark = pytest.mark.distributed

HALF, STEPS = 3, 6
SUB_GROUPS = {"deepspeed": {"zero_optimization": {"sub_group_size": 4000}}}
MODES: dict[str, dict[str, Any]] = {
    "stage 0 fp32": {"stage": 0, "precision": "fp32"} | NOT_OFFLOADED,
    "stage 3 fp32": {"precision": "fp32"} | NOT_OFFLOADED,
    "stage 0": {"stage": 0} | NOT_OFFLOADED,
    "stage 1": {"stage": 1} | NOT_OFFLOADED,
    "stage 2": {"stage": 2} | NOT_OFFLOADED,
    "stage 3": NOT_OFFLOADED,
    "stage 1 cpu": {"stage": 1} | ON_HOST,
    "stage 2 cpu": {"stage": 2} | ON_HOST,
    "stage 3 cpu": ON_HOST,
    "stage 3 sub-groups": SUB_GROUPS,
}
# The optimizer on disk: buffers below 1 MB stay in memory, and the model's are in several sub-groups.
NVME = {"offload_optimizer": "nvme", "deepspeed": {"zero_optimization": {"sub_group_size": 300_000}}}
WIDE = {"width": 256}
needs_libaio = pytest.mark.skipif(not Path("/usr/include/libaio.h").exists(), reason="DeepSpeed's NVMe offload")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Results:
    """Straight runs and first halves in one launch, second halves in another, and the same on 1 and 4 ranks."""
    folder = tmp_path_factory.mktemp("resume")
    modes = dict(MODES)
    nvme = NVME | {"nvme_path": str(folder / "nvme")}

    def jobs(prefix: str, **more: Any) -> list[dict[str, Any]]:
        made = [
            job(f"{prefix} {mode}", micro=1, max_steps=STEPS, engine=engine, **_run(prefix, mode), **more)
            for mode, engine in modes.items()
        ]
        if needs_libaio.args[0]:
            return made
        wide = more | _run(prefix, "nvme") | WIDE
        return [*made, job(f"{prefix} nvme", micro=1, max_steps=STEPS, engine=nvme, **wide)]

    launch(2, folder, [*jobs("straight", steps=STEPS), *jobs("first", steps=HALF, save=True)])
    of_all = str(folder / "stage 3 sub-groups" / "checkpoints" / f"step_{HALF:08}")
    of_fp32 = str(folder / "stage 3 fp32" / "checkpoints" / f"step_{HALF:08}")
    again: dict[str, Any] = {"micro": 1, "max_steps": STEPS}
    conversions = [
        job(f"converted {mode}", resume=of_all, steps=0, save=True, engine=engine, **again)
        for mode, engine in MODES.items()
    ]
    launch(2, folder, [*jobs("second", steps=STEPS), *conversions])
    for ranks in (1, 4):
        engine = {"precision": "fp32"}
        launch(
            ranks,
            folder,
            [
                job(f"{ranks} ranks converted", resume=of_all, steps=0, save=True, **again),
                job(f"{ranks} ranks bf16", resume=of_all, steps=STEPS, engine=SUB_GROUPS, **again),
                job(f"{ranks} ranks fp32", resume=of_fp32, steps=STEPS, engine=engine, **again),
            ],
        )
    return Results(folder)


def _run(prefix: str, mode: str) -> dict[str, str]:
    return {} if prefix == "straight" else {"run": mode}


def content(folder: Path) -> dict[tuple[str, str], Tensor]:
    """(kind, parameter) -> all of it, flat."""
    manifest = Manifest.read(folder)
    whole = {}
    for kind in KINDS:
        with SliceReader(folder / file for file in manifest.of_kind(kind)) as reader:
            for name, shape in manifest.parameters.items():
                whole[kind, name] = torch.empty(torch.Size(shape).numel())
                reader.read(name, 0, whole[kind, name])
    return whole


def check_bitwise(runs: Results, mode: str) -> None:
    for column in ("loss", "grad_norm", "lr", "tokens"):
        halves = runs.column(f"first {mode}", column) + runs.column(f"second {mode}", column)
        assert halves == runs.column(f"straight {mode}", column), column
    resumed = runs.weights(f"second {mode}")
    for name, tensor in runs.weights(f"straight {mode}").items():
        assert torch.equal(resumed[name], tensor), name


@pytest.mark.parametrize("mode", MODES)
def test_the_same_ranks_resume_bit_for_bit(runs: Results, mode: str) -> None:
    check_bitwise(runs, mode)


@needs_libaio
def test_moments_on_nvme_resume_bit_for_bit(runs: Results) -> None:
    check_bitwise(runs, "nvme")
    swapped = list((runs.folder / "nvme").rglob("exp_avg*.swp"))
    assert len(swapped) >= 4, "nothing was on the disk"


@pytest.mark.parametrize(
    "converted", [*(f"converted {mode}" for mode in MODES), "1 ranks converted", "4 ranks converted"]
)
def test_every_mode_loads_every_bit(runs: Results, converted: str) -> None:
    """Read from a checkpoint of ZeRO-3 with offload on 2 ranks, and written again without a step between."""
    name = f"checkpoints/step_{HALF:08}"
    before = content(runs.folder / "stage 3 sub-groups" / name)
    after = content(runs.folder / converted / name)
    assert before.keys() == after.keys()
    for key, tensor in before.items():
        assert torch.equal(after[key], tensor), key
    manifests = [Manifest.read(runs.folder / run / name) for run in ("stage 3 sub-groups", converted)]
    assert manifests[0].optimizer == manifests[1].optimizer == {"steps": HALF, "loss_scale": {}}
    for kept in ("step", "tokens", "next_batch"):
        assert manifests[0].state[kept] == manifests[1].state[kept], kept


@pytest.mark.parametrize(("precision", "tolerance"), [("fp32", 1e-5), ("bf16", 2e-3)])
@pytest.mark.parametrize("ranks", [1, 4])
def test_other_rank_counts_resume_within_rounding(runs: Results, ranks: int, precision: str, tolerance: float) -> None:
    """Sums are made in another order: 1e-5 of the loss in fp32, 2e-3 in bf16, whose gradients have 8 bits."""
    straight = "straight stage 3 fp32" if precision == "fp32" else "straight stage 3 sub-groups"
    other = f"{ranks} ranks {precision}"
    assert runs.column(other, "loss") == pytest.approx(runs.column(straight, "loss")[HALF:], rel=tolerance)
    assert runs.column(other, "tokens") == runs.column(straight, "tokens")[HALF:]
    of_rank = [runs.of(other, rank)["rows"] for rank in range(ranks)]
    for turn, windows in enumerate(windows_in_order(HALF, STEPS - HALF)):
        turns = zip(*(rows[turn] for rows in of_rank), strict=True)
        assert [row for micros in turns for micro in micros for row in micro] == windows
