"""Compare our training step with Transformers' GPT-J under one DeepSpeed config: time, memory, and equal losses.

    python benchmarks/step_vs_transformers.py

Equal on both sides: DeepSpeed's config (ZeRO-3, optimizer and parameters offloaded to the host, bf16, clipping) and
how the model is built and wrapped; the initial weights, read from one folder; the token batches, in which one document
fills a window, so that both sides attend alike; the learning rates, ranks and threads. Each side uses its own model,
attention and loss unchanged; on a CPU Transformers has only eager attention for GPT-J. The sides alternate
(A B A B ...), each run in fresh processes. A row is written only if the losses agree: the first within 1 %, the mean
of all within 0.5 %. The benchmark runs on the CPU.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import resource
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

from clm_config import clm_config
from provenance import provenance

RESULTS = Path(__file__).parent / "results"
SIDES = ("gptj_train", "transformers")
VOCAB = 50400
WARM_UP = 3  # Untimed steps, which allocate buffers.
GATE_FIRST, GATE_MEAN = 0.01, 0.005  # Largest relative gaps of the losses.


@dataclass(frozen=True)
class Cell:
    """A model and a batch. GPT-J 6B has heads of 256."""

    layers: int
    width: int
    heads: int
    sequence_length: int
    micro_batch_size: int

    def config(self) -> dict[str, Any]:
        """Return GPTJConfig's arguments."""
        sizes = {"n_layer": self.layers, "n_embd": self.width, "n_head": self.heads}
        rotary = min(64, self.width // self.heads)
        return sizes | {"n_positions": self.sequence_length, "rotary_dim": rotary, "vocab_size": VOCAB}


CELLS = [Cell(4, 256, 1, 512, 4), Cell(4, 512, 2, 2048, 1)]


def build(side: str, cell: Cell, folder: Path, rank: int) -> tuple[Any, Any, dict[str, Any]]:
    """Return a side's DeepSpeed engine with the weights in ``folder``, its OptimConfig, and DeepSpeed's config."""
    import torch
    from transformers.models.gptj import configuration_gptj, modeling_gptj

    from gptj_train import GPTJConfig, GPTJForCausalLM
    from gptj_train.training.engine import deepspeed  # type: ignore[attr-defined]
    from gptj_train.training.zero_config import deepspeed_config
    from gptj_train.weights.hf_reader import HFWeights

    cfg = clm_config(
        *("engine=zero3_offload", "engine.activation_checkpointing=none"),
        *("optim.lr=3e-4", "optim.weight_decay=0", "optim.warmup_steps=2"),
    )
    optim = cfg.optim
    config = deepspeed_config(
        engine=cfg.engine,
        optim=optim,
        micro_batch_size=cell.micro_batch_size,
        accumulation=1,
        largest_parameter=VOCAB * cell.width,
        pin_memory=False,
    )
    model: Any  # either side's
    with deepspeed.zero.Init(config_dict_or_path=config):
        if side == "gptj_train":
            model = GPTJForCausalLM(GPTJConfig(**cell.config()))
        else:
            model = modeling_gptj.GPTJForCausalLM(configuration_gptj.GPTJConfig(**cell.config()))
    with HFWeights(folder) as stored, torch.no_grad():
        for name, parameter in model.named_parameters():
            with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0):
                if rank == 0:
                    parameter.copy_(stored.tensor(name))
    engine, *_ = deepspeed.initialize(model=model, model_parameters=model.parameters(), config=config)
    return engine, optim, config


