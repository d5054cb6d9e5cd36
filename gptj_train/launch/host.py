"""This host's compiler and cores, made ready for DeepSpeed, which is not imported here."""

from __future__ import annotations

import contextlib
import functools
import io
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import cpuinfo
import torch

_LONGEST_COMPILATION = 1800  # seconds


def prepare_environment() -> None:
    """What DeepSpeed reads from the environment as it is imported, and asks of the CPU later.

    It asks three times on every rank, and each answer takes a process that runs for a second.
    """
    cpuinfo.get_cpu_info = functools.cache(cpuinfo.get_cpu_info)
    if not torch.accelerator.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # spares a warning about finding no GPU
    if sys.prefix != sys.base_prefix and os.access(sys.prefix, os.W_OK):
        # Its CPU optimizer is compiled at first use: once for each virtual environment, with its ninja.
        os.environ.setdefault("TORCH_EXTENSIONS_DIR", f"{sys.prefix}/torch_extensions")
        os.environ["PATH"] = f"{sys.prefix}/bin{os.pathsep}{os.environ.get('PATH', '')}"


def is_compiled(extension: str) -> bool:
    """Whether an extension of DeepSpeed is there already, as far as can be told."""
    folder = os.environ.get("TORCH_EXTENSIONS_DIR")
    return folder is None or any(Path(folder).rglob(f"{extension}*.so"))


def clear_stale_locks() -> None:
    """Remove what a killed compilation left: torch would wait for its end without limit."""
    for lock in Path(os.environ.get("TORCH_EXTENSIONS_DIR", "/nonexistent")).glob("*/lock"):
        with contextlib.suppress(OSError):
            if time.time() - lock.stat().st_mtime > _LONGEST_COMPILATION:
                lock.unlink()


def usable_cores() -> int:
    """Of this process, which may be allowed fewer than there are."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def share_cores() -> None:
    """Give each rank its part of the host's cores: the optimizer on the host uses them beside a GPU too."""
    ranks_here = int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or 1)
    share = max(1, usable_cores() // ranks_here)
    if "TORCHELASTIC_RUN_ID" in os.environ:  # torchrun sets one thread, which starves the optimizer
        torch.set_num_threads(share)
    elif "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(min(torch.get_num_threads(), share))


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep DeepSpeed's print calls from the screen of every rank; shown if it fails."""
    said = io.StringIO()
    try:
        with contextlib.redirect_stdout(said):
            yield
    except BaseException:
        print(said.getvalue(), end="")
        raise
