"""Stop a run in every way: signals, a stop file, a dying launcher or rank, Slurm's time limit."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from gptj_train.data.tokenizer import Tokenizer

pytestmark = pytest.mark.distributed

ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent
TEXT = "One for sorrow, two for joy, three for a girl, four for a boy. "
LAUNCHERS = {
    "python": [sys.executable],
    "deepspeed": [str(BIN / "deepspeed"), "-q", "--num_gpus", "2", "--master_port", "{port}"],
    "torchrun": [str(BIN / "torchrun"), "--nproc-per-node", "2", "--master-port", "{port}"],
}
PREEMPTED = 85


class Run:
    """A training run in the background, of a million steps."""

    def __init__(self, folder: Path, launcher: str, *overrides: str, **environment: str) -> None:
        self.folder = folder / "run"
        self.began_after = self.steps()
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = str(probe.getsockname()[1])
        tiny = ["model.n_layer=1", "model.n_embd=16", "model.n_head=2", "model.rotary_dim=4", "model.vocab_size=300"]
        short = ["model.n_positions=16", "sequence_length=16", "global_batch_size=2", "micro_batch_size=1"]
        endless = ["max_steps=1000000", "eval_every=0", "save_every=0", "optim.lr=1e-4", "hang_timeout=60"]
        paths = ["output_dir={}/run", "tokenizer={}/tokenizer", "data.train={}/train.jsonl", "data.cache_dir={}/cache"]
        arguments = [*tiny, *short, *endless, "data.validation=null", *(path.format(folder) for path in paths)]
        self.process = subprocess.Popen(
            [part.format(port=port) for part in LAUNCHERS[launcher]]
            + [str(ROOT / "recipes/clm.py"), "+config=quickstart", *arguments, *overrides],
            env=os.environ | {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"} | environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,  # as a terminal's job: Ctrl-C goes to the whole group
        )
        self.all: list[psutil.Process] = []

    def steps(self) -> int:
        try:
            lines = (self.folder / "metrics.jsonl").read_text().splitlines()
            return json.loads(lines[-1])["step"]
        except (OSError, IndexError, ValueError):
            return 0

    def after_some_steps(self) -> Run:
        deadline = time.monotonic() + 120
        while self.steps() < self.began_after + 3:
            assert self.process.poll() is None, self.process.communicate()
            assert time.monotonic() < deadline
            time.sleep(0.1)
        self.all = psutil.Process(self.process.pid).children(recursive=True)
        return self

    def once_ranks_import(self) -> Run:
        """Wait until both ranks of a launcher have started; they import torch for seconds."""
        deadline = time.monotonic() + 120
        while sum("--local_rank" in " ".join(_words(process)) for process in self.all) < 2:
            assert self.process.poll() is None, self.process.communicate()
            assert time.monotonic() < deadline
            time.sleep(0.05)
            # launch.py has the ranks' arguments too, but not the launcher's own --local_rank.
            self.all = psutil.Process(self.process.pid).children(recursive=True)
        return self

    def rank(self, number: int) -> psutil.Process:
        def is_rank(process: psutil.Process) -> bool:
            return "clm.py" in " ".join(process.cmdline()) and process.environ().get("RANK") == str(number)

        return next(process for process in [*self.all, psutil.Process(self.process.pid)] if is_rank(process))

    def end(self, seconds: float = 90) -> tuple[int, str]:
        """Exit code and stderr, once no process of the run is left."""
        self.stdout, stderr = self.process.communicate(timeout=seconds)
        _, alive = psutil.wait_procs(self.all, timeout=seconds)
        assert alive == []
        return self.process.returncode, stderr

    def checkpoint(self) -> int:
        """Step of the newest one."""
        return max(int(path.name.removeprefix("step_")) for path in (self.folder / "checkpoints").glob("step_*"))


def _words(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.Error:
        return []


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("interruptions")
    (folder / "train.jsonl").write_text(json.dumps({"text": TEXT * 20}) + "\n")
    (folder / "tokenizer").mkdir()
    Tokenizer.train([TEXT], 300).save(folder / "tokenizer")
    return folder


@pytest.fixture
def start(place: Path) -> Iterator[Callable[..., Run]]:
    """Start runs, each of which resumes the last one; none is left behind."""
    runs: list[Run] = []

    def begin(launcher: str, *overrides: str, **environment: str) -> Run:
        runs.append(Run(place, launcher, *overrides, **environment))
        return runs[-1]

    yield begin
    for run in runs:
        for process in [*run.all, run.process]:
            if isinstance(process, subprocess.Popen) or process.is_running():
                process.kill()


def assert_stopped(run: Run, stderr: str, why: str) -> None:
    message = [line for line in stderr.splitlines() if line.startswith("stopped: ")]
    assert len(message) == 1, stderr
    found = re.fullmatch(rf"stopped: {why}: preempted after step (?P<step>\d+) of 1000000, saved", message[0])
    assert found, message
    assert "Traceback" not in stderr
    assert int(found["step"]) == run.checkpoint() == run.steps() > run.began_after
    assert {path.name for path in run.folder.iterdir()} <= {
        "checkpoints",
        "config.yaml",
        "metrics.jsonl",
        "STOP",
        "status.json",
        "environment.json",
        "report.html",
        ".lock",
    }
    assert json.loads((run.folder / "status.json").read_text())["state"] == "stopped"


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM])
def test_a_signal_to_one_rank_stops_all_ranks(start: Callable[..., Run], number: signal.Signals) -> None:
    run = start("deepspeed").after_some_steps()
    run.rank(1).send_signal(number)
    code, stderr = run.end()
    assert code == PREEMPTED
    assert_stopped(run, stderr, f"{number.name} reached rank 1")


def test_a_stop_file_stops_all_ranks(start: Callable[..., Run]) -> None:
    run = start("deepspeed").after_some_steps()
    stop = run.folder / "STOP"
    stop.touch()
    try:
        code, stderr = run.end()
        assert code == PREEMPTED
        assert_stopped(run, stderr, f"found {stop}; remove it before you rerun")
        # The next start is refused: tests/recipes/test_mistakes.py has that.
    finally:
        stop.unlink()


@pytest.mark.parametrize(
    ("level", "number", "code", "why"),
    [
        (0, signal.SIGTERM, -signal.SIGTERM, "the launcher of rank 0 has exited"),
        (1, signal.SIGTERM, 1, "SIGTERM reached rank [01]"),
        (1, signal.SIGKILL, 0, "the launcher of rank 0 has exited"),
    ],
    ids=["deepspeed", "its child", "its child killed"],
)
def test_a_launcher_that_dies_leaves_a_run_that_saves_and_ends(
    start: Callable[..., Run], level: int, number: signal.Signals, code: int, why: str
) -> None:
    """The deepspeed command and the process it starts, which starts the ranks, do not care for each other."""
    run = start("deepspeed").after_some_steps()
    process = psutil.Process(run.process.pid)
    (process.children()[0] if level else process).send_signal(number)
    ended_with, stderr = run.end()
    assert ended_with == code
    assert_stopped(run, stderr, why)


@pytest.mark.parametrize("level", [0, 1], ids=["deepspeed", "its child"])
def test_a_launcher_that_dies_before_training_leaves_no_rank(start: Callable[..., Run], level: int) -> None:
    """The ranks know it from their first import, and end without a step."""
    run = start("deepspeed").once_ranks_import()
    process = psutil.Process(run.process.pid)
    (process.children()[0] if level else process).kill()
    _, stderr = run.end(120)
    assert run.steps() == run.began_after
    assert stderr.count("stopped: the launcher has exited outside the training loop; rerun the command\n") == 2
    assert "Traceback" not in stderr


@pytest.mark.parametrize(
    ("launcher", "number", "key"),
    [
        ("deepspeed", signal.SIGINT, "Ctrl-C"),
        ("torchrun", signal.SIGINT, "Ctrl-C"),
        ("deepspeed", signal.SIGQUIT, "Ctrl-\\"),
        ("deepspeed", signal.SIGHUP, None),
    ],
)
def test_a_key_or_a_closed_terminal_saves(
    start: Callable[..., Run], launcher: str, number: signal.Signals, key: str | None
) -> None:
    """The terminal sends it to the launcher and the ranks at once; launchers may pass it on once more."""
    run = start(launcher).after_some_steps()
    os.killpg(run.process.pid, number)
    _, stderr = run.end()
    assert run.checkpoint() == run.steps() > run.began_after
    assert json.loads((run.folder / "status.json").read_text())["state"] == "stopped"
    assert stderr.count("once more ends at once") == (key is not None)
    assert key is None or f"{key}: finishing the step and saving; once more ends at once" in stderr
    # The launchers print tracebacks of their own.
    assert "clm.py" not in "".join(re.findall(r'^  File ".*"', stderr, re.MULTILINE))
    assert not (run.folder / "stacks").exists()


@pytest.mark.parametrize("to_launcher", [True, False])
def test_torchrun_forwards_a_signal_and_exits_with_its_own_code(start: Callable[..., Run], to_launcher: bool) -> None:
    run = start("torchrun").after_some_steps()
    (run.process if to_launcher else run.rank(1)).send_signal(signal.SIGTERM)
    code, _ = run.end()
    assert code == 1
    assert run.checkpoint() == run.steps() > run.began_after


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_plain_python_is_a_rank(start: Callable[..., Run], number: signal.Signals) -> None:
    run = start("python", "resume=never").after_some_steps()
    run.process.send_signal(number)
    code, stderr = run.end()
    assert code == PREEMPTED
    assert_stopped(run, stderr, f"{number.name} reached rank 0")


@pytest.mark.parametrize(("number", "limit"), [(signal.SIGKILL, 30), (signal.SIGSTOP, 45)])
def test_a_rank_that_dies_or_hangs_ends_the_job(start: Callable[..., Run], number: signal.Signals, limit: int) -> None:
    """The launcher gives the rank that hangs 30 seconds more than hang_timeout."""
    run = start("deepspeed", "hang_timeout=5").after_some_steps()
    began = time.monotonic()
    run.rank(1).send_signal(number)
    code, stderr = run.end()
    assert time.monotonic() - began < limit
    assert code not in (0, PREEMPTED)
    assert "train_step" in (run.folder / "stacks" / "rank_0.txt").read_text()
    if number == signal.SIGSTOP:
        assert f"error: rank 0 made no progress for 5 s (hang_timeout); its stacks: {run.folder}/stacks/" in stderr


def test_slurms_time_limit_stops_a_run_and_no_secret_is_written(start: Callable[..., Run]) -> None:
    """The run folder, Weights & Biases' part of it and the screen hold none of the environment's secrets."""
    canary = "c4n4ry" * 6 + "0000"  # as long as a W&B key
    secrets = dict.fromkeys(("WANDB_API_KEY", "HF_TOKEN", "AWS_SECRET_ACCESS_KEY", "MY_PASSWORD"), canary)
    soon = str(int(time.time()) + 300)
    run = start("python", "tracking.wandb=offline", "resume=never", SLURM_JOB_END_TIME=soon, **secrets)
    code, stderr = run.end()
    assert code == PREEMPTED
    assert re.fullmatch(r"stopped: the Slurm job ends in \d+ s: preempted after step 1 of 1000000, saved\n", stderr)
    files = [file for file in run.folder.rglob("*") if file.is_file()]
    assert any(file.suffix == ".wandb" for file in files)
    assert [file for file in files if canary.encode() in file.read_bytes()] == []
    assert canary not in stderr + run.stdout
