"""What scripts/train.sbatch does after srun has ended, with stand-ins for Slurm; make test-slurm has the real one."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

STAND_INS = {
    "scontrol": 'echo "$*" >> "$CALLS"; echo node1',
    "squeue": 'echo "${STATE:-RUNNING}"',
    # The probe of the nodes comes with --overlap.
    "srun": 'echo "srun $*" >> "$CALLS"; [[ "$*" == *--overlap* ]] && exit "${PROBE:-0}"; exit "${CODE:-0}"',
    "sleep": "",
}


def submit(folder: Path, *arguments: str, script: str = "train", **environment: str) -> tuple[int, str, str]:
    """Return the script's exit code, its last line without time and place, and the calls of Slurm's commands."""
    for name, body in STAND_INS.items():
        (folder / name).write_text(f"#!/bin/bash\n{body}\n")
        (folder / name).chmod(0o755)
    calls = folder / "calls"
    calls.write_text("")
    path = {"PATH": f"{folder}:{os.environ['PATH']}", "CALLS": str(calls), "VENV": ""}
    job = {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "node[1-2]", "SLURM_JOB_NUM_NODES": "2"}
    done = subprocess.run(
        ["bash", str(ROOT / "scripts" / f"{script}.sbatch"), *arguments],
        env=os.environ | path | job | environment,
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    last = done.stderr.splitlines()[-1]
    return done.returncode, last.partition("node[1-2]: ")[2] or last, calls.read_text()


@pytest.mark.parametrize(
    ("environment", "line", "requeued"),
    [
        ({"CODE": "0"}, "done", False),
        ({"CODE": "85"}, "queued again: preempted", True),
        ({"CODE": "85", "STATE": "COMPLETING"}, "not queued again: the job was cancelled", False),
        ({"CODE": "85", "SLURM_RESTART_COUNT": "99"}, "queued again: preempted", True),
        (
            {"CODE": "85", "SLURM_RESTART_COUNT": "100"},
            "not queued again: preempted, but it was queued again max_requeues=100 times",
            False,
        ),
        ({"CODE": "2"}, "not queued again: exit code 2, a mistake, or no progress in several attempts", False),
        ({"CODE": "143"}, "not queued again: exit code 143; the first error above names the cause", False),
        ({"CODE": "137", "PROBE": "1"}, "queued again: a node does not answer", True),
        ({"CODE": "143", "PROBE": "1", "STATE": "COMPLETING"}, "not queued again: exit code 143", False),
        ({"CODE": "90"}, "not queued again: srun failed three times", False),
    ],
)
def test_only_what_makes_progress_is_queued_again(
    tmp_path: Path, environment: dict[str, str], line: str, requeued: bool
) -> None:
    code, last, calls = submit(tmp_path, "clm", "+config=quickstart", **environment)
    assert (str(code), last.startswith(line)) == (environment["CODE"], True), last
    assert ("requeue 7" in calls.splitlines()) == requeued


def test_a_requeued_run_resumes_and_other_recipes_do_not_know_that_key(tmp_path: Path) -> None:
    *_, calls = submit(tmp_path, "qa", "resume=never", SLURM_RESTART_COUNT="1")
    assert "python recipes/qa.py resume=never resume=auto\n" in calls
    *_, calls = submit(tmp_path, "prepare_data", "inspect=1", SLURM_RESTART_COUNT="1")
    assert "python recipes/prepare_data.py inspect=1\n" in calls


def test_recipes_without_checkpoints_are_queued_again_three_times(tmp_path: Path) -> None:
    for count, requeued in (("2", True), ("3", False)):
        *_, calls = submit(tmp_path, "prepare_data", CODE="85", SLURM_RESTART_COUNT=count)
        assert ("requeue 7" in calls.splitlines()) == requeued


def test_the_short_script_runs_clm(tmp_path: Path) -> None:
    code, last, calls = submit(tmp_path, "+config=quickstart", script="clm")
    assert (code, last) == (0, "done")
    assert "python recipes/clm.py +config=quickstart\n" in calls


def test_a_recipe_that_does_not_exist_is_named(tmp_path: Path) -> None:
    code, last, calls = submit(tmp_path, "clmm")
    assert (code, calls) == (2, "")
    assert (
        last
        == f"error: {ROOT}/recipes/clmm.py: no such recipe; submit from the repository root and name one of recipes/"
    )
