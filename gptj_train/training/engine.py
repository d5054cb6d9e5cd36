"""The one door to DeepSpeed: build, step, gather and show its state."""

from __future__ import annotations

import contextlib
import logging
import math
import os
import resource
import sys
import warnings
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from gptj_train.launch import host

host.prepare_environment()
import deepspeed
from deepspeed.utils import logger, safe_get_full_fp32_param

from gptj_train.training.accumulation import accumulation_steps
from gptj_train.training.deepspeed_internals import OptimizerState
from gptj_train.training.initial_weights import fill_frozen, fill_masters, fill_moments
from gptj_train.training.optimizer import OptimConfig, decay_groups
from gptj_train.training.zero_config import EngineConfig, deepspeed_config
from gptj_train.weights.checkpoint_weights import open_weights
from gptj_train.weights.mean_rows import WithMeanRows
from gptj_train.weights.moments import StoredMoments, moments_beside
from gptj_train.weights.stored import StoredWeights, is_adapter

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
        *,
        build: Callable[[], nn.Module],
        init_from: str | None,
        engine: EngineConfig,
        optim: OptimConfig,
        global_batch_size: int,
        micro_batch_size: int,
        seed: int,
        mean_rows: Mapping[int, Sequence[int]] | None = None,
    ) -> None:
        """Build the model where it will live and wrap it.

        Args:
            build: makes the module; under ZeRO-3 each rank keeps only its part of every weight.
            init_from: HF folder to take the weights from, and Adam's moments if it has them; None keeps the
                fresh weights.
            seed: decides the fresh weights, whatever the number of ranks.
            mean_rows: embedding row -> rows whose mean initializes it.

        Raises:
            UserError: batch sizes that do not divide, or weights that are not this model's.
        """
        self.rank, self.world_size = join_process_group()
        self.device = torch.device(deepspeed.get_accelerator().current_device_name())
        with torch.device("meta"):
            plan = build()
        self.shapes = {name: parameter.shape for name, parameter in plan.named_parameters()}
        self.trained = {name: parameter.shape for name, parameter in plan.named_parameters() if parameter.requires_grad}
        accumulation = accumulation_steps(global_batch_size, micro_batch_size, self.world_size)
        config = deepspeed_config(
            engine,
            optim,
            micro_batch_size,
            accumulation,
            largest_parameter=max(shape.numel() for shape in self.shapes.values()),
            pin_memory=self.device.type != "cpu",
        )
        if self.rank == 0 and engine.offload_optimizer != "none" and not host.is_compiled("cpu_adam"):
            print("Compiling DeepSpeed's CPU optimizer; once per installation, about a minute ...", flush=True)
        with contextlib.ExitStack() as stack:
            weights: StoredWeights | None = None
            moments: StoredMoments | None = None
            stored: dict[str, str] = {}
            if init_from is not None:  # known to be this model's before memory is taken for it
                weights = stack.enter_context(WithMeanRows(open_weights(init_from), mean_rows or {}))
                stored = self._match(weights, bool(plan.new_head_allowed))
                if self.trained == self.shapes:
                    moments = stack.enter_context(moments_beside(init_from, self.shapes, bool(plan.new_head_allowed)))
            stack.enter_context(host.quiet())
            torch.manual_seed(seed)
            with deepspeed.zero.Init(config_dict_or_path=config, enabled=engine.stage == 3):
                model = build()
            if engine.stage == 3:
                _clear_padding(model)
            if weights is not None:
                fill_frozen(model, weights, stored, self.rank)
            if engine.activation_checkpointing:
                model.gradient_checkpointing_enable()  # type: ignore[operator]
            self._engine, *_ = deepspeed.initialize(
                model=model, model_parameters=decay_groups(model, optim.weight_decay), config=config
            )
            if weights is not None:
                fill_masters(self.optimizer_state(), weights, stored)
            if engine.stage == 0:  # it has counted the empty step that made its moments
                for section in self.optimizer_state().sections:
                    section.set_steps(0)
            if moments is not None:
                fill_moments(self.optimizer_state(), moments)
        if moments is not None and self.rank == 0:
            print(f"Adam goes on from the {moments.steps:,} updates of {init_from}/adam", file=sys.stderr, flush=True)
        self._plain_norm = float("nan")  # of fp32 on stage 0, where DeepSpeed does not tell it

    def _match(self, weights: StoredWeights, new_head: bool) -> dict[str, str]:
        """Name in ``weights`` of each parameter that is to come from there."""
        wanted = {name: shape for name, shape in self.shapes.items() if not is_adapter(name)}
        stored = weights.match(wanted, frozenset({"lm_head.weight"}) - wanted.keys(), new_head)
        if self.rank == 0 and (new := wanted.keys() - stored.keys()):
            print(f"new head, not in {weights.folder}: {', '.join(sorted(new))}", file=sys.stderr, flush=True)
        return stored

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
            gradients = [p.grad for p in self._engine.module.parameters() if p.grad is not None]
            self._plain_norm = float(nn.utils.get_total_norm(gradients))
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
        broken = 0
        for section in self.optimizer_state().sections:
            with section.buffers() as buffers:
                ends = [end.item() for flat in buffers.values() if flat.numel() for end in flat.aminmax()]
            broken += sum(not math.isfinite(end) for end in ends)
        return self.summed([broken]) == [0]

    # --- state in and out ---

    def optimizer_state(self) -> OptimizerState:
        """This rank's master weights and moments, where they lie."""
        names = dict(zip(self._engine.module.parameters(), self.shapes, strict=True))
        return OptimizerState(self._engine.optimizer, names, self.rank)

    def full_parameters(self, names: Container[str] | None = None) -> Iterator[tuple[str, Tensor]]:
        """Each parameter, or each of some, whole and in fp32, gathered one at a time from the master weights."""
        state = self.optimizer_state()
        whole, parts = dict(state.whole_masters()), state.partial_masters()
        for name, parameter in zip(self.shapes, self._engine.module.parameters(), strict=True):
            if names is not None and name not in names:
                continue
            if parameter in whole:
                yield name, whole[parameter]
            elif not parameter.requires_grad:
                with deepspeed.zero.GatheredParameters([parameter], enabled=hasattr(parameter, "ds_tensor")):
                    yield name, parameter.detach().float()
            elif hasattr(parameter, "ds_tensor"):
                yield name, safe_get_full_fp32_param(parameter)
            elif parts is not None:
                yield name, self._joined(parts.get(name, []), parameter.shape)
            else:
                yield name, parameter.detach()

    def _joined(self, parts: list[tuple[int, Tensor]], shape: torch.Size) -> Tensor:
        """The ranks' parts of a parameter as one; added up as integers, which keeps every bit, also of -0.0."""
        bits = torch.zeros(shape.numel(), dtype=torch.int32, device=self.device)
        for start, part in parts:
            bits[start : start + part.numel()] = part.view(torch.int32).to(self.device)
        dist.all_reduce(bits)
        return bits.view(torch.float32).view(shape)


def _clear_padding(model: nn.Module) -> None:
    """ZeRO-3 fills up a parameter's last part with memory as it finds it, which need not even be finite."""
    for parameter in model.parameters():
        part = parameter.ds_tensor  # type: ignore[attr-defined]
        part.data[max(0, parameter.ds_numel - dist.get_rank() * part.ds_numel) :] = 0  # type: ignore[attr-defined]
