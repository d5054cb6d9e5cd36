"""Typed engine settings -> DeepSpeed's dict, with one owner each of batch sizes, precision and clipping."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, ValidationError

from gptj_train.errors import UserError
from gptj_train.model.recomputation import Degree
from gptj_train.schema import schema
from gptj_train.training.optimizer import OptimConfig

_OWNED = {
    "train_batch_size": "global_batch_size",
    "train_micro_batch_size_per_gpu": "micro_batch_size",
    "gradient_accumulation_steps": "global_batch_size and micro_batch_size",
    "gradient_clipping": "optim.clip_norm",
    "optimizer": "optim",
    "scheduler": "optim.schedule",
    "bf16": "engine.precision",
    "fp16": "engine.precision",
    "zero_optimization.stage": "engine.stage",
    "zero_optimization.offload_optimizer.device": "engine.offload_optimizer",
    "zero_optimization.offload_optimizer.nvme_path": "engine.nvme_path",
    "zero_optimization.offload_param.device": "engine.offload_parameters",
    "zero_optimization.offload_param.nvme_path": "engine.nvme_path",
}

# DeepSpeed accepts these, and then trains other numbers than the config says, or a part of the weights not at all.
_UNSUITABLE = {
    "zero_optimization.offload_optimizer.ratio": "a part of the optimizer would not update its weights",
    "zero_optimization.offload_optimizer.super_offload": "its optimizer keeps no state that checkpoints could hold",
    "zero_optimization.zenflow": "weights would be updated late, and checkpoints lack its state",
    "zero_optimization.cpu_offload": "use engine.offload_optimizer",
    "zero_optimization.cpu_offload_param": "use engine.offload_parameters",
    "zero_optimization.load_from_fp32_weights": "weights come from init_from or a checkpoint",
    "zero_force_ds_cpu_optimizer": "use engine.offload_optimizer",
    "torch_autocast": "use engine.precision",
    "data_types": "engine.precision decides how gradients accumulate",
    "elasticity": "it would change the batch size; use global_batch_size",
    "compression_training": "it would change the weights",
    "tensor_parallel": "the model has no tensor parallelism",
    "pipeline": "the model has no pipeline stages",
    "checkpoint": "checkpoints are ours; see save_every",
    "load_universal_checkpoint": "use resume",
}

# Of the blocks that DeepSpeed reads those that suit us; any other name it ignores without a word.
_READ_BY_DEEPSPEED = {
    *("train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping", "optimizer"),
    *("bf16", "fp16", "data_types", "zero_optimization", "steps_per_print", "aio", "communication_data_type"),
    *("wall_clock_breakdown", "memory_breakdown", "dump_state", "comms_logger", "flops_profiler", "disable_python_gc"),
    *("tensorboard", "wandb", "csv_monitor", "comet", "zero_allow_untested_optimizer", "disable_allgather"),
    *("compile", "log_level", "timers"),
}


def _degree(value: Any) -> Any:
    """Return a degree for the values that the key had when recomputation was all or nothing."""
    if isinstance(value, bool):
        return "block" if value else "none"
    return value


@schema
class EngineConfig:
    """Where the training state lives. ``deepspeed`` holds further settings in DeepSpeed's own spelling."""

    stage: Literal[0, 1, 2, 3]
    offload_optimizer: Literal["none", "cpu", "nvme"]
    offload_parameters: Literal["none", "cpu", "nvme"]
    nvme_path: str | None
    accumulate_on: Literal["optimizer", "gpu"]
    precision: Literal["bf16", "fp16", "fp32"]
    activation_checkpointing: Annotated[Degree, BeforeValidator(_degree)]
    deepspeed: dict[str, Any]

    def __post_init__(self) -> None:
        if self.offload_parameters != "none" and self.stage != 3:
            raise UserError(f"engine.offload_parameters={self.offload_parameters} needs engine.stage=3")
        if self.offload_optimizer == "cpu" and self.stage == 0:
            raise UserError("engine.offload_optimizer=cpu needs engine.stage=1, 2 or 3")
        if self.offload_optimizer == "nvme" and self.stage != 3:
            raise UserError("engine.offload_optimizer=nvme needs engine.stage=3")
        if self.accumulate_on == "gpu" and self.offload_optimizer != "none" and self.stage != 3:
            raise UserError("engine.accumulate_on=gpu with an offloaded optimizer needs engine.stage=3")
        if "nvme" in (self.offload_optimizer, self.offload_parameters) and not self.nvme_path:
            raise UserError("engine.nvme_path must name a folder on the NVMe disk to offload to")
        for key, ours in _OWNED.items():
            if _holds(self.deepspeed, key):
                raise UserError(f"engine.deepspeed.{key} is set by {ours}; set it there")
        for key, reason in _UNSUITABLE.items():
            if _holds(self.deepspeed, key):
                raise UserError(f"engine.deepspeed.{key} is not supported: {reason}")


