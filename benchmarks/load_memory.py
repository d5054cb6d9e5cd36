"""Compare host memory while a checkpoint becomes ZeRO-3 partitions: our streamed load, Transformers' from_pretrained.

    python benchmarks/load_memory.py
    python benchmarks/load_memory.py --layers 28 --width 4096 --sides gptj_train    # GPT-J 6B's shape: 12 GB of disk

The benchmark first writes a random sharded bf16 checkpoint. Both sides run under one DeepSpeed config (ZeRO-3,
parameters in host memory), with the same ranks and threads. They import all libraries before memory is measured, and
alternate, with the files dropped from the page cache before each run. In the end every rank holds its partition of the
bf16 weights and nothing else; both sides must hold the same numbers.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import resource
import shutil
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
SIDES = ("gptj_train", "transformers")
VOCAB = 50400
GB = 1e9


def shape(layers: int, width: int) -> dict[str, Any]:
    """Return GPTJConfig's arguments; heads of 256, as in GPT-J 6B."""
    return {"n_layer": layers, "n_embd": width, "n_head": width // 256, "rotary_dim": 64, "vocab_size": VOCAB}


def write_checkpoint(folder: Path, layers: int, width: int) -> int:
    """Write random weights, one tensor in memory at a time, and return the number of parameters."""
    import torch

    from gptj_train import GPTJConfig, GPTJForCausalLM
    from gptj_train.weights.hf_writer import write_weights

    config = GPTJConfig(**shape(layers, width), dtype="bfloat16")
    with torch.device("meta"):
        shapes = {name: parameter.shape for name, parameter in GPTJForCausalLM(config).named_parameters()}
    tensors = ((name, torch.randn(size, dtype=torch.bfloat16)) for name, size in shapes.items())
    write_weights(folder, tensors, shapes, dtype=torch.bfloat16)
    config.save_pretrained(folder, "GPTJForCausalLM")
    return sum(size.numel() for size in shapes.values())


def work(side: str, folder: Path, layers: int, width: int, threads: int) -> None:
    """Run one rank: load, and write the measurements into ``folder``."""
    os.environ["DS_ACCELERATOR"] = "cpu"
    import torch
    import transformers
    from transformers.integrations.deepspeed import HfDeepSpeedConfig
    from transformers.models.gptj import modeling_gptj  # noqa: F401 - both sides import it, so that neither pays for it.

    from gptj_train import GPTJConfig, GPTJForCausalLM
    from gptj_train.training.engine import deepspeed, join_process_group  # type: ignore[attr-defined]
    from gptj_train.training.initial_weights import open_initial_weights

    torch.set_num_threads(threads)
    rank, ranks = join_process_group()
    zero = {"stage": 3, "offload_param": {"device": "cpu", "pin_memory": False}}
    config = {"train_micro_batch_size_per_gpu": 1, "bf16": {"enabled": True}, "zero_optimization": zero}
    gc.collect()
    imported, read_before, began = resident(), bytes_read(), time.perf_counter()
    Path("/proc/self/clear_refs").write_text("5")  # Resets the peak.
    model: Any  # its parameters have DeepSpeed's attributes
    if side == "gptj_train":
        with deepspeed.zero.Init(config_dict_or_path=config):
            model = GPTJForCausalLM(GPTJConfig(**shape(layers, width))).requires_grad_(False)
        shapes = {name: torch.Size(parameter.ds_shape) for name, parameter in model.named_parameters()}
        initial_weights = open_initial_weights(
            str(folder), shapes=shapes, trained={}, mean_rows={}, new_head_allowed=False, share=(rank, ranks)
        )
        with initial_weights as initial:
            initial.fill_frozen(model, rank)
    else:
        # from_pretrained partitions the weights while this object is alive.
        held = HfDeepSpeedConfig(config)
        model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
        del held
    seconds = time.perf_counter() - began
    parameters = dict(model.named_parameters())
    own = sum(parameter.ds_tensor.nbytes for parameter in parameters.values())
    found = {
        "imported": imported,
        "peak": peak_resident() - imported,
        "after": resident() - imported,
        "own": own / GB,
        "largest": max(parameter.ds_numel for parameter in parameters.values()) * 2 / GB,
        "read": (bytes_read() - read_before) / GB,
        "seconds": seconds,
        "checksum": sum(parameters[name].ds_tensor.double().sum().item() for name in sorted(parameters)),
    }
    (folder / f"rank{rank}.json").write_text(json.dumps(found))
    torch.distributed.destroy_process_group()


def resident() -> float:
    """Return this process's resident memory in GB, mapped files included."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() / GB


def peak_resident() -> float:
    """Return this process's peak resident memory in GB since the last reset."""
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024 / GB


def bytes_read() -> int:
    """Return the bytes this process read from disk."""
    return int(dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())["read_bytes"])


