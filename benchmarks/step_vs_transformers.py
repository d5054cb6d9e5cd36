"""Our training step beside Transformers' GPT-J under DeepSpeed: step time, memory, and whether the losses agree.

python benchmarks/step_vs_transformers.py [--repeats 3] [--steps 12]

Equal on both sides: the DeepSpeed config (ZeRO-3, optimizer and parameters offloaded to the host, bf16, clipping),
the initial weights (one folder), the token batches (one document a window), the learning rate, the number of ranks
and of threads. Different: the model class and its loss. The sides take turns (A B A B ...), each run a fresh pair of
processes. A cell is published only when the losses agree: the first to 1 %, the mean of all to 0.5 %.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import platform
import resource
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
VOCAB = 50400
WARM_UP = 3
CELLS = [
    {"n_layer": 4, "n_embd": 256, "n_head": 4, "length": 512, "micro": 2},
    {"n_layer": 4, "n_embd": 512, "n_head": 8, "length": 1024, "micro": 1},
    {"n_layer": 4, "n_embd": 512, "n_head": 8, "length": 2048, "micro": 1},
]


def shape(cell: dict[str, Any]) -> dict[str, Any]:
    """GPTJConfig's arguments."""
    sizes = {name: cell[name] for name in ("n_layer", "n_embd", "n_head")}
    return sizes | {"vocab_size": VOCAB, "n_positions": cell["length"], "rotary_dim": 32}


def work(side: str, cell: dict[str, Any], weights: str, steps: int, out: str) -> None:
    """One rank of one run."""
    import torch

    torch.set_num_threads(1)
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")
    import deepspeed
    import transformers

    from gptj_train import GPTJConfig, GPTJForCausalLM
    from gptj_train.training.schedule import OptimConfig
    from gptj_train.training.zero_config import EngineConfig, deepspeed_config
    from gptj_train.weights.hf import HFWeights

    deepspeed.utils.logger.setLevel("ERROR")
    deepspeed.init_distributed(verbose=False)
    rank = torch.distributed.get_rank()
    engine_config = EngineConfig(
        stage=3,
        offload_optimizer="cpu",
        offload_parameters="cpu",
        nvme_path=None,
        precision="bf16",
        activation_checkpointing=False,
        deepspeed={},
    )
    optim = OptimConfig(
        lr=1e-4,
        betas=(0.9, 0.95),
        eps=1e-8,
        weight_decay=0.1,
        clip_norm=1.0,
        schedule="constant",
        warmup_steps=0,
        decay_steps=0,
        final_lr_ratio=1.0,
    )
    largest = VOCAB * cell["n_embd"]
    config = deepspeed_config(engine_config, optim, cell["micro"], 1, largest, pin_memory=torch.cuda.is_available())
    with deepspeed.zero.Init(config_dict_or_path=config):
        if side == "ours":
            model = GPTJForCausalLM(GPTJConfig(**shape(cell)))
        else:
            transformers.utils.logging.set_verbosity_error()
            model = transformers.GPTJForCausalLM(transformers.GPTJConfig(**shape(cell)))
    with HFWeights(weights) as stored, torch.no_grad():
        for name, parameter in model.named_parameters():
            with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0):
                if rank == 0:
                    parameter.copy_(stored.tensor(name))
    engine, *_ = deepspeed.initialize(model=model, model_parameters=model.parameters(), config=config)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    generator = torch.Generator().manual_seed(100 + rank)
    # Words of a small part of the vocabulary, so that there is something to learn.
    batches = torch.randint(500, (steps + WARM_UP, cell["micro"], cell["length"]), generator=generator)
    losses, seconds, parts = [], [], []
    for ids in batches.to(engine.device):
        marks = [time.perf_counter()]
        loss = engine(input_ids=ids, labels=ids, use_cache=False).loss
        losses.append(loss.item())
        marks.append(time.perf_counter())
        engine.backward(loss)
        marks.append(time.perf_counter())
        engine.step()
        marks.append(time.perf_counter())
        seconds.append(marks[-1] - marks[0])
        parts.append([end - start for start, end in itertools.pairwise(marks)])
        del loss
    result = {
        "losses": losses,
        "seconds": seconds[WARM_UP:],
        "parts": [statistics.median(part) for part in zip(*parts[WARM_UP:], strict=True)],
        "peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
        "built": before / 2**20,
    }
    if torch.cuda.is_available():
        result["gpu"] = torch.cuda.max_memory_allocated() / 2**30
    Path(f"{out}.rank{rank}").write_text(json.dumps(result))
    torch.distributed.destroy_process_group()


