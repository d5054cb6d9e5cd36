"""The memory that this process may use: the host's, or less by the limits of its control group."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

CGROUPS = Path("/sys/fs/cgroup")
OWN_CGROUPS = Path("/proc/self/cgroup")


def usable_memory() -> int:
    """Return the bytes of memory that this process may use; containers and schedulers allow less than the host has."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return min([total, *memory_limits(OWN_CGROUPS, CGROUPS)])


def memory_limits(own: Path, root: Path) -> Iterator[int]:
    """Yield the memory limits in bytes of a process's control groups and of those around them.

    Args:
        own: file that lists the process's groups (proc_pid_cgroup in cgroups(7)).
        root: folder where the groups are mounted.
    """
    try:
        lines = own.read_text().splitlines()
    except OSError:
        return  # no Linux
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if not controllers:  # version 2 has one hierarchy
            yield from _limits_upwards(root, path, "memory.max")
        elif "memory" in controllers.split(","):
            yield from _limits_upwards(root / "memory", path, "memory.limit_in_bytes")


def _limits_upwards(mount: Path, path: str, name: str) -> Iterator[int]:
    """Yield the limits of a group and of its parents: the least counts."""
    group = mount / path.lstrip("/")
    # In a container the path may name a group outside of what is mounted; the mount itself is then its own.
    while group.is_relative_to(mount):
        try:
            text = (group / name).read_text().strip()
        except OSError:
            text = ""
        if text.isdigit():  # version 2 writes "max" where there is none
            yield int(text)
        group = group.parent
