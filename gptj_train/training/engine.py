"""The one door to DeepSpeed: build, step, save, load and gather."""

from __future__ import annotations

import contextlib
import logging
import math
import os
import resource
import sys
import warnings
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from gptj_train.training import host

host.prepare_environment()
import deepspeed
from deepspeed.ops.adam import DeepSpeedCPUAdam
from deepspeed.utils import logger, safe_get_full_fp32_param

from gptj_train.training.schedule import OptimConfig, decay_groups
from gptj_train.training.zero_config import EngineConfig, accumulation_steps, deepspeed_config
from gptj_train.weights.hf import HFWeights

_TIMEOUT = timedelta(hours=1)  # of a collective: the others wait while one rank writes tens of GB

logger.setLevel(logging.ERROR)
# DeepSpeed still calls the collectives by the names that torch 2.13 renamed.
warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")


def join_process_group() -> tuple[int, int]:
    """Start torch.distributed with the device's backend, once; returns rank and world size.

    The launcher's RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT must be in the environment.
    """
    if not dist.is_initialized():
        if deepspeed.get_accelerator().device_name() == "cuda":
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        host.share_cores()
        host.clear_stale_locks()
        # Its inference alone reduces over shared memory, of which each rank leaves 66 MiB behind in /dev/shm.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        with host.quiet():
            deepspeed.init_distributed(verbose=False, timeout=_TIMEOUT)
    return dist.get_rank(), dist.get_world_size()