def run(side: str, cell: dict[str, Any], weights: str, args: argparse.Namespace, folder: Path) -> list[dict[str, Any]]:
    """Launch one side on all ranks; what each rank measured."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    out = folder / "result"
    launcher = [sys.executable, "-m", "deepspeed.launcher.runner", "-q", "--num_gpus", str(args.ranks)]
    job = json.dumps([side, cell, weights, args.steps, str(out)])
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*launcher, "--master_port", port, __file__, "--work", job],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        sys.exit(done.stdout + done.stderr)
    return [json.loads(Path(f"{out}.rank{rank}").read_text()) for rank in range(args.ranks)]


def measure(cell: dict[str, Any], args: argparse.Namespace) -> dict[str, Any]:
    """Both sides of a cell, taking turns."""
    from gptj_train import GPTJConfig, GPTJForCausalLM

    found: dict[str, list[list[dict[str, Any]]]] = {"ours": [], "transformers": []}
    with tempfile.TemporaryDirectory() as scratch:
        GPTJForCausalLM(GPTJConfig(**shape(cell))).save_pretrained(f"{scratch}/weights")
        for _ in range(args.repeats):
            for side, runs in found.items():
                runs.append(run(side, cell, f"{scratch}/weights", args, Path(scratch)))
    sides = {side: condensed(runs, cell, args.ranks) for side, runs in found.items()}
    ours, theirs = sides["ours"]["losses"], sides["transformers"]["losses"]
    first = abs(ours[0] / theirs[0] - 1)
    mean = abs(statistics.mean(ours) / statistics.mean(theirs) - 1)
    if first > 0.01 or mean > 0.005:
        sys.exit(f"{cell}: the losses disagree (first {first:.2%}, mean {mean:.2%}); nothing is published")
    return {"cell": cell, "first_loss_gap": first, "mean_loss_gap": mean, **sides}


def condensed(runs: list[list[dict[str, Any]]], cell: dict[str, Any], ranks: int) -> dict[str, Any]:
    """The runs of a side: times of all steps of rank 0, the largest memory of any rank."""
    seconds = sorted(second for run in runs for second in run[0]["seconds"])
    middle = statistics.median(seconds)
    tenths = statistics.quantiles(seconds, n=10)
    return {
        "step_seconds": middle,
        "p10": tenths[0],
        "p90": tenths[-1],
        "tokens_per_second": cell["micro"] * cell["length"] * ranks / middle,
        "forward_backward_update": [statistics.median(p) for p in zip(*(run[0]["parts"] for run in runs), strict=True)],
        "peak_rss_gib": max(rank["peak"] for run in runs for rank in run),
        "built_rss_gib": max(rank["built"] for run in runs for rank in run),
        "losses": runs[0][0]["losses"],
    }


def table(rows: list[dict[str, Any]]) -> str:
    lines = [
        "| model | tokens | side | step s, median (p10-p90) | tokens/s | forward / backward / update s "
        "| peak RSS GiB (once built) | loss gap, first / mean |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        cell = row["cell"]
        for side in ("ours", "transformers"):
            found = row[side]
            parts = " / ".join(f"{part:.2f}" for part in found["forward_backward_update"])
            lines.append(
                f"| {cell['n_layer']} x {cell['n_embd']} | {cell['micro']} x {cell['length']} a rank | {side} "
                f"| {found['step_seconds']:.2f} ({found['p10']:.2f}-{found['p90']:.2f}) "
                f"| {found['tokens_per_second']:,.0f} | {parts} "
                f"| {found['peak_rss_gib']:.2f} ({found['built_rss_gib']:.2f}) "
                f"| {row['first_loss_gap']:.3%} / {row['mean_loss_gap']:.3%} |"
            )
        speed = row["transformers"]["step_seconds"] / row["ours"]["step_seconds"]
        grown = [row[side]["peak_rss_gib"] - row[side]["built_rss_gib"] for side in ("transformers", "ours")]
        lines.append(
            f"| | | **ratio** | **{speed:.2f}x faster** | | | **{grown[0] / grown[1]:.1f}x less for the step** | |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3, help="runs of each side and cell, taking turns")
    parser.add_argument("--steps", type=int, default=12, help="timed steps of a run")
    parser.add_argument("--work", help=argparse.SUPPRESS)
    args, _ = parser.parse_known_args()
    if args.work:
        work(*json.loads(args.work))
        return
    rows = [measure(cell, args) for cell in CELLS]
    packages = ", ".join(f"{name} {version(name)}" for name in ("torch", "deepspeed", "transformers"))
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False).stdout
    text = (
        "# Our step beside Transformers' GPT-J\n\n"
        f"`python benchmarks/step_vs_transformers.py --repeats {args.repeats} --steps {args.steps}`, "
        f"{args.ranks} ranks, one thread each, ZeRO-3 with CPU offload of optimizer and parameters, bf16, vocabulary "
        f"{VOCAB}. {os.cpu_count()} cores ({platform.machine()}), {packages}, commit {commit.strip()}.\n\n"
        f"{table(rows)}\n"
    )
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "step_vs_transformers.md").write_text(text)
    (RESULTS / "step_vs_transformers.json").write_text(json.dumps(rows, indent=1) + "\n")
    print(text)


if __name__ == "__main__":
    main()
