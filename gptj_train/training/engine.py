"""The only module that imports DeepSpeed: builds the engine, steps it, and gives access to its state."""

from __future__ import annotations

import contextlib
import itertools
import logging
import math
import os
import resource
import warnings
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from gptj_train.launch import host
from gptj_train.launch.compilation import compile_under_lock
from gptj_train.launch.ranks import port_in_use_is_a_mistake

host.prepare_environment()
import deepspeed
from deepspeed.ops.op_builder.builder import OpBuilder
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
from deepspeed.utils import logger, safe_get_full_fp32_param

from gptj_train.model.batch_facts import inputs_on
from gptj_train.model.lora import LoraConfig
from gptj_train.model.quantized import Quantization
from gptj_train.model.recomputation import recompute
from gptj_train.training import deepspeed_internals
from gptj_train.training.deepspeed_internals import OptimizerState, is_partitioned
from gptj_train.training.gradient_buffers import count_non_finite, spread_non_finite, sums_on
from gptj_train.training.initial_weights import InitialWeights, open_initial_weights
from gptj_train.training.optimizer import OptimConfig, decay_groups
from gptj_train.training.quantized_base import build_quantized
from gptj_train.training.zero_config import EngineConfig, check_accepted, deepspeed_config
from gptj_train.weights.hf_writer import DTYPES

# Of a collective. While rank 0 writes or checks tens of GB, the other ranks wait in one.
_TIMEOUT = timedelta(hours=1)

logger.setLevel(logging.ERROR)
# DeepSpeed still calls the collectives by the names that torch 2.13 renamed.
warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")


def join_process_group() -> tuple[int, int]:
    """Start torch.distributed with the device's backend, once; return rank and world size.

    The launcher's RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT must be in the environment.
    """
    if not dist.is_initialized():
        if deepspeed.get_accelerator().device_name() == "cuda":
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        host.share_cores()
        # Before any rank compiles an extension: it would wait forever for the lock of a process that was killed.
        compile_under_lock(OpBuilder)
        deepspeed_internals.leave_shared_memory_clean(deepspeed.ops)
        with host.quiet(), port_in_use_is_a_mistake():
            deepspeed.init_distributed(verbose=False, timeout=_TIMEOUT)
    return dist.get_rank(), dist.get_world_size()