class Engine:
    """A module under DeepSpeed: ZeRO stage 0 to 3, offload, fp32 master weights for AdamW.

    Every method that moves data between ranks must be called on all of them.
    """

    def __init__(
        self,
        build: Callable[[], nn.Module],
        init_from: str | None,
        engine: EngineConfig,
        optim: OptimConfig,
        global_batch_size: int,
        micro_batch_size: int,
        seed: int,
    ) -> None:
        """Build the model where it will live and wrap it.

        Args:
            build: makes the module; under ZeRO-3 each rank keeps only its part of every weight.
            init_from: HF folder to take the weights from, or None to keep the fresh ones.
            seed: decides the fresh weights, whatever the number of ranks.

        Raises:
            ValueError: batch sizes that do not divide, or weights that are not this model's.
        """
        self.rank, self.world_size = join_process_group()
        self.device = torch.device(deepspeed.get_accelerator().current_device_name())
        with torch.device("meta"):
            shapes = {name: parameter.shape for name, parameter in build().named_parameters()}
        self.numels = {name: shape.numel() for name, shape in shapes.items()}
        accumulation = accumulation_steps(global_batch_size, micro_batch_size, self.world_size)
        config = deepspeed_config(
            engine,
            optim,
            micro_batch_size,
            accumulation,
            largest_parameter=max(self.numels.values()),
            pin_memory=self.device.type != "cpu",
        )
        if self.rank == 0 and engine.offload_optimizer != "none" and not host.is_compiled("cpu_adam"):
            print("Compiling DeepSpeed's CPU optimizer; once per installation, about a minute ...", flush=True)
        torch.manual_seed(seed)
        with host.quiet():
            model = self._placed(build, engine, config, init_from, shapes)
            if engine.activation_checkpointing:
                model.gradient_checkpointing_enable()  # type: ignore[operator]
            self._engine, *_ = deepspeed.initialize(
                model=model, model_parameters=decay_groups(model, optim.weight_decay), config=config
            )
        if engine.stage == 0:  # it has counted the empty step that made its moments
            adam = getattr(self._engine.optimizer, "optimizer", self._engine.optimizer)
            for state in adam.state.values():
                state["step"] = 0
        self._names = list(self.numels)
        self._plain_norm = float("nan")  # of fp32 on stage 0, where DeepSpeed does not tell it

    @staticmethod
    def _placed(
        build: Callable[[], nn.Module],
        engine: EngineConfig,
        config: dict[str, Any],
        init_from: str | None,
        shapes: dict[str, torch.Size],
    ) -> nn.Module:
        partitioned = engine.stage == 3
        with deepspeed.zero.Init(config_dict_or_path=config, enabled=partitioned):
            model = build()
        if init_from is not None:
            _load_weights(model, init_from, shapes, partitioned)
        if partitioned:
            _clear_padding(model)
        return model

    # --- the step ---

    def forward(self, batch: dict[str, Tensor], targets: float) -> Any:
        """The module's output for a batch, its loss summed over the batch's targets and divided by ``targets``."""
        moved = {name: tensor.to(self.device, non_blocking=True) for name, tensor in batch.items()}
        return self._engine(**moved, use_cache=False, num_items_in_batch=targets)

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of one micro-batch. Gradients are averaged over ranks, not over micro-batches.

        A loss that is not finite makes all of them NaN.
        """
        self._engine.backward(loss * (1 + 0 * loss.detach()), scale_wrt_gas=False)

    def step(self, lr: float) -> None:
        """End a micro-batch; on the last one of the accumulation clip and update with ``lr``.

        Gradients that are not finite, in part or on one rank, are dropped on all: weights and moments stay as
        they are.
        """
        optimizer = self._engine.optimizer
        last = self._engine.is_gradient_accumulation_boundary()
        for group in optimizer.param_groups:
            group["lr"] = lr
        unchecked = last and not hasattr(optimizer, "_global_grad_norm")  # fp32 on stage 0
        if unchecked:
            self._plain_norm = float(nn.utils.get_total_norm([p.grad for p in self._engine.module.parameters()]))
            if not math.isfinite(self._plain_norm):
                self._engine.module.zero_grad()
                self._engine.set_gradient_accumulation_boundary(False)
        self._engine.step()
        if unchecked:
            self._engine.set_gradient_accumulation_boundary(None)  # DeepSpeed counts on
        if last and getattr(optimizer, "overflow", False) and hasattr(optimizer, "averaged_gradients"):
            # DeepSpeed 0.19.8 offloading under stage 1 or 2 would add them to all later ones, and drop these too.
            optimizer.averaged_gradients = dict.fromkeys(optimizer.averaged_gradients)

    @property
    def grad_norm(self) -> float:
        """Global L2 norm of the last gradients before clipping; not finite if they were dropped."""
        norm = self._engine.get_global_grad_norm()
        return self._plain_norm if norm is None else float(norm)

    @property
    def loss_scale(self) -> float:
        """What fp16 losses are multiplied by before backward; 1 in other precisions."""
        return float(getattr(self._engine.optimizer, "loss_scale", None) or 1)

    @contextlib.contextmanager
    def evaluating(self) -> Iterator[None]:
        """No gradients and no dropout inside."""
        self._engine.eval()
        try:
            with torch.no_grad():
                yield
        finally:
            self._engine.train()

    def summed(self, values: list[float]) -> list[float]:
        """Element-wise sums over all ranks, in float64."""
        total = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(total)
        return total.tolist()

    def gathered(self, rows: list[Any]) -> list[Any]:
        """The rows of all ranks, on every rank; for small things, they travel pickled."""
        of_rank: list[list[Any]] = [[] for _ in range(self.world_size)]
        dist.all_gather_object(of_rank, rows)
        return [row for rows in of_rank for row in rows]

    def peak_memory(self) -> float:
        """GiB: the most this rank has held so far, on its GPU, or resident on the host without one."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device) / 2**30
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20

    def wait(self) -> None:
        """Until every rank is here."""
        dist.barrier()

    def holds_only_finite(self) -> bool:
        """Whether each number of all ranks' master weights and moments is finite. Collective."""
        optimizer = getattr(self._engine.optimizer, "optimizer", self._engine.optimizer)
        tensors = [t for master, state in optimizer.state.items() for t in (master.detach(), *state.values())]
        ends = [end.item() for t in tensors if torch.is_tensor(t) and t.numel() for end in t.aminmax()]
        return self.summed([sum(not math.isfinite(end) for end in ends)]) == [0]

    # --- state in and out ---

    def save(self, folder: Path) -> None:
        """Write every rank's part of weights, master and moments into ``folder``."""
        with host.quiet():
            self._engine.save_checkpoint(str(folder.parent), tag=folder.name, save_latest=False)
        if self.rank == 0:  # DeepSpeed leaves programs beside the state
            for script in ("zero_to_fp32.py", "zero_to_torch.py"):
                (folder.parent / script).unlink(missing_ok=True)

    def load(self, folder: Path) -> None:
        """Read what ``save`` wrote, with the same number of ranks and the same engine settings.

        Raises:
            ValueError: with the optimizer on NVMe, whose moments DeepSpeed 0.19.8 does not bring back.
        """
        if self._engine.zero_nvme_offload_optimizer():
            raise ValueError(
                "a run with engine.offload_optimizer=nvme cannot be resumed: DeepSpeed does not restore its moments; "
                "set resume=never to start over, or train with engine.offload_optimizer=cpu"
            )
        with host.quiet():
            self._engine.load_checkpoint(str(folder.parent), tag=folder.name, load_lr_scheduler_states=False)
        optimizer = getattr(self._engine.optimizer, "optimizer", None)
        if isinstance(optimizer, DeepSpeedCPUAdam):
            _replay_steps(optimizer)

    def full_parameters(self) -> Iterator[tuple[str, Tensor]]:
        """Each parameter by name, whole and in fp32, gathered one at a time from the master weights."""
        whole = _stage_0_masters(self._engine.optimizer)
        for name, parameter in zip(self._names, self._engine.module.parameters(), strict=True):
            master = whole[parameter] if parameter in whole else safe_get_full_fp32_param(parameter)
            yield name, parameter.detach().float() if master is None else master


