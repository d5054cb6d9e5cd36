"""A rank knows the processes that launched it from its first import on, and notices when one of them is gone."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from gptj_train.launch import launchers

RANK = """
import json, sys, time
time.sleep(float(sys.argv[2]))
from gptj_train.launch.launchers import AT_START, launcher_has_exited
assert "torch" not in sys.modules
first = launcher_has_exited()
with open(sys.argv[1] + ".tmp", "w") as file:
    json.dump([AT_START, first], file)
__import__("os").rename(sys.argv[1] + ".tmp", sys.argv[1])
while not launcher_has_exited():
    time.sleep(0.05)
open(sys.argv[1] + ".noticed", "w").close()
"""
# Starts a rank as a launcher does, says so, and waits.
LAUNCH = """
import subprocess, sys, time
process = subprocess.Popen([sys.executable, *sys.argv[1:]])
print(process.pid, flush=True)
time.sleep(60)
"""


def wait_for(path: Path) -> None:
    with subprocess.Popen(["timeout", "60", "sh", "-c", f"until test -e '{path}'; do sleep 0.05; done"]) as waiting:
        assert waiting.wait() == 0, path


@pytest.mark.parametrize("moment", ["while Python starts", "later"])
@pytest.mark.parametrize("launcher", ["torchrun", "launch.py", "deepspeed"])
def test_a_launcher_that_dies_is_noticed(tmp_path: Path, launcher: str, moment: str) -> None:
    """Of deepspeed's two processes, the one under the command starts the ranks."""
    rank = ["-c", RANK, str(tmp_path / "rank"), "1" if moment == "while Python starts" else "0"]
    command = [sys.executable, "-c", LAUNCH, *rank]
    if launcher != "torchrun":
        command = [sys.executable, "-c", LAUNCH, "-c", LAUNCH, *rank]
    variable = {"TORCHELASTIC_RUN_ID": "1"} if launcher == "torchrun" else {"CROSS_RANK": "0"}
    environment = {name: value for name, value in os.environ.items() if name != "CROSS_RANK"} | variable
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as top:
        assert top.stdout is not None
        pids = [int(top.stdout.readline()) for _ in range(1 if launcher == "torchrun" else 2)]
        if moment == "later":
            wait_for(tmp_path / "rank")
        os.kill(pids[0] if launcher == "launch.py" else top.pid, signal.SIGKILL)
        if launcher == "launch.py":
            top.kill()
        wait_for(tmp_path / "rank.noticed")
        at_start, first = json.loads((tmp_path / "rank").read_text())
        assert first is (moment == "while Python starts")
        assert len(at_start) == (1 if launcher == "torchrun" else 2)
        for pid in pids:
            if psutil.pid_exists(pid):
                os.kill(pid, signal.SIGKILL)


def test_without_a_launcher_there_is_none_to_lose() -> None:
    assert launchers.launchers() == launchers.AT_START == ()
    assert not launchers.launcher_has_exited()


def test_a_parent_that_exits_while_it_is_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    def gone(pid: int) -> None:
        raise psutil.NoSuchProcess(pid)

    monkeypatch.setenv("CROSS_RANK", "0")
    monkeypatch.setattr(psutil, "Process", gone)
    assert launchers.launchers() == (os.getppid(), 0)


@pytest.mark.parametrize(
    ("pid", "name", "command", "adopts"),
    [
        (1, "init", ["/sbin/init"], True),
        (1, "python3", ["/usr/bin/python3", "/usr/bin/torchrun"], False),  # a container's first process
        (700, "systemd", ["/lib/systemd/systemd", "--user"], True),
        (701, "bash", ["bash"], False),
        (702, "sshd", ["sshd: someone"], False),
    ],
)
def test_who_adopts_orphans(
    monkeypatch: pytest.MonkeyPatch, pid: int, name: str, command: list[str], adopts: bool
) -> None:
    class Process:
        def __init__(self, pid: int) -> None:
            self.pid = pid

        def name(self) -> str:
            return name

        def cmdline(self) -> list[str]:
            return command

    monkeypatch.setattr(psutil, "Process", Process)
    assert launchers._adopts_orphans(pid) is adopts
