"""The plan's arithmetic equals what torch counts and what GPT-J 6B needs."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from gptj_train import GPTJConfig, GPTJForCausalLM
from gptj_train.launch.machine import Machine, Speeds
from gptj_train.model.lora import LoraConfig, with_lora
from gptj_train.model.recomputation import Degree, recompute
from gptj_train.planning.activations import activations
from gptj_train.planning.memory import Place, at_peak, memory_items, page_locked, peak
from gptj_train.planning.preflight import memory_line
from gptj_train.planning.run_plan import ModelSizes, RunPlan
from gptj_train.planning.step_time import flops, step_time
from gptj_train.training.disk_space import disk_needed
from gptj_train.training.zero_config import EngineConfig

SMALL = GPTJConfig(n_embd=128, n_layer=12, n_head=4, rotary_dim=16, vocab_size=300, n_positions=64)
BATCH, LENGTH = 2, 64
N = 6_050_882_784
WIDTH = 4096
EMBEDDING = 50400 * WIDTH


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


def lora_config(rank: int, dropout: float = 0.0, targets: tuple[str, ...] = ("q_proj", "v_proj")) -> LoraConfig:
    return LoraConfig(rank=rank, alpha=32, dropout=dropout, targets=list(targets), rslora=False, init_from=None)


def small(model: GPTJForCausalLM, config: GPTJConfig, lora: LoraConfig, **changes: Any) -> RunPlan:
    cfg = SimpleNamespace(
        engine=engine(**changes),
        lora=lora,
        quantize="none",
        global_batch_size=BATCH,
        micro_batch_size=BATCH,
        sequence_length=LENGTH,
    )
    return RunPlan(ModelSizes.of(model), config, cfg)  # type: ignore[arg-type]


def of_6b(rank: int = 0, micro_batch_size: int = 1, **changes: Any) -> RunPlan:
    lora = lora_config(rank)
    with torch.device("meta"):
        model = with_lora(GPTJForCausalLM(GPTJConfig()), lora)
    cfg = SimpleNamespace(
        engine=engine(**({"activation_checkpointing": "block"} | changes)),
        lora=lora,
        quantize="none",
        global_batch_size=32,
        micro_batch_size=micro_batch_size,
        sequence_length=2048,
        steps=1000,
        saves_best_every=0,
        save_every=500,
        keep_checkpoints=2,
        keep_every=0,
        export_dtype="bf16",
    )
    return RunPlan(ModelSizes.of(model), GPTJConfig(), cfg)  # type: ignore[arg-type]


def machine(nodes: int = 1, gpus: int = 1, **speeds: float) -> Machine:
    given = {"compute": 400e12, "host": 100e9, "nvme": 6e9, "pcie": 50e9, "gpu_link": 300e9, "network": 50e9}
    return Machine(
        nodes=nodes,
        ranks_per_node=gpus,
        has_gpus=True,
        gpu_memory=80e9,
        host_memory=137e9,
        nvme=None,
        disk=None,
        speeds=Speeds(**(given | speeds)),
    )


def bytes_of(plan: RunPlan, ranks: int, place: Place) -> dict[str, float]:
    """Items at the peak of a place, in GB with one decimal."""
    return {item.name: round(item.size / 1e9, 1) for item in at_peak(memory_items(plan, ranks, on_gpu=True), place)}


# --- what torch counts ---


@pytest.mark.parametrize("degree", ["none", "gelu", "mlp", "block"])
@pytest.mark.parametrize("rank", [0, 4])
def test_operations_are_those_torch_counts(degree: Degree, rank: int) -> None:
    """Torch does not count attention on the CPU; the last token of each row is no target of the head."""
    lora = lora_config(rank, targets=("q_proj",))
    model = with_lora(GPTJForCausalLM(SMALL), lora).bfloat16()
    recompute(model, degree)
    ids = torch.randint(SMALL.vocab_size, (BATCH, LENGTH))
    with FlopCounterMode(display=False) as counter:
        model(ids, labels=ids, skip_logits=True, use_cache=False).loss.backward()
    planned = small(model, SMALL, lora, activation_checkpointing=degree)
    passes = (2 if rank else 3) + (degree == "block")
    # With adapters, nothing asks for the gradients of what is before the first block's.
    attention = passes * 2 * SMALL.n_embd * LENGTH * SMALL.n_layer * BATCH * LENGTH
    assert flops(planned) - attention == pytest.approx(counter.get_total_flops(), rel=0.06 if rank else 0.01)


def kept_by_autograd(layers: int, degree: Degree, lora: LoraConfig) -> tuple[int, float]:
    """Bytes that one forward leaves beside the weights, and what the plan says."""
    config = GPTJConfig(n_embd=128, n_layer=layers, n_head=4, rotary_dim=16, vocab_size=300, n_positions=LENGTH)
    model = with_lora(GPTJForCausalLM(config), lora).bfloat16()
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
    planned = small(model, config, lora, activation_checkpointing=degree)
    return sum(sizes.values()), activations(planned, on_gpu=False)


@pytest.mark.parametrize("degree", ["none", "gelu", "mlp", "block"])
@pytest.mark.parametrize(
    "lora",
    [
        lora_config(0),
        lora_config(4, targets=("q_proj", "k_proj", "v_proj", "out_proj", "fc_in", "fc_out")),
        lora_config(4, 0.05, targets=("q_proj", "k_proj", "v_proj", "out_proj", "fc_in", "fc_out")),
        lora_config(4, 0.05),
    ],
    ids=["all weights", "adapters", "adapters with dropout", "two adapters with dropout"],
)
def test_activations_are_those_autograd_keeps(degree: Degree, lora: LoraConfig) -> None:
    """Of three blocks: the difference of a deep and a shallow model; without outputs of A, of the rank's width."""
    (deep, planned_deep), (shallow, planned_shallow) = (kept_by_autograd(layers, degree, lora) for layers in (4, 1))
    assert planned_deep - planned_shallow == pytest.approx(deep - shallow, rel=0.04 if lora.rank else 0.02)


