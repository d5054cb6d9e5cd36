"""Files -> token stores, each made once: several files side by side, in processes of their own.

``python -m gptj_train.data.preparation`` is such a process: it takes its work, a line of JSON, from its input.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from queue import Empty, SimpleQueue
from threading import Lock

from filelock import FileLock
from tqdm import tqdm

from gptj_train.data.sources import DataConfig, read_segments
from gptj_train.data.store import FORMAT, TokenStore, write_store
from gptj_train.data.tokenizer import Tokenizer

_SMALL = 64 * 2**20  # bytes; so much is done before other processes have started
_LINE_SECONDS = 10
_OPTIONS = (
    "kind",
    "text_field",
    "prompt_field",
    "response_field",
    "messages_field",
    "chat_template",
    "component_field",
)
"""With these and ``bad_records`` a file gives the same store."""


def open_stores(files: list[Path], data: DataConfig, tokenizer: Tokenizer) -> list[TokenStore]:
    """The stores of files, in their order; those that are missing are made.

    Any number of processes may call this at once, without a process group: the first one works, the others wait
    for its lock. One that is killed leaves nothing that counts.

    Raises:
        ValueError: a bad record or file, too large a share of bad records, or no document at all.
    """
    cache = Path(data.cache_dir)
    folders = {file: cache / _key(file, data, tokenizer) for file in files}
    if any(not TokenStore.exists(folder) for folder in folders.values()):
        try:
            cache.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ValueError(f"data.cache_dir={cache}: not a folder to write to ({error.strerror})") from None
        with FileLock(cache / "preparing.lock"):
            for leftover in cache.glob(".making-*"):  # of a process that was killed
                shutil.rmtree(leftover)
            missing = {file: folder for file, folder in folders.items() if not TokenStore.exists(folder)}
            _make(missing, data, tokenizer)
    stores = [TokenStore(folder) for folder in folders.values()]
    _check(files, stores, data)
    return [TokenStore(folders[file]) for file in files] if len(files) > len(folders) else stores


def _key(file: Path, data: DataConfig, tokenizer: Tokenizer) -> str:
    facts = file.stat()
    identity = [str(file.resolve()), facts.st_size, facts.st_mtime_ns]
    options = [getattr(data, name) for name in _OPTIONS]
    return hashlib.sha256(json.dumps([FORMAT, tokenizer.digest, identity, options]).encode()).hexdigest()[:24]


def _check(files: list[Path], stores: list[TokenStore], data: DataConfig) -> None:
    skipped = sum((Counter(store.skipped) for store in stores), Counter[str]())
    documents = sum(len(store.ends) for store in stores)
    if not documents:
        raise ValueError(f"{', '.join(map(str, files[:3]))}: no text in the data, it is empty")
    share = skipped.total() / (skipped.total() + documents)
    if share > data.max_bad_share:
        reasons = ", ".join(f"{count:,} of {reason}" for reason, count in skipped.most_common())
        raise ValueError(
            f"{share:.2%} of the records are bad ({reasons}), more than data.max_bad_share ({data.max_bad_share:.2%})"
        )


def _make(folders: dict[Path, Path], data: DataConfig, tokenizer: Tokenizer) -> None:
    sizes = {file: file.stat().st_size for file in folders}
    workers = min(len(folders), os.cpu_count() or 1) if sum(sizes.values()) > _SMALL else 1
    with _Progress(sum(sizes.values())) as progress:
        if workers == 1:
            for file, folder in folders.items():
                make_store(file, folder, data, tokenizer, progress)
            return
        work: SimpleQueue[Path] = SimpleQueue()
        for file in sorted(folders, key=lambda file: -sizes[file]):
            work.put(file)
        with ThreadPoolExecutor(workers) as threads:
            done = [
                threads.submit(_in_processes, work, folders, data, tokenizer, workers, progress) for _ in range(workers)
            ]
            for future in done:
                future.result()


def make_store(
    file: Path, folder: Path, data: DataConfig, tokenizer: Tokenizer, progress: Callable[[int], None]
) -> None:
    """Read and tokenize a file into a folder that appears when all of it is there."""
    scratch = Path(tempfile.mkdtemp(dir=folder.parent, prefix=".making-"))
    try:
        skipped: Counter[str] = Counter()
        write_store(scratch, read_segments(file, data, skipped, progress), skipped, tokenizer, data.kind == "text")
        shutil.rmtree(folder, ignore_errors=True)
        scratch.rename(folder)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


class _Progress:
    """Shows how far the bytes of all files have been read: a bar, or a line now and then where nobody looks."""

    def __init__(self, total: int) -> None:
        self._bar = tqdm(
            total=total, desc="preparing data", unit="B", unit_scale=True, disable=not sys.stderr.isatty(), leave=False
        )
        self._total, self._read, self._lock = total, 0, Lock()
        self._began = self._last = time.monotonic()

    def __call__(self, read: int) -> None:
        with self._lock:
            self._read += read
            self._bar.update(read)
            now = time.monotonic()
            if self._bar.disable and now - self._last > _LINE_SECONDS:
                self._last = now
                left = tqdm.format_interval((now - self._began) * (self._total / max(self._read, 1) - 1))
                print(
                    f"preparing data: {self._read / self._total:.0%} of {self._total / 1e9:.2f} GB, {left} left",
                    flush=True,
                )

    def __enter__(self) -> _Progress:
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()


# --- other processes ---


def _in_processes(
    work: SimpleQueue[Path],
    folders: dict[Path, Path],
    data: DataConfig,
    tokenizer: Tokenizer,
    workers: int,
    progress: Callable[[int], None],
) -> None:
    """Let one process make stores until there is no more work."""
    threads = max(1, (os.cpu_count() or 1) // workers)
    env = os.environ | {"RAYON_NUM_THREADS": str(threads)}
    command = [sys.executable, "-m", "gptj_train.data.preparation"]
    with subprocess.Popen(command, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        given = {"data": asdict(data), "tokenizer": tokenizer.to_json(), "end_of_text": tokenizer.end_of_text}
        print(json.dumps(given), file=process.stdin, flush=True)
        for file in _until_empty(work):
            print(json.dumps([str(file), str(folders[file])]), file=process.stdin, flush=True)
            for answer in map(json.loads, process.stdout):
                if isinstance(answer, int):
                    progress(answer)
                    continue
                if answer is not None:
                    for _ in _until_empty(work):
                        pass  # the others need not begin what will not be used
                    raise ValueError(answer)
                break
            else:
                raise RuntimeError(f"the process that prepared {file} ended with exit code {process.wait()}")


def _until_empty(work: SimpleQueue[Path]) -> Iterator[Path]:
    while True:
        try:
            yield work.get_nowait()
        except Empty:
            return


def _serve() -> None:
    given = json.loads(sys.stdin.readline())
    data = DataConfig(**given["data"])
    tokenizer = Tokenizer.from_json(given["tokenizer"], given["end_of_text"])
    for line in sys.stdin:
        file, folder = map(Path, json.loads(line))
        answer = None
        try:
            make_store(file, folder, data, tokenizer, lambda read: print(read, flush=True))
        except ValueError as error:
            answer = str(error)
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    _serve()
