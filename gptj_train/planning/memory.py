"""The memory of each rank, item by item.

It follows DeepSpeed 0.19.8's buffers (runtime/zero/stage3.py, stage_1_and_2.py, runtime/swap_tensor) and what autograd
keeps of our blocks.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from math import ceil, log2, prod
from typing import Literal

import torch
from torch.torch_version import TorchVersion

from gptj_train.model.quantized import product_bytes, stored_bytes
from gptj_train.planning.activations import activations, loss_memory
from gptj_train.planning.run_plan import RunPlan

Place = Literal["GPU", "host", "NVMe"]
Phase = Literal["backward", "reduction", "step"]

PLACES: dict[str, Place] = {"none": "GPU", "cpu": "host", "nvme": "NVMe"}
"""Where an offload setting puts things."""

OPTIMIZER_BYTES = 12
"""Per trained parameter: fp32 master weight and two fp32 Adam moments."""

FP32 = 4

# Bytes of libraries. A GPU: CUDA context, cuBLAS workspace, the allocator's gaps; not measured. The host of a rank
# with a GPU: torch's CUDA libraries; not measured. Without a GPU: measured (benchmarks/results/plan_vs_measured.md).
_GPU_LIBRARIES = 2e9
_HOST_LIBRARIES = 1.5e9
_CPU_LIBRARIES = 0.52e9

_NVME_OPTIMIZER_BUFFERS = 4  # of a sub-group each: weight, gradient and both moments (offload_optimizer.buffer_count)
_NVME_WEIGHT_BUFFERS = 5  # of the largest parameter each (offload_param.buffer_count)
_CACHED_BLOCK = 64 * 2**20  # launch/host.py: page-locked blocks up to this size are rounded up and kept when freed

_LARGEST_KEPT_BLOCK = 32 * 2**20  # larger ones glibc's malloc gives back at once (M_MMAP_THRESHOLD in mallopt(3))


@dataclass(frozen=True)
class Item:
    """Bytes of a rank in a place.

    ``phases`` are the parts of a step in which they exist; none means always.
    """

    name: str
    place: Place
    size: float
    phases: tuple[Phase, ...] = ()


def memory_items(plan: RunPlan, ranks: int, *, on_gpu: bool) -> list[Item]:
    """Return the memory of one of so many ranks.

    Args:
        on_gpu: each rank has a GPU. Otherwise what would be on it is on the host.
    """
    items = [
        *_weights(plan, ranks, on_gpu),
        *_optimizer(plan, ranks, on_gpu),
        *_gradients(plan, ranks, on_gpu),
        Item("activations", "GPU", activations(plan, on_gpu=on_gpu), ("backward",)),
        Item("loss", "GPU", loss_memory(plan), ("backward",)),
        Item("a dequantized matrix", "GPU", product_bytes(plan.sizes.shapes, plan.cfg.quantize, plan.element)),
    ]
    if on_gpu:
        items += [Item("libraries", "GPU", _GPU_LIBRARIES), Item("libraries", "host", _HOST_LIBRARIES)]
    else:
        items = [_on_host(item) for item in items]
        items += [
            Item("freed blocks that malloc keeps", "host", _kept_by_malloc(plan, ranks)),
            Item("libraries", "host", _CPU_LIBRARIES),
        ]
    return [item for item in items if item.size > 0]


def at_peak(items: Sequence[Item], place: Place) -> list[Item]:
    """Return the items that exist in a place when it holds most, the largest first."""
    phases: tuple[Phase, ...] = ("backward", "reduction", "step")
    moments = []
    for phase in phases:
        moments.append([item for item in items if item.place == place and (not item.phases or phase in item.phases)])
    fullest = max(moments, key=_total)
    return sorted(fullest, key=lambda item: -item.size)


def peak(items: Sequence[Item], place: Place) -> float:
    """Return the most bytes that a place holds at a time."""
    return _total(at_peak(items, place))


def page_locked(plan: RunPlan, ranks: int) -> float:
    """Return the bytes of the host that a rank with a GPU locks for copies to it, on stage 3; part of the items."""
    engine = plan.cfg.engine
    trained = plan.sizes.trained_elements / ranks
    locked = 0.0
    if engine.offload_parameters == "cpu":
        # The frozen ones too: each stays in the block that zero.Init locked.
        locked += plan.element * plan.sizes.all_elements / ranks
    if engine.offload_optimizer == "cpu":
        locked += FP32 * trained
    if engine.offload_optimizer == "nvme":
        locked += _NVME_OPTIMIZER_BUFFERS * FP32 * min(trained, plan.zero("sub_group_size"))
    if engine.offload_optimizer != "none" and engine.accumulate_on == "optimizer":
        locked += FP32 * trained
    return locked


def _on_host(item: Item) -> Item:
    """Return an item of a GPU where there is none.

    No part of a step gives its memory to the next: forward and backward run in different threads, each with an arena
    of malloc, and a block that is freed stays in its arena.
    """
    return replace(item, place="host", phases=()) if item.place == "GPU" else item


def _kept_by_malloc(plan: RunPlan, ranks: int) -> float:
    """Return the bytes of zero.Init's parts, which malloc keeps when DeepSpeed has moved them to one buffer."""
    if plan.cfg.engine.stage != 3:
        return 0.0
    parts = [plan.element * prod(shape) / ranks for shape in plan.sizes.trained.values()]
    return sum(size for size in parts if size <= _LARGEST_KEPT_BLOCK)


