"""Engine settings -> DeepSpeed's whole dict; contradictions and settings with two owners are refused."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from deepspeed import DeepSpeedConfig
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from typed_configs import engine_config, optim_config

from gptj_train.errors import UserError
from gptj_train.training.accumulation import accumulation_steps
from gptj_train.training.zero_config import EngineConfig, check_accepted, deepspeed_config

OPTIM = optim_config("clip_norm=0.5")
BASE = engine_config("zero3")
ADAMW = {"lr": 0.0, "betas": [0.9, 0.95], "eps": 1e-8, "weight_decay": 0.0}
ON_THE_GPU = {"optimizer": {"type": "AdamW", "params": ADAMW | {"torch_adam": True, "fused": True}}}
GOLDEN: dict[str, Any] = {
    "train_micro_batch_size_per_gpu": 2,
    "gradient_accumulation_steps": 4,
    "gradient_clipping": 0.5,
    "optimizer": {"type": "AdamW", "params": ADAMW},
    "bf16": {"enabled": True},
    "fp16": {"enabled": False},
    "data_types": {"grad_accum_dtype": "fp32"},
    "zero_optimization": {"stage": 3},
    "steps_per_print": 10**9,
    "timers": {"throughput": {"enabled": False}},
}


def engine(**changes: Any) -> EngineConfig:
    return replace(BASE, **changes)


def config(pin_memory: bool = False, **changes: Any) -> dict[str, Any]:
    return deepspeed_config(
        engine=engine(**changes),
        optim=OPTIM,
        micro_batch_size=2,
        accumulation=4,
        largest_parameter=1000,
        pin_memory=pin_memory,
    )


def test_zero3_on_the_gpus() -> None:
    assert config() == GOLDEN | ON_THE_GPU
    assert "train_batch_size" not in config()


def test_zero3_offload() -> None:
    host = {"device": "cpu", "pin_memory": True}
    zero = {"stage": 3, "offload_optimizer": host, "offload_param": host}
    made = config(offload_optimizer="cpu", offload_parameters="cpu", pin_memory=True)
    assert made == GOLDEN | {"zero_optimization": zero}


def test_zero3_nvme() -> None:
    disk = {"device": "nvme", "pin_memory": False, "nvme_path": "/disk"}
    zero = {
        "stage": 3,
        "offload_optimizer": disk,
        "offload_param": disk | {"buffer_size": 1000},
        "stage3_prefetch_bucket_size": 0,
    }
    made = config(offload_optimizer="nvme", offload_parameters="nvme", nvme_path="/disk")
    assert made == GOLDEN | {"zero_optimization": zero}


def test_optimizer_on_nvme_weights_on_the_host() -> None:
    zero = config(offload_optimizer="nvme", offload_parameters="cpu", nvme_path="/disk")["zero_optimization"]
    assert zero["offload_optimizer"] == {"device": "nvme", "pin_memory": False, "nvme_path": "/disk"}
    assert zero["offload_param"] == {"device": "cpu", "pin_memory": False}


@pytest.mark.parametrize(
    ("precision", "bf16", "fp16"), [("bf16", True, False), ("fp16", False, True), ("fp32", False, False)]
)
def test_precision(precision: str, bf16: bool, fp16: bool) -> None:
    made = config(stage=2, precision=precision)
    assert made == GOLDEN | ON_THE_GPU | {
        "bf16": {"enabled": bf16},
        "fp16": {"enabled": fp16},
        "zero_optimization": {"stage": 2},
    }


@pytest.mark.parametrize(("place", "kind"), [("none", "bf16"), ("cpu", "fp32")])
def test_stage_1_sums_gradients_in_fp32_only_where_that_is_right(place: str, kind: str) -> None:
    assert config(stage=1, offload_optimizer=place)["data_types"] == {"grad_accum_dtype": kind}


@pytest.mark.parametrize("precision", ["bf16", "fp16", "fp32"])
def test_stage_0_sums_gradients_in_its_own_precision(precision: str) -> None:
    made = config(stage=0, precision=precision)
    assert made["zero_optimization"] == {"stage": 0}
    assert made["data_types"] == {"grad_accum_dtype": precision}


def test_further_settings_in_deepspeeds_spelling() -> None:
    own = {
        "zero_optimization": {"stage3_max_live_parameters": 5, "offload_optimizer": {"pin_memory": True}},
        "wall_clock_breakdown": True,
        "steps_per_print": 7,
    }
    made = config(offload_optimizer="cpu", deepspeed=own)
    assert made == GOLDEN | {
        "zero_optimization": {
            "stage": 3,
            "stage3_max_live_parameters": 5,
            "offload_optimizer": {"device": "cpu", "pin_memory": True},
        },
        "wall_clock_breakdown": True,
        "steps_per_print": 7,
    }


def test_the_settings_are_not_modified() -> None:
    own = {"zero_optimization": {"offload_param": {"buffer_count": 9}}}
    config(offload_optimizer="cpu", offload_parameters="cpu", deepspeed=own)
    assert own == {"zero_optimization": {"offload_param": {"buffer_count": 9}}}


@pytest.mark.parametrize(
    ("own", "message"),
    [
        ({"train_batch_size": 8}, "engine.deepspeed.train_batch_size is set by global_batch_size; set it there"),
        ({"train_micro_batch_size_per_gpu": 8}, "is set by micro_batch_size"),
        ({"gradient_accumulation_steps": 1}, "is set by global_batch_size and micro_batch_size"),
        ({"gradient_clipping": 1.0}, "is set by optim.clip_norm"),
        ({"optimizer": {"type": "Adam"}}, "is set by optim;"),
        ({"scheduler": {"type": "WarmupLR"}}, "is set by optim.schedule"),
        ({"bf16": {"enabled": True}}, "is set by engine.precision"),
        ({"fp16": None}, "is set by engine.precision"),
        ({"zero_optimization": {"stage": 3}}, "engine.deepspeed.zero_optimization.stage is set by engine.stage"),
        ({"zero_optimization": {"offload_optimizer": {"device": "cpu"}}}, "is set by engine.offload_optimizer"),
        ({"zero_optimization": {"offload_optimizer": {"nvme_path": "/x"}}}, "is set by engine.nvme_path"),
        ({"zero_optimization": {"offload_param": {"device": "cpu"}}}, "is set by engine.offload_parameters"),
        ({"zero_optimization": {"offload_param": {"nvme_path": "/x"}}}, "is set by engine.nvme_path"),
    ],
)
def test_keys_that_our_settings_own_are_refused(own: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        engine(deepspeed=own)


@pytest.mark.parametrize(
    "own",
    [{"zero_optimization": None}, {"zero_optimization": 2}, {"zero_optimization": {"offload_optimizer": None}}],
)
def test_a_block_with_such_keys_cannot_be_replaced(own: dict[str, Any]) -> None:
    with pytest.raises(ValidationError, match=r"is set by engine\.(stage|offload_optimizer); set it there"):
        engine(deepspeed=own)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"stage": 2, "offload_parameters": "cpu"}, "engine.offload_parameters=cpu needs engine.stage=3"),
        ({"stage": 0, "offload_parameters": "nvme", "nvme_path": "/d"}, "offload_parameters=nvme needs engine.stage=3"),
        ({"stage": 0, "offload_optimizer": "cpu"}, "engine.offload_optimizer=cpu needs engine.stage=1, 2 or 3"),
        ({"stage": 2, "offload_optimizer": "nvme", "nvme_path": "/d"}, "offload_optimizer=nvme needs engine.stage=3"),
        ({"offload_optimizer": "nvme"}, "engine.nvme_path must name a folder on the NVMe disk"),
        ({"offload_parameters": "nvme"}, "engine.nvme_path must name a folder on the NVMe disk"),
        ({"stage": 4}, "should be 0, 1, 2 or 3"),
        ({"precision": "fp8"}, "should be 'bf16', 'fp16' or 'fp32'"),
        ({"offload_optimizer": "disk"}, "should be 'none', 'cpu' or 'nvme'"),
    ],
)
def test_invalid_combinations(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        engine(**changes)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_valid_combinations(stage: int) -> None:
    assert engine(stage=stage, offload_optimizer="cpu").stage == stage


@given(st.integers(1, 9), st.integers(1, 9), st.integers(1, 9))
def test_accumulation_fills_the_global_batch(accumulation: int, micro: int, world: int) -> None:
    assert accumulation_steps(accumulation * micro * world, micro, world) == accumulation


@given(st.integers(1, 100), st.integers(1, 9), st.integers(1, 9))
def test_a_batch_that_does_not_divide_suggests_one_that_does(total: int, micro: int, world: int) -> None:
    if total % (micro * world) == 0:
        return
    with pytest.raises(ValueError, match=f"global_batch_size {total} does not divide") as caught:
        accumulation_steps(total, micro, world)
    named = int(str(caught.value).rpartition("=")[2])
    assert accumulation_steps(named, micro, world) >= 1
    assert abs(named - total) <= micro * world


def test_the_message_of_a_batch_that_does_not_divide() -> None:
    with pytest.raises(ValueError, match="does not divide") as caught:
        accumulation_steps(30, 4, 2)
    assert str(caught.value) == (
        "global_batch_size 30 does not divide into micro_batch_size 4 x 2 ranks; "
        "the nearest that does is global_batch_size=32"
    )


@pytest.mark.parametrize(("total", "micro"), [(0, 1), (1, 0), (-4, 2)])
def test_empty_batches(total: int, micro: int) -> None:
    with pytest.raises(ValueError, match="global_batch_size and micro_batch_size must be at least 1"):
        accumulation_steps(total, micro, 1)


def test_settings_that_would_not_train_are_refused() -> None:
    for own, key in (
        ({"zero_optimization": {"offload_optimizer": {"ratio": 0.5}}}, "zero_optimization.offload_optimizer.ratio"),
        ({"zero_optimization": {"offload_optimizer": {"super_offload": True}}}, "offload_optimizer.super_offload"),
        ({"zero_optimization": {"zenflow": {"topk_ratio": 0.1}}}, "zero_optimization.zenflow"),
        ({"torch_autocast": {"enabled": True}}, "torch_autocast"),
        ({"elasticity": {}}, "elasticity"),
    ):
        with pytest.raises(ValidationError, match=rf"engine\.deepspeed\.\S*{key} is not supported: |{key} is not supp"):
            engine(deepspeed=own)


@pytest.mark.parametrize(
    ("own", "message"),
    [
        ({"nonsense": 1}, "engine.deepspeed.nonsense: DeepSpeed would ignore it"),
        ({"zero_optimization": {"reduce_bucket_size": "abc"}}, "reduce_bucket_size: input should be a valid integer"),
        ({"zero_optimization": {"nonsense": 1}}, "nonsense: extra inputs are not permitted, got 1"),
        ({"zero_optimization": {"sub_group_size": -1}}, "sub_group_size: input should be greater than or equal to 0"),
        ({"aio": 5}, "DeepSpeed does not accept these settings ('int' object"),
        ({"wall_clock_breakdown": "x"}, "DeepSpeed does not accept these settings"),
        ({"communication_data_type": "fp99"}, "Invalid communication_data_type"),
    ],
)
def test_settings_that_deepspeed_does_not_accept(own: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as caught:
        check_accepted(config(deepspeed=own), DeepSpeedConfig, "cuda")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_fp16_needs_a_gpu() -> None:
    check_accepted(config(precision="fp16"), DeepSpeedConfig, "cuda")
    check_accepted(config(precision="bf16"), DeepSpeedConfig, "cpu")
    with pytest.raises(UserError, match=r"engine\.precision=fp16 needs a GPU; on a CPU use bf16 or fp32"):
        check_accepted(config(precision="fp16"), DeepSpeedConfig, "cpu")
