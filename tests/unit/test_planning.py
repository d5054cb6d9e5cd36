"""The plan's arithmetic equals what torch counts and what GPT-J 6B needs."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from typed_configs import lora_config

from gptj_train import GPTJConfig, GPTJForCausalLM
from gptj_train.model.lora import with_lora
from gptj_train.model.recomputation import Degree, recompute
from gptj_train.planning import RunPlan
from gptj_train.training.retention import disk_needed
from gptj_train.training.zero_config import EngineConfig

SMALL = GPTJConfig(n_embd=128, n_layer=12, n_head=4, rotary_dim=16, vocab_size=300, n_positions=64)
BATCH, LENGTH = 2, 64
N = 6_050_882_784
WIDTH = 4096


def engine(**changes: Any) -> EngineConfig:
    values = {
        "stage": 3,
        "offload_optimizer": "none",
        "offload_parameters": "none",
        "nvme_path": "disk",
        "accumulate_on": "optimizer",
    }
    values |= {"precision": "bf16", "activation_checkpointing": "none", "deepspeed": {}}
    return EngineConfig(**(values | changes))  # type: ignore[arg-type]


def small(model: GPTJForCausalLM, **changes: Any) -> RunPlan:
    cfg = SimpleNamespace(
        engine=engine(**changes),
        quantize="none",
        global_batch_size=BATCH,
        micro_batch_size=BATCH,
        sequence_length=LENGTH,
    )
    return RunPlan.of(model, SMALL, cfg)  # type: ignore[arg-type]


def of_6b(lora: int = 0, **changes: Any) -> RunPlan:
    shape = GPTJConfig()
    with torch.device("meta"):
        adapters = replace(lora_config(), rank=lora, dropout=0, targets=["q_proj", "v_proj"])
        model = with_lora(GPTJForCausalLM(shape), adapters)
    cfg = SimpleNamespace(
        engine=engine(**({"activation_checkpointing": "block"} | changes)),
        quantize="none",
        global_batch_size=32,
        micro_batch_size=1,
        sequence_length=2048,
        max_steps=1000,
        save_every=500,
        keep_checkpoints=2,
        keep_every=0,
        export_dtype="bf16",
    )
    return RunPlan.of(model, shape, cfg)  # type: ignore[arg-type]


@pytest.mark.parametrize("degree", ["none", "gelu", "mlp", "block"])
@pytest.mark.parametrize("lora", [0, 4])
def test_operations_are_those_torch_counts(degree: Degree, lora: int) -> None:
    """Torch does not count attention on the CPU; the last token of each row is no target of the head."""
    model = with_lora(GPTJForCausalLM(SMALL), replace(lora_config(), rank=lora, targets=["q_proj"])).bfloat16()
    recompute(model, degree)
    ids = torch.randint(SMALL.vocab_size, (BATCH, LENGTH))
    with FlopCounterMode(display=False) as counter:
        model(ids, labels=ids, skip_logits=True, use_cache=False).loss.backward()
    planned = small(model, activation_checkpointing=degree)
    passes = (2 if lora else 3) + (degree == "block")
    # With adapters, nothing asks for the gradients of what is before the first block's.
    attention = passes * 2 * SMALL.n_embd * LENGTH * SMALL.n_layer * BATCH * LENGTH
    assert planned.flops() - attention == pytest.approx(counter.get_total_flops(), rel=0.06 if lora else 0.01)


def kept_by_autograd(layers: int, degree: Degree) -> tuple[int, float]:
    """Bytes that one forward leaves beside the weights, and what the plan says."""
    config = GPTJConfig(n_embd=128, n_layer=layers, n_head=4, rotary_dim=16, vocab_size=300, n_positions=LENGTH)
    model = GPTJForCausalLM(config).bfloat16()
    recompute(model, degree)
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    sizes: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            sizes[storage.data_ptr()] = storage.nbytes()
        return tensor

    ids = torch.randint(config.vocab_size, (BATCH, LENGTH))
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        # Kept alive, because storages are counted by their addresses.
        output = model(ids, labels=ids, skip_logits=True, use_cache=False)
    assert output.loss.requires_grad
    cfg = SimpleNamespace(
        engine=engine(activation_checkpointing=degree), micro_batch_size=BATCH, sequence_length=LENGTH
    )
    return sum(sizes.values()), RunPlan.of(model, config, cfg).activations()  # type: ignore[arg-type]


@pytest.mark.parametrize("degree", ["none", "gelu", "mlp", "block"])
def test_activations_are_those_autograd_keeps(degree: Degree) -> None:
    """Of three blocks: the difference of a deep and a shallow model."""
    (deep, planned_deep), (shallow, planned_shallow) = (kept_by_autograd(layers, degree) for layers in (4, 1))
    assert planned_deep - planned_shallow == pytest.approx(deep - shallow, rel=0.02)


@pytest.mark.parametrize(
    ("changes", "place", "bytes_a_parameter"),
    [
        # weights 2, gradients 4, master and moments 12
        ({}, "GPU", 18),
        ({"offload_optimizer": "cpu"}, "host", 12 + 4 + 4),
        ({"offload_optimizer": "cpu", "offload_parameters": "cpu"}, "host", 2 + 12 + 4 + 4),
        ({"offload_optimizer": "cpu", "accumulate_on": "gpu"}, "host", 12 + 4),
        ({"offload_optimizer": "cpu", "accumulate_on": "gpu"}, "GPU", 2 + 4),
        ({"offload_optimizer": "nvme", "offload_parameters": "nvme"}, "NVMe", 2 + 12),
        ({"offload_optimizer": "nvme", "offload_parameters": "nvme"}, "host", 4 + 4),
    ],
)
def test_what_is_spread_falls_with_the_ranks(changes: dict[str, Any], place: str, bytes_a_parameter: int) -> None:
    one_by_one = {"zero_optimization": {"sub_group_size": 1}}  # else a GPU holds a copy of a sub-group's gradients
    plan = of_6b(deepspeed=one_by_one, **changes)
    spread = (plan.memory(4)[place] - plan.memory(8)[place]) * 8
    assert spread == pytest.approx(bytes_a_parameter * N)


def test_a_stage_keeps_whole_what_it_does_not_spread() -> None:
    whole = [of_6b(stage=stage).memory(64)["GPU"] for stage in range(4)]
    assert whole == sorted(whole, reverse=True)
    assert whole[0] > (2 + 2 + 12) * N
    assert whole[1] == pytest.approx(whole[2] + 4 * N * 63 / 64)  # gradients


def test_adapters_cost_what_adapters_cost() -> None:
    plan = of_6b(lora=8)
    (trained,) = {sum(shape.numel() for shape in plan.trained.values())}
    assert trained == 28 * 2 * 8 * 2 * WIDTH
    assert plan.disk()[0] == 12 * trained
    assert plan.disk()[2] == 2 * N  # merged
    of_adapters = plan.memory(1)["GPU"] - 2 * (N + trained) - plan.activations() - 2e9  # without weights
    assert 16 * trained < of_adapters < 32 * trained


def test_a_line_for_the_report() -> None:
    plan = of_6b(offload_optimizer="cpu", offload_parameters="cpu")
    held = {place: size / 2**30 for place, size in plan.memory(4).items()}
    on_both = (
        f"{held['GPU']:.1f} GiB on the GPU, {held['host']:.1f} GiB on the host planned for a rank, without libraries"
    )
    assert plan.memory_line(4, with_gpu=True) == on_both
    without = f"{held['GPU'] + held['host']:.1f} GiB on the host planned for a rank, without libraries"
    assert plan.memory_line(4, with_gpu=False) == without


def test_disk_and_time() -> None:
    plan = of_6b()
    assert plan.disk() == (12 * N, 2, 2 * N)
    speed = SimpleNamespace(gpus_per_node=8, tflops_per_gpu=400, host_gb_per_second=100, nvme_gb_per_second=5)
    # 36.47 GFLOP a token by hand, without recomputation
    without = of_6b(activation_checkpointing="none")
    assert without.flops() / (32 * 2048) == pytest.approx(36.47e9, rel=1e-3)
    assert without.step_seconds(8, speed) == pytest.approx(32 * 2048 * 36.47e9 / 3200e12, rel=1e-3)  # type: ignore[arg-type]
    times = {
        place: of_6b(activation_checkpointing="none", offload_optimizer=place).step_seconds(16, speed)  # type: ignore[arg-type]
        for place in ("none", "cpu", "nvme")
    }
    assert times["cpu"] - times["none"] == pytest.approx(42 * N / 2 / 100e9)
    assert times["nvme"] - times["cpu"] == pytest.approx(28 * N / 2 / 5e9)


@pytest.mark.parametrize("steps", [range(0), range(1), range(100), range(7, 100), range(40, 40), range(30, 90)])
@pytest.mark.parametrize("keep_every", [0, 1, 6, 20])
@pytest.mark.parametrize("save_every", [0, 1, 10, 15, 1000])
def test_counting_checkpoints_is_the_same_as_listing_them(steps: range, save_every: int, keep_every: int) -> None:
    saves = {step for step in range(steps.start + 1, steps.stop + 1) if save_every and step % save_every == 0}
    saves |= {steps.stop} if steps else set()
    permanent = {step for step in saves if keep_every and step % keep_every == 0}
    expected = min(2 + len(saves - permanent), 4) + len(permanent) if saves else 0
    _, most = disk_needed(1, steps=steps, save_every=save_every, keep=3, keep_every=keep_every, existing=2)
    assert most == expected