def _weights(plan: RunPlan, ranks: int, on_gpu: bool) -> Iterator[Item]:
    engine = plan.cfg.engine
    # ZeRO-3 partitions the weights over the ranks.
    parts = ranks if engine.stage == 3 else 1
    everything = _stored_weights(plan)
    yield Item("weights", PLACES[engine.offload_parameters], everything / parts)
    if engine.stage != 3:
        return
    moved = on_gpu and engine.offload_parameters != "none"
    if parts > 1 or moved or engine.offload_parameters == "nvme":
        # Gathered whole for use; DeepSpeed keeps at most so many. A single rank uses its own in place.
        live = plan.element * min(plan.sizes.all_elements, plan.zero("stage3_max_live_parameters"))
        yield Item("gathered weights", "GPU", live, ("backward", "reduction"))
    if engine.offload_parameters == "nvme":
        yield Item("buffers for weights on NVMe", "host", _NVME_WEIGHT_BUFFERS * plan.element * plan.sizes.largest)
    if engine.offload_parameters == "cpu" and on_gpu:
        yield Item("freed page-locked blocks", "host", _freed_blocks(plan, ranks))


def _stored_weights(plan: RunPlan) -> float:
    """Return the bytes of all weights, in the compute precision or quantized, over all ranks of stage 3."""
    return stored_bytes(plan.sizes.shapes, plan.cfg.quantize, plan.element)


def _freed_blocks(plan: RunPlan, ranks: int) -> float:
    """Return the bytes that torch keeps of the blocks that zero.Init locks, one for each trained parameter.

    They are freed when their content moves to DeepSpeed's flat buffer.
    """
    exact = TorchVersion(torch.__version__) >= "2.13"  # older versions keep blocks of every size
    kept = 0.0
    for shape in plan.sizes.trained.values():
        size = plan.element * ceil(prod(shape) / ranks)
        if size <= _CACHED_BLOCK or not exact:
            kept += 2.0 ** ceil(log2(size))
    return kept


def _optimizer(plan: RunPlan, ranks: int, on_gpu: bool) -> Iterator[Item]:
    engine = plan.cfg.engine
    place = PLACES[engine.offload_optimizer]
    # ZeRO 1 partitions the optimizer state over the ranks.
    own = plan.sizes.trained_elements / (ranks if engine.stage >= 1 else 1)
    sub_group = min(own, plan.zero("sub_group_size"))
    of_weight = OPTIMIZER_BYTES
    if engine.precision == "fp32" and place == "GPU" and engine.stage in (0, 3):
        of_weight -= FP32  # the weights are their own masters
    yield Item("fp32 masters and Adam moments", place, of_weight * own)
    if place == "NVMe":
        yield Item("gradients for Adam", "NVMe", FP32 * own)
        yield Item("buffers for Adam on NVMe", "host", _NVME_OPTIMIZER_BUFFERS * FP32 * sub_group)
        yield Item("gradients of a sub-group", "host", FP32 * sub_group)
    elif place == "host":
        yield Item("gradients for Adam", "host", FP32 * own)
    elif engine.stage == 3:
        # The optimizer reads a copy of the accumulated gradients, of a sub-group at a time.
        yield Item("gradients of a sub-group", "GPU", FP32 * sub_group, ("step",))
    elif engine.stage > 0 or engine.precision != "fp32":
        yield Item("gradients for Adam", "GPU", FP32 * own, ("step",))
    if place != "GPU" and engine.offload_parameters == "none" and on_gpu:
        # Converted on the host before they are copied, because the copy waits for its end (ATen/native/cuda/Copy.cu).
        yield Item("updated weights of a sub-group", "host", plan.element * sub_group, ("step",))


def _gradients(plan: RunPlan, ranks: int, on_gpu: bool) -> Iterator[Item]:
    engine = plan.cfg.engine
    trained = plan.sizes.trained_elements
    if engine.stage == 0:
        # Whole gradients, and no buckets to reduce them in.
        yield Item("gradients", "GPU", plan.element * trained)
        return
    offloaded = engine.offload_optimizer != "none"
    if engine.stage == 1 and not offloaded:
        yield Item("gradients", "GPU", plan.element * trained)
    else:
        sums_on_host = offloaded and engine.accumulate_on == "optimizer"
        yield Item("sums of gradients", "host" if sums_on_host else "GPU", FP32 * trained / ranks)
        if sums_on_host and on_gpu:
            # The largest parameter's, moved to the GPU to be added to, and the result.
            largest = FP32 * plan.sizes.largest_trained / ranks
            yield Item("sums on their way", "GPU", 2 * largest, ("backward", "reduction"))

    # Gradients are reduced in buckets: the buffer, the tensor that it is flattened into, and the result in fp32.
    size = plan.zero("reduce_bucket_size")
    filled = min(trained, size)
    # A GPU's buffer takes its memory at once, the host's as it is filled.
    yield Item("gradient bucket", "GPU", plan.element * (size if on_gpu else filled))
    flattened = plan.element * filled if engine.stage == 3 else 0
    result = FP32 * filled / ranks if engine.precision != "fp32" else 0
    # A bucket that holds all gradients is reduced after the backward, when activations are gone.
    phases: tuple[Phase, ...] = ("reduction",) if trained <= size else ("backward", "reduction")
    yield Item("reduction of a bucket", "GPU", flattened + result, phases)


def _total(items: Sequence[Item]) -> float:
    return sum(item.size for item in items)
