"""Every signal that asks for an end is noted; a second key press ends at once and leaves no empty file."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from gptj_train.errors import UserError
from gptj_train.launch.activity import activity
from gptj_train.launch.preemption import SIGNALS, StopRequest
from gptj_train.launch.ranks import port_in_use_is_a_mistake
from gptj_train.launch.recipe import recipe
from gptj_train.schema import schema

IN_LOOP = """
import os, signal, sys, time
from gptj_train.launch.preemption import StopRequest
from gptj_train.launch.watchdog import Watchdog
with StopRequest(sys.argv[1], None, 0), Watchdog(sys.argv[1], 0, 0, 1):
    print("ready", flush=True)
    time.sleep(60)
"""


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_is_a_reason_to_stop(tmp_path: Path, number: signal.Signals) -> None:
    with StopRequest(tmp_path, None, 3) as request:
        os.kill(os.getpid(), number)
        assert request.reason(0, 0) == f"{number.name} reached rank 3"
    assert {"SIGUSR1", "SIGUSR2", "SIGTERM", "SIGINT", "SIGQUIT", "SIGHUP"} == {number.name for number in SIGNALS}


@pytest.mark.parametrize("numbers", [(signal.SIGTERM, signal.SIGINT), (signal.SIGINT, signal.SIGTERM)])
def test_a_key_is_the_reason_though_the_launcher_answers_it_by_sigterm(
    tmp_path: Path, numbers: tuple[signal.Signals, ...]
) -> None:
    with StopRequest(tmp_path, None, 3) as request:
        for number in numbers:
            os.kill(os.getpid(), number)
        assert request.reason(0, 0) == "SIGINT reached rank 3"


@pytest.mark.parametrize(("number", "key"), [(signal.SIGINT, "Ctrl-C"), (signal.SIGQUIT, "Ctrl-\\")])
def test_a_second_key_press_ends_at_once(tmp_path: Path, number: signal.Signals, key: str) -> None:
    command = [sys.executable, "-c", IN_LOOP, tmp_path]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stdout.readline() == "ready\n"
        assert (tmp_path / "stacks").is_dir()
        process.send_signal(number)
        assert process.stderr.readline() == "\n"
        assert process.stderr.readline() == f"{key}: finishing the step and saving; once more ends at once\n"
        # The launcher passes the same press on: it is no second one.
        process.send_signal(number)
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(1.2)
        process.send_signal(number)
        assert process.wait(30) == 130
        assert process.stderr.read() == ""
    assert list(tmp_path.iterdir()) == []


def test_what_a_signal_interrupts_is_named() -> None:
    """The room that the recipe called counts, not the one that works for it."""
    rooms: dict[str, object] = {}
    source = "import sys\ndef call(inner): return inner()\n"
    for room in ("gptj_train.data.corpus", "gptj_train.export.from_engine", "gptj_train.weights.slices"):
        module = {"__name__": room}
        exec(source, module)
        rooms[room] = module["call"]
    in_data, in_export, in_weights = rooms.values()
    assert callable(in_data)
    assert callable(in_export)
    assert callable(in_weights)
    assert in_data(lambda: activity(sys._getframe())) == "while it prepared data"
    assert in_export(lambda: in_weights(lambda: activity(sys._getframe()))) == "while it exported the model"
    assert in_weights(lambda: activity(sys._getframe())) == "outside the training loop"


def test_a_port_in_use_is_a_mistake(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MASTER_PORT", "29500")
    advice = r"port 29500 on .* is in use by another process; .*--master_port=PORT"
    with pytest.raises(UserError, match=advice), port_in_use_is_a_mistake():
        raise RuntimeError("The server socket has failed to listen ... name: EADDRINUSE, message: address in use")
    with pytest.raises(RuntimeError, match="something else"), port_in_use_is_a_mistake():
        raise RuntimeError("something else")


@schema
class NoConfig:
    """A recipe's config without keys."""


FAULTS = {
    errno.ENOSPC: "No space left on device; free or mend the disk, or give another place",
    errno.EDQUOT: "Disk quota exceeded; free or mend the disk",
    errno.EIO: "Input/output error; free or mend the disk",
    errno.EROFS: "Read-only file system; free or mend the disk",
    errno.ESTALE: "Stale file handle; free or mend the disk",
    errno.EACCES: "Permission denied; correct the permissions, or give another place",
    errno.EPERM: "Operation not permitted; correct the permissions",
}


@pytest.mark.parametrize("number", FAULTS)
def test_a_fault_of_the_disk_is_one_line(
    number: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Wherever it occurs, exit code 2; any other OSError is a bug of ours."""
    monkeypatch.setattr(sys, "argv", ["generate.py"])
    monkeypatch.setattr("gptj_train.launch.recipe.compose", lambda *_: None)
    monkeypatch.setattr("gptj_train.launch.recipe.with_local_folders", lambda config, weights: config)
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "0")

    @recipe(NoConfig, primary="generate")
    def failing(_: NoConfig) -> None:
        raise OSError(number, os.strerror(number), "/disk/file")

    with pytest.raises(SystemExit) as caught:
        failing()
    assert caught.value.code == 2
    message = capsys.readouterr().err
    assert message.startswith(f"error: /disk/file: {FAULTS[number]}")
    assert message.count("\n") == 1


def test_an_endless_message_is_cut(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    from gptj_train.launch.recipe import _mistake

    monkeypatch.setenv("RANK", "0")
    assert _mistake("begins " + "x" * 100_000 + " remedy") == 2
    message = capsys.readouterr().err
    assert len(message) < 2000
    assert message.startswith("error: begins x")
    assert message.endswith("x remedy\n")
