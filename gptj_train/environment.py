"""Describe where and with what a run was started: versions, git, hosts, GPUs, command. No environment variables."""

from __future__ import annotations

import os
import platform
import re
import shlex
import socket
import subprocess
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from gptj_train.launch.host import usable_cores

_PACKAGES = (
    "gptj_train",
    "torch",
    "deepspeed",
    "bitsandbytes",
    "tokenizers",
    "safetensors",
    "datasets",
    "numpy",
    "hydra-core",
)
_CREDENTIALS = re.compile(r"(?<=://)[^/@\s]+(?=@)")  # of a URL: user:password@


def describe_host() -> dict[str, Any]:
    """Return this rank's host, cores, memory and GPU."""
    gpu = None
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(torch.cuda.current_device())
        gpu = {"name": properties.name, "memory_gib": round(properties.total_memory / 2**30, 1)}
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {"host": socket.gethostname(), "cores": usable_cores(), "memory_gib": round(memory / 2**30, 1), "gpu": gpu}


def describe_environment(ranks: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return the content of environment.json.

    Args:
        ranks: what ``describe_host`` returned on each rank.
    """
    hosts: dict[str, dict[str, Any]] = {}
    for rank in ranks:
        host = hosts.setdefault(rank["host"], {name: rank[name] for name in ("host", "cores", "memory_gib")})
        host["ranks"] = host.get("ranks", 0) + 1
        host.setdefault("gpus", [])
        if rank["gpu"] is not None:
            host["gpus"].append(rank["gpu"])
    return {
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": _CREDENTIALS.sub("***", shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])),
        "ranks": len(ranks),
        "hosts": list(hosts.values()),
        "versions": {"python": platform.python_version(), "cuda": torch.version.cuda, **package_versions()},
        "platform": platform.platform(),
        "git": _git(Path(__file__).parent),
    }


def package_versions() -> dict[str, str]:
    """Return the versions of the packages that decide a run's numbers and files."""
    versions = {}
    for name in _PACKAGES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    return versions


def _git(folder: Path) -> dict[str, Any] | None:
    """Return the commit of the source and whether it has changes; None where it is no checkout of this project."""
    try:
        tracked = _git_output(folder, "ls-files", "--error-unmatch", Path(__file__).name)
        commit = _git_output(folder, "rev-parse", "HEAD")
        changes = _git_output(folder, "status", "--porcelain", "--untracked-files=no")
    except (OSError, subprocess.SubprocessError):
        return None
    assert tracked
    return {"commit": commit, "changed": bool(changes)}


def _git_output(folder: Path, *arguments: str) -> str:
    command = ["git", "-C", str(folder), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
