"""The answers for five machines, and that what is advised fits when it is planned again."""

from __future__ import annotations

import pytest

from gptj_train.config import PlanConfig, model_config_of
from gptj_train.launch.command_line import compose
from gptj_train.launch.machine import Machine, described_machine
from gptj_train.planning.advice import Advice, advise, nodes_needed
from gptj_train.planning.run_plan import RunPlan
from gptj_train.planning.step_time import step_time
from gptj_train.planning.verdict import memory_fits, needs

OFFLOAD = "+config=gptj_6b_zero3_offload"


def planned(*overrides: str) -> tuple[RunPlan, Machine]:
    cfg = compose("plan", overrides, PlanConfig)
    plan = RunPlan.of(cfg, model_config_of(cfg.model, cfg.init_from))
    return plan, described_machine(cfg, output_dir=cfg.output_dir, nvme_path=cfg.engine.nvme_path)


def short(plan: RunPlan, machine: Machine) -> dict[str, tuple[float, str]]:
    """GB needed in each place that has less, and its largest item."""
    return {
        need.place: (round(need.needed / 1e9, 1), need.items[0][0]) for need in needs(plan, machine) if not need.fits
    }


MASTERS = "fp32 masters and Adam moments"

ANSWERS = [
    (
        "a100_40gb_x1",
        {"a host": (139.4, MASTERS)},
        "lora=adapters optim.lr=0.0002 engine.offload_parameters=none engine.activation_checkpointing=none",
    ),
    (
        "h100_80gb_x1",
        {"a host": (139.4, MASTERS)},
        "engine.accumulate_on=gpu engine.activation_checkpointing=none micro_batch_size=4",
    ),
    (
        "rtx4090_24gb_x8",
        {"a host": (158.5, MASTERS)},
        "engine.offload_optimizer=none micro_batch_size=4",
    ),
    (
        "h100_80gb_2x8",
        {},
        "engine.stage=2 engine.offload_optimizer=none engine.offload_parameters=none "
        "engine.activation_checkpointing=none micro_batch_size=2",
    ),
    (
        "laptop_16gb",
        {"a host": (144.7, MASTERS)},
        "lora=adapters optim.lr=0.0002 quantize=nf4 engine.stage=2 engine.offload_optimizer=none "
        "engine.offload_parameters=none engine.activation_checkpointing=mlp",
    ),
]


@pytest.mark.parametrize(("cluster", "missing", "first"), ANSWERS, ids=[answer[0] for answer in ANSWERS])
def test_the_answer_for_a_machine(cluster: str, missing: dict[str, tuple[float, str]], first: str) -> None:
    plan, machine = planned(OFFLOAD, f"cluster={cluster}")
    assert short(plan, machine) == missing
    found = advise(plan, machine)
    assert found[0].overrides == first
    for advice in found:
        check_again(advice, OFFLOAD, f"cluster={cluster}")


def check_again(advice: Advice, *overrides: str) -> None:
    """Plan what is advised as a user would type it: it fits, and a step takes as long as the advice said."""
    plan, machine = planned(*overrides, *advice.overrides.split())
    assert memory_fits(plan, machine)
    assert step_time(plan, machine).seconds == pytest.approx(advice.seconds)


@pytest.mark.parametrize(
    ("preset", "cluster"),
    [("gptj_6b_1x80gb", "h100_80gb_x1"), ("gptj_6b_8x24gb", "rtx4090_24gb_x8"), ("gptj_6b_lora_24gb", "a100_40gb_x1")],
)
def test_a_preset_fits_its_machine_and_is_only_advised_what_is_faster(preset: str, cluster: str) -> None:
    plan, machine = planned(f"+config={preset}", f"cluster={cluster}")
    assert short(plan, machine) == {}
    for advice in advise(plan, machine):
        assert advice.seconds < 0.9 * step_time(plan, machine).seconds
        assert "lora" not in advice.change
        check_again(advice, f"+config={preset}", f"cluster={cluster}")


def test_nvme_is_advised_where_there_is_some() -> None:
    given = [OFFLOAD, "cluster=a100_40gb_x1", "nvme_gb=500"]
    plan, machine = planned(*given)
    first, second, *_ = advise(plan, machine)
    assert "engine.offload_optimizer=nvme" in first.overrides
    assert "engine.nvme_path=FOLDER" in first.overrides
    assert "lora=adapters" in second.overrides
    check_again(first, *given)
    full, machine = planned(*given, "nvme_gb=50")
    assert "lora" in advise(full, machine)[0].change


def test_a_batch_that_does_not_divide() -> None:
    given = ["+config=gptj_6b_8x80gb", "cluster=h100_80gb_2x8"]
    plan, machine = planned(*given)
    (advice,) = advise(plan, machine)
    assert advice.change["micro_batch_size"] == 2
    check_again(advice, *given)
    odd = [*given, "global_batch_size=36"]
    plan, machine = planned(*odd)
    (advice,) = advise(plan, machine)
    assert advice.change["global_batch_size"] == 32
    check_again(advice, *odd)


def test_more_nodes_where_no_key_helps() -> None:
    plan, machine = planned("+config=gptj_6b_zero3", "gpus_per_node=1", "gpu_memory=6", "host_memory=8")
    assert advise(plan, machine) == []
    assert nodes_needed(plan, machine) is None  # two billion gathered weights and the rest do not shrink
    plan, machine = planned("+config=gptj_6b_zero3", "gpus_per_node=1", "gpu_memory=13", "host_memory=3")
    assert nodes_needed(plan, machine) == 32


@pytest.mark.parametrize(
    ("preset", "parameters"),
    [
        # GPT-J's trunk of 5,844,393,984; the head: 50,400 x (4096 + 1), or two labels
        ("gptj_6b_zero3", 6_050_882_784),
        ("gptj_6b_classification", 5_844_393_984 + 2 * 4096),
        ("gptj_6b_qa", 5_844_393_984 + 2 * (4096 + 1)),
    ],
)
def test_the_head_is_that_of_the_presets_task(preset: str, parameters: int) -> None:
    plan, _ = planned(f"+config={preset}", "cluster=a100_40gb_x1")
    assert plan.sizes.all_elements == parameters


def test_a_recipe_can_be_named() -> None:
    plan, _ = planned("+config=gptj_6b_lora", "recipe=qa", "cluster=a100_40gb_x1")
    assert "qa_outputs.weight" in plan.sizes.trained
