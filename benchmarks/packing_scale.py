"""Measure what packing many documents costs: once, when the data are prepared, and at each start of a rank.

    python benchmarks/packing_scale.py                       # 20 million documents: 5 GB of disk, a few minutes
    python benchmarks/packing_scale.py --documents 1000000

The benchmark writes token stores of synthetic documents, whose lengths are log-normal with a median of 60 tokens, and
packs them into windows of 2048 with each method. Every measurement is a process of its own: ``pack`` finds no packing
and makes it, ``start`` finds it and reads a batch of 32 windows. Memory is the growth of the peak RSS over that after
the imports; pages of mapped files that were read count.
"""

from __future__ import annotations

import argparse
import json
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

RESULTS = Path(__file__).parent / "results" / "packing_scale.json"
METHODS = ("contiguous", "text", "examples")
LENGTH = 2048
STORES = 8
MEDIAN, SPREAD = 60, 1.0  # of the lengths, in tokens, and of their logarithms


def write_stores(cache: Path, documents: int, *, with_targets: bool) -> list[Path]:
    """Write token stores as preparation does; the tokens are holes in the files."""
    from gptj_train.data.store import _DOCUMENT

    rng = np.random.default_rng(0)
    folders = []
    for number in range(STORES):
        folder = cache / f"{'examples' if with_targets else 'text'}_{number}"
        folder.mkdir(parents=True)
        lengths = np.exp(rng.normal(np.log(MEDIAN), SPREAD, documents // STORES)).astype(np.int64) + 1
        records = np.zeros(len(lengths), dtype=_DOCUMENT)
        records["end"] = lengths.cumsum()
        records["bytes"] = 4 * lengths
        records.tofile(folder / "documents.bin")
        tokens = int(lengths.sum())
        with open(folder / "tokens.bin", "wb") as file:
            file.truncate(2 * tokens)
        if with_targets:
            np.full(tokens, True).tofile(folder / "targets.bin")
        sizes = {path.name: path.stat().st_size for path in folder.iterdir()}
        metadata = {"dtype": "uint16", "components": ["all"], "skipped": {}, "special_tokens": {}, "bytes": sizes}
        (folder / "store.json").write_text(json.dumps(metadata))
        folders.append(folder)
    return folders


def work(cache: Path, method: str) -> None:
    """Open a packing, read a batch, and print seconds and bytes."""
    from gptj_train.data.packed import open_packing
    from gptj_train.data.packing import Windows
    from gptj_train.data.sampler import sample_at
    from gptj_train.data.store import TokenStore

    before = peak_rss()
    began = time.perf_counter()
    kind = "examples" if method == "examples" else "text"
    stores = [TokenStore(folder) for folder in sorted(cache.glob(f"{kind}_*"))]
    packing = open_packing(stores, None, cache=cache, method=method, length=LENGTH)  # type: ignore[arg-type]
    windows = Windows(stores, packing, length=LENGTH, fill=0)
    for position in range(32):
        windows[sample_at(position, len(windows), 0)]
    result = {"seconds": time.perf_counter() - began, "bytes": peak_rss() - before, "windows": len(windows)}
    print(json.dumps(result))


def peak_rss() -> int:
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--documents", type=int, default=20_000_000)
    parser.add_argument("--work", nargs=2, metavar=("CACHE", "METHOD"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.work:
        work(Path(arguments.work[0]), arguments.work[1])
        return
    cache = Path(tempfile.mkdtemp())
    rows = []
    try:
        for with_targets in (False, True):
            write_stores(cache, arguments.documents, with_targets=with_targets)
        for method in METHODS:
            for phase in ("pack", "start"):
                command = [sys.executable, __file__, "--work", str(cache), method]
                found = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)
                rows.append({"documents": arguments.documents, "method": method, "phase": phase, **found})
                print(
                    f"{method:<11} {phase:<6} {found['seconds']:8.2f} s {found['bytes'] / 1e6:8.0f} MB "
                    f"{found['windows']:,} windows"
                )
    finally:
        shutil.rmtree(cache)
    RESULTS.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