def work(side: str, cell: Cell, folder: Path, steps: int, threads: int) -> None:
    """Run one rank: build, step, and write the measurements into ``folder``."""
    os.environ["DS_ACCELERATOR"] = "cpu"
    import torch
    import transformers.models.gptj.modeling_gptj  # noqa: F401 - both sides import it, so that neither pays for it.

    from gptj_train.training.engine import join_process_group
    from gptj_train.training.schedule import lr_at

    torch.set_num_threads(threads)
    rank, _ = join_process_group()
    imported = resident()
    engine, optim, config = build(side, cell, folder, rank)

    gc.collect()
    built, built_peak = resident(), peak_resident()
    Path("/proc/self/clear_refs").write_text("5")  # Resets the peak.
    # Tokens from a small part of the vocabulary, which a few steps can learn.
    shape = (WARM_UP + steps, cell.micro_batch_size, cell.sequence_length)
    batches = torch.randint(500, shape, generator=torch.Generator().manual_seed(100 + rank))
    # As our engine calls the model: the loss alone, without logits. Transformers has no such switch.
    own_arguments = {"num_items_in_batch": batches[0, :, 1:].numel()} if side == "gptj_train" else {}
    losses, norms, parts = [], [], []
    for step, ids in enumerate(batches):
        marks = [time.perf_counter()]
        loss = engine(input_ids=ids, labels=ids, use_cache=False, **own_arguments).loss
        marks.append(time.perf_counter())
        engine.backward(loss)
        marks.append(time.perf_counter())
        for group in engine.optimizer.param_groups:
            group["lr"] = lr_at(step, len(batches), optim)
        engine.step()
        marks.append(time.perf_counter())
        parts.append([end - start for start, end in pairwise(marks)])
        losses.append(loss.item())
        norms.append(float(engine.get_global_grad_norm()))
    memory = {"imported": imported, "built": built, "built_peak": built_peak, "peak": peak_resident()}
    found = {"losses": losses, "norms": norms, "parts": parts[WARM_UP:], "memory": memory, "config": config}
    (folder / f"rank{rank}.json").write_text(json.dumps(found))
    torch.distributed.destroy_process_group()


def resident() -> float:
    """Return this process's resident memory in GiB."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() / 2**30


def peak_resident() -> float:
    """Return this process's peak resident memory in GiB, since its start or the last reset."""
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) / 2**20


