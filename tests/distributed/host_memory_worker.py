"""One rank that records what the engine page-locks, where it sums gradients, and what a step copies.

Page-locking is recorded where DeepSpeed asks for it: on a CPU nothing is locked.
"""

from __future__ import annotations

import gc
import json
import sys
import weakref
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from toy import engine_config, optim_config

from gptj_train import GPTJConfig, GPTJForCausalLM
from gptj_train.planning.memory import memory_items, page_locked, peak
from gptj_train.planning.run_plan import ModelSizes, RunPlan
from gptj_train.training import engine as engine_module
from gptj_train.training.engine import Engine, deepspeed
from gptj_train.training.gradient_buffers import sums_on

CONFIG = GPTJConfig(vocab_size=600, n_positions=16, n_embd=64, n_layer=4, n_head=2, rotary_dim=8)
IDS = torch.randint(600, (2, 16), generator=torch.Generator().manual_seed(0))
LOCKED = {"zero_optimization": {"offload_optimizer": {"pin_memory": True}, "offload_param": {"pin_memory": True}}}


class LargestNew(TorchDispatchMode):
    """The number of elements of the largest tensor that an operation allocates."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        known = {tensor.untyped_storage().data_ptr() for tensor in given}
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor) and leaf.untyped_storage().data_ptr() not in known:
                self.numel = max(self.numel, leaf.numel())
        return result


def build(settings: Any) -> Engine:
    return Engine(
        build=lambda: GPTJForCausalLM(CONFIG),
        init_from=None,
        engine=settings,
        optim=optim_config(),
        micro_batch_size=2,
        accumulation=1,
        seed=0,
    )


def locked_bytes(job: dict[str, Any]) -> dict[str, float]:
    """Build an engine; return the page-locked bytes that live on, and those planned."""
    recorded: list[Any] = []

    def pin_memory(tensor: Tensor, **_: Any) -> Tensor:
        recorded.append(weakref.ref(tensor))
        return tensor

    accelerator = deepspeed.get_accelerator()
    accelerator.pin_memory = pin_memory
    settings = engine_config(job["engine"] | {"deepspeed": LOCKED})
    engine = build(settings)
    del accelerator.pin_memory
    gc.collect()
    storages = {}
    for reference in recorded:
        tensor = reference()
        if tensor is not None:
            # Those of zero.Init have become views of DeepSpeed's flat buffer by now.
            storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
    cfg = SimpleNamespace(engine=settings, quantize="none", micro_batch_size=2, sequence_length=16)
    plan = RunPlan(ModelSizes(engine.shapes, engine.trained), CONFIG, cfg)  # type: ignore[arg-type]
    return {
        "parameters": sum(shape.numel() for shape in engine.shapes.values()),
        "locked": sum(storages.values()),
        "planned": page_locked(plan, 1),
        "host": peak(memory_items(plan, 1, on_gpu=True), "host"),
    }


def devices_of_sums() -> dict[str, Any]:
    """Build an engine whose sums go to the meta device, which stands for a GPU."""
    given = []

    def sums_on_meta(stage_3: Any, device: torch.device | None) -> Any:
        given.append(str(device))
        return sums_on(stage_3, torch.device("meta"))

    engine_module.sums_on = sums_on_meta
    engine = build(engine_config({"accumulate_on": "gpu"}))
    engine_module.sums_on = sums_on
    zero = engine._engine.optimizer
    others = set()
    for section in engine.optimizer_state().sections:
        assert section.master.grad is not None
        others |= {section.master.device.type, section.master.grad.device.type}
    return {
        "asked for": given,
        "engine": str(engine.device),
        "sums": zero.grad_partitions_flat_buffer.device.type,
        "tracker": zero.inf_or_nan_tracker.device.type,
        "rest": sorted(others),
        "optimizer on the host": zero.device == "cpu",
    }


def largest_of_a_step() -> dict[str, int]:
    """Return the elements of the largest tensor that an optimizer step allocates."""
    engine = build(engine_config({}))
    for _ in range(2):
        loss = engine.forward({"input_ids": IDS, "labels": IDS}, 30.0).loss
        engine.backward(loss)
        with LargestNew() as largest:
            engine.step(1e-3)
    with LargestNew() as control:
        torch.isinf(torch.zeros(1000)).any()
    parameters = sum(shape.numel() for shape in engine.shapes.values())
    return {"parameters": parameters, "step": largest.numel, "isinf of 1000": control.numel}


def main() -> None:
    out = Path(sys.argv[-2])
    for job in json.loads(sys.argv[-1]):
        (out / f"{job['name']}.rank0.json").write_text(json.dumps(locked_bytes(job)))
    (out / "sums.rank0.json").write_text(json.dumps(devices_of_sums()))
    (out / "step.rank0.json").write_text(json.dumps(largest_of_a_step()))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
