"""Whatever happens to Weights & Biases, the run continues: the real package against a server that fails."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from gptj_train.metrics_file import read_metrics

# Each run is a process of its own: the package keeps a service process and state.
RUN = """
import os, sys, time
from pathlib import Path

sys.path.insert(0, {tests!r})
from fake_wandb_server import FakeWandbServer

from gptj_train import tracking_services
from gptj_train.tracking import Tracker, TrackingConfig

failure, folder = sys.argv[1], Path(sys.argv[2])
tracking_services._ANSWER_WITHIN = 5.0
tracking_services._UPLOAD_WITHIN = 3.0
server = FakeWandbServer()
os.environ["WANDB_BASE_URL"] = server.url
os.environ["WANDB_API_KEY"] = "bad" if failure == "bad key" else "a" * 40
if failure == "no network":
    server.stop()
if failure == "no key":
    del os.environ["WANDB_API_KEY"]
if failure == "errors":
    server.failing = True
settings = TrackingConfig(tensorboard=False, wandb="online", project="tests", run_name=None)
tracker = Tracker(settings, folder, {{"seed": 0}}, 0)
tracker.start(0, 4)


def step(number):
    tracker.step({{"step": number, "loss": 4.0, "lr": 1e-3, "tokens": 100 * number, "tokens_per_second": 10.0,
                   "step_seconds": 0.25, "memory_gib": 1.5}})


step(1)
step(2)
if failure == "server gone":
    server.stop()
if failure == "errors in the middle":
    server.failing = True
if failure == "service killed":
    from pathlib import Path as P
    for entry in P("/proc").glob("[0-9]*/stat"):
        if entry.exists() and "wandb-core" in entry.read_text():
            fields = entry.read_text().rsplit(")", 1)[1].split()
            if int(fields[1]) == os.getpid():
                os.kill(int(entry.parent.name), 9)
    time.sleep(1)
step(3)
step(4)
began = time.monotonic()
tracker.finish()
assert time.monotonic() - began < 20
print("rows", sorted({{row["_step"] for row in server.rows}}))
print("all steps done", flush=True)
os._exit(0)
"""


def run(failure: str, folder: Path) -> str:
    """Return what a run of four steps prints."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("WANDB_")}
    for name in ("HOME", "WANDB_DIR", "WANDB_CONFIG_DIR", "WANDB_CACHE_DIR", "WANDB_DATA_DIR", "NETRC"):
        environment[name] = str(folder / "home")
    code = RUN.format(tests=str(Path(__file__).parent))
    command = [sys.executable, "-c", code, failure, str(folder / "run")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stdout + done.stderr
    assert done.stdout.endswith("all steps done\n")
    assert [line["step"] for line in read_metrics(folder / "run")] == [1, 2, 3, 4]
    return done.stdout


def test_all_is_well(tmp_path: Path) -> None:
    out = run("none", tmp_path)
    assert "rows [1, 2, 3, 4]" in out
    assert re.search(r"follow this run at http://127\.0\.0\.1:\d+/me/tests/runs/\w+\n", out)
    assert "sync" not in out


@pytest.mark.parametrize("failure", ["no network", "no key", "bad key", "errors"])
def test_without_a_start_online_the_run_is_logged_offline(tmp_path: Path, failure: str) -> None:
    out = run(failure, tmp_path)
    assert re.search(r"^cannot reach Weights & Biases \(.*\); logging offline$", out, re.MULTILINE)
    identity = (tmp_path / "run" / "wandb_id.txt").read_text()
    folders = tmp_path / "run" / "wandb"
    assert f"upload this run with: wandb sync --id {identity} {folders}/*-{identity}\n" in out
    assert len(list(folders.glob(f"offline-run-*-{identity}"))) == 1


@pytest.mark.parametrize("failure", ["server gone", "errors in the middle"])
def test_a_server_that_fails_later_leaves_the_rest_to_upload(tmp_path: Path, failure: str) -> None:
    out = run(failure, tmp_path)
    assert "Weights & Biases does not answer; upload the rest with: wandb sync --id " in out


def test_a_service_process_that_dies_ends_the_charts_only(tmp_path: Path) -> None:
    out = run("service killed", tmp_path)
    assert re.search(r"Weights & Biases (failed|does not answer)", out)
