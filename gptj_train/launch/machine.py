"""The machines of a run: their memory, disks and speeds, given by config keys or looked up on this one."""

from __future__ import annotations

import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

from pydantic import Field

from gptj_train.errors import UserError
from gptj_train.launch.host import usable_cores
from gptj_train.launch.host_memory import usable_memory
from gptj_train.schema import schema

# Achieved bf16 TFLOP/s of a GPU, about half of the dense peak in its data sheet; the first part of a name that fits.
_TFLOPS = {
    **{"B200": 900, "H200": 400, "H100": 400, "A100": 150, "L40S": 150, "L40": 90, "A40": 70, "A10": 60, "L4": 60},
    **{"5090": 100, "4090": 80, "3090": 35, "V100": 55, "T4": 25},
}
_TFLOPS_OF_OTHERS = 100.0
_TFLOPS_OF_CORE = 0.05

_Count = Annotated[int, Field(gt=0)]
_Positive = Annotated[float, Field(gt=0)]
_Size = Annotated[float, Field(ge=0)]


@schema
class MachineKeys:
    """Keys that describe machines; null is looked up on this one, or assumed. GB are 10^9 bytes."""

    nodes: _Count | None
    gpus_per_node: Annotated[int, Field(ge=0)] | None
    gpu_memory: _Positive | None
    host_memory: _Positive | None
    nvme_gb: _Size | None
    disk_gb: _Size | None
    tflops_per_gpu: _Positive | None
    host_gb_per_second: _Positive | None
    nvme_gb_per_second: _Positive | None
    pcie_gb_per_second: _Positive | None
    gpu_link_gb_per_second: _Positive | None
    network_gb_per_second: _Positive | None


@dataclass(frozen=True)
class Speeds:
    """Per second: operations of a rank, and bytes.

    Attributes:
        compute: operations of a rank.
        host: bytes between a node's memory and its cores.
        nvme: bytes of a node's NVMe disks, reading or writing.
        pcie: bytes between a GPU and its host, each way.
        gpu_link: bytes into each GPU from the others of its node.
        network: bytes into each node from the others.
    """

    compute: float
    host: float
    nvme: float
    pcie: float
    gpu_link: float
    network: float


_ASSUMED = Speeds(compute=0, host=100e9, nvme=6e9, pcie=25e9, gpu_link=20e9, network=10e9)
"""Of a server, where no key gives it: PCIe 4, GPUs without NVLink, a network of 100 Gbit/s."""

_ASSUMED_WITHOUT_GPU = replace(_ASSUMED, host=30e9, nvme=2e9)


@dataclass(frozen=True)
class Machine:
    """Nodes that are alike; sizes in bytes.

    Attributes:
        nodes: number of nodes.
        ranks_per_node: ranks of the run on each.
        has_gpus: each rank has a GPU; otherwise it computes on the CPU.
        gpu_memory: of each GPU, 0 without.
        host_memory: of a node.
        nvme: of a node's NVMe disk. disk: for checkpoints and the export. None: unknown.
        speeds: of a node and its ranks.
    """

    nodes: int
    ranks_per_node: int
    has_gpus: bool
    gpu_memory: float
    host_memory: float
    nvme: float | None
    disk: float | None
    speeds: Speeds

    @property
    def ranks(self) -> int:
        return self.nodes * self.ranks_per_node


def described_machine(keys: MachineKeys, *, output_dir: str, nvme_path: str | None) -> Machine:
    """Return the machine that the keys describe; where they are null, what this one has.

    Args:
        output_dir: of the run, on the disk whose free space counts.
        nvme_path: folder on this machine's NVMe disk, if there is one.

    Raises:
        UserError: GPUs whose memory is neither given nor found.
    """
    gpus = keys.gpus_per_node
    if gpus is None:
        gpus = 1 if keys.gpu_memory else _gpus_here()
    here = this_machine(
        nodes=keys.nodes or 1,
        ranks_per_node=max(1, gpus),
        has_gpus=gpus > 0,
        output_dir=output_dir,
        nvme_path=nvme_path,
    )
    gpu_memory = _bytes(keys.gpu_memory) or here.gpu_memory
    if gpus and not gpu_memory:
        raise UserError("gpus_per_node without gpu_memory: give the GB of each GPU, gpu_memory=...")
    is_here = keys.host_memory is None  # the disks of another machine are unknown
    speeds = Speeds(
        compute=1e12 * keys.tflops_per_gpu if keys.tflops_per_gpu else here.speeds.compute,
        host=_bytes(keys.host_gb_per_second) or here.speeds.host,
        nvme=_bytes(keys.nvme_gb_per_second) or here.speeds.nvme,
        pcie=_bytes(keys.pcie_gb_per_second) or here.speeds.pcie,
        gpu_link=_bytes(keys.gpu_link_gb_per_second) or here.speeds.gpu_link,
        network=_bytes(keys.network_gb_per_second) or here.speeds.network,
    )
    return replace(
        here,
        gpu_memory=gpu_memory,
        host_memory=_bytes(keys.host_memory) or here.host_memory,
        nvme=here.nvme if is_here and keys.nvme_gb is None else _bytes(keys.nvme_gb),
        disk=here.disk if is_here and keys.disk_gb is None else _bytes(keys.disk_gb),
        speeds=speeds,
    )


def this_machine(*, nodes: int, ranks_per_node: int, has_gpus: bool, output_dir: str, nvme_path: str | None) -> Machine:
    """Return this machine, and assumed speeds: only its GPU's name is looked up for them."""
    import torch  # Here: it takes seconds to load.

    gpu_memory = 0.0
    compute = _TFLOPS_OF_CORE * usable_cores() / ranks_per_node
    if has_gpus:
        compute = _TFLOPS_OF_OTHERS
    if has_gpus and torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        gpu_memory = float(properties.total_memory)
        compute = next((speed for name, speed in _TFLOPS.items() if name in properties.name), compute)
    return Machine(
        nodes=nodes,
        ranks_per_node=ranks_per_node,
        has_gpus=has_gpus,
        gpu_memory=gpu_memory,
        host_memory=float(usable_memory()),
        nvme=_free(nvme_path),
        disk=_free(output_dir),
        speeds=replace(_ASSUMED if has_gpus else _ASSUMED_WITHOUT_GPU, compute=1e12 * compute),
    )


def _gpus_here() -> int:
    import torch

    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def _free(path: str | None) -> float | None:
    """Return the free bytes of the disk that a folder, which may not exist yet, will be on."""
    if path is None:
        return None
    folder = Path(path).absolute()
    existing = next((parent for parent in (folder, *folder.parents) if parent.exists()), None)
    return float(shutil.disk_usage(existing).free) if existing is not None else None


def _bytes(gigabytes: float | None) -> float | None:
    return None if gigabytes is None else 1e9 * gigabytes
