"""Compare the plan's host memory with the measured peak of real runs on a CPU.

    python benchmarks/plan_vs_measured.py [--sizes 40M 90M 320M] [--ranks 1 2] [--folder DIR]

Each run is recipes/clm.py on random weights for a few steps, with an evaluation, a checkpoint and an export, under
bf16 with fp32 masters. Every rank is a process whose peak resident memory (ru_maxrss) the kernel reports.
Written to results/plan_vs_measured.json. Give each run the machine for itself: it takes up to 11 GB.
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
from pathlib import Path

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
        "max_steps=8",
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
    raise NotImplementedError


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=list(SIZES))
    parser.add_argument("--cases", nargs="+", choices=CASES, default=["offload"])
    parser.add_argument("--ranks", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "plan_vs_measured")
    given = parser.parse_args()
    if not (given.folder / "train.jsonl").exists():
        subprocess.run([sys.executable, str(ROOT / "scripts" / "quickstart_corpus.py"), str(given.folder)], check=True)
    # One document: evaluating 14 takes longer than training a few steps.
    held_out = (given.folder / "validation.jsonl").read_text().splitlines()[0]
    (given.folder / "held_out.jsonl").write_text(held_out + "\n")
    for size in given.sizes:
        for case in given.cases:
            for ranks in given.ranks:
                shutil.rmtree(given.folder / "run", ignore_errors=True)
                peaks = measured(arguments(size, case, given.folder), ranks)
                steps = [json.loads(line) for line in (given.folder / "run" / "metrics.jsonl").read_text().splitlines()]
                print(
                    json.dumps(
                        {
                            "size": size,
                            "case": case,
                            "ranks": ranks,
                            "peaks_gb": [p / 1e9 for p in peaks],
                            "steps": [s.get("memory_gib", 0) * 2**30 / 1e9 for s in steps],
                        }
                    ),
                    flush=True,
                )


if __name__ == "__main__":
    main()
