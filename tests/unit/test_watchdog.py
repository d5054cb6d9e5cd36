"""A process that hangs exits with its stacks on disk; one that is slow, saving or suspended does not."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from gptj_train.launch import watchdog
from gptj_train.launch.preemption import Preempted
from gptj_train.launch.watchdog import Watchdog

LIMIT = 0.5


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watchdog, "_TICK", 0.05)


def watched(folder: Path, work: Callable[[Watchdog], None], limit: float = LIMIT) -> multiprocessing.Process:
    """Start ``work`` under a watchdog in a new process."""

    def run() -> None:
        with Watchdog(folder, limit, rank=3, ranks=4) as dog:
            work(dog)

    process = multiprocessing.get_context("fork").Process(target=run)
    process.start()
    return process  # type: ignore[return-value]


def ends_with(process: multiprocessing.Process, seconds: float = 10) -> int | None:
    process.join(seconds)
    code = process.exitcode
    process.kill()
    return code


def stacks(folder: Path) -> str:
    return (folder / "stacks" / "rank_3.txt").read_text()


def spinning_forever(dog: Watchdog) -> None:
    while True:
        pass


def waiting_forever(dog: Watchdog) -> None:
    threading.Event().wait()


def slow_but_alive(dog: Watchdog) -> None:
    for _ in range(6):
        time.sleep(LIMIT / 2)
        dog.beat()


def long_save(dog: Watchdog) -> None:
    with dog.paused():
        time.sleep(3 * LIMIT)
    time.sleep(LIMIT / 2)


@pytest.mark.parametrize("work", [spinning_forever, waiting_forever])
def test_a_hang_ends_the_process_and_leaves_its_stacks(
    tmp_path: Path, work: Callable[[Watchdog], None], capfd: pytest.CaptureFixture[str]
) -> None:
    began = time.monotonic()
    assert ends_with(watched(tmp_path, work)) == 1
    assert LIMIT < time.monotonic() - began < LIMIT + 5
    assert work.__name__ in stacks(tmp_path)
    message = capfd.readouterr().err
    assert message.startswith("error: rank 3 made no progress for 0.5 s (hang_timeout); its stacks: ")
    assert message.count("\n") == 1


@pytest.mark.parametrize(("work", "limit"), [(slow_but_alive, LIMIT), (long_save, LIMIT), (long_save, 0)])
def test_progress_and_pauses_keep_it_alive(tmp_path: Path, work: Callable[[Watchdog], None], limit: float) -> None:
    assert ends_with(watched(tmp_path, work, limit)) == 0
    assert not (tmp_path / "stacks").exists()


def test_a_suspended_job_does_not_hang(tmp_path: Path) -> None:
    process = watched(tmp_path, slow_but_alive)
    time.sleep(LIMIT)
    os.kill(process.pid or 0, signal.SIGSTOP)
    time.sleep(4 * LIMIT)
    os.kill(process.pid or 0, signal.SIGCONT)
    assert ends_with(process) == 0


def test_sigterm_leaves_the_stacks_and_then_ends_the_process(tmp_path: Path) -> None:
    """Launchers end the ranks beside a failed one with it; this one hangs in a call and cannot answer."""
    process = watched(tmp_path, waiting_forever, limit=60)
    time.sleep(2)
    process.terminate()
    assert ends_with(process) == -signal.SIGTERM
    assert "waiting_forever" in stacks(tmp_path)


def fails(dog: Watchdog) -> None:
    raise RuntimeError("Connection closed by peer")


def is_preempted(dog: Watchdog) -> None:
    raise Preempted("SIGTERM")


def test_a_crash_leaves_its_traceback_and_a_preemption_nothing(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), Watchdog(tmp_path / "failed", LIMIT, rank=3, ranks=4) as dog:
        fails(dog)
    assert "in fails" in stacks(tmp_path / "failed")
    assert "Connection closed by peer" in stacks(tmp_path / "failed")
    with pytest.raises(Preempted), Watchdog(tmp_path / "preempted", LIMIT, rank=3, ranks=4) as dog:
        is_preempted(dog)
    assert not (tmp_path / "preempted" / "stacks").exists()


def test_stacks_of_ranks_that_this_start_lacks_go(tmp_path: Path) -> None:
    """A killed rank cannot remove its file, and a start on fewer ranks has nobody who would."""
    for rank in range(4):
        with contextlib.suppress(RuntimeError), Watchdog(tmp_path, LIMIT, rank=rank, ranks=4) as dog:
            fails(dog)
    left = tmp_path / "stacks"
    with Watchdog(tmp_path, LIMIT, rank=1, ranks=2):
        assert {path.name for path in left.iterdir()} == {f"rank_{rank}.txt" for rank in range(4)}
    with Watchdog(tmp_path, LIMIT, rank=0, ranks=2):
        assert {path.name for path in left.iterdir()} == {"rank_0.txt"}
    assert not left.exists()
