"""Where DeepSpeed's optimizers keep the training state: flat buffers, told by parameter name and slice.

Every ZeRO stage of DeepSpeed 0.19.8 lays parameters one behind the other into flat fp32 buffers, each rank its
part, and hands the buffers to AdamW. Its attributes are used here without importing it.
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


@dataclass(frozen=True)
class Section:
    """A flat buffer of this rank: its slices in order, each at its offset, and the optimizer that steps it.

    ``whole`` sections are the same on every rank. ``held`` keeps a buffer in memory that is else on NVMe.
    """

    slices: list[Slice]
    offsets: list[int]
    master: Tensor
    adam: torch.optim.Optimizer
    whole: bool = False
    held: Callable[[bool], AbstractContextManager[Any]] = nullcontext

    @contextmanager
    def buffers(self, changing: bool = False) -> Iterator[dict[str, Tensor]]:
        """Weights and moments, one-dimensional, to be read, or with ``changing`` to be written."""
        with self.held(changing):
            state = self.adam.state[self.master]
            if "exp_avg" not in state:  # no step has been taken yet
                state.update({moment: torch.zeros_like(self.master.data) for moment in MOMENTS})
                self.set_steps(0)
            yield {"master": self.master.data.view(-1)} | {moment: state[moment].view(-1) for moment in MOMENTS}

    @property
    def steps(self) -> int:
        """Updates that AdamW has made."""
        return int(self.adam.state.get(self.master, {}).get("step", 0))

    def set_steps(self, steps: int) -> None:
        """Where its bias correction goes on; nothing to set before the first step."""
        if state := self.adam.state.get(self.master):
            on_tensor = isinstance(self.adam, torch.optim.AdamW)
            state["step"] = torch.tensor(float(steps), device=self.master.device) if on_tensor else steps

    def pieces(self, buffers: Mapping[str, Tensor]) -> Iterator[tuple[Slice, dict[str, Tensor]]]:
        """Yield each slice with the view of each buffer (master, exp_avg, exp_avg_sq) that holds it."""
        for piece, offset in zip(self.slices, self.offsets, strict=True):
            yield piece, {kind: buffer.narrow(0, offset, piece.numel) for kind, buffer in buffers.items()}

    def share(self, rank: int, world_size: int) -> Iterator[tuple[Slice, int]]:
        """The slices, and their offsets in the buffer, that a rank has to save."""
        for (name, start, numel), offset in zip(self.slices, self.offsets, strict=True):
            if not self.whole:
                yield Slice(name, start, numel), offset
                continue
            size = -(-numel // world_size)
            first, last = min(numel, rank * size), min(numel, (rank + 1) * size)
            if first < last:
                yield Slice(name, first, last - first), offset + first


class OptimizerState:
    """All sections of a DeepSpeed engine's optimizer on this rank, and what it counts."""

    def __init__(self, optimizer: Any, names: Mapping[nn.Parameter, str], rank: int) -> None:
        self._optimizer, self._names, self._rank = optimizer, names, rank
        if hasattr(optimizer, "fp32_partitioned_groups_flat"):
            self.sections = list(self._stage_3())
        elif hasattr(optimizer, "single_partition_of_fp32_groups"):
            self.sections = list(self._stage_1_and_2())
        elif hasattr(optimizer, "fp32_groups_flat"):
            self.sections = list(self._stage_0())
        else:
            assert isinstance(optimizer, torch.optim.Optimizer), f"unknown optimizer {type(optimizer)}"
            self.sections = list(self._plain())

    def _stage_3(self) -> Iterator[Section]:
        zero = self._optimizer
        for index, (group, master) in enumerate(zip(zero.fp16_groups, zero.fp32_partitioned_groups_flat, strict=True)):
            slices, offsets, offset = [], [], 0
            for parameter in group:
                size = parameter.partition_numel()
                start = self._rank * size
                numel = min(size, parameter.ds_numel - start)  # the last rank's may be padded
                if numel > 0:
                    slices.append(Slice(self._names[parameter], start, numel))
                    offsets.append(offset)
                offset += size
            yield Section(slices, offsets, master, zero.optimizer, held=partial(self._held, index))

    @contextmanager
    def _held(self, index: int, changing: bool) -> Iterator[None]:
        """Bring a sub-group in from NVMe where it is there; once changed, derive its weights of compute."""
        zero = self._optimizer
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

    def _stage_1_and_2(self) -> Iterator[Section]:
        zero = self._optimizer
        for group, master in zip(zero.bit16_groups, zero.single_partition_of_fp32_groups, strict=True):
            slices, offsets = [], []
            for parameter in group:
                if (mapping := parameter._hp_mapping) is not None:
                    here, there = mapping.lp_fragment_address, mapping.hp_fragment_address
                    slices.append(Slice(self._names[parameter], here.start, here.numel))
                    offsets.append(there.start)
            yield Section(slices, offsets, master, zero.optimizer)

    def _stage_0(self) -> Iterator[Section]:
        mixed = self._optimizer
        for group, master in zip(mixed.fp16_groups, mixed.fp32_groups_flat, strict=True):
            slices, offsets, offset = [], [], 0
            for parameter in group:
                slices.append(Slice(self._names[parameter], 0, parameter.numel()))
                offsets.append(offset)
                offset += parameter.numel()
            yield Section(slices, offsets, master, mixed.optimizer, whole=True)

    def _plain(self) -> Iterator[Section]:
        """fp32 on stage 0: the parameters are their own masters."""
        for parameter, name in self._names.items():
            yield Section([Slice(name, 0, parameter.numel())], [0], parameter, self._optimizer, whole=True)

    @contextmanager
    def changing(self) -> Iterator[None]:
        """Around writing into the sections' buffers: the weights of compute follow from them at the end."""
        optimizer = self._optimizer
        if hasattr(optimizer, "checkpoint_event_prologue"):  # stage 3
            optimizer.checkpoint_event_prologue()
            yield
            optimizer.checkpoint_event_epilogue()
            return
        yield
        if hasattr(optimizer, "update_lp_params"):  # stages 1 and 2
            optimizer.update_lp_params()
        for parameter, master in self.whole_masters():
            parameter.data.copy_(master)

    def whole_masters(self) -> Iterator[tuple[nn.Parameter, Tensor]]:
        """Each parameter's fp32 master, where every rank has all of it: mixed precision on stage 0."""
        if not hasattr(self._optimizer, "fp32_groups_flat"):
            return
        for section, group in zip(self.sections, self._optimizer.fp16_groups, strict=True):
            for parameter, offset in zip(group, section.offsets, strict=True):
                yield parameter, section.master.detach().narrow(0, offset, parameter.numel()).view_as(parameter)

    def partial_masters(self) -> dict[str, list[tuple[int, Tensor]]] | None:
        """This rank's parts of each parameter's fp32 master and where they begin, on stages 1 and 2; else None."""
        if not hasattr(self._optimizer, "single_partition_of_fp32_groups"):
            return None
        parts = defaultdict(list)
        for section in self.sections:
            for (name, start, numel), offset in zip(section.slices, section.offsets, strict=True):
                parts[name].append((start, section.master.detach().narrow(0, offset, numel)))
        return parts

    def counters(self) -> dict[str, Any]:
        """AdamW's steps and the state of fp16's loss scale, the same on every rank."""
        scaler = self._dynamic_scaler()
        scale = {name: getattr(scaler, name) for name in _SCALER_FIELDS if hasattr(scaler, name)}
        return {"steps": max(section.steps for section in self.sections), "loss_scale": scale}

    def set_counters(self, counters: Mapping[str, Any]) -> None:
        """Restore what ``counters`` told; a loss scale only where this run has one."""
        for section in self.sections:
            section.set_steps(counters["steps"])
        scaler = self._dynamic_scaler()
        for name, value in counters["loss_scale"].items():
            if hasattr(scaler, name):
                setattr(scaler, name, value)
        if hasattr(adam := self.sections[0].adam, "ds_opt_adam"):
            _replay_steps(adam, counters["steps"])

    def _dynamic_scaler(self) -> Any:
        if (config := getattr(self._optimizer, "loss_scale_config", None)) is not None:  # stage 0
            return config if config.dynamic_loss_scale else None
        scaler = getattr(self._optimizer, "loss_scaler", None)
        return scaler if getattr(scaler, "dynamic", False) else None


def _replay_steps(cpu_adam: Any, steps: int) -> None:
    """Bring CPUAdam's native beta powers to where this number of updates leaves them.

    It keeps them as running fp32 products, which no file holds; computed anew by pow() they differ in the last
    bits, and a resumed run would leave the straight one (DeepSpeed csrc/includes/cpu_adam.h, IncrementStep).
    """
    group = cpu_adam.param_groups[0]
    dummy = [torch.zeros(1) for _ in range(4)]
    for step in range(1, steps + 1):
        cpu_adam.ds_opt_adam.adam_update(
            cpu_adam.opt_id, step, 0.0, *group["betas"], group["eps"], 0.0, group["bias_correction"], *dummy
        )
