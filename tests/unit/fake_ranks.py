"""Ranks as threads of this process, each with the same small model under plain AdamW; no DeepSpeed."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from gptj_train import GPTJConfig, GPTJForCausalLM
from gptj_train.data.tokenizer import Tokenizer
from gptj_train.training.checkpoint import Checkpoints
from gptj_train.training.deepspeed_internals import OptimizerState
from gptj_train.training.model_files import ModelFiles
from gptj_train.training.state import TrainState

CONFIG = GPTJConfig(vocab_size=31, n_positions=16, n_embd=16, n_layer=1, n_head=2, rotary_dim=4)
MODEL_FILES = ModelFiles(CONFIG, "GPTJForCausalLM", Tokenizer.train(["a text"], 257))


class FakeRank:
    """What a checkpoint needs of an engine. Every rank holds everything and saves its share."""

    def __init__(self, rank: int, world_size: int, meeting: threading.Barrier, rows: list[Any], seed: int) -> None:
        self.rank, self.world_size = rank, world_size
        self._meeting, self._rows = meeting, rows
        torch.manual_seed(seed)
        self.model = GPTJForCausalLM(CONFIG)
        self.adam = torch.optim.AdamW(self.model.parameters(), lr=0.1)
        self.shapes = {name: parameter.shape for name, parameter in self.model.named_parameters()}
        self.trained = self.shapes

    def train(self, steps: int) -> None:
        for step in range(steps):
            for number, parameter in enumerate(self.model.parameters()):
                generator = torch.Generator().manual_seed(1000 * step + number)
                parameter.grad = torch.randn(parameter.shape, generator=generator)
            self.adam.step()

    def optimizer_state(self) -> OptimizerState:
        names = {parameter: name for name, parameter in self.model.named_parameters()}
        return OptimizerState(self.adam, names, self.rank)

    def holds_only_finite(self) -> bool:
        return True

    def gathered(self, rows: list[Any]) -> list[Any]:
        self._rows[self.rank] = rows
        self._meeting.wait()
        together = [row for rows in self._rows for row in rows]
        self._meeting.wait()
        return together

    def wait(self) -> None:
        self._meeting.wait()


def on_ranks(world_size: int, work: Callable[[Any], Any], seed: int = 0) -> list[Any]:
    """What ``work(rank's engine)`` returns on each rank; raises what rank 0 raises."""
    meeting, rows = threading.Barrier(world_size, timeout=30), [None] * world_size
    ranks = [FakeRank(rank, world_size, meeting, rows, seed) for rank in range(world_size)]
    with ThreadPoolExecutor(world_size) as threads:
        return [future.result() for future in [threads.submit(work, rank) for rank in ranks]]


def save(folder: Path, *steps: int, world_size: int = 1, keep: int = 2, keep_every: int = 0) -> list[Any]:
    """Train and save at each of the steps; returns the ranks."""

    def work(rank: Any) -> Any:
        checkpoints = Checkpoints(folder, keep=keep, keep_every=keep_every, model_files=MODEL_FILES)
        done = 0
        for step in steps:
            rank.train(max(0, step - done))
            done = step
            checkpoints.save(rank, TrainState(step=step, tokens=10 * step))
        return rank

    return on_ranks(world_size, work)
