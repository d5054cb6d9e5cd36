"""One rank of the engine tests: does the jobs it is told, one Engine after another, and writes what came out.

deepspeed --num_gpus N worker.py OUT_DIR JOBS_JSON

A job's keys: name; micro, steps, max_steps; engine, dropout, init_from; run: the name of its run folder, whose
newest checkpoint it resumes; save_at, poisoned_at: steps; packed: folder of prepared text for the real task
instead of the toy; evaluate; export: dtypes.
"""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from toy import VOCAB, ToyTask, optim_config, packed_task, toy_config, trainer_config

from gptj_train import GPTJForCausalLM
from gptj_train.data.tokenizer import Tokenizer
from gptj_train.tracking import Tracker, TrackingConfig
from gptj_train.training.checkpoint import Checkpoints
from gptj_train.training.engine import Engine
from gptj_train.training.export import export
from gptj_train.training.trainer import Trainer
from gptj_train.training.zero_config import EngineConfig

SILENT = TrackingConfig(wandb="disabled", project="test", run_name=None)
DEFAULTS = {
    "stage": 3,
    "offload_optimizer": "cpu",
    "offload_parameters": "cpu",
    "nvme_path": None,
    "precision": "bf16",
    "activation_checkpointing": False,
    "deepspeed": {},
}


def do(job: dict[str, Any], out: Path) -> None:
    """Train ``job["steps"]`` of ``job["max_steps"]`` and write losses, weights and, if asked, an export."""
    steps, micro = job["steps"], job["micro"]
    folder = out / job.get("run", job["name"])
    config = trainer_config(str(folder), micro, job["max_steps"])
    tokenizer = Tokenizer.load(job["packed"]) if "packed" in job else Tokenizer.train(["some text"], 300)
    model = toy_config(job.get("dropout", 0.0), len(tokenizer) if "packed" in job else VOCAB)
    engine = Engine(
        lambda: GPTJForCausalLM(model),
        job.get("init_from"),
        EngineConfig(**(DEFAULTS | job["engine"])),
        optim_config(),
        config.global_batch_size,
        micro,
        seed=config.seed,
    )
    task = packed_task(Path(job["packed"]), micro) if "packed" in job else ToyTask(micro)
    checkpoints = Checkpoints(folder, keep=2)
    trainer = Trainer(config, engine, task, checkpoints, Tracker(SILENT, folder, {}, engine.rank))
    found = checkpoints.find("auto", engine.world_size)
    if found is not None:
        trainer.state = checkpoints.load(engine, found)
    lines = []
    for step in range(trainer.state.step, steps):
        with poisoned(engine) if step == job.get("poisoned_at") else contextlib.nullcontext():
            lines.append(trainer.train_step())
        if step + 1 == job.get("save_at"):
            checkpoints.save(engine, trainer.state)
    result = {"steps": lines, "evaluation": trainer.evaluate() if job.get("evaluate") else {}, "seen": task.seen}
    (out / f"{job['name']}.rank{engine.rank}.json").write_text(json.dumps(result))
    weights = {name: tensor.clone().cpu() for name, tensor in engine.full_parameters()}
    if engine.rank == 0:
        save_file(weights, out / f"{job['name']}.safetensors")
    for dtype in job.get("export", []):
        export(engine, model, "GPTJForCausalLM", tokenizer, folder / f"export_{dtype}", dtype)


@contextlib.contextmanager
def poisoned(engine: Engine) -> Iterator[None]:
    """Every loss inside is not a number, and so are its gradients."""
    sound = engine.forward

    def forward(batch: dict[str, torch.Tensor], targets: float) -> Any:
        output = sound(batch, targets)
        output.loss = output.loss * float("nan")
        return output

    engine.forward = forward  # type: ignore[method-assign]
    yield
    engine.forward = sound  # type: ignore[method-assign]


def main() -> None:
    out = Path(sys.argv[-2])
    for job in json.loads(sys.argv[-1]):
        torch.manual_seed(0)
        do(job, out)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
