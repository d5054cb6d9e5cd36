"""A process that is stuck ends itself with its stacks on disk; one that is slow, saving or suspended does not."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from gptj_train.launch.preemption import Preempted
from gptj_train.launch.watchdog import Watchdog
from gptj_train.launch import watchdog

LIMIT = 0.5


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watchdog, "_TICK", 0.05)


def watched(folder: Path, work: Callable[[Watchdog], None], limit: float = LIMIT) -> multiprocessing.Process:
    """``work`` in a process of its own."""

    def run() -> None:
        with Watchdog(folder, limit, rank=3) as dog:
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


def spinning_for_ever(dog: Watchdog) -> None:
    while True:
        pass


def waiting_for_ever(dog: Watchdog) -> None:
    threading.Event().wait()


def slow_but_alive(dog: Watchdog) -> None:
    for _ in range(6):
        time.sleep(LIMIT / 2)
        dog.beat()


def long_save(dog: Watchdog) -> None:
    with dog.paused():
        time.sleep(3 * LIMIT)
    time.sleep(LIMIT / 2)


@pytest.mark.parametrize("work", [spinning_for_ever, waiting_for_ever])
def test_what_is_stuck_ends_and_says_where(
    tmp_path: Path, work: Callable[[Watchdog], None], capfd: pytest.CaptureFixture[str]
) -> None:
    began = time.monotonic()
    assert ends_with(watched(tmp_path, work)) == 1
    assert LIMIT < time.monotonic() - began < LIMIT + 5
    assert work.__name__ in stacks(tmp_path)
    said = capfd.readouterr().err
    assert said.startswith("error: rank 3 made no progress for 0.5 s (hang_timeout); where it was: ")
    assert said.count("\n") == 1


@pytest.mark.parametrize(("work", "limit"), [(slow_but_alive, LIMIT), (long_save, LIMIT), (long_save, 0)])
def test_what_goes_on_is_left_alone(tmp_path: Path, work: Callable[[Watchdog], None], limit: float) -> None:
    assert ends_with(watched(tmp_path, work, limit)) == 0
    assert not (tmp_path / "stacks").exists()


def test_a_job_that_was_suspended_is_not_hung(tmp_path: Path) -> None:
    process = watched(tmp_path, slow_but_alive)
    time.sleep(LIMIT)
    os.kill(process.pid or 0, signal.SIGSTOP)
    time.sleep(4 * LIMIT)
    os.kill(process.pid or 0, signal.SIGCONT)
    assert ends_with(process) == 0


def test_sigterm_leaves_the_stacks_too_and_then_does_what_it_did(tmp_path: Path) -> None:
    """Launchers end the ranks beside a failed one with it; this one hangs in a call and cannot answer."""
    process = watched(tmp_path, waiting_for_ever, limit=60)
    time.sleep(2)
    process.terminate()
    assert ends_with(process) == -signal.SIGTERM
    assert "waiting_for_ever" in stacks(tmp_path)


def fails(dog: Watchdog) -> None:
    raise RuntimeError("Connection closed by peer")


def is_told_to_stop(dog: Watchdog) -> None:
    raise Preempted("SIGTERM")


def test_an_error_leaves_its_traceback_and_an_orderly_end_nothing(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), Watchdog(tmp_path / "failed", LIMIT, rank=3) as dog:
        fails(dog)
    assert "in fails" in stacks(tmp_path / "failed")
    assert "Connection closed by peer" in stacks(tmp_path / "failed")
    with pytest.raises(Preempted), Watchdog(tmp_path / "told", LIMIT, rank=3) as dog:
        is_told_to_stop(dog)
    assert not (tmp_path / "told" / "stacks").exists()
