"""Compare the plan's host memory with the measured peak of real runs on a CPU.

    python benchmarks/plan_vs_measured.py [--sizes 40M 90M 320M] [--ranks 1 2] [--steps 8] [--folder DIR]

Each run is recipes/clm.py on random weights for a few steps, with an evaluation, a checkpoint and an export, under
bf16 with fp32 masters. Every rank is a process whose peak resident memory (ru_maxrss) the kernel reports.
Written to results/plan_vs_measured.json. Give each run the machine for itself: it takes up to 11 GB.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

from gptj_train.config import ClmConfig, model_config_of
from gptj_train.launch.command_line import compose
from gptj_train.planning.memory import at_peak, memory_items
from gptj_train.planning.run_plan import RunPlan

ROOT = Path(__file__).parents[1]
RESULTS = Path(__file__).parent / "results" / "plan_vs_measured.json"
# Width, layers and vocabulary: 42, 89 and 319 million parameters.
SIZES = {"40M": (512, 8, 16384), "90M": (768, 9, 16384), "320M": (1024, 24, 8192)}
CASES = {
    "offload": ["engine=zero3_offload"],
    "offload, sums beside the weights": ["engine=zero3_offload", "engine.accumulate_on=gpu"],
    "no offload": ["engine=zero3"],
    "stage 2": ["engine=zero3", "engine.stage=2"],
    "adapters": ["engine=zero3", "lora=adapters"],
}


def arguments(size: str, case: str, folder: Path) -> list[str]:
    """Return the overrides of a run."""
    width, layers, vocabulary = SIZES[size]
    return [
        *CASES[case],
        f"output_dir={folder}/run",
        "init_from=null",
        f"tokenizer={folder}/tokenizer",
        f"data.train={folder}/train.jsonl",
        f"data.validation={folder}/held_out.jsonl",
        f"model.n_embd={width}",
        f"model.n_layer={layers}",
        f"model.vocab_size={vocabulary}",
        "model.n_head=8",
        "model.rotary_dim=32",
        "model.n_positions=256",
        "sequence_length=256",
        "global_batch_size=8",
        "micro_batch_size=4",
        "engine.activation_checkpointing=none",
    ]


def measured(overrides: list[str], ranks: int) -> list[float]:
    """Run the recipe and return the peak resident bytes of each rank.

    Raises:
        RuntimeError: a rank failed.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    processes = []
    for rank in range(ranks):
        place = {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(ranks),
            "LOCAL_WORLD_SIZE": str(ranks),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": port,
        }
        command = [sys.executable, str(ROOT / "recipes" / "clm.py"), *overrides]
        processes.append(subprocess.Popen(command, env=os.environ | place, stdout=subprocess.DEVNULL))
    peaks = []
    for process in processes:
        _, status, usage = os.wait4(process.pid, 0)
        if status != 0:
            raise RuntimeError(f"a rank ended with status {status}")
        peaks.append(usage.ru_maxrss * 1024.0)  # Linux counts in KiB
    return peaks


def planned(overrides: list[str], ranks: int) -> dict[str, float]:
    """Return the plan's bytes of a rank on the host, by item."""
    cfg = compose("clm", overrides, ClmConfig)
    plan = RunPlan.of(cfg, model_config_of(cfg.model, None))
    items = at_peak(memory_items(plan, ranks, on_gpu=False), "host")
    return {item.name: item.size for item in items}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=list(SIZES))
    parser.add_argument("--cases", nargs="+", choices=CASES, default=["offload"])
    parser.add_argument("--ranks", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "plan_vs_measured")
    given = parser.parse_args()
    if not (given.folder / "train.jsonl").exists():
        subprocess.run([sys.executable, str(ROOT / "scripts" / "quickstart_corpus.py"), str(given.folder)], check=True)
    # One document: evaluating 14 takes longer than training a few steps.
    held_out = (given.folder / "validation.jsonl").read_text().splitlines()[0]
    (given.folder / "held_out.jsonl").write_text(held_out + "\n")
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    for size, case, ranks in itertools.product(given.sizes, given.cases, given.ranks):
        shutil.rmtree(given.folder / "run", ignore_errors=True)
        overrides = [*arguments(size, case, given.folder), f"max_steps={given.steps}"]
        measured_gb = max(measured(overrides, ranks)) / 1e9
        items = {name: round(size / 1e9, 3) for name, size in planned(overrides, ranks).items()}
        planned_gb = sum(items.values())
        results[f"{size}, {case}, {ranks} ranks"] = {
            "steps": given.steps,
            "measured_gb": round(measured_gb, 3),
            "planned_gb": round(planned_gb, 3),
            "planned_is_more_by": f"{planned_gb / measured_gb - 1:+.1%}",
            "items_gb": items,
        }
        print(size, case, ranks, json.dumps(results[f"{size}, {case}, {ranks} ranks"]), flush=True)
        RESULTS.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