class Engine:
    """A module under DeepSpeed: ZeRO stage 0 to 3, offload, fp32 master weights for AdamW.

    Every method that moves data between ranks is collective: call it on all of them.

    Attributes:
        shapes: of all parameters, by name. trained: of those that are trained.
    """

    def __init__(
        self,
        *,
        build: Callable[[], nn.Module],
        init_from: str | None,
        engine: EngineConfig,
        optim: OptimConfig,
        micro_batch_size: int,
        accumulation: int,
        seed: int,
        mean_rows: Mapping[int, Sequence[int]] | None = None,
        quantize: Quantization = "none",
        lora: LoraConfig | None = None,
    ) -> None:
        """Build the model where its weights will live and wrap it.

        Args:
            build: makes the module; under ZeRO-3 each rank keeps only its part of every weight.
            init_from: HF folder or checkpoint with weights, and Adam's moments if it has them; None: fresh weights.
            accumulation: micro-batches per optimizer step on each rank.
            seed: decides the fresh weights, whatever the number of ranks.
            mean_rows: embedding row -> rows whose mean initializes it.
            quantize: how the frozen matrices of the blocks are stored; needs ``init_from``.
            lora: the adapters in the module; may name a folder for them to start from.

        Raises:
            UserError: weights that are not this model's.
        """
        self.rank, self.world_size = join_process_group()
        self.device = torch.device(deepspeed.get_accelerator().current_device_name())
        self._stage = engine.stage
        self._plain_norm = float("nan")  # set by step() where DeepSpeed reports no norm
        with torch.device("meta"):
            plan = build()
        self.shapes = {name: parameter.shape for name, parameter in plan.named_parameters()}
        self.trained = {name: parameter.shape for name, parameter in plan.named_parameters() if parameter.requires_grad}
        config = deepspeed_config(
            engine=engine,
            optim=optim,
            micro_batch_size=micro_batch_size,
            accumulation=accumulation,
            largest_parameter=max(shape.numel() for shape in self.shapes.values()),
            pin_memory=self.device.type != "cpu",
        )
        check_accepted(config, deepspeed.DeepSpeedConfig, self.device.type)
        with contextlib.ExitStack() as stack:
            initial = None
            if init_from is not None:
                # Opened first: a folder of another model is refused before memory is taken for this one.
                opened = open_initial_weights(
                    init_from,
                    shapes=self.shapes,
                    trained=self.trained,
                    mean_rows=mean_rows or {},
                    new_head_allowed=bool(plan.new_head_allowed),
                    share=(self.rank, self.world_size),
                    lora=lora,
                )
                initial = stack.enter_context(opened)
                if self.rank == 0:
                    initial.report(init_from)
            stack.enter_context(host.quiet())
            if quantize != "none":
                assert initial is not None
                model = build_quantized(
                    build,
                    initial,
                    quantize=quantize,
                    precision=DTYPES[engine.precision],
                    device=self.device,
                    seed=seed,
                )
            else:
                model = self._build(build, seed, config)
            if initial is not None:
                initial.fill_frozen(model, self.rank)
            recompute(model, engine.activation_checkpointing)
            groups = decay_groups(model, optim.weight_decay, optim.lora_lr_ratio)
            sums_device = self.device if engine.accumulate_on == "gpu" else None
            stack.enter_context(sums_on(DeepSpeedZeroOptimizer_Stage3, sums_device))
            self._engine, *_ = deepspeed.initialize(model=model, model_parameters=groups, config=config)
            self._fill_optimizer(initial)

    def _build(self, build: Callable[[], nn.Module], seed: int, config: dict[str, Any]) -> nn.Module:
        """Make the module; on stage 3 each parameter is split over the ranks as soon as it exists."""
        torch.manual_seed(seed)
        with deepspeed.zero.Init(config_dict_or_path=config, enabled=self._stage == 3):
            model = build()
        if self._stage == 3:
            deepspeed_internals.clear_padding(model, self.rank)
        return model

    def _fill_optimizer(self, initial: InitialWeights | None) -> None:
        """Fill masters and moments, and set AdamW's step."""
        state = self.optimizer_state()
        if initial is not None:
            initial.fill_trained(state)
        if self._stage == 0:
            # DeepSpeed has made the moments by a step without gradients, which counts.
            for section in state.sections:
                section.set_steps(0)
        if initial is not None:
            initial.fill_moments(state)

    # --- the step ---

    def forward(self, batch: dict[str, Tensor], targets: float) -> Any:
        """Return the module's output for a batch; its loss is the sum over the batch's targets / ``targets``."""
        return self._engine(**inputs_on(self.device, batch), use_cache=False, num_items_in_batch=targets)

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of one micro-batch. Gradients are averaged over ranks, not over micro-batches.

        A non-finite loss makes all of them NaN.
        """
        self._engine.backward(spread_non_finite(loss), scale_wrt_gas=False)

    def step(self, lr: float) -> None:
        """End a micro-batch; after the last one of the accumulation clip and update with ``lr``.

        One non-finite gradient on one rank skips the update on all ranks: weights and moments keep every bit.
        """
        optimizer = self._engine.optimizer
        last = self._engine.is_gradient_accumulation_boundary()
        for group in optimizer.param_groups:
            group["lr"] = lr * group.get("lr_ratio", 1)
        unchecked = last and not deepspeed_internals.checks_gradients(optimizer)
        if unchecked:
            # Skip the update ourselves: DeepSpeed steps the optimizer only at a boundary.
            gradients = [p.grad for p in self._engine.module.parameters() if p.grad is not None]
            self._plain_norm = float(nn.utils.get_total_norm(gradients))
            if not math.isfinite(self._plain_norm):
                self._engine.module.zero_grad()
                self._engine.set_gradient_accumulation_boundary(False)
        self._engine.step()
        if unchecked:
            # Let DeepSpeed count micro-batches again.
            self._engine.set_gradient_accumulation_boundary(None)
        if last:
            deepspeed_internals.drop_overflowed_gradients(optimizer)

    @property
    def grad_norm(self) -> float:
        """Global L2 norm of the last gradients before clipping; non-finite if the update was skipped."""
        norm = self._engine.get_global_grad_norm()
        return self._plain_norm if norm is None else float(norm)

    @property
    def loss_scale(self) -> float:
        """The factor of fp16 losses in the backward pass; 1 in other precisions."""
        return deepspeed_internals.loss_scale(self._engine.optimizer)

    @contextlib.contextmanager
    def evaluating(self) -> Iterator[None]:
        """Turn off gradients and dropout."""
        self._engine.eval()
        try:
            with torch.no_grad():
                yield
        finally:
            self._engine.train()

    def summed(self, values: list[float]) -> list[float]:
        """Return the element-wise sums over all ranks, in float64. Collective."""
        total = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(total)
        return total.tolist()

    def gathered(self, rows: list[Any]) -> list[Any]:
        """Return the rows of all ranks, in the order of ranks. Collective; for few rows, since they are pickled."""
        rows_of_ranks: list[list[Any]] = [[]] * self.world_size
        dist.all_gather_object(rows_of_ranks, rows)
        return list(itertools.chain.from_iterable(rows_of_ranks))

    def peak_memory(self) -> float:
        """Return the peak memory of this rank so far in GiB: on its GPU, or resident on the host without one."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device) / 2**30
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # Linux counts in KiB

    def wait(self) -> None:
        """Wait until every rank is here. Collective."""
        dist.barrier()

    def holds_only_finite(self) -> bool:
        """Return whether all master weights and moments of all ranks are finite. Collective."""
        return self.summed([count_non_finite(self.optimizer_state())]) == [0]

    # --- state in and out ---

    def optimizer_state(self) -> OptimizerState:
        """Return access to this rank's master weights and moments, in place."""
        names = {parameter: name for name, parameter in self._engine.module.named_parameters()}
        return OptimizerState(self._engine.optimizer, names, self.rank)

    def full_parameters(self, names: Container[str] | None = None) -> Iterator[tuple[str, Tensor]]:
        """Yield each parameter, or those in ``names``, whole and in fp32, from the master weights. Collective.

        One parameter is gathered at a time, so that no rank ever holds the whole model. Quantized matrices are none.
        """
        whole = self.optimizer_state().whole_masters()
        parts = self.optimizer_state().partial_masters()
        for name, parameter in self._engine.module.named_parameters():
            if names is not None and name not in names:
                continue
            if name in whole:  # stage 0 in bf16 or fp16
                yield name, whole[name].view_as(parameter)
            elif not parameter.requires_grad:  # frozen weights have no master
                with deepspeed.zero.GatheredParameters([parameter], enabled=is_partitioned(parameter)):
                    yield name, parameter.detach().float()
            elif is_partitioned(parameter):  # stage 3
                yield name, safe_get_full_fp32_param(parameter)
            elif parts is not None:  # stages 1 and 2
                yield name, self._joined(parts.get(name, []), parameter.shape)
            else:  # stage 0 in fp32: the parameter is its own master
                yield name, parameter.detach()

    def _joined(self, parts: list[tuple[int, Tensor]], shape: torch.Size) -> Tensor:
        """Join the ranks' parts of a parameter. Their bits are added as integers, which keeps also those of -0.0."""
        bits = torch.zeros(shape.numel(), dtype=torch.int32, device=self.device)
        for start, part in parts:
            bits[start : start + part.numel()] = part.view(torch.int32).to(self.device)
        dist.all_reduce(bits)
        return bits.view(torch.float32).view(shape)