def test_the_mask_of_dropout_takes_a_byte_on_a_gpu() -> None:
    lora = lora_config(4, 0.05, targets=("q_proj",))
    plan = small(with_lora(GPTJForCausalLM(SMALL), lora), SMALL, lora)
    elements = SMALL.n_layer * BATCH * LENGTH * SMALL.n_embd
    assert activations(plan, on_gpu=False) - activations(plan, on_gpu=True) == elements


# --- bytes by item ---


@pytest.mark.parametrize(
    ("changes", "place", "bytes_a_parameter"),
    [
        # weights 2, gradients 4, master and moments 12
        ({}, "GPU", 18),
        ({"precision": "fp32"}, "GPU", 16),  # the weights are their own masters
        ({"offload_optimizer": "cpu"}, "host", 12 + 4 + 4),
        ({"offload_optimizer": "cpu", "offload_parameters": "cpu"}, "host", 2 + 12 + 4 + 4),
        ({"offload_optimizer": "cpu", "accumulate_on": "gpu"}, "host", 12 + 4),
        ({"offload_optimizer": "cpu", "accumulate_on": "gpu"}, "GPU", 2 + 4),
        # gradients lie there too, until Adam reads them
        ({"offload_optimizer": "nvme", "offload_parameters": "nvme"}, "NVMe", 2 + 12 + 4),
        ({"offload_optimizer": "nvme", "offload_parameters": "nvme"}, "host", 4),
    ],
)
def test_what_is_spread_falls_with_the_ranks(changes: dict[str, Any], place: Place, bytes_a_parameter: int) -> None:
    # Else buffers of a sub-group or a bucket fall with the ranks, too.
    one_by_one = {"zero_optimization": {"sub_group_size": 1, "reduce_bucket_size": 1}}
    plan = of_6b(deepspeed=one_by_one, **changes)
    held = {}
    for ranks in (4, 8):
        items = memory_items(plan, ranks, on_gpu=True)
        fixed = ("freed page-locked blocks", "sums on their way")
        held[ranks] = peak([item for item in items if item.name not in fixed], place)
    assert (held[4] - held[8]) * 8 == pytest.approx(bytes_a_parameter * N)


