"""Measure the preparation of the same text as one file, as parts of it, as several files, and by two hosts.

    python benchmarks/prepare_parts.py

The text is Python's own library, repeated under other names to 64 MB. "Two hosts" are two processes on this machine,
each with half of its cores and another host name; they share out the files by locks. Each measurement is made in fresh
processes and with an empty cache; the sides take turns. MB/s of wall time, start-up included.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import time
from dataclasses import replace
from pathlib import Path

from clm_config import clm_config

RESULTS = Path(__file__).parent / "results" / "prepare_parts.json"
SIZE = 64_000_000
FILES = 4
SIDES = ("one file, whole", "one file, 4 parts", "4 files", "4 files, two hosts")


def write_corpus(folder: Path) -> None:
    """Write FILES files of SIZE bytes in all, and one with all of their lines."""
    texts: list[str] = []
    size = 0
    sources = sorted(Path(sysconfig.get_path("stdlib")).rglob("*.py"))
    while size < SIZE:
        for path in sources:
            text = f"{len(texts)} {path.name}\n{path.read_text(encoding='utf-8', errors='replace')}"
            texts.append(json.dumps({"text": text}) + "\n")
            size += len(texts[-1])
            if size >= SIZE:
                break
    for number in range(FILES):
        (folder / f"{number}.jsonl").write_text("".join(texts[number::FILES]))
    (folder / "all.jsonl").write_text("".join(texts))


def work(side: str, folder: Path, cache: Path, host: str) -> None:
    """Prepare in this process and its workers."""
    from gptj_train.data import claims, file_parts
    from gptj_train.data.preparation import open_stores
    from gptj_train.data.tokenizer import Tokenizer

    claims.socket.gethostname = lambda: host  # type: ignore[attr-defined]
    files = [folder / "all.jsonl"] if side.startswith("one") else sorted(folder.glob("[0-9].jsonl"))
    if "parts" in side:
        file_parts.PART = files[0].stat().st_size // FILES + 1
    data = replace(clm_config().data, kind="text", cache_dir=str(cache))
    open_stores(files, data, Tokenizer.load(folder / "tokenizer"))


def measure(side: str, folder: Path) -> float:
    """Return the seconds of a preparation."""
    hosts = ["one", "two"] if "two" in side else ["one"]
    cores = sorted(os.sched_getaffinity(0))
    with tempfile.TemporaryDirectory() as cache:
        began = time.perf_counter()
        processes = []
        for number, host in enumerate(hosts):
            own = cores[number :: len(hosts)]
            command = ["taskset", "-c", ",".join(map(str, own)), sys.executable, __file__]
            processes.append(subprocess.Popen([*command, "--work", side, str(folder), cache, host]))
        for process in processes:
            assert process.wait() == 0
        return time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--work", nargs=4, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.work:
        side, folder, cache, host = given.work
        work(side, Path(folder), Path(cache), host)
        return
    from gptj_train.data.tokenizer import Tokenizer

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_corpus(folder)
        (folder / "tokenizer").mkdir()
        sample = [json.loads(line)["text"] for line in (folder / "0.jsonl").read_text().splitlines()[:50]]
        Tokenizer.train(sample, 8192).save(folder / "tokenizer")
        seconds: dict[str, list[float]] = {side: [] for side in SIDES}
        for _ in range(given.turns):
            for side in SIDES:
                seconds[side].append(measure(side, folder))
    rows = []
    for side, times in seconds.items():
        speeds = [SIZE / 1e6 / one for one in times]
        rows.append({"side": side, "mb_per_second": round(statistics.median(speeds), 2), "seconds": times})
        print(f"{side:<20} {statistics.median(speeds):6.2f} MB/s  ({min(speeds):.2f} to {max(speeds):.2f})")
    cores = len(os.sched_getaffinity(0))
    RESULTS.write_text(json.dumps({"cores": cores, "load": os.getloadavg(), "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