def run(side: str, folder: Path, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Run one side and return each rank's measurements."""
    # Dropped from the page cache, else the first run would read from disk for all later ones.
    for file in folder.glob("*.safetensors"):
        with file.open("rb") as opened:
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    launcher = [sys.executable, "-m", "deepspeed.launcher.runner", "-q", "--num_gpus", str(args.ranks)]
    job = json.dumps([side, str(folder), args.layers, args.width, args.threads])
    done = subprocess.run(
        [*launcher, "--master_port", port, __file__, "--work", job],
        env=os.environ | {"OMP_NUM_THREADS": str(args.threads), "DS_ACCELERATOR": "cpu"},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        sys.exit(done.stdout + done.stderr)
    return [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(args.ranks)]


def table(runs: dict[str, list[list[dict[str, Any]]]], args: argparse.Namespace) -> str:
    lines = [
        "| side | own partition, GB | peak while loading, GB | above own, GB | allowed above own, GB "
        "| read from disk, all ranks, GB | seconds |",
        "|---|---|---|---|---|---|---|",
    ]
    for side in args.sides:
        ranks = [rank for of_run in runs[side] for rank in of_run]
        own, peak = max(rank["own"] for rank in ranks), max(rank["peak"] for rank in ranks)
        read = statistics.median(sum(rank["read"] for rank in of_run) for of_run in runs[side])
        seconds = statistics.median(max(rank["seconds"] for rank in of_run) for of_run in runs[side])
        allowed = 2 * ranks[0]["largest"] + 0.5
        lines.append(
            f"| {side} | {own:.2f} | {peak:.2f} | {peak - own:.2f} | {allowed:.2f} | {read:.2f} | {seconds:.0f} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=20)
    parser.add_argument("--width", type=int, default=2048, help="20 x 2048 with GPT-J's vocabulary: 1.2 billion")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--threads", type=int, default=1, help="threads of each rank")
    parser.add_argument("--repeats", type=int, default=2, help="runs of each side, alternately")
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=list(SIDES))
    parser.add_argument("--scratch", type=Path, help="folder for the checkpoint, which is deleted afterwards")
    parser.add_argument("--work", help=argparse.SUPPRESS)
    args, _ = parser.parse_known_args()  # The launcher adds --local_rank.
    if args.work:
        side, folder, *sizes = json.loads(args.work)
        work(side, Path(folder), *sizes)
        return
    folder = Path(tempfile.mkdtemp(dir=args.scratch))
    try:
        count = write_checkpoint(folder, args.layers, args.width)
        runs: dict[str, list[list[dict[str, Any]]]] = {side: [] for side in args.sides}
        for _ in range(args.repeats):
            for side in args.sides:
                runs[side].append(run(side, folder, args))
    finally:
        shutil.rmtree(folder)
    sums = {round(sum(rank["checksum"] for rank in of_run), 3) for of_runs in runs.values() for of_run in of_runs}
    assert len(sums) == 1, f"the sides hold different weights: {sums}"
    packages = ", ".join(f"{name} {version(name)}" for name in ("torch", "deepspeed", "transformers"))
    text = (
        f"`{' '.join(['python benchmarks/load_memory.py', *sys.argv[1:]])}`: {count / 1e9:.2f} billion parameters, "
        f"bf16, {args.ranks} ranks. Memory is that of one rank, the largest of {args.repeats} runs, without "
        f"the imports' ({max(rank['imported'] for rank in runs[args.sides[0]][0]):.2f} GB). {packages}.\n\n"
        f"{table(runs, args)}\n"
    )
    print(text)
    name = f"load_memory_{count / 1e9:.1f}b"
    (RESULTS / f"{name}.json").write_text(json.dumps(runs, indent=1) + "\n")
    (RESULTS / f"{name}.md").write_text(f"# Host memory while loading\n\n{text}")


if __name__ == "__main__":
    main()
