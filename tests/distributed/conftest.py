"""Launches the worker on several ranks, once for all tests that look at what it wrote."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from gptj_train.data.tokenizer import Tokenizer

HERE = Path(__file__).parent


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


def launch(ranks: int, folder: Path, jobs: list[dict[str, Any]]) -> None:
    """Run the worker under the deepspeed launcher; its output is shown when it fails."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "deepspeed.launcher.runner", "-q", "--num_gpus", str(ranks)]
    command += ["--master_port", str(port), str(HERE / "worker.py"), str(folder), json.dumps(jobs)]
    # The ranks test the package beside them, not one that is installed.
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(HERE.parents[1])}
    if torch.cuda.device_count() < ranks:
        environment["DS_ACCELERATOR"] = "cpu"
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-8000:]


def job(name: str, micro: int = 2, steps: int = 12, max_steps: int = 12, **more: Any) -> dict[str, Any]:
    engine = more.pop("engine", {})
    return {"name": name, "micro": micro, "steps": steps, "max_steps": max_steps, "engine": engine, **more}


FP32 = {"precision": "fp32"}
FP32_MESSAGES = {"deepspeed": {"communication_data_type": "fp32"}}
NOT_OFFLOADED = {"offload_optimizer": "none", "offload_parameters": "none"}
ON_HOST = {"offload_optimizer": "cpu", "offload_parameters": "none"}
PLACES: dict[str, dict[str, Any]] = {
    "stage 0": {"stage": 0} | NOT_OFFLOADED,
    "stage 1": {"stage": 1} | NOT_OFFLOADED,
    "stage 1 cpu": {"stage": 1} | ON_HOST,
    "stage 2": {"stage": 2} | NOT_OFFLOADED,
    "stage 2 cpu": {"stage": 2} | ON_HOST,
    "stage 3": NOT_OFFLOADED,
    "stage 3 cpu": ON_HOST,
    "stage 3 both": {},
}


def write_text(folder: Path) -> Path:
    """Documents of very different lengths, and a tokenizer of them."""
    folder.mkdir()
    texts = [("Wer reitet so spät durch Nacht und Wind? " * 9)[: 7 * (index % 11) + 3] for index in range(40)]
    (folder / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    Tokenizer.train(texts, 300).save(folder)
    return folder


@pytest.fixture(scope="session")
def results(tmp_path_factory: pytest.TempPathFactory) -> Results:
    """Jobs on 2 ranks in one launch; a second launch resumes; then the same batch on 1 rank and on 4."""
    folder = tmp_path_factory.mktemp("ranks")
    packed = str(write_text(folder / "text"))
    start = str(folder / "fp32" / "export_fp32")
    launch(
        2,
        folder,
        [
            job("fp32", micro=1, engine=FP32, evaluate=True, export=["fp32", "bf16"]),
            job("bf16", micro=1),
            job("bf16, fp32 messages", micro=1, engine=FP32_MESSAGES),
            job("stage 2, fp32 messages", micro=1, engine={"stage": 2} | NOT_OFFLOADED | FP32_MESSAGES),
            job("recomputed", micro=1, engine=FP32 | {"activation_checkpointing": True}),
            job("recomputed with dropout", micro=1, dropout=0.1, engine={"activation_checkpointing": True}),
            job("straight", micro=1, dropout=0.1, save_at=5),
            job("stage 0 fp32", micro=1, engine=FP32 | {"stage": 0} | NOT_OFFLOADED),
            job("stage 0 fp32 poisoned", micro=1, steps=4, poisoned_at=2, engine=FP32 | {"stage": 0} | NOT_OFFLOADED),
            *(job(name, micro=1, steps=6, poisoned_at=2, save_at=4, engine=place) for name, place in PLACES.items()),
            job("packed", steps=2, engine=FP32, packed=packed, evaluate=True),
        ],
    )
    launch(
        2,
        folder,
        [
            job("resumed", micro=1, dropout=0.1, run="straight"),
            *(job(f"{name} resumed", micro=1, steps=6, engine=place, run=name) for name, place in PLACES.items()),
            job("from fp32", steps=0, init_from=start, engine=FP32),
            job("from fp32 to bf16", steps=0, init_from=start),
            job("from bf16", steps=0, init_from=str(folder / "fp32" / "export_bf16"), engine=FP32),
            job("from fp32 on stage 1", steps=0, init_from=start, engine=FP32 | PLACES["stage 1"]),
        ],
    )
    launch(1, folder, [job("1 rank", micro=1, engine=FP32, evaluate=True)])
    launch(4, folder, [job("4 ranks", micro=1, engine=FP32, evaluate=True)])
    return Results(folder)
