"""Machines as config keys describe them, and what this one has: memory within the limits of control groups."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from gptj_train.errors import UserError
from gptj_train.launch import host_memory, machine
from gptj_train.launch.host_memory import memory_limits, usable_memory
from gptj_train.launch.machine import Machine, MachineKeys, described_machine

NOTHING = dict.fromkeys(machine.MachineKeys.__dataclass_fields__)  # type: ignore[attr-defined]


def described(**given: Any) -> Machine:
    return described_machine(MachineKeys(**(NOTHING | given)), output_dir="runs/x", nvme_path=None)


def groups(root: Path, limits: dict[str, str], own: str) -> tuple[Path, Path]:
    """Control groups with files of limits, and the file that names a process's own."""
    for path, text in limits.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_text(text + "\n")
    (root / "own").write_text(own)
    return root / "own", root


@pytest.mark.parametrize(
    ("limits", "own", "expected"),
    [
        # version 2: of the group itself and those around it
        ({"a/b/memory.max": "max", "a/memory.max": "5000"}, "0::/a/b\n", [5000]),
        ({"a/b/memory.max": "3000", "a/memory.max": "5000"}, "0::/a/b\n", [3000, 5000]),
        # in a container: the mount is the group
        ({"memory.max": "7000"}, "0::/not/mounted/here\n", [7000]),
        # version 1: beside other hierarchies
        (
            {"memory/job/memory.limit_in_bytes": "4000", "memory/memory.limit_in_bytes": "9223372036854771712"},
            "5:cpu:/x\n4:memory:/job\n0::/\n",
            [4000, 9223372036854771712],
        ),
        ({}, "0::/\n", []),
    ],
)
def test_limits_of_control_groups(tmp_path: Path, limits: dict[str, str], own: str, expected: list[int]) -> None:
    assert list(memory_limits(*groups(tmp_path, limits, own))) == expected


def test_no_control_groups(tmp_path: Path) -> None:
    assert list(memory_limits(tmp_path / "absent", tmp_path)) == []


def test_a_limit_counts_where_it_is_below_the_hosts_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own, root = groups(tmp_path, {"a/memory.max": "123456789"}, "0::/a\n")
    monkeypatch.setattr(host_memory, "OWN_CGROUPS", own)
    monkeypatch.setattr(host_memory, "CGROUPS", root)
    assert usable_memory() == 123456789
    (root / "a/memory.max").write_text(str(10**18))
    assert 10**8 < usable_memory() < 10**18


def test_what_is_given_counts() -> None:
    given = described(nodes=2, gpus_per_node=8, gpu_memory=80, host_memory=1000, tflops_per_gpu=400, disk_gb=3)
    assert (given.nodes, given.ranks_per_node, given.ranks, given.has_gpus) == (2, 8, 16, True)
    assert (given.gpu_memory, given.host_memory, given.disk) == (80e9, 1000e9, 3e9)
    assert given.nvme is None  # another machine's
    assert given.speeds.compute == 400e12
    assert (given.speeds.pcie, given.speeds.network) == (25e9, 10e9)  # assumed


def test_this_machine_by_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "usable_memory", lambda: 24_000_000_000)
    monkeypatch.setattr(machine, "usable_cores", lambda: 4)
    monkeypatch.setattr(machine, "_gpus_here", lambda: 0)
    found = described()
    assert (found.nodes, found.ranks, found.has_gpus) == (1, 1, False)
    assert found.host_memory == 24e9
    assert found.disk is not None
    assert found.disk > 0
    assert found.speeds.compute == pytest.approx(0.2e12)
    assert found.speeds.host == 30e9


def test_a_gpu_of_given_memory_is_one_gpu() -> None:
    assert described(gpu_memory=24).ranks_per_node == 1
    assert described(gpu_memory=24).has_gpus


def test_gpus_of_unknown_memory_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "_gpus_here", lambda: 0)
    with pytest.raises(UserError, match=r"gpu_memory=\.\.\."):
        described(gpus_per_node=2)


@pytest.mark.parametrize(("name", "value"), [("nodes", 0), ("gpu_memory", 0), ("host_memory", -1), ("nvme_gb", -1)])
def test_impossible_values_are_refused(name: str, value: int) -> None:
    with pytest.raises(ValueError, match=rf"{name}\n  Input should be greater than"):
        described(**{name: value})
