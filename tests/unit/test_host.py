"""Threads of a rank, and what the environment of DeepSpeed holds."""

from __future__ import annotations

import os

import pytest
import torch

from gptj_train.launch import host

SLURM_8_TASKS_OF_64_CORES = {"LOCAL_WORLD_SIZE": "8", "SLURM_STEP_ID": "0", "SLURM_CPUS_ON_NODE": "64"}


@pytest.mark.parametrize(
    ("environment", "cores", "threads"),
    [
        ({"LOCAL_WORLD_SIZE": "8"}, 64, 8),
        ({"LOCAL_SIZE": "4"}, 64, 16),
        ({"LOCAL_WORLD_SIZE": "8"}, 4, 1),
        # Bound by srun to a share of the node: not divided again.
        (SLURM_8_TASKS_OF_64_CORES, 8, 8),
        # srun --cpu-bind=none: every task sees all cores.
        (SLURM_8_TASKS_OF_64_CORES, 64, 8),
    ],
)
def test_threads_of_a_rank(
    environment: dict[str, str], cores: int, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("LOCAL_WORLD_SIZE", "LOCAL_SIZE", "OMP_NUM_THREADS", "TORCHELASTIC_RUN_ID", "SLURM_STEP_ID"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(host, "usable_cores", lambda: cores)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 64)
    asked: list[int] = []
    monkeypatch.setattr(torch, "set_num_threads", asked.append)
    host.share_cores()
    assert asked == [threads]


@pytest.mark.parametrize(("version", "sets"), [("2.13.0", True), ("2.11.0+cu130", False)])
def test_page_locked_blocks_are_not_rounded_up(version: str, sets: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "environ", dict(os.environ))
    for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"):
        os.environ.pop(name, None)
    monkeypatch.setattr(torch, "__version__", version)
    host.prepare_environment()
    assert ("pinned_max_round_threshold_mb:64" in os.environ.get("PYTORCH_ALLOC_CONF", "")) == sets


def test_a_users_allocator_settings_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "environ", os.environ | {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"})
    os.environ.pop("PYTORCH_ALLOC_CONF", None)
    host.prepare_environment()
    assert "PYTORCH_ALLOC_CONF" not in os.environ
