"""Compare our data preparation with that of Transformers' run_clm.py: MB of text a second, on the same files.

    python benchmarks/prepare_vs_run_clm.py TOKENIZER_FOLDER FILES...

The peer does what that example does with ``datasets``: load_dataset("json"), map(tokenize, batched) with the fast
tokenizer, map(group_texts, batched), both with a process per core. Both sides have the same files, tokenizer, cores and
window length, a fresh process and an empty cache. The clock starts when the tokenizer is loaded and stops when the
windows can be read. CPU seconds of all processes are the fairer measure on a busy machine. The sides take turns.
No results are written unless both count the same tokens, apart from our EOS token after each document.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from clm_config import clm_config

RESULTS = Path(__file__).parent / "results" / "prepare_vs_run_clm.json"
SIDES = ("gptj_train", "run_clm")


def ours(tokenizer_folder: str, files: list[str], length: int, cache: str) -> dict[str, float]:
    from gptj_train.data.corpus import prepare
    from gptj_train.data.tokenizer import Tokenizer

    data = replace(clm_config().data, train=files, cache_dir=cache)
    tokenizer = Tokenizer.load(tokenizer_folder)
    began = spent()
    (windows,) = prepare(data, tokenizer, length).train.windows.values()
    times = {name: value - began[name] for name, value in spent().items()}
    return times | {"tokens": windows.facts.tokens - windows.facts.documents, "bytes": windows.facts.bytes}


def theirs(tokenizer_folder: str, files: list[str], length: int, cache: str) -> dict[str, float]:
    from itertools import chain

    import datasets
    from transformers import PreTrainedTokenizerFast
    from transformers.utils import logging

    datasets.disable_progress_bars()
    logging.set_verbosity_error()  # it warns of texts longer than the model's context, which are cut later
    # As in our stores, text that spells a special token is plain text.
    tokenizer = PreTrainedTokenizerFast.from_pretrained(tokenizer_folder, split_special_tokens=True)
    began = spent()
    records = datasets.load_dataset("json", data_files=files, split="train", cache_dir=cache)

    def grouped(batch: dict[str, Any]) -> dict[str, Any]:
        joined = {name: list(chain(*rows)) for name, rows in batch.items()}
        total = len(joined["input_ids"]) // length * length
        cut = {name: [row[at : at + length] for at in range(0, total, length)] for name, row in joined.items()}
        return cut | {"labels": cut["input_ids"].copy()}

    shared = {"batched": True, "num_proc": os.cpu_count()}
    tokenized = records.map(lambda b: tokenizer(b["text"]), remove_columns=records.column_names, **shared)
    windows = tokenized.map(grouped, **shared)
    times = {name: value - began[name] for name, value in spent().items()}
    counted = sum(map(len, tokenized.with_format("numpy")["input_ids"]))
    return times | {"tokens": counted, "kept": len(windows) * length}


def spent() -> dict[str, float]:
    """Return wall-clock seconds, and CPU seconds of this process and the children it waited for."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return {"seconds": time.perf_counter(), "cpu_seconds": sum(each.ru_utime + each.ru_stime for each in used)}


def run(side: str, args: argparse.Namespace) -> dict[str, float]:
    """Run one side in a fresh process with an empty cache."""
    with tempfile.TemporaryDirectory() as cache:
        job = json.dumps([side, args.tokenizer, args.files, args.length, cache])
        command = [sys.executable, __file__, "--work", job]
        env = os.environ | {"HF_HOME": cache, "HF_HUB_OFFLINE": "1"}
        done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(done.stdout + done.stderr)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def main() -> None:
    if sys.argv[1:2] == ["--work"]:
        side, *job = json.loads(sys.argv[2])
        print(json.dumps((ours if side == "gptj_train" else theirs)(*job)))
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tokenizer")
    parser.add_argument("files", nargs="+")
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    runs: dict[str, list[dict[str, float]]] = {side: [] for side in SIDES}
    loads = []
    for _ in range(args.repeats):
        for side in SIDES:
            loads.append(os.getloadavg()[0])
            runs[side].append(run(side, args))
            print(side, runs[side][-1], f"load {loads[-1]:.1f}", file=sys.stderr, flush=True)
    if len({found["tokens"] for of_side in runs.values() for found in of_side}) > 1:
        sys.exit("the sides count different tokens; no results are written")
    size = runs["gptj_train"][0]["bytes"] / 1e6
    turns = list(zip(*runs.values(), strict=True))
    of_turn = {name: [their[name] / our[name] for our, their in turns] for name in ("seconds", "cpu_seconds")}
    found = {
        "what": "MB of UTF-8 text a second, file to windows",
        "megabytes": size,
        "files": len(args.files),
        "tokens": runs["gptj_train"][0]["tokens"],
        "tokens_dropped_by_run_clm": runs["run_clm"][0]["tokens"] - runs["run_clm"][0]["kept"],
        "megabytes_per_second": {side: [size / each["seconds"] for each in runs[side]] for side in SIDES},
        "megabytes_per_cpu_second": {side: [size / each["cpu_seconds"] for each in runs[side]] for side in SIDES},
        "median_ratio": {name: statistics.median(ratios) for name, ratios in of_turn.items()},
        "ratio_of_each_turn": of_turn,
        "cores": os.cpu_count(),
        "load_before_each_run": loads,
        "versions": {name: version(name) for name in ("tokenizers", "datasets", "transformers")},
    }
    RESULTS.write_text(json.dumps(found, indent=1) + "\n")
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
