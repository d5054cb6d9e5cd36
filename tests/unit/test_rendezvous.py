"""Ranks that wait for each other before they connect: who is missing, where, and for how long."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from gptj_train.launch.rendezvous import name_ranks

RANK = """
import sys, time
import torch.distributed as dist
from gptj_train.errors import UserError
from gptj_train.launch import rendezvous
rendezvous.REPORT_EVERY = 1
time.sleep(float(sys.argv[2]))
try:
    store = rendezvous.wait_for_ranks(float(sys.argv[1]))
    dist.init_process_group("gloo")
    numbers = [None] * 3
    dist.all_gather_object(numbers, dist.get_rank())
    print(numbers)
except UserError as error:
    print(error)
    sys.exit(2)
"""


@pytest.fixture
def port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def start(rank: int, port: int, limit: float, delay: float = 0.0) -> subprocess.Popen[str]:
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "3", "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, "-c", RANK, str(limit), str(delay)],
        env=os.environ
        | place
        | {"RANK": str(rank), "LOCAL_RANK": str(rank), "PYTHONPATH": str(Path(__file__).parents[2])},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def outcome(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    out, err = process.communicate(timeout=60)
    return process.returncode, out, err


def test_ranks_are_named_in_runs() -> None:
    assert name_ranks([3]) == "rank 3"
    assert name_ranks([0, 8, 9, 10, 15]) == "ranks 0, 8-10, 15"


def test_a_missing_rank_is_named_while_the_others_wait_and_at_the_end(port: int) -> None:
    first, second = [outcome(process) for process in [start(0, port, 4), start(1, port, 4)]]
    host = socket.gethostname()
    line = f"{host}: waiting for rank 2 (have 2 of 3) at 127.0.0.1:{port}"
    assert re.fullmatch(rf"(\d\d:\d\d:\d\d {re.escape(line)}\n)+", first[2])
    assert first[1].startswith(
        f"rank 2 did not come to 127.0.0.1:{port} within 4 s (rendezvous_timeout), 2 of 3 did, from {host}; "
    )
    assert first[0] == 2
    assert second == (2, first[1], "")


def test_a_rank_0_that_dies_meanwhile_ends_the_others(port: int) -> None:
    first, second = start(0, port, 60), start(1, port, 60)
    # It waits until rank 0 has seen rank 1.
    assert first.stderr is not None
    while "waiting for rank 2 (have 2 of 3)" not in first.stderr.readline():
        assert first.poll() is None
    first.kill()
    code, out, err = outcome(second)
    assert (code, err) == (2, "")
    assert out.startswith(f"rank 0 at 127.0.0.1:{port} has ended while the ranks waited for each other")


def test_without_rank_0_each_host_prints_where_it_looks(port: int) -> None:
    # LOCAL_RANK is 1 here, as on a host whose rank 0 prints for all.
    silent, other = start(1, port, 4), start(2, port, 4)
    for code, out, err in (outcome(silent), outcome(other)):
        assert (code, err) == (2, "")
        assert out.startswith(f"rank 0 was not at 127.0.0.1:{port} within 4 s (rendezvous_timeout); ")


def test_a_late_rank_0_is_waited_for(port: int) -> None:
    ranks = [start(1, port, 60), start(2, port, 60), start(0, port, 60, delay=3)]
    assert [outcome(rank) for rank in ranks] == [(0, "[0, 1, 2]\n", "")] * 3


def test_a_port_that_is_taken_is_named() -> None:
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        port = taken.getsockname()[1]
        code, out, _ = outcome(start(0, port, 5))
    assert code == 2
    assert out.startswith(f"rank 0 cannot listen at 127.0.0.1:{port} (")
