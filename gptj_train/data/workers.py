"""Worker processes that tokenize files, one file at a time each.

``python -m gptj_train.data.workers`` is a worker. It exchanges lines of JSON with its parent through pipes. The parent
writes

    {"data": {...}, "tokenizer": "...", "eos_token": "..."}     once: the setup
    ["SCRATCH_FOLDER", "FILE", BEGIN, END]                      tokenize a file, or a part, into an empty folder

and for each file the worker answers with any number of progress lines and one last line:

    4096            bytes of the file read since the last line
    null            the file is done
    "MESSAGE"       the file has a mistake that the user can fix

A worker that ends otherwise has failed; its traceback is on stderr.

Why not ``concurrent.futures.ProcessPoolExecutor``:

* A killed parent leaves its workers waiting for work forever: each of them holds the writing end of the queue, so none
  reads its end. Here stdin ends, or stdout breaks, and the worker exits.
* A running job cannot be cancelled. When one file of many is bad, the user would wait for the others; here they are
  killed at their next line of progress.
* It starts workers by fork, which copies mutexes that the tokenizer's threads may hold, or by spawn, which imports the
  recipe once more in each worker.
* ``RAYON_NUM_THREADS``, the tokenizer's threads, must be in a worker's environment before it starts, and must not be in
  the parent's.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import fields
from pathlib import Path
from queue import Empty, SimpleQueue
from threading import Event

from gptj_train.atomic_write import new_folder
from gptj_train.data.claims import claim
from gptj_train.data.file_parts import FilePart
from gptj_train.data.sources import read_segments
from gptj_train.data.store import write_store
from gptj_train.data.text_config import DataConfig
from gptj_train.data.tokenizer import Tokenizer
from gptj_train.errors import UserError
from gptj_train.launch.host import usable_cores

Job = tuple[Path, FilePart]
"""The folder of a store to make, and the file, or the part of one, that goes into it."""


def tokenize_file(
    part: FilePart, scratch: Path, data: DataConfig, tokenizer: Tokenizer, *, progress: Callable[[int], None]
) -> None:
    """Write the store of a file, or of a part of it, into an empty folder, in this process.

    Args:
        progress: called with the number of bytes of the file read since the last call.
    """
    skipped: Counter[str] = Counter()
    segments = read_segments(part.file, data, skipped=skipped, progress=progress, part=part)
    write_store(
        scratch,
        segments,
        tokenizer,
        skipped=skipped,
        all_targets=not data.has_examples,
        special_tokens=data.special_tokens,
    )


def cannot_write(cache: Path, error: OSError) -> str:
    """Return the message for a full or read-only disk."""
    return f"data.cache_dir: cannot write into {cache} ({error.strerror or error}); free space or name another folder"


# --- the parent ---


def tokenize_in_workers(
    jobs: Iterable[Job],
    data: DataConfig,
    tokenizer: Tokenizer,
    *,
    workers: int,
    progress: Callable[[int], None],
    is_missing: Callable[[Path], bool],
) -> int:
    """Make stores in several processes, in this order; return how many. The first error stops them all.

    Args:
        is_missing: tells whether a store, once it is locked, is still to be made; other hosts make some.

    Raises:
        UserError: a file with a mistake; the stores that are complete are kept.
        RuntimeError: a worker that died.
    """
    queue: SimpleQueue[Job] = SimpleQueue()
    for job in jobs:
        queue.put(job)
    stop = Event()
    # A thread for each worker: it hands out the jobs and waits for lines, which costs no CPU time.
    with ThreadPoolExecutor(workers) as threads:
        running = []
        for _ in range(workers):
            thread = threads.submit(
                _drive_worker,
                queue,
                data,
                tokenizer,
                workers=workers,
                progress=progress,
                stop=stop,
                is_missing=is_missing,
            )
            running.append(thread)
        try:
            return sum(thread.result() for thread in as_completed(running))
        finally:
            # After an error, or an interruption of this thread: leaving the ``with`` waits for the other threads.
            stop.set()


def _drive_worker(
    queue: SimpleQueue[Job],
    data: DataConfig,
    tokenizer: Tokenizer,
    *,
    workers: int,
    progress: Callable[[int], None],
    stop: Event,
    is_missing: Callable[[Path], bool],
) -> int:
    """Start a worker and hand it jobs until none is left; return how many it did.

    The worker writes into scratch folders only, and this process renames them: if this process is killed, whatever
    the worker still writes is not taken for a store.
    """
    # All workers together use as many threads as there are cores.
    threads = max(1, usable_cores() // workers)
    environment = os.environ | {"RAYON_NUM_THREADS": str(threads)}
    command = [sys.executable, "-m", "gptj_train.data.workers"]
    # A subclass may have more keys, which DataConfig does not know.
    options = {field.name: getattr(data, field.name) for field in fields(DataConfig)}
    setup = {"data": options, "tokenizer": tokenizer.to_json(), "eos_token": tokenizer.eos_token}
    pipe = subprocess.PIPE
    made = 0
    try:
        # Leaving the ``with`` closes the pipes, which ends an idle worker, and waits for its end.
        with subprocess.Popen(command, env=environment, stdin=pipe, stdout=pipe, text=True) as process:
            _send(process, setup)
            while not stop.is_set():
                try:
                    folder, part = queue.get_nowait()
                except Empty:
                    return made
                with claim(folder) as is_free:
                    if is_free and is_missing(folder):
                        with new_folder(folder) as scratch:
                            _send(process, [str(scratch), str(part.file), part.begin, part.end])
                            _wait_for_file(process, part.file, progress, stop)
                        made += 1
            return made
    except BrokenPipeError:
        # The worker died before it read its job.
        raise RuntimeError(f"a worker that prepares data ended with exit code {process.returncode}") from None


def _send(process: subprocess.Popen[str], message: object) -> None:
    assert process.stdin is not None
    print(json.dumps(message), file=process.stdin, flush=True)


def _wait_for_file(process: subprocess.Popen[str], file: Path, progress: Callable[[int], None], stop: Event) -> None:
    """Pass a worker's progress on until its file is done."""
    assert process.stdout is not None
    for line in process.stdout:
        if stop.is_set():
            # Another file has failed, and its error is the one to show. A worker in the middle of a file does not
            # read its stdin, so it has to be killed.
            process.kill()
            process.wait()
            raise RuntimeError("stopped: another file cannot be prepared")
        answer = json.loads(line)
        if answer is None:
            return
        if isinstance(answer, str):
            raise UserError(answer)
        progress(answer)
    raise RuntimeError(f"{file}: a worker that prepares data ended with exit code {process.wait()}")


# --- the worker ---


def _report(answer: int | str | None) -> None:
    print(json.dumps(answer), flush=True)


def _work() -> None:
    """Tokenize files until stdin ends."""
    setup = json.loads(sys.stdin.readline())
    data = DataConfig(**setup["data"])
    tokenizer = Tokenizer.from_json(setup["tokenizer"], setup["eos_token"])
    for line in sys.stdin:
        folder, file, begin, end = json.loads(line)
        scratch = Path(folder)
        try:
            tokenize_file(FilePart(Path(file), begin, end), scratch, data, tokenizer, progress=_report)
        except UserError as error:
            _report(str(error))
        except BrokenPipeError:
            raise  # an OSError too, but of stdout, not of the disk
        except OSError as error:
            _report(cannot_write(scratch.parent, error))
        else:
            _report(None)


if __name__ == "__main__":
    # Ctrl-C reaches workers too. They end without a traceback; what to say is their parent's part.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        _work()
    except BrokenPipeError:
        # The parent is gone. Exit without flushing stdout, which would raise once more.
        os._exit(1)