def _holds(settings: Any, dotted: str) -> bool:
    """Return whether nested settings have a key, or replace a block that it belongs to."""
    for part in dotted.split("."):
        if not isinstance(settings, Mapping):
            return True  # a value in place of the block
        if part not in settings:
            return False
        settings = settings[part]
    return True


def check_accepted(config: dict[str, Any], reader: Callable[[dict[str, Any]], Any], device: str) -> None:
    """Check that DeepSpeed can read its settings and that the device computes in their precision.

    Args:
        config: from ``deepspeed_config``.
        reader: DeepSpeed's own parser, which raises errors of many types.

    Raises:
        UserError: fp16 on a CPU; a setting that DeepSpeed would ignore or does not accept.
    """
    if config["fp16"]["enabled"] and device == "cpu":
        # DeepSpeed asserts that its optimizer is on a GPU.
        raise UserError("engine.precision=fp16 needs a GPU; on a CPU use bf16 or fp32")
    unknown = sorted(config.keys() - _READ_BY_DEEPSPEED)
    if unknown:
        raise UserError(f"engine.deepspeed.{unknown[0]}: DeepSpeed would ignore it; remove it or correct its name")
    try:
        reader(config)
    except ValidationError as error:
        faults = []
        for detail in error.errors():
            key = ".".join(str(part) for part in detail["loc"])
            faults.append(f"{key}: {detail['msg'].lower()}, got {detail['input']!r}")
        raise UserError(f"engine.deepspeed: DeepSpeed does not accept {'; '.join(faults)}") from None
    except (AssertionError, AttributeError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"engine.deepspeed: DeepSpeed does not accept these settings ({error})") from None


def deepspeed_config(
    *,
    engine: EngineConfig,
    optim: OptimConfig,
    micro_batch_size: int,
    accumulation: int,
    largest_parameter: int,
    pin_memory: bool,
) -> dict[str, Any]:
    """Return the dict for ``deepspeed.initialize`` (https://www.deepspeed.ai/docs/config-json/).

    Args:
        largest_parameter: elements of the model's largest tensor, the size of NVMe's swap buffers.
        pin_memory: page-lock host buffers, which speeds up copies to an accelerator.
    """
    zero: dict[str, Any] = {"stage": engine.stage}
    if engine.offload_optimizer != "none":
        zero["offload_optimizer"] = _offload(engine.offload_optimizer, engine.nvme_path, pin_memory)
    if engine.offload_parameters != "none":
        zero["offload_param"] = _offload(engine.offload_parameters, engine.nvme_path, pin_memory)
        if engine.offload_parameters == "nvme":
            zero["offload_param"] |= {"buffer_size": largest_parameter}
            # With prefetching on, DeepSpeed 0.19.8 requests the head's swap buffer twice and fails.
            zero["stage3_prefetch_bucket_size"] = 0
    ours = {
        "train_micro_batch_size_per_gpu": micro_batch_size,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": optim.clip_norm,
        # The engine's param_groups carry each group's weight decay, and the trainer sets lr before each step. Until
        # then it must be 0: stage 0 takes a step without gradients when it is built, which would decay weights.
        "optimizer": {
            "type": "AdamW",
            "params": {"lr": 0.0, "betas": list(optim.betas), "eps": optim.eps, "weight_decay": 0.0}
            | _implementation(engine),
        },
        "bf16": {"enabled": engine.precision == "bf16"},
        "fp16": {"enabled": engine.precision == "fp16"},
        "data_types": {"grad_accum_dtype": _accumulation_type(engine)},
        "zero_optimization": zero,
        "steps_per_print": 10**9,
        # It waits for the device twice a micro-batch, and the trainer times the steps itself.
        "timers": {"throughput": {"enabled": False}},
    }
    return _merged(ours, engine.deepspeed)


def _implementation(engine: EngineConfig) -> dict[str, bool]:
    if engine.stage > 0 and engine.offload_optimizer == "none":
        # torch's fused AdamW: compiling DeepSpeed's own would need a CUDA toolkit.
        return {"torch_adam": True, "fused": True}
    # Offloaded, DeepSpeed takes its CPUAdam; its stage 0 keeps master weights for its own FusedAdam only.
    return {}


def _accumulation_type(engine: EngineConfig) -> str:
    # Sums of micro-batch gradients in bf16 lose small terms. But DeepSpeed 0.19.8 has no stage 0 with another type
    # than the model's, and its stage 1 with one adds earlier micro-batches' gradients again with each micro-batch.
    if engine.stage == 0 or (engine.stage == 1 and engine.offload_optimizer == "none"):
        return engine.precision
    return "fp32"


def _offload(device: str, nvme_path: str | None, pin_memory: bool) -> dict[str, Any]:
    settings: dict[str, Any] = {"device": device, "pin_memory": pin_memory}
    if device == "nvme":
        settings["nvme_path"] = nvme_path
    return settings


def _merged(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """Return ``base`` with the values of ``over``, block by block."""
    merged = dict(base)
    for key, value in over.items():
        both = isinstance(value, Mapping) and isinstance(base.get(key), Mapping)
        merged[key] = _merged(base[key], value) if both else value
    return merged
