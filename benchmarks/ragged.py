"""Compare useful tokens a second on text of uneven length: our packed windows, and two ways with Transformers.

    python benchmarks/ragged.py TOKENIZER_FOLDER FILES...

* ``gptj_train``: packed windows; documents in a window are isolated.
* ``transformers_padded``: a document a row (a long one in several rows), padded to the longest row of the batch.
* ``transformers_packed``: the same windows as run_clm.py would train on them: documents attend to each other.

Model, DeepSpeed config, initial weights, rows per batch, ranks and threads are those of step_vs_transformers.py. Useful
tokens are targets that are text, not padding; ours exclude the first token of each document, which nothing predicts.
The sides take turns, each run in fresh processes, on the CPU.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, replace
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path
from typing import Any

from clm_config import clm_config
from step_vs_transformers import VOCAB, WARM_UP, Cell, build, free_port

RESULTS = Path(__file__).parent / "results" / "ragged.json"
SIDES = ("gptj_train", "transformers_padded", "transformers_packed")
CELL = Cell(layers=4, width=256, heads=1, sequence_length=1024, micro_batch_size=4)
IGNORE = -100


def batches(
    side: str, tokenizer_folder: str, files: list[str], cache: str, steps: int, rank: int, ranks: int
) -> list[Any]:
    """Return a rank's micro-batches, as arguments of the model's forward."""
    import torch

    from gptj_train.data.packing import Windows, pack
    from gptj_train.data.preparation import open_stores
    from gptj_train.data.sampler import sample_at
    from gptj_train.data.tokenizer import Tokenizer

    data = replace(clm_config().data, train=files, cache_dir=cache)
    tokenizer = Tokenizer.load(tokenizer_folder)
    stores = open_stores([Path(file) for file in files], data, tokenizer)
    length, rows = CELL.sequence_length, CELL.micro_batch_size
    windows = Windows(
        stores, pack(stores, None, method="contiguous", length=length), length=length, fill=tokenizer.eos_id
    )
    # Padded rows: a document each, or, where it is longer than a window, one of its pieces.
    pieces = []
    for store in stores:
        for first, end in pairwise([0, *store.ends.tolist()]):
            pieces += [(store, start, min(length, end - start)) for start in range(first, end - 1, length)]
    # The last window is left out: it is not full.
    count = len(pieces) if side == "transformers_padded" else len(windows) - 1
    found = []
    for step in range(steps):
        first = (step * ranks + rank) * rows
        order = [sample_at(position, count, 0) for position in range(first, first + rows)]
        if side == "transformers_padded":
            texts = []
            for store, start, size in (pieces[index] for index in order):
                texts.append(store.part(start, size)[0])
            ids = torch.full((rows, max(map(len, texts))), tokenizer.eos_id)
            mask = torch.zeros_like(ids)
            for row, text in enumerate(texts):
                ids[row, : len(text)] = torch.from_numpy(text.astype("int64"))
                mask[row, : len(text)] = 1
            labels = ids.masked_fill(mask == 0, IGNORE)
            found.append({"input_ids": ids, "attention_mask": mask, "labels": labels})
            continue
        chosen = [windows[index] for index in order]
        ids = torch.stack([torch.from_numpy(window.tokens) for window in chosen])
        batch = {"input_ids": ids, "labels": ids}
        if side == "gptj_train":
            batch["document_ids"] = torch.stack([torch.from_numpy(window.document_ids) for window in chosen])
        found.append(batch)
    return found


def useful(batch: dict[str, Any]) -> int:
    """Count the targets of a batch."""
    from gptj_train.model.loss import next_token_targets

    return int((next_token_targets(batch["labels"], batch.get("document_ids")) != IGNORE).sum())


def work(side: str, tokenizer: str, files: list[str], folder: str, cache: str, steps: int, threads: int) -> None:
    """Train as one rank of one run."""
    os.environ["DS_ACCELERATOR"] = "cpu"
    import torch

    from gptj_train.training.engine import join_process_group

    torch.set_num_threads(threads)
    rank, ranks = join_process_group()
    given = batches(side, tokenizer, files, cache, WARM_UP + steps, rank, ranks)
    engine, *_ = build(side, CELL, Path(folder), rank)
    losses, seconds = [], []
    for batch in given:
        began = time.perf_counter()
        loss = engine(**batch, use_cache=False).loss
        engine.backward(loss)
        update = time.perf_counter()
        engine.step()
        seconds.append([update - began, time.perf_counter() - update])
        losses.append(loss.item())
    found = {
        "seconds": seconds[WARM_UP:],
        "losses": losses,
        "useful": [useful(batch) for batch in given[WARM_UP:]],
        "positions": [batch["input_ids"].numel() for batch in given[WARM_UP:]],
    }
    (Path(folder) / f"rank{rank}.json").write_text(json.dumps(found))
    torch.distributed.destroy_process_group()


def run(side: str, args: argparse.Namespace, folder: str, cache: str) -> dict[str, float]:
    """Launch one side, and return the rates of all ranks together."""
    job = json.dumps([side, args.tokenizer, args.files, folder, cache, args.steps, args.threads])
    launcher = [sys.executable, "-m", "deepspeed.launcher.runner", "-q", "--num_gpus", str(args.ranks)]
    command = [*launcher, "--master_port", free_port(), __file__, "--work", job]
    env = os.environ | {"OMP_NUM_THREADS": str(args.threads), "DS_ACCELERATOR": "cpu"}
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{side} ended with {done.returncode}\n{done.stdout}{done.stderr}")
    of_ranks = [json.loads((Path(folder) / f"rank{rank}.json").read_text()) for rank in range(args.ranks)]
    tokens, positions = (sum(sum(found[name]) for found in of_ranks) for name in ("useful", "positions"))
    model, update = (sum(times) for times in zip(*of_ranks[0]["seconds"], strict=True))
    return {
        "useful_tokens_per_second": tokens / (model + update),
        "useful_without_update": tokens / model,
        "useful_share_of_positions": tokens / positions,
        "first_loss": of_ranks[0]["losses"][0],
    }


def main() -> None:
    if "--work" in sys.argv:
        work(*json.loads(sys.argv[sys.argv.index("--work") + 1]))
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tokenizer")
    parser.add_argument("files", nargs="+")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--threads", type=int, default=1, help="of each rank")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--steps", type=int, default=10, help=f"timed steps of a run, after {WARM_UP} to warm up")
    args = parser.parse_args()
    import torch

    from gptj_train import GPTJConfig, GPTJForCausalLM

    torch.manual_seed(0)
    runs: dict[str, list[dict[str, float]]] = {side: [] for side in SIDES}
    loads = []
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryDirectory() as cache:
        GPTJForCausalLM(GPTJConfig(**CELL.config())).save_pretrained(folder)
        for _ in range(args.repeats):
            for side in SIDES:
                loads.append(os.getloadavg()[0])
                runs[side].append(run(side, args, folder, cache))
                print(side, runs[side][-1], f"load {loads[-1]:.1f}", file=sys.stderr, flush=True)
    ours, *others = SIDES
    found = {
        "cell": asdict(CELL) | {"vocab_size": VOCAB},
        "ranks_threads_steps": [args.ranks, args.threads, args.steps],
        "runs": runs,
        "ours_over": {other: ratios(runs[ours], runs[other]) for other in others},
        "load_before_each_run": loads,
        "versions": {name: version(name) for name in ("torch", "deepspeed", "transformers")},
    }
    RESULTS.write_text(json.dumps(found, indent=1) + "\n")
    print(json.dumps(found, indent=1))


def ratios(ours: list[dict[str, float]], theirs: list[dict[str, float]]) -> dict[str, Any]:
    """Return the ratio of each turn and the median, with and without the optimizer update."""
    names = "useful_tokens_per_second", "useful_without_update"
    turns = {name: [our[name] / their[name] for our, their in zip(ours, theirs, strict=True)] for name in names}
    return {name: {"median": statistics.median(of_turn), "turns": of_turn} for name, of_turn in turns.items()}


if __name__ == "__main__":
    main()