def free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def run(side: str, cell: Cell, folder: Path, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Run one side and return each rank's measurements."""
    launcher = [sys.executable, "-m", "deepspeed.launcher.runner", "-q", "--num_gpus", str(args.ranks)]
    job = json.dumps([side, asdict(cell), str(folder), args.steps, args.threads])
    done = subprocess.run(
        [*launcher, "--master_port", free_port(), __file__, "--work", job],
        env=os.environ | {"OMP_NUM_THREADS": str(args.threads), "DS_ACCELERATOR": "cpu"},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        sys.exit(done.stdout + done.stderr)
    return [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(args.ranks)]


def measure(cell: Cell, args: argparse.Namespace) -> dict[str, Any]:
    """Run both sides of a cell alternately and compare them."""
    import torch

    from gptj_train import GPTJConfig, GPTJForCausalLM

    torch.manual_seed(0)
    runs: dict[str, list[list[dict[str, Any]]]] = {side: [] for side in SIDES}
    with tempfile.TemporaryDirectory() as folder:
        GPTJForCausalLM(GPTJConfig(**cell.config())).save_pretrained(folder)
        for turn in range(args.repeats):
            for side in SIDES:
                runs[side].append(run(side, cell, Path(folder), args))
                print(f"{cell}: {side}, run {turn + 1} of {args.repeats}", file=sys.stderr, flush=True)
    ranks = [rank for side in SIDES for of_ranks in runs[side] for rank in of_ranks]
    assert all(rank["config"] == ranks[0]["config"] for rank in ranks)
    row: dict[str, Any] = {side: condensed(runs[side], cell) for side in SIDES}
    ours, theirs = (row[side]["losses"] for side in SIDES)
    first = abs(ours[0] / theirs[0] - 1)
    mean = abs(statistics.mean(ours) / statistics.mean(theirs) - 1)
    if not (first <= GATE_FIRST and mean <= GATE_MEAN):
        sys.exit(f"{cell}: the losses disagree (first {first:.2%}, mean {mean:.2%}); nothing is written")
    turns = [their / our for our, their in zip(*(row[side]["median_of_each_run"] for side in SIDES), strict=True)]
    return {"cell": asdict(cell), "first_loss_gap": first, "mean_loss_gap": mean, "speed_of_each_turn": turns, **row}


def condensed(runs: list[list[dict[str, Any]]], cell: Cell) -> dict[str, Any]:
    """Summarize a side's runs: rank 0's times of all timed steps, the largest memory of any rank, the mean losses."""
    parts = [part for of_ranks in runs for part in of_ranks[0]["parts"]]
    seconds = [sum(part) for part in parts]
    tenths = statistics.quantiles(seconds, n=10)
    every = [rank for of_ranks in runs for rank in of_ranks]
    tokens = cell.micro_batch_size * cell.sequence_length * len(runs[0])
    return {
        "step_seconds": statistics.median(seconds),
        "p10_p90": [tenths[0], tenths[-1]],
        "tokens_per_second": tokens / statistics.median(seconds),
        "forward_backward_update": [statistics.median(part) for part in zip(*parts, strict=True)],
        "median_of_each_run": [statistics.median(map(sum, of_ranks[0]["parts"])) for of_ranks in runs],
        "memory_gib": {name: max(rank["memory"][name] for rank in every) for name in every[0]["memory"]},
        "losses": [statistics.mean(of_step) for of_step in zip(*(rank["losses"] for rank in every), strict=True)],
        "grad_norms": every[0]["norms"],
    }


def table(rows: list[dict[str, Any]]) -> str:
    lines = [
        "| layers x width, tokens a rank | side | step, s (p10-p90) | forward / backward / update, s | tokens/s "
        "| peak RSS, GiB | grown by the steps | loss gap, first / mean |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        cell, gap = Cell(**row["cell"]), f"{row['first_loss_gap']:.3%} / {row['mean_loss_gap']:.3%}"
        name = f"{cell.layers} x {cell.width}, {cell.micro_batch_size} x {cell.sequence_length}"
        grown = {side: row[side]["memory_gib"]["peak"] - row[side]["memory_gib"]["built"] for side in SIDES}
        for side in SIDES:
            found = row[side]
            low, high = found["p10_p90"]
            times = " / ".join(f"{part:.2f}" for part in found["forward_backward_update"])
            lines.append(
                f"| {name} | {side} | {found['step_seconds']:.2f} ({low:.2f}-{high:.2f}) | {times} "
                f"| {found['tokens_per_second']:,.0f} | {found['memory_gib']['peak']:.2f} | {grown[side]:.2f} | {gap} |"
            )
        ours, theirs = (row[side] for side in SIDES)
        turns = row["speed_of_each_turn"]
        lines.append(
            f"| | **transformers / gptj_train** | **{theirs['step_seconds'] / ours['step_seconds']:.2f}** "
            f"({min(turns):.2f}-{max(turns):.2f} by turn) | | "
            f"| **{theirs['memory_gib']['peak'] / ours['memory_gib']['peak']:.2f}** "
            f"| **{grown['transformers'] / grown['gptj_train']:.2f}** | |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in Cell.__dataclass_fields__:
        parser.add_argument("--" + name.replace("_", "-"), type=int, help="measure one cell with this value")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--threads", type=int, default=1, help="threads of each rank")
    parser.add_argument("--repeats", type=int, default=3, help="runs of each side and cell, alternately")
    parser.add_argument("--steps", type=int, default=10, help=f"timed steps of a run, after {WARM_UP} warm-up steps")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder for the table")
    parser.add_argument("--work", help=argparse.SUPPRESS)
    args, _ = parser.parse_known_args()  # The launcher adds --local_rank.
    if args.work:
        side, cell, folder, steps, threads = json.loads(args.work)
        work(side, Cell(**cell), Path(folder), steps, threads)
        return
    own = {name: getattr(args, name) for name in Cell.__dataclass_fields__ if getattr(args, name) is not None}
    rows = [measure(cell, args) for cell in ([replace(CELLS[0], **own)] if own else CELLS)]
    command = " ".join(["python benchmarks/step_vs_transformers.py", *sys.argv[1:]])
    text = (
        "# Our training step and Transformers' GPT-J\n\n"
        f"`{command}`: {args.ranks} ranks, threads a rank {args.threads}, ZeRO-3 with optimizer and parameters "
        f"offloaded to the host, bf16, vocabulary {VOCAB}. Median over {args.repeats} x {args.steps} steps.\n\n"
        f"{provenance(('torch', 'deepspeed', 'transformers'))}.\n\n"
        f"{table(rows)}\n"
    )
    args.results.mkdir(parents=True, exist_ok=True)
    (args.results / "step_vs_transformers.md").write_text(text)
    (args.results / "step_vs_transformers.json").write_text(json.dumps(rows, indent=1) + "\n")
    print(text)


if __name__ == "__main__":
    main()
