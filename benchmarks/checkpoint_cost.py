"""Measure the cost of a checkpoint: memory of a resumed and a fresh run; time to save, verify and read.

    python benchmarks/checkpoint_cost.py [--layers 24] [--width 1024] [--folder DIR]

One rank, ZeRO-3, everything offloaded, bf16; 24 layers of 1024 are 0.3 billion parameters. Each phase runs in a
separate process, whose peak resident memory (ru_maxrss) is reported. Written to results/checkpoint_cost.json.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

LENGTH = 64
RESULTS = Path(__file__).parent / "results" / "checkpoint_cost.json"


def phase(name: str, folder: Path, layers: int, width: int) -> dict[str, Any]:
    """Train two steps and save, or resume and train two more; return GiB and seconds."""
    import torch

    from gptj_train import GPTJConfig, GPTJForCausalLM
    from gptj_train.config import ClmConfig
    from gptj_train.data.tokenizer import Tokenizer
    from gptj_train.launch.command_line import compose
    from gptj_train.planning.memory import memory_items, peak
    from gptj_train.planning.run_plan import ModelSizes, RunPlan
    from gptj_train.training.checkpoint import Checkpoints, load
    from gptj_train.training.engine import Engine
    from gptj_train.training.model_files import ModelFiles
    from gptj_train.training.retention import resume_candidates
    from gptj_train.training.state import TrainState
    from gptj_train.weights.manifest import Manifest

    config = GPTJConfig(n_embd=width, n_layer=layers, n_positions=LENGTH, n_head=16, rotary_dim=16, vocab_size=8192)
    overrides = [f"output_dir={folder}", "init_from=null", "data.train=unused", "max_steps=3"]
    overrides += [f"sequence_length={LENGTH}", "global_batch_size=1", "micro_batch_size=1"]
    overrides += ["engine=zero3_offload", "engine.activation_checkpointing=none"]
    cfg = compose("clm", overrides, ClmConfig)
    engine = Engine(
        build=lambda: GPTJForCausalLM(config),
        init_from=None,
        engine=cfg.engine,
        optim=cfg.optim,
        micro_batch_size=1,
        accumulation=1,
        seed=0,
    )
    found: dict[str, Any] = {"built_gib": engine.peak_memory()}

    def seconds_of(work: Any) -> float:
        began = time.perf_counter()
        work()
        return time.perf_counter() - began

    def step() -> None:
        ids = torch.randint(config.vocab_size, (1, LENGTH))
        engine.backward(engine.forward({"input_ids": ids, "labels": ids}, LENGTH - 1).loss)
        engine.step(1e-4)

    if name == "resumed":
        (checkpoint,) = resume_candidates(folder, "auto")
        manifest = Manifest.read(checkpoint)
        found["verify_s"] = seconds_of(lambda: manifest.damage(checkpoint, manifest.files))
        found["verify_and_load_s"] = seconds_of(lambda: load(engine, [checkpoint], lambda _: None))
        found["loaded_gib"] = engine.peak_memory()
    step()
    found["step_s"] = seconds_of(step)
    plan = RunPlan(ModelSizes(engine.shapes, engine.trained), config, cfg)
    found["planned_gib"] = peak(memory_items(plan, 1, on_gpu=False), "host") / 2**30
    found["trained_gib"] = engine.peak_memory()
    if name == "fresh":
        files = ModelFiles(config, "GPTJForCausalLM", Tokenizer.train(["some text"], 300))
        checkpoints = Checkpoints(folder, keep=1, keep_every=0, model_files=files)
        found["save_s"] = seconds_of(lambda: checkpoints.save(engine, TrainState(step=2)))
        found["saved_gib"] = engine.peak_memory()
        found["parameters"] = sum(shape.numel() for shape in engine.shapes.values())
    torch.distributed.destroy_process_group()
    return found


def plain_write(folder: Path, size: int) -> float:
    """Return the seconds that a plain write and flush of as many bytes takes on the same disk."""
    block = os.urandom(1 << 26)
    began = time.perf_counter()
    with (folder / "plain").open("wb") as file:
        for _ in range(size // len(block)):
            file.write(block)
        file.flush()
        os.fsync(file.fileno())
    (folder / "plain").unlink()
    return time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "checkpoint_cost")
    parser.add_argument("--phase", choices=("fresh", "resumed"))
    given = parser.parse_args()
    if given.phase:
        print(json.dumps(phase(given.phase, given.folder, given.layers, given.width)))
        return
    shutil.rmtree(given.folder, ignore_errors=True)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    rank = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    results: dict[str, Any] = {}
    for name in ("fresh", "resumed"):
        command = [sys.executable, __file__, "--phase", name, "--folder", str(given.folder)]
        command += ["--layers", str(given.layers), "--width", str(given.width)]
        done = subprocess.run(command, env=os.environ | rank, stdout=subprocess.PIPE, text=True, check=True)
        results[name] = json.loads(done.stdout.splitlines()[-1])
    size = 12 * results["fresh"]["parameters"]
    results["checkpoint_gb"] = size / 1e9
    results["plain_write_s"] = plain_write(given.folder, size)
    results["resumed_minus_fresh_gib"] = results["resumed"]["trained_gib"] - results["fresh"]["trained_gib"]
    shutil.rmtree(given.folder)
    RESULTS.write_text(json.dumps(results, indent=1) + "\n")
    print(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
