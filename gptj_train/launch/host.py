"""Set up this host's environment, compiler and cores for DeepSpeed, which is not imported here."""

from __future__ import annotations

import contextlib
import functools
import io
import os
import sys
from collections.abc import Iterator

import cpuinfo

from gptj_train.launch.ranks import ranks_on_host


def prepare_environment() -> None:
    """Set what DeepSpeed reads from the environment; call it before the import of deepspeed."""
    import torch  # Here: it takes seconds to load, which a process that only asks for its cores need not spend.

    # DeepSpeed asks for it three times on every rank, and each answer takes a process that runs for a second.
    cpuinfo.get_cpu_info = functools.cache(cpuinfo.get_cpu_info)
    if not torch.accelerator.is_available():
        # Otherwise DeepSpeed warns that it finds no GPU.
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    # torch's allocator of page-locked memory rounds each block up to a power of two, and keeps freed ones: for 6B with
    # the optimizer on the host it would take 10 to 30 GB more. torch below 2.13 does not know these settings.
    settings = os.environ.keys() & {"PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"}
    if not settings and torch.torch_version.TorchVersion(torch.__version__) >= "2.13":
        os.environ["PYTORCH_ALLOC_CONF"] = "pinned_max_round_threshold_mb:64,pinned_max_cached_size_mb:64"
    if sys.prefix != sys.base_prefix and os.access(sys.prefix, os.W_OK):
        # The CPU optimizer is compiled at first use: once per virtual environment, whose bin has ninja.
        os.environ.setdefault("TORCH_EXTENSIONS_DIR", f"{sys.prefix}/torch_extensions")
        os.environ["PATH"] = f"{sys.prefix}/bin{os.pathsep}{os.environ.get('PATH', '')}"


def usable_cores() -> int:
    """Return the number of cores that this process may use; a container or scheduler may allow it only some."""
    if hasattr(os, "sched_getaffinity"):  # Linux
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def share_cores() -> None:
    """Set torch's threads to this rank's share of the host's cores, which an offloaded optimizer needs."""
    import torch

    ranks_here = ranks_on_host()
    cores = usable_cores()
    # srun binds each task to its own cores by default: those are already this rank's share.
    already_shared = cores < int(os.environ.get("SLURM_CPUS_ON_NODE", "0")) and "SLURM_STEP_ID" in os.environ
    share = cores if already_shared else max(1, cores // ranks_here)
    if "TORCHELASTIC_RUN_ID" in os.environ:
        # torchrun sets OMP_NUM_THREADS=1 unasked, which starves the optimizer.
        torch.set_num_threads(share)
    elif "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(min(torch.get_num_threads(), share))


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Hide what DeepSpeed prints on every rank; print it after all if the block raises."""
    output = io.StringIO()
    try:
        with contextlib.redirect_stdout(output):
            yield
    except BaseException:
        print(output.getvalue(), end="")
        raise
