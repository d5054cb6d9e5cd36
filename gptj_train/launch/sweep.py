"""The jobs of a --multirun: each a process of its own, and a table of what came of them."""

from __future__ import annotations

import csv
import io
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from gptj_train.atomic_write import write_text
from gptj_train.launch.exit_codes import EXIT_DONE, EXIT_PREEMPTED
from gptj_train.launch.preemption import handled_signals
from gptj_train.launch.ranks import rank
from gptj_train.metrics_file import read_metrics, results_of

_STATES = {EXIT_DONE: "done", EXIT_PREEMPTED: "stopped", 2: "mistake"}


@dataclass
class Job:
    """A job of a sweep, and what came of it.

    Attributes:
        number: from 0; its run folder is ``<output_dir>/<number>``.
        overrides: what it sets, beyond what all jobs share.
        folder: its run folder; None for a recipe without one.
        code: its exit code; None if it was not started.
    """

    number: int
    overrides: list[str]
    folder: Path | None
    code: int | None = None

    @property
    def state(self) -> str:
        if self.code is None:
            return "not started"
        return _STATES.get(self.code, f"failed (exit code {self.code})")


class Sweep:
    """Runs jobs one after the other. A job that fails does not end the sweep; a request to stop does.

    The request is passed on to the running job, which saves its state; the sweep waits for it, and starts no other.
    """

    def __init__(self) -> None:
        self.jobs: list[Job] = []
        self._process: subprocess.Popen[bytes] | None = None
        self._stopped = False

    def run(self, job: Job, command: Sequence[str]) -> None:
        """Run a job to its end, or note that it was not started."""
        self.jobs.append(job)
        if self._stopped:
            return
        if rank() == 0:
            print(f"\njob {job.number}: {' '.join(job.overrides)}", flush=True)
        old = {number: signal.signal(number, self._pass_on) for number in handled_signals()}
        try:
            # A session of its own: a key pressed at the terminal must reach it once, from here.
            self._process = subprocess.Popen(command, start_new_session=True)
            job.code = self._process.wait()
        finally:
            self._process = None
            for number, handler in old.items():
                signal.signal(number, handler)

    def _pass_on(self, number: int, frame: FrameType | None) -> None:
        self._stopped = True
        if self._process is not None:
            self._process.send_signal(number)

    def finish(self, folder: Path | None) -> int:
        """Print the table and write sweep.md and sweep.csv into a folder; return the exit code of the sweep."""
        if rank() == 0:
            rows = _rows(self.jobs)
            print("\n" + _markdown(rows), end="", flush=True)
            if folder is not None and folder.is_dir():
                write_text(folder / "sweep.md", _markdown(rows))
                write_text(folder / "sweep.csv", _csv(rows))
                print(f"\ntable: {folder / 'sweep.md'}, {folder / 'sweep.csv'}", flush=True)
        if self._stopped:
            if rank() == 0:
                print("stopped: rerun the same command to resume the sweep", file=sys.stderr, flush=True)
            return EXIT_PREEMPTED
        failures = [job.code for job in self.jobs if job.code]
        return failures[0] if failures else EXIT_DONE


def _rows(jobs: Sequence[Job]) -> list[list[str]]:
    """Return the table: a row of titles, then one for each job; results are those of its last evaluation."""
    results: list[dict[str, Any]] = []
    for job in jobs:
        found: dict[str, Any] = {}
        lines = [] if job.folder is None else read_metrics(job.folder)
        evaluations = [line for line in lines if line["kind"] == "eval"]
        if lines:
            found["step"] = lines[-1]["step"]
        if evaluations:
            # The metrics of components, such as eval_loss/NAME, would be too many columns.
            found |= {name: value for name, value in results_of(evaluations[-1]).items() if "/" not in name}
        results.append(found)
    names = list(dict.fromkeys(name for found in results for name in found))
    rows = [["job", "state", "overrides", *names]]
    for job, found in zip(jobs, results, strict=True):
        values = [f"{found[name]:.6g}" if name in found else "" for name in names]
        rows.append([str(job.number), job.state, " ".join(job.overrides), *values])
    return rows


def _markdown(rows: Sequence[Sequence[str]]) -> str:
    title, *others = rows
    lines = [title, ["---"] * len(title), *others]
    return "".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |\n" for line in lines)


def _csv(rows: Sequence[Sequence[str]]) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue()
