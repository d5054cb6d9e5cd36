"""Plan a run before it starts: a machine that is too small is reported before anything is loaded."""

from __future__ import annotations

import os
import sys

import torch

from gptj_train.config import FinetuneConfig
from gptj_train.errors import UserError
from gptj_train.launch.machine import Machine, this_machine
from gptj_train.launch.ranks import ranks_on_host, world_size
from gptj_train.model.gptj_config import GPTJConfig
from gptj_train.planning.advice import advise, nodes_needed
from gptj_train.planning.memory import memory_items, peak
from gptj_train.planning.run_plan import RunPlan
from gptj_train.planning.verdict import DISK, needs

_SHOWN = 2  # changes


def check_machine(cfg: FinetuneConfig, model_config: GPTJConfig) -> None:
    """Print a warning, or refuse the run, if this host or its GPUs are too small; ``plan`` says which.

    Other hosts are taken to be like this one. The disk of the checkpoints is checked later (training/disk_space.py).

    Raises:
        UserError: they are too small, with ``plan=error``.
    """
    if cfg.plan == "off":
        return
    machine = _machine_of_ranks(cfg)
    plan = RunPlan.of(cfg, model_config)
    short = []
    for need in needs(plan, machine):
        if not need.fits and need.place != DISK:
            assert need.available is not None
            name, size = need.items[0]
            short.append(
                f"{need.place} needs {need.needed / 1e9:.0f} GB, this machine has {need.available / 1e9:.0f} "
                f"(most of it: {name}, {size / 1e9:.0f} GB)"
            )
    if not short:
        return
    message = f"this run does not fit: {'; '.join(short)}; {_what_to_do(plan, machine)}"
    if cfg.plan == "error":
        raise UserError(f"{message}; or set plan=warn to start all the same")
    print(f"warning: {message}", file=sys.stderr, flush=True)


def _what_to_do(plan: RunPlan, machine: Machine) -> str:
    found = advise(plan, machine)
    if found:
        return "try " + ", or ".join(advice.overrides for advice in found[:_SHOWN])
    nodes = nodes_needed(plan, machine)
    if nodes is not None:
        return f"no change of keys helps here; {nodes} such machines would do"
    return "no change of keys helps on such machines"


def memory_line(plan: RunPlan, ranks: int, *, on_gpu: bool) -> str:
    """Describe the planned memory of a rank, for the table at the top of a run's report."""
    items = memory_items(plan, ranks, on_gpu=on_gpu)
    parts = []
    if on_gpu:
        parts.append(f"{peak(items, 'GPU') / 2**30:.1f} GiB on the GPU")
    parts.append(f"{peak(items, 'host') / 2**30:.1f} GiB on the host")
    nvme = peak(items, "NVMe")
    if nvme:
        parts.append(f"{nvme / 2**30:.1f} GiB on the NVMe disk")
    return ", ".join(parts) + " planned for a rank"


def _machine_of_ranks(cfg: FinetuneConfig) -> Machine:
    """Return the machines that this run's ranks have been started on."""
    ranks_here = ranks_on_host()
    has_gpus = torch.cuda.is_available() and os.environ.get("DS_ACCELERATOR", "cuda") == "cuda"
    return this_machine(
        nodes=-(-world_size() // ranks_here),  # rounded up
        ranks_per_node=ranks_here,
        has_gpus=has_gpus,
        output_dir=cfg.output_dir,
        nvme_path=cfg.engine.nvme_path,
    )
