"""Peak memory and seconds of LoRA on GPT-J 6B's shape on a CPU, its base in 4 bits or in bf16, and of PEFT's.

    python benchmarks/qlora_6b.py --folder /tmp/random_6b --modes nf4 lora peft

Writes a random checkpoint in bf16 (12 GB with all 28 layers), and trains each mode in a process of its own, so that
the peak of one does not hide that of another. Peaks are ru_maxrss: resident memory, mapped pages of files included.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gptj_train import GPTJConfig, GPTJForCausalLM
from gptj_train.weights.hf_writer import write_weights

MODES = ("nf4", "int8", "lora", "peft")
LORA_RANK = 16


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", required=True, help="of the random checkpoint; written if it is not there")
    parser.add_argument("--layers", type=int, default=28)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES))
    parser.add_argument("--one", choices=MODES, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.one is not None:
        run(given.one, given)
        return
    config = GPTJConfig(n_layer=given.layers)
    if not (Path(given.folder) / "config.json").is_file():
        write_random(Path(given.folder), config)
    for mode in given.modes:
        subprocess.run([sys.executable, *sys.argv, "--one", mode], check=True)


def write_random(folder: Path, config: GPTJConfig) -> None:
    """Write a model of normal weights, one tensor in memory at a time."""
    folder.mkdir(parents=True, exist_ok=True)
    with torch.device("meta"):
        shapes = {name: parameter.shape for name, parameter in GPTJForCausalLM(config).named_parameters()}

    def tensors() -> Iterator[tuple[str, Tensor]]:
        for name, shape in shapes.items():
            if name.endswith("bias"):
                yield name, torch.zeros(shape, dtype=torch.bfloat16)
            elif len(shape) == 1:  # of a LayerNorm
                yield name, torch.ones(shape, dtype=torch.bfloat16)
            else:
                yield name, torch.empty(shape, dtype=torch.bfloat16).normal_(std=0.02)

    write_weights(folder, tensors(), shapes, dtype=torch.bfloat16)
    replace(config, dtype="bfloat16").save_pretrained(folder, "GPTJForCausalLM")


class Phases:
    """Print seconds, peak and present memory of each phase of this process."""

    def __init__(self, mode: str) -> None:
        self._mode, self._began = mode, time.perf_counter()

    def end(self, phase: str) -> None:
        seconds = time.perf_counter() - self._began
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        line = {
            "mode": self._mode,
            "phase": phase,
            "seconds": round(seconds, 1),
            "peak_gib": round(peak, 2),
            "resident_gib": round(pages * os.sysconf("SC_PAGE_SIZE") / 2**30, 2),
        }
        print(json.dumps(line), flush=True)
        self._began = time.perf_counter()


def run(mode: str, given: argparse.Namespace) -> None:
    torch.manual_seed(0)
    ids = torch.randint(50257, (1, given.tokens))
    if mode == "peft":
        run_peft(given, ids)
    else:
        run_ours(mode, given, ids)


def run_ours(mode: str, given: argparse.Namespace, ids: Tensor) -> None:
    """Load, train, save a checkpoint, merge and export, as the recipe does."""
    # Here, since the peer shall not pay for them.
    from gptj_train.config import ClmConfig
    from gptj_train.data.tokenizer import Tokenizer
    from gptj_train.export.from_engine import export
    from gptj_train.launch.command_line import compose
    from gptj_train.model.lora import with_lora
    from gptj_train.training.checkpoint import Checkpoints
    from gptj_train.training.engine import Engine
    from gptj_train.training.model_files import ModelFiles
    from gptj_train.training.state import TrainState

    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    os.environ |= {
        "RANK": "0",
        "LOCAL_RANK": "0",
        "WORLD_SIZE": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "29511",
    }
    preset = "gptj_6b_lora" if mode == "lora" else "gptj_6b_qlora"
    out = Path(given.folder) / f"run_{mode}"
    settings = [f"+config={preset}", f"init_from={given.folder}", "data.train=unused", f"output_dir={out}"]
    if mode == "int8":
        settings.append("quantize=int8")
    cfg = compose("clm", settings, ClmConfig)
    config = GPTJConfig.from_pretrained(given.folder)
    phases = Phases(mode)
    engine = Engine(
        build=lambda: with_lora(GPTJForCausalLM(config), cfg.lora),
        init_from=cfg.init_from,
        engine=cfg.engine,
        optim=cfg.optim,
        micro_batch_size=1,
        accumulation=1,
        seed=0,
        quantize=cfg.quantize,
        lora=cfg.lora,
    )
    phases.end("load")
    for step in range(given.steps):
        output = engine.forward({"input_ids": ids, "labels": ids, "attention_mask": torch.ones_like(ids)}, ids.numel())
        engine.backward(output.loss)
        engine.step(1e-4)
        phases.end(f"step {step + 1}")
    model_files = ModelFiles(config, "GPTJForCausalLM", Tokenizer.train(["some text"], 300))
    Checkpoints(out, keep=1, keep_every=0, model_files=model_files).save(engine, TrainState())
    phases.end("checkpoint")
    export(
        engine,
        model_files,
        out / "export",
        dtype="bf16",
        facts={},
        lora=cfg.lora,
        base=cfg.init_from,
        quantize=cfg.quantize,
    )
    phases.end("merge and export")


def run_peft(given: argparse.Namespace, ids: Tensor) -> None:
    """Load and train with Transformers, PEFT and bitsandbytes."""
    import peft
    import transformers

    phases = Phases("peft")
    quantization = transformers.BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(
        given.folder, dtype=torch.bfloat16, quantization_config=quantization, device_map="cpu"
    )
    model = peft.prepare_model_for_kbit_training(model)
    config = peft.LoraConfig(r=LORA_RANK, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
    model = peft.get_peft_model(model, config).train()
    phases.end("load")
    optimizer = torch.optim.AdamW([parameter for parameter in model.parameters() if parameter.requires_grad], lr=1e-4)
    for step in range(given.steps):
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        phases.end(f"step {step + 1}")


if __name__ == "__main__":
    main()