def _stage_0_masters(optimizer: Any) -> dict[nn.Parameter, Tensor]:
    """Master weights under stage 0, which DeepSpeed keeps flat and does not link to the parameters."""
    masters: dict[nn.Parameter, Tensor] = {}
    for flat, group in zip(
        getattr(optimizer, "fp32_groups_flat", []), getattr(optimizer, "fp16_groups", []), strict=False
    ):
        parts = flat.detach().split([parameter.numel() for parameter in group])
        masters.update((parameter, part.view_as(parameter)) for parameter, part in zip(group, parts, strict=True))
    return masters


def _load_weights(model: nn.Module, folder: str, shapes: dict[str, torch.Size], partitioned: bool) -> None:
    """Copy an HF folder's tensors into the model, one at a time; under ZeRO-3 rank 0 reads and sends."""
    with HFWeights(folder) as weights, torch.no_grad():
        tied = frozenset({"lm_head.weight"}) - shapes.keys()
        stored = weights.match(shapes, tied, bool(model.new_head_allowed))
        if dist.get_rank() == 0 and (new := shapes.keys() - stored.keys()):
            print(f"new head, not in {folder}: {', '.join(sorted(new))}", file=sys.stderr, flush=True)
        for name, parameter in model.named_parameters():
            if name not in stored:
                continue
            gathered = deepspeed.zero.GatheredParameters([parameter], modifier_rank=0, enabled=partitioned)
            with gathered:
                if not partitioned or dist.get_rank() == 0:
                    parameter.copy_(weights.tensor(stored[name]))


def _clear_padding(model: nn.Module) -> None:
    """ZeRO-3 fills up a parameter's last part with memory as it finds it, which need not even be finite."""
    for parameter in model.parameters():
        part = parameter.ds_tensor  # type: ignore[attr-defined]
        part.data[max(0, parameter.ds_numel - dist.get_rank() * part.ds_numel) :] = 0  # type: ignore[attr-defined]


def _replay_steps(optimizer: DeepSpeedCPUAdam) -> None:
    """Bring CPUAdam's native beta powers to where the loaded number of updates leaves them.

    It keeps them as running fp32 products, which a checkpoint does not hold; computed anew by pow() they
    differ in the last bits, and a resumed run would leave the straight one
    (DeepSpeed csrc/includes/cpu_adam.h, IncrementStep).
    """
    group = optimizer.param_groups[0]
    dummy = [torch.zeros(1) for _ in range(4)]
    steps = max((int(state["step"]) for state in optimizer.state.values()), default=0)
    for step in range(1, steps + 1):
        optimizer.ds_opt_adam.adam_update(
            optimizer.opt_id, step, 0.0, *group["betas"], group["eps"], 0.0, group["bias_correction"], *dummy
        )
