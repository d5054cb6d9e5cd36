"""One rank of the engine tests: runs a list of jobs, one Engine after another, and writes their results.

deepspeed --num_gpus N worker.py OUT_DIR JOBS_JSON
"""

from __future__ import annotations

import gc
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from toy import ToyTask, accumulation, engine_config, from_yaml, toy_config, trainer_config

from gptj_train import GPTJForCausalLM
from gptj_train.data.tokenizer import Tokenizer
from gptj_train.export.from_engine import export
from gptj_train.model.lora import LoraConfig, with_lora
from gptj_train.tracking import Tracker, TrackingConfig
from gptj_train.training.checkpoint import Checkpoints
from gptj_train.training.engine import Engine
from gptj_train.training.model_files import ModelFiles
from gptj_train.training.retention import resume_candidates
from gptj_train.training.trainer import Trainer

SILENT = TrackingConfig(**from_yaml("tracking/local"))


def do(job: dict[str, Any], out: Path) -> None:
    """Train ``job["steps"]`` of ``job["max_steps"]`` and write losses, weights and, if asked, an export."""
    steps, micro = job["steps"], job["micro"]
    folder = out / job.get("run", job["name"])
    config = trainer_config(str(folder), micro, job["max_steps"], save_every=steps)
    config = replace(config, optim=replace(config.optim, **job.get("optim", {})))
    model = toy_config(job.get("dropout", 0.0), job.get("width", 32))
    lora = LoraConfig(**from_yaml("lora/none") | {"alpha": 8, "targets": ["q_proj", "fc_out"]} | job.get("lora", {}))
    mean_rows = {int(row): others for row, others in job.get("mean_rows", {}).items()}
    engine = Engine(
        build=lambda: with_lora(GPTJForCausalLM(model), lora),
        init_from=job.get("init_from"),
        engine=engine_config(job["engine"]),
        optim=config.optim,
        micro_batch_size=micro,
        accumulation=accumulation(micro),
        seed=config.seed,
        mean_rows=mean_rows,
        quantize=job.get("quantize", "none"),
        lora=lora,
    )
    task = ToyTask(micro)
    model_files = ModelFiles(model, "GPTJForCausalLM", Tokenizer.train(["some text"], 300))
    checkpoints = Checkpoints(folder, keep=2, keep_every=0, model_files=model_files)
    tracker = Tracker(SILENT, folder, {}, engine.rank)
    trainer = Trainer(config=config, engine=engine, task=task, checkpoints=checkpoints, tracker=tracker)
    if found := resume_candidates(folder, job.get("resume", "auto")):
        trainer.resume(found)
    began = trainer.state.step
    task.handed_out.clear()
    lines = [trainer.train_step() for _ in range(began, min(steps, job["max_steps"]))]
    if job.get("save"):
        trainer.save()
    result = {"steps": lines, "rows": task.handed_out, "evaluation": trainer.evaluate() if job.get("evaluate") else {}}
    (out / f"{job['name']}.rank{engine.rank}.json").write_text(json.dumps(result))
    weights = {name: tensor.clone().cpu() for name, tensor in engine.full_parameters()}
    if engine.rank == 0:
        save_file(weights, out / f"{job['name']}.safetensors")
    for dtype in job.get("export", []):
        export(
            engine,
            model_files,
            folder / f"export_{dtype}",
            dtype=dtype,
            facts={},
            lora=lora,
            base=job.get("init_from"),
            quantize=job.get("quantize", "none"),
            mean_rows=mean_rows,
        )


def main() -> None:
    out = Path(sys.argv[-2])
    for job in json.loads(sys.argv[-1]):
        torch.manual_seed(0)
        do(job, out)
        gc.collect()  # of an engine's threads for NVMe, which must not outlive the interpreter
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
