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
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import fields
from pathlib import Path
from queue import Empty, SimpleQueue
from threading import Event, Lock

from filelock import FileLock
from tqdm import tqdm

from gptj_train.atomic_write import SCRATCH_PATTERN, new_folder
from gptj_train.data.sources import DataConfig, read_segments
from gptj_train.data.store import FORMAT, TokenStore, write_store
from gptj_train.data.tokenizer import Tokenizer
from gptj_train.errors import UserError
from gptj_train.launch.host import usable_cores

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
"""With these a file gives the same store. ``bad_records`` only says whether one with gaps will do."""


def open_stores(files: list[Path], data: DataConfig, tokenizer: Tokenizer) -> list[TokenStore]:
    """The stores of files, in their order; those that are missing are made.

    Any number of processes may call this at once, without a process group: the first one works, the others wait
    for its lock. One that is killed leaves nothing that counts.

    Raises:
        UserError: a bad record or file, too large a share of bad records, or no document at all.
    """
    cache = Path(data.cache_dir)
    folders = _folders(files, data, tokenizer)
    if any(not _usable(folder, data) for folder in folders):
        try:
            cache.mkdir(parents=True, exist_ok=True)
            with FileLock(cache / "preparing.lock"):
                for leftover in cache.glob(SCRATCH_PATTERN):  # of a process that was killed
                    shutil.rmtree(leftover, ignore_errors=True)
                # By folder: a file that is listed twice is made once.
                found = dict(zip(folders, files, strict=True))
                _make({folder: found[folder] for folder in found if not _usable(folder, data)}, data, tokenizer)
        except OSError as error:
            raise UserError(_unwritable(cache, error)) from None
    stores = [TokenStore(folder) for folder in folders]
    _check(files, stores, data)
    return stores


def _folders(files: list[Path], data: DataConfig, tokenizer: Tokenizer) -> list[Path]:
    """Where the store of each file is or will be."""
    options = [FORMAT, tokenizer.digest, *(getattr(data, name) for name in _OPTIONS)]
    folders = []
    for file in files:
        facts = file.stat()
        identity = [os.path.abspath(file), facts.st_size, facts.st_mtime_ns]
        digest = hashlib.sha256(json.dumps([*options, *identity]).encode()).hexdigest()
        folders.append(Path(data.cache_dir) / digest[:24])
    return folders


def _usable(folder: Path, data: DataConfig) -> bool:
    return TokenStore.exists(folder) and (data.bad_records == "skip" or not TokenStore(folder).skipped)


def _check(files: list[Path], stores: list[TokenStore], data: DataConfig) -> None:
    skipped = sum((Counter(store.skipped) for store in stores), Counter[str]())
    documents = sum(len(store.ends) for store in stores)
    share = skipped.total() / max(skipped.total() + documents, 1)
    if share > data.max_bad_share:
        reasons = ", ".join(f"{count:,} of {reason}" for reason, count in skipped.most_common())
        raise UserError(
            f"{_named(files)}: {share:.2%} of the records are bad ({reasons}), more than data.max_bad_share "
            f"({data.max_bad_share:.2%}); data.bad_records=error tells where the first is"
        )
    if not documents:
        raise UserError(f"{_named(files)}: no text in the data, it is empty")


def _unwritable(cache: Path, error: OSError) -> str:
    return f"data.cache_dir: cannot write into {cache} ({error.strerror or error}); free space or name another folder"


def _named(files: list[Path]) -> str:
    return ", ".join(map(str, files[:3])) + (f" and {len(files) - 3:,} more" if len(files) > 3 else "")


def _make(files: dict[Path, Path], data: DataConfig, tokenizer: Tokenizer) -> None:
    """Make the stores: folder -> the file that goes there."""
    sizes = {folder: file.stat().st_size for folder, file in files.items()}
    workers = min(len(files), usable_cores()) if sum(sizes.values()) > _SMALL else 1
    with _Progress(sum(sizes.values())) as progress:
        if workers == 1:
            for folder, file in files.items():
                with new_folder(folder) as scratch:
                    _write(scratch, file, data, tokenizer, progress)
            return
        work: SimpleQueue[tuple[Path, Path]] = SimpleQueue()
        for folder in sorted(files, key=lambda folder: -sizes[folder]):
            work.put((folder, files[folder]))
        stop = Event()
        with ThreadPoolExecutor(workers) as threads:
            jobs = [
                threads.submit(_in_another_process, work, data, tokenizer, workers, progress, stop)
                for _ in range(workers)
            ]
            try:
                for job in as_completed(jobs):
                    job.result()
            finally:
                stop.set()


def _write(scratch: Path, file: Path, data: DataConfig, tokenizer: Tokenizer, progress: Callable[[int], None]) -> None:
    skipped: Counter[str] = Counter()
    write_store(scratch, read_segments(file, data, skipped, progress), skipped, tokenizer, data.kind == "text")


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


def _in_another_process(
    work: SimpleQueue[tuple[Path, Path]],
    data: DataConfig,
    tokenizer: Tokenizer,
    workers: int,
    progress: Callable[[int], None],
    stop: Event,
) -> None:
    """Let one process write stores until there is no more work. It writes into scratch folders only: were this
    process killed, what the other one still does would count for nothing.
    """
    threads = max(1, usable_cores() // workers)
    env = os.environ | {"RAYON_NUM_THREADS": str(threads)}
    command = [sys.executable, "-m", "gptj_train.data.preparation"]
    try:
        with subprocess.Popen(command, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdin is not None
            assert process.stdout is not None
            options = {field.name: getattr(data, field.name) for field in fields(DataConfig)}
            given = {"data": options, "tokenizer": tokenizer.to_json(), "end_of_text": tokenizer.end_of_text}
            print(json.dumps(given), file=process.stdin, flush=True)
            while not stop.is_set():
                try:
                    folder, file = work.get_nowait()
                except Empty:
                    return
                with new_folder(folder) as scratch:
                    print(json.dumps([str(scratch), str(file)]), file=process.stdin, flush=True)
                    _follow(process, file, progress, stop)
    except BrokenPipeError:
        raise RuntimeError(f"a process that prepares data ended with exit code {process.returncode}") from None


def _follow(process: subprocess.Popen[str], file: Path, progress: Callable[[int], None], stop: Event) -> None:
    """Take what a process tells of a file: bytes read, and at last what is wrong with it or null."""
    assert process.stdout is not None
    for line in process.stdout:
        if stop.is_set():
            process.kill()
            process.wait()
            raise RuntimeError("stopped: another file cannot be prepared")
        answer = json.loads(line)
        if isinstance(answer, str):
            raise UserError(answer)
        if answer is None:
            return
        progress(answer)
    raise RuntimeError(f"{file}: a process that prepares data ended with exit code {process.wait()}")


def _serve() -> None:
    given = json.loads(sys.stdin.readline())
    data = DataConfig(**given["data"])
    tokenizer = Tokenizer.from_json(given["tokenizer"], given["end_of_text"])
    for line in sys.stdin:
        scratch, file = map(Path, json.loads(line))
        answer = None
        try:
            _write(scratch, file, data, tokenizer, lambda read: print(read, flush=True))
        except ValueError as error:
            answer = str(error)
        except BrokenPipeError:
            raise
        except OSError as error:
            answer = _unwritable(scratch.parent, error)
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    try:
        _serve()
    except BrokenPipeError:
        os._exit(1)  # nobody is left to hear of it
