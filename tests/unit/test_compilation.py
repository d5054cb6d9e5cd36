"""Extensions compile one process at a time; the lock of a killed one stops nobody."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from gptj_train.launch import compilation
from gptj_train.launch.compilation import alone_in, compile_under_lock

# A build as torch's: it holds the file "lock" while a compiler works in the folder.
BUILD = """
import os, sys
from pathlib import Path
from gptj_train.launch import compilation
folder = Path(sys.argv[1])
os.environ["LOCAL_RANK"] = "0"
compilation._SAYS_EVERY = 0.3
class Builder:
    name = "tiny"
    def jit_load(self):
        print("building", flush=True)
        with open(folder / "lock", "x"):  # as torch.utils.file_baton does
            import time, subprocess
            if sys.argv[2] == "hang":
                subprocess.run(["sleep", "60"], cwd=folder, check=True)
            (folder / "tiny.so").touch()
        (folder / "lock").unlink()
compilation.compile_under_lock(Builder, lambda name: folder)
compilation.compile_under_lock(Builder, lambda name: folder)  # a second time changes nothing
Builder().jit_load()
print("built", flush=True)
"""


def build(folder: Path, how: str) -> subprocess.Popen[str]:
    return subprocess.Popen([sys.executable, "-c", BUILD, folder, how], stdout=subprocess.PIPE, text=True)


def children(process: subprocess.Popen[str]) -> list[int]:
    listed = subprocess.run(["ps", "-o", "pid=", "--ppid", str(process.pid)], capture_output=True, text=True)
    return [int(pid) for pid in listed.stdout.split()]


def test_a_killed_build_stops_nobody(tmp_path: Path) -> None:
    """Its lock file stays behind, and its compiler runs on for a while: the next build waits for that alone."""
    first = build(tmp_path, "hang")
    assert first.stdout is not None
    lines: list[str] = []
    while not lines or lines[-1] != "building\n":
        lines.append(first.stdout.readline())
    # On a busy machine progress is due before the work begins.
    told = [line for line in lines if not line.startswith(("waiting", "compiling"))]
    assert told == ["Compiling DeepSpeed's tiny; once per installation, about a minute ...\n", "building\n"]
    while not (compilers := children(first)):
        time.sleep(0.02)
    second = build(tmp_path, "")
    assert second.stdout is not None
    waiting = second.stdout.readline()
    assert waiting.startswith("waiting for DeepSpeed's tiny (process ")
    assert f"(process {first.pid} on " in waiting
    first.send_signal(signal.SIGKILL)
    first.wait()
    assert (tmp_path / "lock").exists()
    while "another build" not in waiting:
        waiting = second.stdout.readline()
        assert waiting.startswith("waiting for"), waiting
    while "sleep, process " not in waiting:
        waiting = second.stdout.readline()
        assert waiting.startswith("waiting for"), waiting
    assert f"(another build in {tmp_path}: sleep, process {compilers[0]})" in waiting
    assert not (tmp_path / "tiny.so").exists()
    for pid in compilers:
        os.kill(pid, signal.SIGKILL)
    rest, _ = second.communicate(timeout=30)
    assert rest.endswith("building\nbuilt\n")
    assert second.returncode == 0
    assert not (tmp_path / "lock").exists()


def test_torchs_lock_of_a_dead_process_goes_at_once(tmp_path: Path) -> None:
    (tmp_path / "lock").touch()
    began = time.monotonic()
    with alone_in(tmp_path, "tiny"):
        assert not (tmp_path / "lock").exists()
    assert time.monotonic() - began < 5


def test_torchs_lock_of_a_living_process_is_respected(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A program without our lock may build in the same folder."""
    hold = (
        "import os, sys, time; os.open(sys.argv[1], os.O_CREAT | os.O_EXCL); print('held', flush=True); time.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", hold, tmp_path / "lock"], stdout=subprocess.PIPE) as other:
        assert other.stdout is not None
        other.stdout.readline()
        assert compilation._user_of(tmp_path) == f"{psutil.Process(other.pid).name()}, process {other.pid}"
        other.kill()
        other.wait()
        assert compilation._user_of(tmp_path) is None


def test_on_a_disk_without_locks_age_tells(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_locks(*_: object) -> None:
        raise OSError(37, "No locks available")

    monkeypatch.setattr(compilation.fcntl, "lockf", no_locks)
    (tmp_path / "lock").touch()
    with alone_in(tmp_path, "tiny"):
        assert (tmp_path / "lock").exists()
    os.utime(tmp_path / "lock", (0, 0))
    with alone_in(tmp_path, "tiny"):
        assert not (tmp_path / "lock").exists()


def test_deepspeeds_builders_are_under_our_lock(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    class Builder:
        name = "tiny"

        def jit_load(self, verbose: bool = True) -> str:
            return f"loaded, verbose={verbose}"

    compile_under_lock(Builder, lambda name: tmp_path)
    (tmp_path / "tiny.so").touch()
    assert Builder().jit_load(verbose=False) == "loaded, verbose=False"
    assert "Compiling" not in capfd.readouterr().out
