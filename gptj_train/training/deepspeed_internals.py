"""Everything that relies on attributes DeepSpeed does not document, as they are in DeepSpeed 0.19.8.

Every ZeRO stage lays parameters one behind the other into flat fp32 buffers, each rank its part, and hands the
buffers to AdamW. tests/unit/test_deepspeed_internals.py looks up every attribute used here in the installed DeepSpeed,
so that an upgrade that renames one fails there. Nothing is imported from DeepSpeed: engine.py hands its objects in.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from gptj_train.weights.moments import MOMENTS
from gptj_train.weights.slices import Slice

_SCALER_FIELDS = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")


@dataclass(frozen=True, kw_only=True)
class Section:
    """A flat fp32 buffer of this rank: its slices in order, each at its offset, and the optimizer that steps it.

    ``whole`` sections are the same on every rank. ``held`` keeps a buffer in memory that otherwise lies on NVMe.
    """

    slices: list[Slice]
    offsets: list[int]
    master: Tensor
    adam: torch.optim.Optimizer
    whole: bool = False
    held: Callable[[bool], AbstractContextManager[Any]] = nullcontext

    @contextmanager
    def buffers(self, changing: bool = False) -> Iterator[dict[str, Tensor]]:
        """Give access to master, exp_avg and exp_avg_sq, flat; with ``changing`` they may be written to."""
        with self.held(changing):
            state = self.adam.state[self.master]
            if "exp_avg" not in state:  # AdamW makes its moments at the first step only
                state.update({moment: torch.zeros_like(self.master.data) for moment in MOMENTS})
                self.set_steps(0)
            yield {"master": self.master.data.view(-1)} | {moment: state[moment].view(-1) for moment in MOMENTS}

    @property
    def steps(self) -> int:
        """Updates that AdamW has made."""
        return int(self.adam.state.get(self.master, {}).get("step", 0))

    def set_steps(self, steps: int) -> None:
        """Set the step count of AdamW's bias correction; before the first step there is none to set."""
        state = self.adam.state.get(self.master)
        if not state:
            return
        # torch's AdamW counts in a tensor, DeepSpeed's optimizers in an int.
        on_tensor = isinstance(self.adam, torch.optim.AdamW)
        state["step"] = torch.tensor(float(steps), device=self.master.device) if on_tensor else steps

    def pieces(self, buffers: Mapping[str, Tensor]) -> Iterator[tuple[Slice, dict[str, Tensor]]]:
        """Yield each slice with the view of each buffer (master, exp_avg, exp_avg_sq) that holds it."""
        for piece, offset in zip(self.slices, self.offsets, strict=True):
            yield piece, {kind: buffer.narrow(0, offset, piece.numel) for kind, buffer in buffers.items()}

    def share(self, rank: int, world_size: int) -> Iterator[tuple[Slice, int]]:
        """Yield the slices that a rank has to save, with their offsets in the buffer."""
        for piece, offset in zip(self.slices, self.offsets, strict=True):
            if not self.whole:
                yield piece, offset
                continue
            # Every rank holds all of it: each saves an equal part, the last one what is left.
            size = -(-piece.numel // world_size)
            first = min(piece.numel, rank * size)
            end = min(piece.numel, first + size)
            if first < end:
                yield Slice(piece.name, first, end - first), offset + first


class OptimizerState:
    """All sections of a DeepSpeed engine's optimizer on this rank, and its counters."""

    def __init__(self, optimizer: Any, names: Mapping[nn.Parameter, str], rank: int) -> None:
        self._optimizer = optimizer
        self._names: Mapping[Any, str] = names
        self._rank = rank
        # Each stage has a class of its own; the name of its fp32 buffers tells which it is.
        if hasattr(optimizer, "fp32_partitioned_groups_flat"):
            self.sections = list(self._stage_3(optimizer))
        elif hasattr(optimizer, "single_partition_of_fp32_groups"):
            self.sections = list(self._stage_1_and_2(optimizer))
        elif hasattr(optimizer, "fp32_groups_flat"):
            self.sections = list(self._stage_0(optimizer))
        else:
            assert isinstance(optimizer, torch.optim.Optimizer), f"unknown optimizer {type(optimizer)}"
            self.sections = list(self._stage_0_in_fp32(optimizer))

    def _stage_3(self, zero: Any) -> Iterator[Section]:
        for index, (group, master) in enumerate(zip(zero.fp16_groups, zero.fp32_partitioned_groups_flat, strict=True)):
            slices, offsets, offset = [], [], 0
            for parameter in group:
                start, numel = _partition_of(parameter, self._rank)
                if numel > 0:  # a rank may hold nothing but padding of a small parameter
                    slices.append(Slice(self._names[parameter], start, numel))
                    offsets.append(offset)
                offset += parameter.partition_numel()
            held = partial(_held, zero, index)
            yield Section(slices=slices, offsets=offsets, master=master, adam=zero.optimizer, held=held)

    def _stage_1_and_2(self, zero: Any) -> Iterator[Section]:
        for group, master in zip(zero.bit16_groups, zero.single_partition_of_fp32_groups, strict=True):
            slices, offsets = [], []
            for parameter in group:
                mapping = parameter._hp_mapping
                if mapping is not None:  # otherwise the parameter lies on other ranks
                    # Its elements here ("lp", low precision) and where they are in the flat fp32 buffer ("hp").
                    here, there = mapping.lp_fragment_address, mapping.hp_fragment_address
                    slices.append(Slice(self._names[parameter], here.start, here.numel))
                    offsets.append(there.start)
            yield Section(slices=slices, offsets=offsets, master=master, adam=zero.optimizer)

    def _stage_0(self, mixed: Any) -> Iterator[Section]:
        for group, master in zip(mixed.fp16_groups, mixed.fp32_groups_flat, strict=True):
            slices, offsets, offset = [], [], 0
            for parameter in group:
                slices.append(Slice(self._names[parameter], 0, parameter.numel()))
                offsets.append(offset)
                offset += parameter.numel()
            yield Section(slices=slices, offsets=offsets, master=master, adam=mixed.optimizer, whole=True)

    def _stage_0_in_fp32(self, adam: torch.optim.Optimizer) -> Iterator[Section]:
        for parameter, name in self._names.items():
            slices = [Slice(name, 0, parameter.numel())]
            yield Section(slices=slices, offsets=[0], master=parameter, adam=adam, whole=True)

    @contextmanager
    def changing(self) -> Iterator[None]:
        """Wrap every write into the sections' buffers: at its end the low-precision weights follow the masters."""
        optimizer = self._optimizer
        if hasattr(optimizer, "checkpoint_event_prologue"):  # stage 3, which updates them section by section
            optimizer.checkpoint_event_prologue()
            yield
            optimizer.checkpoint_event_epilogue()
            return
        yield
        if hasattr(optimizer, "update_lp_params"):  # stages 1 and 2
            optimizer.update_lp_params()
        masters = self.whole_masters()
        for parameter, name in self._names.items():
            if name in masters:
                parameter.data.copy_(masters[name].view_as(parameter))

    def whole_masters(self) -> dict[str, Tensor]:
        """Return the flat fp32 masters, by parameter, that every rank holds in full: those of stage 0 below fp32."""
        masters = {}
        if hasattr(self._optimizer, "fp32_groups_flat"):
            for section in self.sections:
                for piece, views in section.pieces({"master": section.master.detach()}):
                    masters[piece.name] = views["master"]
        return masters

    def partial_masters(self) -> dict[str, list[tuple[int, Tensor]]] | None:
        """Return this rank's parts of each fp32 master, with their starts, on stages 1 and 2; otherwise None."""
        if not hasattr(self._optimizer, "single_partition_of_fp32_groups"):
            return None
        parts = defaultdict(list)
        for section in self.sections:
            for piece, views in section.pieces({"master": section.master.detach()}):
                parts[piece.name].append((piece.start, views["master"]))
        return parts

    def counters(self) -> dict[str, Any]:
        """Return AdamW's steps and the state of fp16's dynamic loss scale, the same on every rank."""
        scaler = self._dynamic_scaler()
        scale = {name: getattr(scaler, name) for name in _SCALER_FIELDS if hasattr(scaler, name)}
        return {"steps": max(section.steps for section in self.sections), "loss_scale": scale}

    def set_counters(self, counters: Mapping[str, Any]) -> None:
        """Restore what ``counters`` returned; the loss scale only where this run has a dynamic one."""
        for section in self.sections:
            section.set_steps(counters["steps"])
        scaler = self._dynamic_scaler()
        for name, value in counters["loss_scale"].items():
            if hasattr(scaler, name):
                setattr(scaler, name, value)
        adam = self.sections[0].adam
        if hasattr(adam, "ds_opt_adam"):
            _replay_steps(adam, counters["steps"])

    def _dynamic_scaler(self) -> Any:
        config = getattr(self._optimizer, "loss_scale_config", None)
        if config is not None:  # stage 0
            return config if config.dynamic_loss_scale else None
        scaler = getattr(self._optimizer, "loss_scaler", None)
        return scaler if getattr(scaler, "dynamic", False) else None


@contextmanager
def _held(zero: Any, index: int, changing: bool) -> Iterator[None]:
    """Read a sub-group from NVMe if it lies there; if it was changed, update its low-precision weights after it."""
    swapped = zero._swappable_optimizer_subgroup(index)
    if swapped:
        zero._optimizer_states_and_gradient_swap_in(index)
    try:
        yield
    finally:
        if swapped and not changing:
            zero._release_swap_buffers(index)
    if changing:
        zero._reassign_or_swap_out_partitioned_parameters(index)
    if changing and swapped:
        zero._optimizer_states_and_gradient_swap_out(index)


def _replay_steps(cpu_adam: Any, steps: int) -> None:
    """Bring CPUAdam's native beta powers to their values after this number of updates.

    It keeps them as running fp32 products, which no file holds. Recomputed by pow() they differ in the last bits,
    and a resumed run would diverge from the straight one (DeepSpeed csrc/includes/cpu_adam.h, IncrementStep).
    """
    group = cpu_adam.param_groups[0]
    dummy = [torch.zeros(1) for _ in range(4)]
    for step in range(1, steps + 1):
        cpu_adam.ds_opt_adam.adam_update(
            cpu_adam.opt_id, step, 0.0, *group["betas"], group["eps"], 0.0, group["bias_correction"], *dummy
        )


# --- parameters under ZeRO-3 ---


def is_partitioned(parameter: nn.Parameter) -> bool:
    """Return whether ZeRO-3 has split the parameter over the ranks."""
    return hasattr(parameter, "ds_tensor")


def full_shape(parameter: nn.Parameter) -> torch.Size:
    """Return the parameter's shape before ZeRO-3, which leaves an empty tensor in its place."""
    return getattr(parameter, "ds_shape", parameter.shape)


def clear_padding(model: nn.Module, rank: int) -> None:
    """Zero the end of each last partition: ZeRO-3 pads with uninitialized memory, which may hold NaN."""
    for parameter in model.parameters():
        _, numel = _partition_of(parameter, rank)
        parameter.ds_tensor.data[max(0, numel) :] = 0  # type: ignore[attr-defined]


@contextmanager
def partition(parameter: Any, rank: int) -> Iterator[tuple[int, Tensor]]:
    """Give access to this rank's partition: its start in the parameter and its elements, flat, without padding."""
    on_nvme = parameter.ds_tensor.final_location == "nvme"
    if on_nvme:
        parameter.nvme_swapper.swap_in([parameter], async_op=False)
    start, numel = _partition_of(parameter, rank)
    yield start, parameter.ds_tensor.data.narrow(0, 0, max(0, numel))
    if on_nvme:
        parameter.nvme_swapper.swap_out_and_release([parameter])


def _partition_of(parameter: Any, rank: int) -> tuple[int, int]:
    """Return start and number of a rank's elements; the last partition may be padded, and then holds fewer."""
    size = parameter.partition_numel()
    start = rank * size
    return start, min(size, parameter.ds_numel - start)


# --- quirks of the optimizers ---


def checks_gradients(optimizer: Any) -> bool:
    """Return whether the optimizer computes the gradients' norm and skips non-finite ones; fp32 on stage 0 does not."""
    return hasattr(optimizer, "_global_grad_norm")


def drop_overflowed_gradients(optimizer: Any) -> None:
    """After a skipped step, drop gradients that offloading under stage 1 or 2 keeps.

    DeepSpeed 0.19.8 would add them to those of all later steps, and skip these too.
    """
    if getattr(optimizer, "overflow", False) and hasattr(optimizer, "averaged_gradients"):
        optimizer.averaged_gradients = dict.fromkeys(optimizer.averaged_gradients)


def loss_scale(optimizer: Any) -> float:
    """Return the factor of fp16 losses in the backward pass; 1 in other precisions."""
    return float(getattr(optimizer, "loss_scale", None) or 1)


def leave_shared_memory_clean(ops: Any) -> None:
    """Turn off DeepSpeed's all-reduce over shared memory, given the module ``deepspeed.ops``.

    It is made for inference, and each rank would leave 66 MiB behind in /dev/shm.
    """
    ops.__compatible_ops__["deepspeed_shm_comm"] = False
