"""The line under a table of results that says where it comes from."""

from __future__ import annotations

import os
import platform
import subprocess
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path


def provenance(packages: Sequence[str]) -> str:
    """Describe machine, versions of packages, and commit."""
    versions = ", ".join(f"{name} {version(name)}" for name in packages)
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False).stdout
    instructions = "AVX-512, " if "avx512f" in Path("/proc/cpuinfo").read_text() else ""
    return f"{os.cpu_count()} cores, {instructions}CPU ({platform.machine()}); {versions}; commit {commit.strip()}"
