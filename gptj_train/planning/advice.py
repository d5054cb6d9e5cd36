"""Changes of config keys that make a run fit on a machine, or faster there."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from gptj_train.config import FinetuneConfig, PlanConfig
from gptj_train.launch.machine import Machine
from gptj_train.model.lora import LoraConfig
from gptj_train.planning.run_plan import RunPlan
from gptj_train.planning.step_time import step_time
from gptj_train.planning.verdict import memory_fits
from gptj_train.training.zero_config import EngineConfig

_LARGEST_MICRO_BATCH = 64
_SHORTEST = 256  # tokens; a shorter sequence_length is not advised
_SMALL_BUCKET = 200_000_000  # elements: 40 % of DeepSpeed's default
_BUCKET = "engine.deepspeed.zero_optimization.reduce_bucket_size"
_SPARE = 0.05  # share of each memory that advice leaves free, for what a plan does not see
_WORTH_IT = 0.9  # a change is faster if a step takes less than this share of the time
_LORA_CHOICES = Path(__file__).parents[1] / "configs" / "lora"
_LORA_LR = 2.0e-4  # as in the presets with adapters: their weights start from 0

# A quantized base is whole on every rank, and the adapters are small.
_QLORA_ENGINE = {"engine.stage": 2, "engine.offload_optimizer": "none", "engine.offload_parameters": "none"}

Change = dict[str, Any]
"""Value by dotted config key."""


@dataclass(frozen=True)
class Advice:
    """A change of config keys, the run that it makes, and the seconds of its step."""

    change: Change
    plan: RunPlan
    seconds: float

    @property
    def overrides(self) -> str:
        """The change as it is typed on the command line."""
        words = []
        for key, value in self.change.items():
            # Two pluses: whether a preset has set it already or not.
            plus = "++" if key == _BUCKET else ""
            words.append(f"{plus}{key}={value}")
        return " ".join(words)


def advise(plan: RunPlan, machine: Machine) -> list[Advice]:
    """Return changes that make a run fit, or faster if it fits; the best first. Each fits.

    First what trains the same numbers (offload, recomputation, micro-batch, stage), then adapters, then adapters beside
    a base in 4 bits, then shorter sequences.
    """
    found = _best(plan, machine, {})
    if memory_fits(plan, machine):
        if not _divides(plan.cfg, machine):
            return found
        now = step_time(plan, machine).seconds
        return [advice for advice in found if advice.change and advice.seconds < _WORTH_IT * now]
    with_adapters = list(_with_adapters(plan))
    for adapted, change in with_adapters:
        found += _best(adapted, machine, change)
    length = plan.cfg.sequence_length // 2
    while not found and length >= _SHORTEST:
        for base, change in [(plan, {}), *with_adapters]:
            shorter = replace(base, cfg=replace(base.cfg, sequence_length=length))
            found += _best(shorter, machine, {**change, "sequence_length": length})
        length //= 2
    return found


def nodes_needed(plan: RunPlan, machine: Machine) -> int | None:
    """Return the least number of such nodes, a power of two, on which the run fits; None if none does."""
    for nodes in (2, 4, 8, 16, 32, 64):
        more = replace(machine, nodes=nodes)
        if _divides(plan.cfg, more) and memory_fits(plan, more):
            return nodes
    return None


def _best(plan: RunPlan, machine: Machine, made: Change) -> list[Advice]:
    """Return the fastest change that fits, without keys that gain nothing, in a list; empty if none fits.

    Args:
        made: what was changed in the plan already.
    """
    fastest: Advice | None = None
    for change in _changes(plan.cfg, machine):
        advice = _tried(plan, machine, change)
        if advice is not None and (fastest is None or _order(advice) < _order(fastest)):
            fastest = advice
    if fastest is None:
        return []
    shortest = _without_idle_keys(plan, machine, fastest)
    return [replace(shortest, change={**made, **shortest.change})]


def _order(advice: Advice) -> tuple[float, int]:
    return advice.seconds, len(advice.change)


def _without_idle_keys(plan: RunPlan, machine: Machine, advice: Advice) -> Advice:
    """Undo each key of a change without which the run still fits and is as fast, within one in a hundred."""
    limit = 1.01 * advice.seconds
    for key in list(advice.change):
        fewer = {name: value for name, value in advice.change.items() if name != key}
        tried = _tried(plan, machine, fewer)
        if tried is not None and tried.seconds <= limit:
            advice = tried
    return advice


def _tried(plan: RunPlan, machine: Machine, change: Change) -> Advice | None:
    """Return the advice to make this change, or None if it is no valid config, does not divide or does not fit."""
    try:
        cfg = changed(plan.cfg, change)
    except ValueError:  # settings that exclude each other
        return None
    changed_plan = replace(plan, cfg=cfg)
    if not _divides(cfg, machine) or not memory_fits(changed_plan, machine, spare=_SPARE):
        return None
    return Advice(change, changed_plan, step_time(changed_plan, machine).seconds)


def changed(cfg: FinetuneConfig, change: Mapping[str, Any]) -> FinetuneConfig:
    """Return a config with other values of some keys.

    Raises:
        ValueError: values that exclude each other.
    """
    top: dict[str, Any] = {}
    engine: dict[str, Any] = {}
    for key, value in change.items():
        group, _, name = key.rpartition(".")
        if key == _BUCKET:
            settings = cfg.engine.deepspeed
            zero = {**settings.get("zero_optimization", {}), name: value}
            engine["deepspeed"] = {**settings, "zero_optimization": zero}
        elif group == "engine":
            engine[name] = value
        else:
            top[key] = value
    if engine:
        top["engine"] = replace(cfg.engine, **engine)
    return replace(cfg, **top)


def _changes(cfg: FinetuneConfig, machine: Machine) -> Iterator[Change]:
    """Yield the changes that train the same numbers, as the keys that differ from the config."""
    for engine in _engines(cfg.engine, machine):
        for batch in _batches(cfg, machine):
            yield {**engine, **batch}


def _engines(engine: EngineConfig, machine: Machine) -> Iterator[Change]:
    disk = ["nvme"] if machine.nvme else []
    stages = sorted({engine.stage, 2, 3})
    places = ["none", "cpu", *disk]
    sums = ["optimizer", "gpu"] if machine.has_gpus else [engine.accumulate_on]
    degrees = ["none", "gelu", "mlp", "block"]
    bucket = engine.deepspeed.get("zero_optimization", {}).get("reduce_bucket_size")
    buckets = [bucket] if bucket is not None else [None, _SMALL_BUCKET]
    for stage, optimizer, weights, place, degree, size in itertools.product(
        stages, places, places, sums, degrees, buckets
    ):
        if stage < 3 and (weights != "none" or optimizer == "nvme" or (place == "gpu" and optimizer != "none")):
            continue
        values = {
            "engine.stage": stage,
            "engine.offload_optimizer": optimizer,
            "engine.offload_parameters": weights,
            "engine.accumulate_on": place,
            "engine.activation_checkpointing": degree,
        }
        change = {key: value for key, value in values.items() if value != getattr(engine, key.partition(".")[2])}
        if "nvme" in (optimizer, weights) and not engine.nvme_path:
            change["engine.nvme_path"] = "FOLDER"
        if size != bucket:
            change[_BUCKET] = size
        yield change


def _batches(cfg: FinetuneConfig, machine: Machine) -> Iterator[Change]:
    """Yield the changes of the micro-batch, and of a global batch that does not divide by the ranks."""
    change: Change = {}
    size = cfg.global_batch_size
    if size % machine.ranks:
        size = max(1, round(size / machine.ranks)) * machine.ranks
        change = {"global_batch_size": size}
    of_rank = size // machine.ranks
    if of_rank % cfg.micro_batch_size == 0:
        yield change
    micro_batch = 1
    while micro_batch <= min(of_rank, _LARGEST_MICRO_BATCH):
        if of_rank % micro_batch == 0 and micro_batch != cfg.micro_batch_size:
            yield {**change, "micro_batch_size": micro_batch}
        micro_batch *= 2


def _with_adapters(plan: RunPlan) -> Iterator[tuple[RunPlan, Change]]:
    """Yield the run with LoRA adapters, then beside a quantized base, each with the change; not what it has already."""
    change: Change = {}
    if not plan.sizes.adapters:
        # As lora=adapters composes it.
        files = [OmegaConf.load(_LORA_CHOICES / f"{name}.yaml") for name in ("none", "adapters")]
        values: Any = OmegaConf.to_container(OmegaConf.merge(*files))
        del values["defaults"]
        cfg = replace(plan.cfg, lora=LoraConfig(**values))
        plan = RunPlan.of(cfg, plan.model_config)
        change = {"lora": "adapters", "optim.lr": _LORA_LR}
        yield plan, change
    has_base = plan.cfg.init_from is not None or isinstance(plan.cfg, PlanConfig)
    if plan.cfg.quantize == "none" and has_base:
        engine = {key: value for key, value in _QLORA_ENGINE.items() if _value(plan.cfg, key) != value}
        quantized = {"quantize": "nf4", **engine}
        yield replace(plan, cfg=changed(plan.cfg, quantized)), {**change, **quantized}


def _value(cfg: FinetuneConfig, key: str) -> Any:
    return getattr(cfg.engine, key.removeprefix("engine."))


def _divides(cfg: FinetuneConfig, machine: Machine) -> bool:
    return cfg.global_batch_size % (cfg.micro_batch_size * machine.ranks) == 0
