"""Leave a job alone on a real Slurm of two nodes: make test-slurm."""

from __future__ import annotations

import json
import os
import re
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from outcomes import Outcomes
from slurm_cluster import ROOT, Job, SlurmCluster, job_environment, losses, steps_done, why_not_here
from tiny_run import STEPS, TEXT, arguments, make_inputs

pytestmark = pytest.mark.slurm


@pytest.fixture(scope="module")
def outcomes() -> Iterator[Outcomes]:
    table = Outcomes("slurm", "Jobs on a Slurm of two nodes", "make test-slurm")
    yield table
    table.write()


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("inputs")
    make_inputs(folder)
    return folder


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SlurmCluster]:
    # A failure, not a skip: who asks for these tests must not take their absence for success.
    assert why_not_here() == ""
    folder = tmp_path_factory.mktemp("slurm")
    with SlurmCluster(folder) as slurm:
        slurm.env |= job_environment()
        yield slurm


@pytest.fixture(scope="module")
def undisturbed(cluster: SlurmCluster, inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[int, float]:
    """The losses of a run that nothing disturbs."""
    folder = tmp_path_factory.mktemp("undisturbed")
    job = start(cluster, inputs, folder)
    assert job.end() == "COMPLETED", job.log
    found = losses(folder / "run")
    assert len(found) == STEPS
    return found


def start(cluster: SlurmCluster, inputs: Path, folder: Path, *more: str, options: tuple[str, ...] = ()) -> Job:
    return cluster.submit(folder / "log", "clm", *arguments(inputs, folder / "run", *more), options=options)


def reasons(job: Job) -> list[str]:
    """The batch script's own lines, without time and place."""
    prefix = rf"\d{{4}}-\d\d-\d\d \d\d:\d\d:\d\d job {job.number}, attempt (\d+) on node\[1-2\]: "
    return [f"{match[1]}: {match[2]}" for match in re.finditer(rf"^{prefix}(.*)$", job.log, flags=re.M)]


def wait_for_steps(job: Job, folder: Path, more: int = 10) -> None:
    """Wait until the job has done some steps more than the newest checkpoint has."""
    saved = [int(path.name[5:]) for path in (folder / "run" / "checkpoints").glob("step_*")]
    goal = max(saved, default=0) + more
    job.wait_for(lambda: steps_done(folder / "run") >= goal and job.state == "RUNNING", f"step {goal}")


def status(folder: Path) -> dict[str, object]:
    try:
        return json.loads((folder / "run" / "status.json").read_text())
    except OSError:
        return {}


def test_a_job_that_makes_progress_is_queued_again_until_it_is_done(
    cluster: SlurmCluster, inputs: Path, undisturbed: dict[int, float], tmp_path: Path, outcomes: Outcomes
) -> None:
    job = start(cluster, inputs, tmp_path)
    for restart in range(3):
        wait_for_steps(job, tmp_path)
        job.signal_batch("USR1")
        job.wait_for(lambda: job.restarts == restart + 1, "its requeue")  # noqa: B023
    assert job.end() == "COMPLETED", job.log
    assert losses(tmp_path / "run") == undisturbed
    lines = reasons(job)
    assert [line for line in lines if "queued again" in line] == [
        f"{number}: queued again: preempted" for number in (1, 2, 3)
    ]
    assert lines[-1] == "4: done"
    outcomes.add("warned before the time limit three times", "saved, queued again each time; losses as undisturbed")


def test_a_job_without_progress_ends_after_three_attempts(
    cluster: SlurmCluster, inputs: Path, tmp_path: Path, outcomes: Outcomes
) -> None:
    """As with a time limit that is too short to finish a step."""
    job = start(cluster, inputs, tmp_path)
    for attempt in (1, 2, 3):
        # This line comes when the ranks have met, and before the engine is built. Earlier, a rank that still imports
        # has no handler yet.
        job.wait_for(lambda: len(re.findall(r"^batch ", job.log, flags=re.M)) == attempt, "its start")  # noqa: B023
        job.signal_batch("USR1")
        if attempt < 3:
            job.wait_for(lambda: job.restarts == attempt, "its requeue")  # noqa: B023
    assert job.end() == "FAILED"
    assert job.exit_code() == 2
    assert "error: attempt 3 is the last of 3 in a row that saved no new checkpoint" in job.log
    assert reasons(job)[-1].startswith("3: not queued again: exit code 2, ")
    outcomes.add("warned before the first step, each time", "queued again twice, then ended with the reason (code 2)")


def test_a_disk_that_is_not_mounted_on_one_node_ends_the_job(
    cluster: SlurmCluster, inputs: Path, tmp_path: Path, outcomes: Outcomes
) -> None:
    own_inputs = tmp_path / "disk"
    shutil.copytree(inputs, own_inputs)
    cluster.mount("node2", "mount", "-t", "tmpfs", "tmpfs", str(own_inputs))
    try:
        job = start(cluster, own_inputs, tmp_path)
        assert job.end() == "FAILED"
    finally:
        cluster.mount("node2", "umount", str(own_inputs))
    assert job.restarts == 0
    assert job.exit_code() in (2, 143)
    assert re.search(rf"error: \[rank 1\] .*{own_inputs}", job.log)
    assert "1: not queued again" in reasons(job)[-1]
    outcomes.add("data not mounted on node 2", f"ended at once, not queued again (code {job.exit_code()})")


def test_an_output_dir_of_its_own_on_one_node_ends_the_job_before_training(
    cluster: SlurmCluster, inputs: Path, tmp_path: Path, outcomes: Outcomes
) -> None:
    (tmp_path / "run").mkdir()
    cluster.mount("node2", "mount", "-t", "tmpfs", "tmpfs", str(tmp_path / "run"))
    try:
        job = start(cluster, inputs, tmp_path)
        assert job.end() == "FAILED"
    finally:
        cluster.mount("node2", "umount", str(tmp_path / "run"))
    assert job.exit_code() == 2
    assert job.restarts == 0
    assert f"error: output_dir={tmp_path}/run is not one folder for all ranks: rank 1 on node2 cannot see" in job.log
    assert not (tmp_path / "run" / "metrics.jsonl").exists()
    outcomes.add("output_dir private on node 2", "refused before training, nodes named (code 2)")


def test_other_data_on_one_node_end_the_job_before_training(
    cluster: SlurmCluster, inputs: Path, tmp_path: Path, outcomes: Outcomes
) -> None:
    other = tmp_path / "other.jsonl"
    other.write_text(json.dumps({"text": TEXT.replace("joy", "fun") * 20}) + "\n")
    cluster.mount("node2", "mount", "--bind", str(other), str(inputs / "train.jsonl"))
    try:
        job = start(cluster, inputs, tmp_path)
        assert job.end() == "FAILED"
    finally:
        cluster.mount("node2", "umount", str(inputs / "train.jsonl"))
    assert (job.exit_code(), job.restarts) == (2, 0)
    assert re.search(
        r"error: the ranks do not run the same job\. .*training and held-out batches: \w{8} on node1, \w{8} on node2\.",
        job.log,
    )
    outcomes.add("other data on node 2", "refused before training, nodes and cause named (code 2)")


def test_scancel_saves_and_does_not_queue_again(
    cluster: SlurmCluster, inputs: Path, tmp_path: Path, outcomes: Outcomes
) -> None:
    job = start(cluster, inputs, tmp_path, "max_steps=1000000")
    wait_for_steps(job, tmp_path)
    cluster.command("scancel", str(job.number))
    assert job.end() == "CANCELLED"
    job.wait_for(lambda: "saved" in job.log and status(tmp_path)["state"] == "stopped", "its save")
    assert job.restarts == 0
    step = status(tmp_path)["step"]
    assert (tmp_path / "run" / "checkpoints" / f"step_{step:08}" / "manifest.json").exists()
    outcomes.add("scancel", "saved within KillWait, CANCELLED, not queued again")


def test_a_warning_to_the_batch_script_saves_whatever_killwait_is(
    cluster: SlurmCluster, inputs: Path, tmp_path: Path, outcomes: Outcomes
) -> None:
    """The way to end a job whose save takes longer than KillWait: a STOP file keeps it from running on."""
    job = start(cluster, inputs, tmp_path, "max_steps=1000000")
    wait_for_steps(job, tmp_path)
    (tmp_path / "run" / "STOP").touch()
    job.wait_for(lambda: job.restarts == 1, "its requeue")
    assert job.end() == "FAILED"
    assert (job.exit_code(), status(tmp_path)["state"]) == (2, "stopped")
    outcomes.add("a STOP file", "saved, queued again once, then refused until the file is removed (code 2)")


def test_a_killed_rank_ends_the_job(cluster: SlurmCluster, inputs: Path, tmp_path: Path, outcomes: Outcomes) -> None:
    job = start(cluster, inputs, tmp_path, "max_steps=1000000")
    wait_for_steps(job, tmp_path)
    began = time.monotonic()
    job.rank_on("node2").kill()
    assert job.end() == "FAILED"
    assert job.restarts == 0
    assert job.exit_code() not in (0, 2, 85)
    assert "1: not queued again: exit code" in reasons(job)[-1]
    seconds = time.monotonic() - began
    outcomes.add("a rank killed", f"FAILED after {seconds:.0f} s, not queued again (code {job.exit_code()})")


def test_a_node_that_goes_down_and_comes_back(
    cluster: SlurmCluster, inputs: Path, undisturbed: dict[int, float], tmp_path: Path, outcomes: Outcomes
) -> None:
    job = start(cluster, inputs, tmp_path, "save_every=20")
    job.wait_for(lambda: list((tmp_path / "run" / "checkpoints").glob("step_*")), "a checkpoint")
    # All of the node at once. The other rank's connection breaks before Slurm notices.
    cluster.stop("node2", hard=True)
    try:
        job.wait_for(lambda: job.restarts == 1 or job.state == "FAILED", "what Slurm does")
        assert job.restarts == 1, job.log
    finally:
        cluster.start_node("node2")
    assert "1: queued again: a node does not answer" in reasons(job)
    assert job.end() == "COMPLETED", job.log
    assert losses(tmp_path / "run") == undisturbed
    outcomes.add("a node down", "queued again, resumed when the node was back; losses as undisturbed")


def test_preemption_by_a_partition_of_higher_priority(
    cluster: SlurmCluster, inputs: Path, undisturbed: dict[int, float], tmp_path: Path, outcomes: Outcomes
) -> None:
    job = start(cluster, inputs, tmp_path, options=("--exclusive",))
    wait_for_steps(job, tmp_path)
    urgent = tmp_path / "urgent.sh"
    urgent.write_text("#!/bin/bash\nsleep 5\n")
    options = ("--partition=urgent", "--exclusive")
    other = cluster.submit(tmp_path / "urgent.log", script=str(urgent), options=options)
    assert other.end() == "COMPLETED"
    job.wait_for(lambda: job.restarts == 1, "its requeue")
    assert job.end() == "COMPLETED", job.log
    assert "preempted after step" in job.log
    assert losses(tmp_path / "run") == undisturbed
    outcomes.add("preempted (GraceTime, send_user_signal)", "saved, queued again, resumed; losses as undisturbed")


def test_data_are_prepared_by_a_job_of_their_own(
    cluster: SlurmCluster, tmp_path: Path, undisturbed: dict[int, float], outcomes: Outcomes
) -> None:
    make_inputs(tmp_path / "inputs")
    one = ("--nodes=1", "--ntasks-per-node=1")
    words = [word for word in arguments(tmp_path / "inputs", tmp_path / "run") if not word.startswith("output_dir=")]
    first = cluster.submit(tmp_path / "prepare.log", "prepare_data", *words, options=one)
    job = start(cluster, tmp_path / "inputs", tmp_path, options=(f"--dependency=afterok:{first.number}",))
    assert first.end() == "COMPLETED", first.log
    assert job.end() == "COMPLETED", job.log
    assert losses(tmp_path / "run") == undisturbed
    outcomes.add("prepare_data, then clm with --dependency=afterok", "both COMPLETED; losses as undisturbed")


def test_a_fault_of_srun_is_tried_again_but_not_for_ever(
    cluster: SlurmCluster, inputs: Path, tmp_path: Path, outcomes: Outcomes
) -> None:
    """The hooks at the top of the script name a node that the job does not have."""
    script = (ROOT / "scripts" / "train.sbatch").read_text()
    edited = tmp_path / "edited.sbatch"
    edited.write_text(
        script.replace("srun_options=()", "srun_options=(--nodelist=node9)").replace("sleep 30", "sleep 1")
    )
    job = cluster.submit(tmp_path / "log", "clm", *arguments(inputs, tmp_path / "run"), script=str(edited))
    assert job.end() == "FAILED"
    assert (job.exit_code(), job.restarts) == (90, 0)
    assert len([line for line in reasons(job) if "srun itself failed" in line]) == 2
    assert reasons(job)[-1] == "1: not queued again: srun failed three times"
    outcomes.add("srun cannot start the step", "tried three times, then ended with the reason (code 90)")


def test_the_short_script_of_causal_lm_still_runs(
    cluster: SlurmCluster, inputs: Path, undisturbed: dict[int, float], tmp_path: Path, outcomes: Outcomes
) -> None:
    words = arguments(inputs, tmp_path / "run")
    job = cluster.submit(tmp_path / "log", *words, script="scripts/clm.sbatch")
    assert job.end() == "COMPLETED", job.log
    assert losses(tmp_path / "run") == undisturbed
    outcomes.add("scripts/clm.sbatch", "COMPLETED; losses as undisturbed")


@pytest.fixture(scope="module", autouse=True)
def _no_slurm_of_our_own() -> Iterator[None]:
    """These tests may themselves run in a Slurm job, whose variables the jobs must not inherit."""
    saved = {name: os.environ.pop(name) for name in list(os.environ) if name.startswith("SLURM_")}
    yield
    os.environ.update(saved)
