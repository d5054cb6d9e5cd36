"""The lines that recipes/plan.py prints: does the run fit, by which items, how long is a step, what would help."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from gptj_train.config import PlanConfig
from gptj_train.counted import counted
from gptj_train.errors import UserError
from gptj_train.launch.machine import Machine
from gptj_train.planning.advice import Advice, advise, nodes_needed
from gptj_train.planning.memory import PLACES, memory_items, peak
from gptj_train.planning.run_plan import RunPlan, head_of
from gptj_train.planning.step_time import StepTime, step_time
from gptj_train.planning.verdict import DISK, SYSTEM, Need, needs

_GPU_SIZES = (8, 12, 16, 24, 32, 40, 48, 80, 96, 141, 192)  # GB, as sold
_SMALL_ITEM = 0.01  # share of a place below which an item has no line of its own


def answer_lines(plan: RunPlan, cfg: PlanConfig, machine: Machine) -> Iterator[str]:
    """Yield the lines that recipes/plan.py prints.

    Raises:
        UserError: a run by epochs.
    """
    if cfg.epochs is not None:
        raise UserError(f"epochs={cfg.epochs:g}: the plan reads no data to count their steps; give max_steps=...")
    yield from _run_lines(plan, cfg)
    yield _machine_line(machine)
    yield ""
    divides = cfg.global_batch_size % (cfg.micro_batch_size * machine.ranks) == 0
    found = needs(plan, machine)
    yield from _verdict_lines(found, plan, machine, divides)
    yield from _advice_lines(plan, machine)
    yield ""
    for need in found:
        yield from _need_lines(need)
    if divides:
        yield from _time_lines(step_time(plan, machine), cfg)
    yield ""
    yield from _table_lines(plan, cfg, machine)
    yield ""
    yield (
        "Computed: memory from DeepSpeed's source; times from the speeds above, as if what can overlap did. "
        "Measured: host memory without a GPU (benchmarks/results/plan_vs_measured.md). Unknown: your GPU's real speed."
    )


def _run_lines(plan: RunPlan, cfg: PlanConfig) -> Iterator[str]:
    tokens = cfg.global_batch_size * cfg.sequence_length
    yield (
        f"model    {head_of(cfg).__name__}, {counted(plan.sizes.all_elements, 'parameter')}, "
        f"{plan.sizes.trained_elements:,} of them trained"
    )
    yield (
        f"engine   ZeRO stage {cfg.engine.stage}, {cfg.engine.precision}, optimizer on the "
        f"{PLACES[cfg.engine.offload_optimizer]}, idle weights on the {PLACES[cfg.engine.offload_parameters]}"
    )
    yield (
        f"step     {cfg.global_batch_size} x {cfg.sequence_length} = {counted(tokens, 'token')}; "
        f"{counted(cfg.steps, 'step')}: {cfg.steps * tokens / 1e6:,.1f} million"
    )


def _machine_line(machine: Machine) -> str:
    gpus = "no GPU"
    if machine.has_gpus:
        gpus = f"{machine.ranks_per_node} x {_gb(machine.gpu_memory)} GB GPU"
    speeds = machine.speeds
    assumed = f"{speeds.compute / 1e12:g} TFLOP/s a rank, host {speeds.host / 1e9:g} GB/s"
    if machine.has_gpus:
        assumed += f", PCIe {speeds.pcie / 1e9:g} GB/s"
    if machine.nodes > 1:
        assumed += f", network {speeds.network / 1e9:g} GB/s"
    return f"machine  {machine.nodes} x ({gpus}, {_gb(machine.host_memory)} GB host); {assumed}"


def _verdict_lines(found: list[Need], plan: RunPlan, machine: Machine, divides: bool) -> Iterator[str]:
    if not divides:
        cfg = plan.cfg
        yield (
            f"DOES NOT RUN: global_batch_size {cfg.global_batch_size} does not divide into micro_batch_size "
            f"{cfg.micro_batch_size} x {machine.ranks} ranks"
        )
    short = [need for need in found if not need.fits]
    for need in short:
        yield f"DOES NOT FIT: {shortage(need)}"
    if divides and not short:
        used = [f"{_gb(need.needed)} GB of {need.place}" + _of(need) for need in found]
        yield f"FITS: {', '.join(used)}"


def shortage(need: Need) -> str:
    """Describe what is missing in a place, and its two largest items."""
    assert need.available is not None
    largest = ", ".join(f"{name} {_gb(size)}" for name, size in need.items[:2])
    message = f"{need.place} needs {_gb(need.needed)} GB and has {_gb(need.available)} ({largest})"
    if need.place == DISK:
        message += "; lower keep_checkpoints or give another output_dir"
    return message


def _advice_lines(plan: RunPlan, machine: Machine) -> Iterator[str]:
    found = advise(plan, machine)
    for advice in found:
        yield f"try      {describe(advice, machine)}"
    if not found and not all(need.fits for need in needs(plan, machine) if need.place != DISK):
        nodes = nodes_needed(plan, machine)
        if nodes is None:
            yield "no change of keys makes it fit on such machines"
        else:
            yield f"no change of keys makes it fit on this machine; it fits on nodes={nodes}"


def describe(advice: Advice, machine: Machine) -> str:
    """Describe a change: its overrides, what it needs and how long a step takes."""
    parts = []
    for need in needs(advice.plan, machine):
        if need.place != DISK:
            parts.append(f"{_gb(need.needed)} GB of {need.place}")
    return f"{advice.overrides}   ({', '.join(parts)}; {_seconds(advice.seconds)} a step)"


def _need_lines(need: Need) -> Iterator[str]:
    yield f"{_gb(need.needed):>8} GB {need.place}{_of(need)}"
    rest = 0.0
    for name, size in need.items:
        if size < _SMALL_ITEM * need.needed:
            rest += size
        else:
            yield f"{_gb(size):>16}  {name}"
    if rest:
        yield f"{_gb(rest):>16}  other"


def _of(need: Need) -> str:
    return "" if need.available is None else f" of {_gb(need.available)}"


def _time_lines(time: StepTime, cfg: PlanConfig) -> Iterator[str]:
    hours = time.seconds * cfg.steps / 3600
    yield f"{_seconds(time.seconds):>10} a step, {hours:,.1f} hours in all; of a step:"
    slowest = max(time.micro_batch, key=lambda name: time.micro_batch[name])
    for name, seconds in time.micro_batch.items():
        note = "" if name == slowest else ", meanwhile"
        yield f"{time.accumulation * seconds:>16.2f}  {name}{note}"
    for name, seconds in time.update.items():
        yield f"{seconds:>16.2f}  {name}"


def _table_lines(plan: RunPlan, cfg: PlanConfig, machine: Machine) -> Iterator[str]:
    """Yield a table of other numbers of GPUs on such nodes, if there are GPUs."""
    if not machine.has_gpus:
        return
    yield "GPUs  accumulated  GB a GPU  fits on  GB a host  NVMe GB a host  s a step     hours"
    for ranks in possible_ranks(cfg, machine.ranks_per_node):
        yield _row(plan, cfg, _with_ranks(machine, ranks))


def possible_ranks(cfg: PlanConfig, gpus_per_node: int) -> list[int]:
    """Return the numbers of GPUs that divide the global batch: parts of a node, and whole nodes."""
    found = []
    for ranks in range(1, cfg.global_batch_size // cfg.micro_batch_size + 1):
        divides = cfg.global_batch_size % (cfg.micro_batch_size * ranks) == 0
        whole_nodes = ranks <= gpus_per_node or ranks % gpus_per_node == 0
        if divides and whole_nodes:
            found.append(ranks)
    return found


def _with_ranks(machine: Machine, ranks: int) -> Machine:
    """Return such nodes with this many GPUs in all."""
    if ranks <= machine.ranks_per_node:
        return replace(machine, nodes=1, ranks_per_node=ranks)
    return replace(machine, nodes=ranks // machine.ranks_per_node)


def _row(plan: RunPlan, cfg: PlanConfig, machine: Machine) -> str:
    """Format a row of the table: this many GPUs."""
    items = memory_items(plan, machine.ranks, on_gpu=True)
    time = step_time(plan, machine)
    hours = time.seconds * cfg.steps / 3600
    on_gpu = peak(items, "GPU")
    fitting = [size for size in _GPU_SIZES if size * 1e9 >= on_gpu]
    fits_on = f"{fitting[0]} GB" if fitting else "none"
    host = machine.ranks_per_node * peak(items, "host") + SYSTEM
    nvme = machine.ranks_per_node * peak(items, "NVMe")
    return (
        f"{machine.ranks:>4}{time.accumulation:>13}{_gb(on_gpu):>10}{fits_on:>9}{_gb(host):>11}{_gb(nvme):>16}"
        f"{time.seconds:>10.1f}{hours:>10.1f}"
    )


def _seconds(seconds: float) -> str:
    return f"{seconds:,.1f} s" if seconds < 100 else f"{seconds:,.0f} s"


def _gb(size: float) -> str:
    return f"{size / 1e9:.1f}"
