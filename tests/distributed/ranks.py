"""Launch the worker on several ranks, and read its results."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

HERE = Path(__file__).parent
LONGEST = 600  # seconds of a launch


class Results:
    """What the ranks wrote, by job."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def of(self, job: str, rank: int = 0) -> dict[str, Any]:
        return json.loads((self.folder / f"{job}.rank{rank}.json").read_text())

    def column(self, job: str, name: str) -> list[float]:
        return [line[name] for line in self.of(job)["steps"]]

    def weights(self, job: str) -> dict[str, Tensor]:
        return load_file(self.folder / f"{job}.safetensors")


def launch(ranks: int, folder: Path, jobs: list[dict[str, Any]], script: str = "worker.py") -> str:
    """Run a worker on this number of ranks and return their output; a failure raises with it.

    Without the launcher, which the recipes' tests go through: it takes as long to start as the ranks.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": str(ranks), "OMP_NUM_THREADS": "1"}
    if torch.cuda.device_count() < ranks:
        shared["DS_ACCELERATOR"] = "cpu"
    command = [sys.executable, str(HERE / script), str(folder), json.dumps(jobs)]
    with tempfile.TemporaryFile("w+") as captured:
        processes = [
            subprocess.Popen(
                command,
                env=os.environ | shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
                stdout=captured,
                stderr=subprocess.STDOUT,
            )
            for rank in range(ranks)
        ]
        try:
            wait_for(processes)
        finally:
            for process in processes:
                process.kill()
            captured.seek(0)
            output = captured.read()
        assert not any(process.wait() for process in processes), output[-12000:]
    return output


def wait_for(processes: list[subprocess.Popen[bytes]]) -> None:
    """Wait until all have exited, or one has failed."""
    ends = time.monotonic() + LONGEST
    while any(process.poll() is None for process in processes) and not any(process.poll() for process in processes):
        if time.monotonic() > ends:
            break
        time.sleep(0.05)


def job(name: str, micro: int = 2, steps: int = 12, max_steps: int = 12, **more: Any) -> dict[str, Any]:
    engine = more.pop("engine", {})
    return {"name": name, "micro": micro, "steps": steps, "max_steps": max_steps, "engine": engine, **more}


NOT_OFFLOADED = {"offload_optimizer": "none", "offload_parameters": "none"}
ON_HOST = {"offload_optimizer": "cpu", "offload_parameters": "none"}
