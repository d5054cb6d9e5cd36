"""A small model and ragged batches, the same in the ranks under test and in the reference beside them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

import gptj_train
from gptj_train import GPTJConfig
from gptj_train.data.sampler import Sampler, evaluation_batches
from gptj_train.launch.ranks import world_size
from gptj_train.model.loss import IGNORE, next_token_targets
from gptj_train.tasks.task import EvaluationBatch
from gptj_train.training.accumulation import accumulation_steps
from gptj_train.training.optimizer import OptimConfig
from gptj_train.training.trainer_config import TrainerConfig
from gptj_train.training.zero_config import EngineConfig

VOCAB, LENGTH, WINDOWS = 97, 24, 21
GLOBAL_BATCH = 4
SEED = 5


def toy_config(dropout: float = 0.0, width: int = 32) -> GPTJConfig:
    return GPTJConfig(
        vocab_size=VOCAB,
        n_positions=LENGTH,
        n_embd=width,
        n_layer=2,
        n_head=4,
        rotary_dim=4,
        bos_token_id=0,
        eos_token_id=0,
        resid_pdrop=dropout,
        embd_pdrop=dropout,
        attn_pdrop=dropout,
    )


# The ranks read the package's YAML without Hydra: typed_configs.py would add three seconds to every launch.
CONFIGS = Path(gptj_train.__file__).parent / "configs"


def from_yaml(name: str) -> dict[str, Any]:
    return yaml.safe_load((CONFIGS / f"{name}.yaml").read_text())


def optim_config() -> OptimConfig:
    """Strong enough that decay, clipping and the schedule all show in the weights."""
    return OptimConfig(**from_yaml("optim/adamw") | {"lr": 3e-3, "clip_norm": 0.5, "warmup_steps": 3})


def engine_config(settings: dict[str, Any]) -> EngineConfig:
    """ZeRO-3 in bf16 with everything offloaded to the CPU, but for the given settings."""
    offloaded = {"offload_optimizer": "cpu", "offload_parameters": "cpu", "activation_checkpointing": False}
    return EngineConfig(**from_yaml("engine/zero3") | offloaded | settings)


def trainer_config(output_dir: str, micro_batch_size: int, max_steps: int, save_every: int = 0) -> TrainerConfig:
    names = {field.name for field in fields(TrainerConfig)}
    values = {name: value for name, value in from_yaml("finetune").items() if name in names}
    values |= {
        "output_dir": output_dir,
        "seed": SEED,
        "max_steps": max_steps,
        "global_batch_size": GLOBAL_BATCH,
        "micro_batch_size": micro_batch_size,
        "eval_every": 0,
        "save_every": save_every,
        "failed_save": "stop",
        "max_skipped_steps": 5,
        "hang_timeout": 60,
        "optim": optim_config(),
    }
    return TrainerConfig(**values)


def accumulation(micro_batch_size: int) -> int:
    """Micro-batches per optimizer step on each of the launcher's ranks."""
    return accumulation_steps(GLOBAL_BATCH, micro_batch_size, world_size())


def sampler(micro_batch_size: int) -> Sampler:
    """The order of the windows."""
    return Sampler([WINDOWS], seed=SEED, global_batch_size=GLOBAL_BATCH, micro_batch_size=micro_batch_size)


def windows_in_order(first_step: int, steps: int) -> list[list[int]]:
    """The windows of each global batch, as a single rank would read them one by one."""
    order = sampler(micro_batch_size=1)
    batches = []
    for step in range(first_step, first_step + steps):
        batches.append([window for (window,) in order.windows(step, rank=0, world_size=1)])
    return batches


def window(index: int | None) -> dict[str, Tensor]:
    """(T) tensors. Windows differ much in their targets; every seventh has none, None is padding alone."""
    generator = torch.Generator().manual_seed(1000 + (index or 0))
    ids = torch.randint(VOCAB, (LENGTH,), generator=generator)
    if index is None:
        nothing = torch.full((LENGTH,), IGNORE)
        return {"input_ids": ids, "labels": nothing, "document_ids": torch.zeros(LENGTH, dtype=torch.long)}
    kept = 0 if index % 7 == 3 else LENGTH - 3 * (index % 7)
    labels = ids.clone()
    labels[kept:] = IGNORE
    return {"input_ids": ids, "labels": labels, "document_ids": 1 + (torch.arange(LENGTH) > 8 + index % 5).long()}


def batch_of(rows: list[Any]) -> dict[str, Tensor]:
    windows = [window(row) for row in rows]
    return {name: torch.stack([one[name] for one in windows]) for name in windows[0]}


def count_targets(batch: dict[str, Tensor]) -> int:
    return int((next_token_targets(batch["labels"], batch["document_ids"]) != IGNORE).sum())


class ToyTask:
    """The Task protocol on toy windows; remembers which windows it handed out."""

    targets_name = "target_tokens"

    def __init__(self, micro_batch_size: int) -> None:
        self.micro_batch_size = micro_batch_size
        self.sampler = sampler(micro_batch_size)
        self.handed_out: list[list[list[int]]] = []

    def training_rows(self, step: int, rank: int, world_size: int) -> list[list[int]]:
        return self.sampler.windows(step, rank, world_size)

    def training_batches(self, step: int, rank: int, world_size: int) -> list[dict[str, Tensor]]:
        rows = self.training_rows(step, rank, world_size)
        self.handed_out.append(rows)
        return [batch_of(micro) for micro in rows]

    def evaluation_batches(self, rank: int, world_size: int) -> Iterable[EvaluationBatch]:
        for rows in evaluation_batches(WINDOWS, self.micro_batch_size, rank, world_size):
            yield EvaluationBatch(batch_of(rows), rows)

    def targets(self, batch: dict[str, Tensor]) -> int:
        return count_targets(batch)

    def records(self, output: Any, batch: EvaluationBatch) -> list[tuple[float, int]]:
        return [(output.loss.item(), count_targets(batch.inputs))]

    def metrics(self, records: list[tuple[float, int]]) -> dict[str, float]:
        loss, tokens = (sum(column) for column in zip(*records, strict=True))
        return {"eval_loss": loss / tokens, "eval_tokens": tokens}

    def write_predictions(self, folder: str | Path) -> None:
        """A language model has no predictions to write."""
