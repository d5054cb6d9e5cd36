"""Every attribute of DeepSpeed that the package relies on exists in the installed version, by its source."""

from __future__ import annotations

import ast
import importlib.util
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
import torch

from gptj_train.training import deepspeed_internals
from gptj_train.training.deepspeed_internals import _SCALER_FIELDS, OptimizerState, Section
from gptj_train.weights.slices import Slice

SPEC = importlib.util.find_spec("deepspeed")
assert SPEC is not None
assert SPEC.submodule_search_locations
DEEPSPEED = Path(SPEC.submodule_search_locations[0])

# (file of DeepSpeed, class or function that sets or has them) -> attributes
USED = {
    ("runtime/zero/stage3.py", "DeepSpeedZeroOptimizer_Stage3"): [
        *("optimizer", "fp16_groups", "fp32_partitioned_groups_flat", "_global_grad_norm", "overflow", "loss_scale"),
        *("_swappable_optimizer_subgroup", "_optimizer_states_and_gradient_swap_in", "_release_swap_buffers"),
        *("_optimizer_states_and_gradient_swap_out", "_reassign_or_swap_out_partitioned_parameters"),
        *("checkpoint_event_prologue", "checkpoint_event_epilogue", "loss_scaler"),
        # of gradient_buffers.py
        *("initialize_optimizer_states", "device", "offload_optimizer_pin_memory", "grad_partitions_flat_buffer"),
        *("inf_or_nan_tracker", "has_overflow"),
    ],
    ("runtime/zero/stage_1_and_2.py", "DeepSpeedZeroOptimizer"): [
        *("optimizer", "bit16_groups", "single_partition_of_fp32_groups", "_global_grad_norm", "overflow"),
        *("loss_scale", "loss_scaler", "averaged_gradients", "update_lp_params"),
    ],
    ("runtime/fp16/fused_optimizer.py", "FP16_Optimizer"): [
        *("optimizer", "fp16_groups", "fp32_groups_flat", "_global_grad_norm", "overflow", "loss_scale"),
        "loss_scale_config",
    ],
    ("runtime/fp16/loss_scaler.py", "LossScaleConfig"): ["dynamic_loss_scale", *_SCALER_FIELDS[:3]],
    ("runtime/fp16/loss_scaler.py", "LossScalerBase"): ["dynamic", "cur_scale"],
    ("runtime/fp16/loss_scaler.py", "DynamicLossScaler"): ["dynamic", *_SCALER_FIELDS[1:]],
    ("utils/tensor_fragment.py", "tensor_fragment"): ["lp_fragment_address", "hp_fragment_address"],
    ("utils/tensor_fragment.py", "fragment_address"): ["start", "numel"],
    ("utils/mixed_precision_linkage.py", "link_hp_params"): ["_hp_mapping"],
    ("runtime/zero/partition_parameters.py", "Init"): [
        *("ds_tensor", "ds_numel", "ds_shape", "partition_numel", "nvme_swapper", "final_location"),
    ],
    ("runtime/swap_tensor/partitioned_param_swapper.py", "AsyncPartitionedParameterSwapper"): [
        *("swap_in", "swap_out_and_release"),
    ],
    ("ops/adam/cpu_adam.py", "DeepSpeedCPUAdam"): ["ds_opt_adam", "opt_id"],
    ("ops/__init__.py", "__getattr__"): ["__compatible_ops__"],
    ("runtime/engine.py", "DeepSpeedEngine"): [
        *("module", "optimizer", "backward", "step", "eval", "train", "get_global_grad_norm"),
        *("is_gradient_accumulation_boundary", "set_gradient_accumulation_boundary"),
    ],
}


@cache
def parsed(file: str) -> ast.Module:
    return ast.parse((DEEPSPEED / file).read_text())


def names_in(node: ast.AST) -> Iterator[str]:
    """Methods, fields, and attributes that are assigned: self.X = ..., p.X = ..., self.__dict__["X"] = ..."""
    for inner in ast.walk(node):
        if isinstance(inner, ast.FunctionDef):
            yield inner.name
        targets: list[ast.expr] = []
        if isinstance(inner, ast.Assign):
            targets = inner.targets
        elif isinstance(inner, ast.AnnAssign):
            targets = [inner.target]
        for target in targets:
            if isinstance(target, ast.Attribute):
                yield target.attr
            elif isinstance(target, ast.Name):
                yield target.id
            elif isinstance(target, ast.Subscript) and isinstance(target.slice, ast.Constant):
                yield str(target.slice.value)


@pytest.mark.parametrize(("place", "names"), USED.items(), ids=[owner for _, owner in USED])
def test_the_installed_deepspeed_has_every_attribute(place: tuple[str, str], names: list[str]) -> None:
    file, owner = place
    found: set[str] = set()
    for node in ast.walk(parsed(file)):
        if isinstance(node, ast.ClassDef | ast.FunctionDef) and node.name == owner:
            found |= set(names_in(node))
    inherited = set(dir(torch.nn.Module)) if owner == "DeepSpeedEngine" else set()
    assert sorted(set(names) - found - inherited) == []


def test_the_native_cpu_adam_has_its_update() -> None:
    assert 'm.def("adam_update"' in (DEEPSPEED / "ops/csrc/adam/cpu_adam.cpp").read_text()


def test_the_table_is_complete() -> None:
    """Whatever deepspeed_internals.py reads of an object is torch's, Python's, our own, or in the table."""
    known = {"adam_update", "sections", "param_groups", "state"}.union(*USED.values())
    for owner in (torch, torch.optim, torch.nn, torch.Tensor, torch.optim.Optimizer, torch.nn.Module, dict, list):
        known |= set(dir(owner))
    for ours in (Section, OptimizerState, Slice):
        known |= set(dir(ours)) | set(ours.__annotations__)
    used: set[str] = set()
    for node in ast.walk(ast.parse(Path(deepspeed_internals.__file__).read_text())):
        if isinstance(node, ast.Attribute) and not (isinstance(node.value, ast.Name) and node.value.id == "self"):
            used.add(node.attr)
        if isinstance(node, ast.Call) and ast.unparse(node.func) in ("getattr", "hasattr"):
            used |= {name.value for name in node.args[1:2] if isinstance(name, ast.Constant)}
    assert len(used) > 50
    assert sorted(used - known) == []


def test_the_engine_uses_no_private_attribute_but_its_own() -> None:
    """Nor any attribute that ZeRO adds to a parameter: those belong to deepspeed_internals.py."""
    for file in Path(deepspeed_internals.__file__).parent.glob("*.py"):
        if file.name == "deepspeed_internals.py":
            continue
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Attribute):
                private = node.attr.startswith("_") and not node.attr.startswith("__")
                own = isinstance(node.value, ast.Name) and node.value.id in ("self", "os")
                assert own or not private, f"{file.name}:{node.lineno}: {ast.unparse(node)}"
                assert not node.attr.startswith("ds_"), f"{file.name}:{node.lineno}: {ast.unparse(node)}"