def test_the_items_of_one_gpu_with_all_offloaded() -> None:
    """By hand, in GB: 6.05 billion parameters; buckets of 0.5 billion elements, 1 billion live, the head 0.206."""
    plan = of_6b(offload_optimizer="cpu", offload_parameters="cpu")
    assert bytes_of(plan, 1, "GPU") == {
        "reduction of a bucket": 3.0,  # 2 flattened + 4 in fp32, x 0.5
        "gathered weights": 2.0,
        "libraries": 2.0,
        "loss": 1.7,  # 8 x 1024 x 50400 + 6 x 4096 x 50400
        "sums on their way": 1.7,  # 2 x 4 x 0.206
        "gradient bucket": 1.0,
        "activations": 0.7,  # (28 + 13) x 2048 x 4096 x 2
    }
    assert bytes_of(plan, 1, "host") == {
        "fp32 masters and Adam moments": 72.6,
        "gradients for Adam": 24.2,
        "sums of gradients": 24.2,
        "weights": 12.1,
        "freed page-locked blocks": 3.8,  # 112 attention matrices of 4096 x 4096, 32 MiB each, and what is smaller
        "libraries": 1.5,
    }


def test_the_items_of_eight_gpus_that_hold_all() -> None:
    plan = of_6b(micro_batch_size=4, activation_checkpointing="none")
    assert bytes_of(plan, 8, "GPU") == {
        "activations": 26.3,  # 14 x 28 x 8192 x 4096 x 2
        "fp32 masters and Adam moments": 9.1,
        "sums of gradients": 3.0,
        "gathered weights": 2.0,
        "libraries": 2.0,
        "loss": 1.7,
        "weights": 1.5,
        "reduction of a bucket": 1.2,  # 2 flattened + 4 / 8 in fp32, x 0.5
        "gradient bucket": 1.0,
    }


def test_a_single_rank_uses_its_weights_where_they_are() -> None:
    alone = of_6b()
    assert "gathered weights" not in bytes_of(alone, 1, "GPU")
    assert bytes_of(alone, 2, "GPU")["gathered weights"] == 2.0


def test_the_buffers_of_nvme_are_on_the_host() -> None:
    plan = of_6b(offload_optimizer="nvme", offload_parameters="nvme")
    held = bytes_of(plan, 1, "host")
    assert held["buffers for Adam on NVMe"] == 16.0  # 4 of a sub-group of a billion in fp32
    assert held["buffers for weights on NVMe"] == 2.1  # 5 of the embedding in bf16
    assert page_locked(plan, 1) == pytest.approx(4 * N + 16e9)


def test_frozen_weights_are_page_locked_too() -> None:
    plan = of_6b(rank=8, offload_parameters="cpu")
    assert page_locked(plan, 1) == 2 * plan.sizes.all_elements


def test_a_stage_keeps_whole_what_it_does_not_spread() -> None:
    whole = [peak(memory_items(of_6b(stage=stage), 64, on_gpu=True), "GPU") for stage in range(4)]
    assert whole == sorted(whole, reverse=True)
    assert whole[0] > (2 + 2 + 12) * N
    assert whole[1] == pytest.approx(whole[2] + (2 - 4 / 64) * N)  # bf16 gradients, whole, for parts of fp32 sums


def test_adapters_cost_what_adapters_cost() -> None:
    plan = of_6b(rank=8)
    trained = plan.sizes.trained_elements
    assert trained == 28 * 2 * 8 * 2 * WIDTH
    assert plan.disk()[0] == 12 * trained
    assert plan.disk()[2] == 2 * N  # merged
    held = bytes_of(plan, 1, "GPU")
    assert held["weights"] == 12.1
    assert held["gradient bucket"] == 1.0  # DeepSpeed allocates all of it


def test_without_a_gpu_all_is_on_the_host() -> None:
    plan = of_6b(offload_optimizer="cpu", offload_parameters="cpu")
    items = memory_items(plan, 1, on_gpu=False)
    assert {item.place for item in items} == {"host"}
    names = {item.name for item in items}
    assert {"freed page-locked blocks", "sums on their way", "gathered weights"} & names == set()
    assert peak(items, "host") == sum(item.size for item in items)


def test_a_line_for_the_report() -> None:
    plan = of_6b(offload_optimizer="cpu", offload_parameters="cpu")
    items = memory_items(plan, 4, on_gpu=True)
    gpu, host = peak(items, "GPU") / 2**30, peak(items, "host") / 2**30
    assert memory_line(plan, 4, on_gpu=True) == (
        f"{gpu:.1f} GiB on the GPU, {host:.1f} GiB on the host planned for a rank"
    )
    alone = peak(memory_items(plan, 4, on_gpu=False), "host") / 2**30
    assert memory_line(plan, 4, on_gpu=False) == f"{alone:.1f} GiB on the host planned for a rank"


# --- disk and time ---


