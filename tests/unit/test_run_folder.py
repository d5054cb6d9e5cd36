"""Which run folders are refused, the lock on them, and status.json."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from gptj_train.errors import UserError
from gptj_train.launch.preemption import Preempted
from gptj_train.launch.run_folder import RunFolder
from gptj_train.launch.run_status import RunStatus, is_done

HOLD = """
import sys, time
from gptj_train.launch.run_folder import RunFolder
folder = RunFolder(sys.argv[1], rank=0)
folder.create()
print("held", flush=True)
time.sleep(60)
"""


def test_two_runs_cannot_have_one_folder(tmp_path: Path) -> None:
    output_dir = tmp_path / "run"
    with subprocess.Popen([sys.executable, "-c", HOLD, output_dir], stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "held\n"
        RunFolder(str(output_dir), rank=1)  # only rank 0 locks
        with pytest.raises(UserError) as refused:
            RunFolder(str(output_dir), rank=0)
        pattern = rf"output_dir={output_dir} is in use by another run \(process {other.pid} on .*, since 20.*\); wait"
        assert re.match(pattern, str(refused.value))
        other.kill()
        other.wait()
        # The lock ends with its process, however that ended.
        RunFolder(str(output_dir), rank=0).create()


def test_nothing_is_written_before_create(tmp_path: Path) -> None:
    folder = RunFolder(str(tmp_path / "run"), rank=0)
    assert list(tmp_path.iterdir()) == []
    folder.create()
    assert folder.is_same()


@pytest.mark.parametrize("place", ["run/checkpoints", "run", "."])
def test_a_link_to_nowhere_is_refused(tmp_path: Path, place: str) -> None:
    link = tmp_path / "disk" / place
    link.parent.mkdir(parents=True, exist_ok=True)
    link.symlink_to(tmp_path / "not mounted")
    with pytest.raises(UserError, match=r"is a link to .*not mounted, which does not exist; is its disk mounted\?"):
        RunFolder(str(tmp_path / "disk" / "run"), rank=0)


def test_a_folder_that_is_exchanged_is_noticed(tmp_path: Path) -> None:
    folder = RunFolder(str(tmp_path / "run"), rank=0)
    folder.create()
    (tmp_path / "run").rename(tmp_path / "away")
    assert not folder.is_same()
    (tmp_path / "run").mkdir()
    assert not folder.is_same()


@pytest.mark.skipif(not Path("/dev/shm").is_dir(), reason="needs a second file system")
def test_a_disk_of_checkpoints_that_disappears_is_noticed(tmp_path: Path) -> None:
    """Of a lost mount an empty folder stays, on the disk below: saves would go there."""
    run, below = tmp_path / "run", tmp_path / "below"
    run.mkdir()
    below.mkdir()
    with tempfile.TemporaryDirectory(dir="/dev/shm") as disk:
        (run / "checkpoints").symlink_to(disk)
        folder = RunFolder(str(run), rank=0)
        folder.create()
        assert folder.is_same()
        (run / "checkpoints").unlink()
        (run / "checkpoints").symlink_to(below)
        assert not folder.is_same()
        (run / "checkpoints").unlink()
        (run / "checkpoints").symlink_to(tmp_path / "nowhere")
        assert not folder.is_same()


def test_checkpoints_that_the_user_removes_or_a_save_makes_are_no_lost_disk(tmp_path: Path) -> None:
    folder = RunFolder(str(tmp_path / "run"), rank=0)
    folder.create()
    (tmp_path / "run" / "checkpoints").mkdir()
    assert folder.is_same()
    (tmp_path / "run" / "checkpoints").rmdir()
    assert folder.is_same()


def test_status_follows_the_run(tmp_path: Path) -> None:
    def status() -> dict[str, object]:
        return json.loads((tmp_path / "status.json").read_text())

    request = {"max_steps": 5}
    with RunStatus(tmp_path, 0, request) as run:
        assert (status()["state"], status()["step"], status()["pid"]) == ("running", 0, os.getpid())
        run.step = lambda: 5
    assert (status()["state"], status()["step"], status()["reason"]) == ("done", 5, None)
    assert is_done(tmp_path, request) == 5
    assert is_done(tmp_path, {"max_steps": 6}) is None
    with pytest.raises(Preempted), RunStatus(tmp_path, 0, request):
        raise Preempted("SIGTERM reached rank 0")
    assert (status()["state"], status()["reason"]) == ("stopped", "SIGTERM reached rank 0")
    with pytest.raises(UserError), RunStatus(tmp_path, 0, request):
        raise UserError("bad\ndata")
    assert (status()["state"], status()["reason"]) == ("failed", "UserError: bad data")
    assert is_done(tmp_path, request) is None


def preempt(folder: Path, *, saved: bool) -> RunStatus:
    """A process that starts the run and is preempted."""
    status = RunStatus(folder, 0, {})
    status.progressed = lambda: saved
    with pytest.raises(Preempted), status:
        raise Preempted("SIGUSR1 reached rank 0")
    return status


def test_three_preempted_attempts_without_a_checkpoint_are_stuck(tmp_path: Path) -> None:
    assert [preempt(tmp_path, saved=False).is_stuck for _ in range(2)] == [False, False]
    assert not preempt(tmp_path, saved=True).is_stuck  # the count begins anew
    assert [preempt(tmp_path, saved=False).is_stuck for _ in range(3)] == [False, False, True]
    assert json.loads((tmp_path / "status.json").read_text())["attempt"] == 6


def test_an_attempt_that_ends_before_the_run_has_a_folder_counts(tmp_path: Path) -> None:
    """A signal while the data are prepared."""
    for stuck in (False, False, True):
        status = RunStatus(tmp_path / "run", 0, {})
        status.preempted("outside the training loop")
        assert status.is_stuck == stuck


def test_a_signal_that_ends_the_attempt_without_a_rerun_does_not_count(tmp_path: Path) -> None:
    for _ in range(3):
        status = RunStatus(tmp_path, 0, {})
        with pytest.raises(SystemExit), status:
            sys.exit(143)
        assert not status.is_stuck


@pytest.mark.parametrize("text", ["", "[]", "{", '{"state": "done"}', "[" * 100000])
def test_a_damaged_status_is_not_done(tmp_path: Path, text: str) -> None:
    (tmp_path / "status.json").write_text(text)
    assert is_done(tmp_path, {}) is None


def test_other_ranks_write_no_status(tmp_path: Path) -> None:
    with RunStatus(tmp_path, 1, {}):
        pass
    assert list(tmp_path.iterdir()) == []
