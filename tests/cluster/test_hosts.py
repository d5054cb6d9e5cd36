"""Runs on two hosts with ssh: ranks that differ, hosts that are missing, and a cable that is cut; make test-hosts."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from outcomes import Outcomes
from slurm_cluster import losses, steps_done
from ssh_hosts import HOSTS, ROOT, SshHosts, why_not_here
from tiny_run import STEPS, arguments, make_inputs

pytestmark = pytest.mark.hosts

RECIPE = str(ROOT / "recipes" / "clm.py")
LONGEST = 600  # seconds that a test waits for anything
# With these the ssh under pdsh ends 10 seconds after a host is gone; without, it waits for the limit of TCP.
ALIVE = {"PDSH_SSH_ARGS_APPEND": "-o ServerAliveInterval=5 -o ServerAliveCountMax=2 -o ConnectTimeout=10"}


@pytest.fixture(scope="module")
def outcomes() -> Iterator[Outcomes]:
    table = Outcomes("hosts", "Runs on two hosts with ssh", "make test-hosts")
    yield table
    table.write()


@pytest.fixture(scope="module")
def hosts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SshHosts]:
    # A failure, not a skip: who asks for these tests must not take their absence for success.
    assert why_not_here() == ""
    bin_folder = str(Path(sys.executable).parent)
    environment = {
        "PYTHONPATH": str(ROOT),
        "PATH": f"{bin_folder}:{os.environ['PATH']}",
        "DS_ACCELERATOR": "cpu",
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
    }
    with SshHosts(tmp_path_factory.mktemp("hosts"), environment) as both:
        yield both


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("inputs")
    make_inputs(folder)
    return folder


def start_rank(hosts: SshHosts, number: int, words: list[str]) -> subprocess.Popen[str]:
    """Start a rank by hand, each on its own host."""
    place = {"RANK": str(number), "LOCAL_RANK": "0", "WORLD_SIZE": "2"}
    address = {"MASTER_ADDR": HOSTS["host1"], "MASTER_PORT": "29500"}
    return hosts.start(f"host{number + 1}", sys.executable, RECIPE, *words, **place, **address)


def start_deepspeed(hosts: SshHosts, folder: Path, words: list[str], **environment: str) -> subprocess.Popen[str]:
    hostfile = folder / "hostfile"
    hostfile.write_text("".join(f"{host} slots=1\n" for host in HOSTS))
    launcher = [str(Path(sys.executable).with_name("deepspeed")), "-q", "--hostfile", str(hostfile)]
    return hosts.start("host1", *launcher, RECIPE, *words, **environment)


def wait_for_steps(hosts: SshHosts, run: subprocess.Popen[str], folder: Path) -> None:
    """Wait until the first checkpoint is saved and the next is still far: a cut in a save would last for an hour."""
    deadline = time.monotonic() + LONGEST
    while steps_done(folder / "run") < 105:
        assert run.poll() is None, hosts.log(run)
        assert time.monotonic() < deadline, hosts.log(run)
        time.sleep(0.2)


def errors(log: str) -> list[str]:
    return [line for line in log.splitlines() if line.startswith("error: ")]


def test_ranks_with_other_settings_end_before_training(
    hosts: SshHosts, inputs: Path, tmp_path: Path, outcomes: Outcomes
) -> None:
    words = arguments(inputs, tmp_path / "run")
    ranks = [start_rank(hosts, 0, words), start_rank(hosts, 1, [*words, "optim.lr=0.5", "max_steps=7"])]
    assert [rank.wait(LONGEST) for rank in ranks] == [2, 2]
    (line,) = errors(hosts.log(ranks[0]))
    assert f"max_steps: {STEPS} on host1, 7 on host2; optim.lr: 0.0001 on host1, 0.5 on host2. " in line
    assert not (tmp_path / "run" / "metrics.jsonl").exists()
    outcomes.add(
        "another learning rate and max_steps on host 2", "refused before training, hosts and keys named (code 2)"
    )


def test_an_output_dir_of_its_own_on_one_host(
    hosts: SshHosts, inputs: Path, tmp_path: Path, outcomes: Outcomes
) -> None:
    (tmp_path / "run").mkdir()
    mount = hosts.on("host2", "mount", "-t", "tmpfs", "tmpfs", str(tmp_path / "run"))
    subprocess.run(mount, check=True)
    try:
        words = arguments(inputs, tmp_path / "run")
        ranks = [start_rank(hosts, number, words) for number in range(2)]
        assert [rank.wait(LONGEST) for rank in ranks] == [2, 2]
    finally:
        subprocess.run(hosts.on("host2", "umount", str(tmp_path / "run")), check=True)
    (line,) = errors(hosts.log(ranks[0]))
    assert "is not one folder for all ranks: rank 1 on host2 cannot see the file that rank 0 wrote on host1" in line
    outcomes.add("output_dir private on host 2", "refused before training, hosts named (code 2)")


def test_a_host_that_never_comes(hosts: SshHosts, inputs: Path, tmp_path: Path, outcomes: Outcomes) -> None:
    rank = start_rank(hosts, 0, arguments(inputs, tmp_path / "run", "rendezvous_timeout=40"))
    assert rank.wait(LONGEST) == 2
    log = hosts.log(rank)
    assert re.search(
        r"^\d\d:\d\d:\d\d host1: waiting for rank 1 \(have 1 of 2\) at 10\.77\.0\.1:29500$", log, flags=re.M
    )
    (line,) = errors(log)
    assert line.startswith("error: rank 1 did not come to 10.77.0.1:29500 within 40 s (rendezvous_timeout), 1 of 2 did")
    outcomes.add(
        "host 2 never starts", "a line every 30 s; ended after rendezvous_timeout, missing rank named (code 2)"
    )


def test_deepspeed_with_an_unreachable_host(hosts: SshHosts, inputs: Path, tmp_path: Path, outcomes: Outcomes) -> None:
    hosts.pull_out("host2")
    try:
        run = start_deepspeed(hosts, tmp_path, arguments(inputs, tmp_path / "run", "rendezvous_timeout=40"), **ALIVE)
        began = time.monotonic()
        code = run.wait(LONGEST)
        seconds = time.monotonic() - began
    finally:
        hosts.plug_in("host2")
    assert code != 0
    log = hosts.log(run)
    assert "host2" in log
    outcomes.add("deepspeed, host 2 unreachable at the start", f"ended after {seconds:.0f} s (code {code})")


def test_deepspeed_on_two_hosts_trains_and_a_cut_cable_ends_it(
    hosts: SshHosts, inputs: Path, tmp_path: Path, outcomes: Outcomes
) -> None:
    """The cable is cut, then the same command resumes; the losses are those of an undisturbed run."""
    straight = tmp_path / "straight"
    straight.mkdir()
    run = start_deepspeed(hosts, straight, arguments(inputs, straight / "run"), **ALIVE)
    assert run.wait(LONGEST) == 0, hosts.log(run)
    undisturbed = losses(straight / "run")
    assert len(undisturbed) == STEPS
    outcomes.add("deepspeed --hostfile, undisturbed", "done (code 0)")

    words = arguments(inputs, tmp_path / "run", "hang_timeout=20", "save_every=100")
    run = start_deepspeed(hosts, tmp_path, words, **ALIVE)
    wait_for_steps(hosts, run, tmp_path)
    hosts.pull_out("host2")
    try:
        began = time.monotonic()
        code = run.wait(LONGEST)
        seconds = time.monotonic() - began
    finally:
        hosts.plug_in("host2")
    assert code not in (0, 85)
    assert "rank 0 made no progress for 20 s (hang_timeout)" in hosts.log(run)
    assert seconds < 120
    text = f"rank 0 ends after hang_timeout=20, deepspeed after {seconds:.0f} s (code {code})"
    outcomes.add("cable of host 2 cut, PDSH_SSH_ARGS_APPEND with ServerAliveInterval", text)

    # The rank on the host without a cable must be gone too, or it would hold the run.
    time.sleep(30)
    run = start_deepspeed(hosts, tmp_path, words, **ALIVE)
    assert run.wait(LONGEST) == 0, hosts.log(run)
    assert losses(tmp_path / "run") == undisturbed
    outcomes.add("the same command after that", "resumed, done; losses as undisturbed")