def test_disk_and_computation() -> None:
    plan = of_6b()
    assert plan.disk() == (12 * N, 2, 2 * N)
    # 36.47 GFLOP a token by hand, without recomputation
    without = of_6b(activation_checkpointing="none")
    assert flops(without) / (32 * 2048) == pytest.approx(36.47e9, rel=1e-3)
    assert step_time(without, machine()).seconds == pytest.approx(32 * 2048 * 36.47e9 / 400e12, rel=1e-3)


def test_copies_of_offloaded_weights_and_sums() -> None:
    """At PCIe's 50 GB/s: 2 x 12.1 + 24.2 GB to the GPU with each of 32 micro-batches, 24.2 back meanwhile: 31 s."""
    plan = of_6b(offload_optimizer="cpu", offload_parameters="cpu")
    time = step_time(plan, machine(host=1e15))
    assert 32 * time.micro_batch["copies to the GPU"] == pytest.approx(32 * (2 * 2 + 4) * N / 50e9)
    assert 32 * time.micro_batch["copies to the host"] == pytest.approx(32 * 4 * N / 50e9)
    assert time.seconds == pytest.approx(30.98 + 0.48, abs=0.02)  # and the gradients for Adam; the host is very fast


def test_copies_of_several_gpus_share_the_hosts_memory() -> None:
    plan = of_6b(offload_optimizer="cpu", offload_parameters="cpu")
    alone = step_time(plan, machine(gpus=8, host=1e15)).micro_batch["copies to the GPU"]
    shared = step_time(plan, machine(gpus=8, host=100e9)).micro_batch["copies to the GPU"]
    assert alone == pytest.approx(8 * N / 8 / 50e9)
    assert shared == pytest.approx((8 + 4) * N / 100e9)


def test_weights_are_read_from_nvme_twice_a_micro_batch() -> None:
    """At 6 GB/s 32 micro-batches read 2 x 12.1 GB: 129 s; the optimizer moves 32 + 2 bytes a parameter: 34 s."""
    plan = of_6b(offload_optimizer="nvme", offload_parameters="nvme")
    time = step_time(plan, machine())
    assert 32 * time.micro_batch["weights from NVMe"] == pytest.approx(129, abs=0.2)
    assert time.update["optimizer state on NVMe"] == pytest.approx(34 * N / 6e9)
    assert time.update["optimizer on the host"] == pytest.approx(42 * N / 100e9)


def test_communication() -> None:
    """Stage 3 gathers the weights twice and scatters the gradients with each micro-batch: 6 bytes a parameter."""
    two_nodes = machine(nodes=2, gpus=8)
    time = step_time(of_6b(), two_nodes)
    assert time.micro_batch["between nodes"] == pytest.approx(15 / 16 * 6 * N / 50e9)
    assert time.micro_batch["between GPUs"] == pytest.approx(15 / 16 * 6 * N / 300e9)
    assert "between nodes" not in step_time(of_6b(), machine(gpus=8)).micro_batch
    second = step_time(of_6b(stage=2), two_nodes)
    assert second.micro_batch["between nodes"] == pytest.approx(15 / 16 * 2 * N / 50e9)
    assert second.update["between nodes"] == pytest.approx(15 / 16 * 2 * N / 50e9)


def test_updated_weights_go_to_the_gpu_from_pageable_memory() -> None:
    time = step_time(of_6b(offload_optimizer="cpu", accumulate_on="gpu"), machine())
    assert time.update["updated weights to the GPU"] == pytest.approx(2 * N / 10e9)


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


@pytest.mark.parametrize("steps", [range(0), range(5), range(100), range(7, 100)])
@pytest.mark.parametrize("best_every", [4, 10, 1000])
@pytest.mark.parametrize(("save_every", "keep_every"), [(0, 0), (10, 0), (15, 20), (6, 6)])
def test_the_best_checkpoint_takes_room_beside_the_newest(
    steps: range, best_every: int, save_every: int, keep_every: int
) -> None:
    """Every evaluation may be the best so far, and save."""
    done = range(steps.start + 1, steps.stop + 1)
    saves = {step for step in done if step % best_every == 0 or (save_every and step % save_every == 0)}
    saves |= {steps.stop} if steps else set()
    permanent = {step for step in saves if keep_every and step % keep_every == 0}
    expected = min(len(saves - permanent), 5) + len(permanent)
    settings = {"save_every": save_every, "best_every": best_every, "keep_every": keep_every}
    assert disk_needed(1, steps=steps, keep=3, **settings)[1] == expected
