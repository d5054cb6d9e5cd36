"""Whether a run fits on a machine, and what takes the room."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from gptj_train.counted import counted
from gptj_train.launch.machine import Machine
from gptj_train.planning.memory import Item, at_peak, memory_items
from gptj_train.planning.run_plan import RunPlan

DISK = "the disk"
"""The place of checkpoints and export."""

SYSTEM = 1e9
"""Bytes of a node for the operating system."""


@dataclass(frozen=True)
class Need:
    """Bytes that a run needs in a place, and those that are there; ``available`` None is unknown.

    Attributes:
        place: such as "a GPU" or "a host".
        items: (name, bytes), the largest first.
    """

    place: str
    needed: float
    available: float | None
    items: list[tuple[str, float]]

    @property
    def fits(self) -> bool:
        return self.available is None or self.needed <= self.available


def needs(plan: RunPlan, machine: Machine) -> list[Need]:
    """Return what a run needs in each place that it uses."""
    items = memory_items(plan, machine.ranks, on_gpu=machine.has_gpus)
    found = []
    if machine.has_gpus:
        found.append(_need("a GPU", at_peak(items, "GPU"), 1, machine.gpu_memory))
    host = _need("a host", at_peak(items, "host"), machine.ranks_per_node, machine.host_memory)
    with_system = sorted([*host.items, ("operating system", SYSTEM)], key=lambda item: -item[1])
    found.append(Need(host.place, host.needed + SYSTEM, host.available, with_system))
    on_nvme = at_peak(items, "NVMe")
    if on_nvme:
        found.append(_need("a host's NVMe disk", on_nvme, machine.ranks_per_node, machine.nvme))
    if plan.cfg.max_steps is not None:  # of epochs, the data decide the number of steps
        checkpoint, most, export = plan.disk()
        of_checkpoints = (f"{counted(most, 'checkpoint')} of {checkpoint / 1e9:.1f} GB", float(most * checkpoint))
        found.append(Need(DISK, most * checkpoint + export, machine.disk, [of_checkpoints, ("export", export)]))
    return found


def memory_fits(plan: RunPlan, machine: Machine, spare: float = 0) -> bool:
    """Return whether memory and NVMe disk suffice, with a share to spare; the disk of checkpoints is another matter."""
    for need in needs(plan, machine):
        if need.place != DISK and need.available is not None and need.needed > (1 - spare) * need.available:
            return False
    return True


def _need(place: str, items: Sequence[Item], ranks: int, available: float | None) -> Need:
    """Add up the items of a place that so many ranks share."""
    of_all = [(item.name, ranks * item.size) for item in items]
    return Need(place, sum(size for _, size in of_all), available, of_all)
