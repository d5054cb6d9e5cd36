"""Count the page faults of a training step, with torch's large buffers in huge pages and without.

    python benchmarks/page_faults.py

One CPU rank, ZeRO-3 with optimizer and weights offloaded, bf16, one layer. A freed large buffer goes back to the
kernel, and its successor is faulted in page by page. The settings alternate (A B A B ...), each run in a fresh process.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys

from clm_config import clm_config

SWITCH = "THP_MEM_ALLOC_ENABLE"
WARM_UP = 2


def work(width: int, length: int, steps: int) -> None:
    """Run one setting; print its steps as JSON."""
    import torch

    from gptj_train import GPTJConfig, GPTJForCausalLM
    from gptj_train.launch.ranks import set_rank_variables
    from gptj_train.training.engine import Engine

    set_rank_variables()
    cfg = clm_config(
        *("engine=zero3_offload", "engine.activation_checkpointing=none"),
        *("optim.lr=1e-4", "optim.weight_decay=0", "optim.schedule=constant", "optim.warmup_steps=0"),
    )
    config = GPTJConfig(n_layer=1, n_embd=width, n_head=width // 256, n_positions=length)
    engine = Engine(
        build=lambda: GPTJForCausalLM(config),
        init_from=None,
        engine=cfg.engine,
        optim=cfg.optim,
        micro_batch_size=1,
        accumulation=1,
        seed=0,
    )
    ids = torch.randint(500, (1, length), generator=torch.Generator().manual_seed(0))
    found = []
    for _ in range(WARM_UP + steps):
        before = resource.getrusage(resource.RUSAGE_SELF)
        loss = engine.forward({"input_ids": ids, "labels": ids}, float(length - 1)).loss
        engine.backward(loss)
        engine.step(1e-4)
        after = resource.getrusage(resource.RUSAGE_SELF)
        found.append(
            {
                "loss": loss.item(),
                "faults": after.ru_minflt - before.ru_minflt,
                "user": after.ru_utime - before.ru_utime,
                "system": after.ru_stime - before.ru_stime,
                "peak_gib": after.ru_maxrss / 2**20,
            }
        )
    print("RESULT" + json.dumps(found))
    torch.distributed.destroy_process_group()


def run(setting: str, args: argparse.Namespace) -> list[dict[str, float]]:
    command = [sys.executable, __file__, "--work", "--width", str(args.width), "--length", str(args.length)]
    done = subprocess.run(
        [*command, "--steps", str(args.steps)],
        env=os.environ | {SWITCH: setting, "OMP_NUM_THREADS": str(args.threads), "DS_ACCELERATOR": "cpu"},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        sys.exit(done.stdout + done.stderr)
    found: list[dict[str, float]] = json.loads(done.stdout.rpartition("RESULT")[2])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=2048)
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--work", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.work:
        work(args.width, args.length, args.steps)
        return
    print("| huge pages | faults a step | user s | system s | peak, GiB | last loss |")
    print("|---|---|---|---|---|---|")
    for _ in range(args.repeats):
        for setting in ("0", "1"):
            steps = run(setting, args)
            timed = steps[WARM_UP:]
            median = {name: statistics.median(step[name] for step in timed) for name in timed[0]}
            print(
                f"| {setting} | {median['faults']:,.0f} | {median['user']:.2f} | {median['system']:.2f} "
                f"| {steps[-1]['peak_gib']:.2f} | {steps[-1]['loss']:.6f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
