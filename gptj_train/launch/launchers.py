"""The processes that launched this rank, and whether they still run.

A launcher that is killed leaves its ranks behind: the kernel gives them another parent, and they would train on unseen.
"""

from __future__ import annotations

import os

import psutil


def launchers() -> tuple[int, ...]:
    """Return the process ids of this rank's launcher; empty without one."""
    if "TORCHELASTIC_RUN_ID" in os.environ:  # torchrun, the parent
        return (os.getppid(),)
    if "CROSS_RANK" in os.environ:  # deepspeed: its launch.py is the parent, the command itself the grandparent
        parent = os.getppid()
        try:
            return (parent, psutil.Process(parent).ppid())
        except psutil.Error:  # it exited just now
            return (parent, 0)
    return ()


def _adopts_orphans(pid: int) -> bool:
    """Return whether a process is init or a service manager: the parent of whoever has lost theirs."""
    try:
        process = psutil.Process(pid)
        if pid != 1 and process.name() != "systemd":
            return False
        # In a container the launcher itself may be process 1. All of them are Python programs.
        return "python" not in " ".join(process.cmdline())
    except psutil.Error:
        return pid == 1  # hidden from us, so that it is none of our processes


AT_START = launchers()
"""The launcher's processes when ``gptj_train`` was imported, which is the first thing that a recipe does.

A later first look, after torch and DeepSpeed have been imported, would take the heir of a dead launcher for a launcher.
"""
_WAS_ORPHAN = any(_adopts_orphans(pid) for pid in AT_START)  # the launcher died while Python started


def launcher_has_exited() -> bool:
    """Return whether this rank had a launcher that runs no more."""
    return _WAS_ORPHAN or launchers() != AT_START
