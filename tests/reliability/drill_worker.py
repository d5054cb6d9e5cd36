"""One rank of the drill: a toy run that may be killed at a moment, or at a point inside the save.

deepspeed --num_gpus N drill_worker.py RUN_DIR LIFE_JSON
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "distributed"))

import torch.distributed as dist
from toy import ToyTask, accumulation, engine_config, optim_config, toy_config, trainer_config
from worker import SILENT

from gptj_train import GPTJForCausalLM, atomic_write
from gptj_train.data.tokenizer import Tokenizer
from gptj_train.tracking import Tracker
from gptj_train.training import checkpoint, retention
from gptj_train.training.checkpoint import Checkpoints
from gptj_train.training.engine import Engine
from gptj_train.training.model_files import ModelFiles
from gptj_train.training.trainer import Trainer
from gptj_train.weights.manifest import Manifest
from gptj_train.weights.slices import SliceWriter

SAVE_EVERY = 3

# What a save does, in its order; each is a point before and a point after.
STAGES: dict[str, tuple[Any, str]] = {
    "temporary folder": (checkpoint, "_make_scratch"),
    "opening of a file": (SliceWriter, "__init__"),
    "writing of a slice": (SliceWriter, "add"),
    "flush of a file": (SliceWriter, "finish"),
    "rank's part": (checkpoint, "_write_part"),
    "manifest": (Manifest, "write"),
    "rename": (Path, "rename"),
    "flush of a folder": (atomic_write, "sync_folder"),
    "verification": (checkpoint, "_find_damage"),
    "pruning": (checkpoint, "prune"),
    "removal of an old one": (retention, "remove_folder"),
}
POINTS = [f"{side} {stage}" for stage in STAGES for side in ("before", "after")]


class Reaper:
    """Kills ranks of this job, when their time has come."""

    def __init__(self, folder: Path, rank: int, world_size: int) -> None:
        self._pids = folder / "pids"
        self._rank, self._world_size = rank, world_size
        self._pids.mkdir(exist_ok=True)
        (self._pids / f"{rank}.tmp").write_text(str(os.getpid()))
        (self._pids / f"{rank}.tmp").rename(self._pids / str(rank))

    def kill(self, victims: list[int]) -> None:
        """SIGKILL, itself last."""
        (self._pids / "killed").touch()
        for victim in sorted(victims, key=lambda rank: rank == self._rank):
            os.kill(int((self._pids / str(victim)).read_text()), signal.SIGKILL)

    def at_time(self, seconds: float, victims: list[int]) -> None:
        def wait() -> None:
            time.sleep(seconds)
            self.kill(victims)

        threading.Thread(target=wait, daemon=True).start()

    def at_point(self, point: str, save: int, times: int, victims: list[int]) -> None:
        """In the ``save``-th save of this life, when rank 0 passes the point for the ``times``-th time."""
        side, _, stage = point.partition(" ")
        owner, attribute = STAGES[stage]
        real: Callable[..., Any] = getattr(owner, attribute)
        self._saves = self._passed = 0
        whole_save = Checkpoints.save

        def counted_save(*args: Any) -> Any:
            self._saves += 1
            self._passed = 0
            return whole_save(*args)

        def passing(*args: Any, **more: Any) -> Any:
            due = False
            if self._saves == save:
                self._passed += 1
                due = self._passed == times
            if due and side == "before":
                self.kill(victims)
            result = real(*args, **more)
            if due and side == "after":
                self.kill(victims)
            return result

        Checkpoints.save = counted_save  # type: ignore[method-assign]
        setattr(owner, attribute, passing)


def main() -> None:
    folder, life = Path(sys.argv[-2]), json.loads(sys.argv[-1])
    config = trainer_config(str(folder), 1, life["max_steps"], save_every=SAVE_EVERY)
    model = toy_config(dropout=0.1)
    engine = Engine(
        build=lambda: GPTJForCausalLM(model),
        init_from=None,
        engine=engine_config({}),
        optim=optim_config(),
        micro_batch_size=config.micro_batch_size,
        accumulation=accumulation(config.micro_batch_size),
        seed=config.seed,
    )
    reaper = Reaper(folder, engine.rank, engine.world_size)
    engine.wait()
    kill = life.get("kill")
    if kill and engine.rank == 0:
        if "seconds" in kill:
            reaper.at_time(kill["seconds"], kill["victims"])
        else:
            reaper.at_point(kill["point"], kill["save"], kill["times"], kill["victims"])
    model_files = ModelFiles(model, "GPTJForCausalLM", Tokenizer.train(["some text"], 300))
    checkpoints = Checkpoints(folder, keep=2, keep_every=0, model_files=model_files)
    tracker = Tracker(SILENT, folder, {}, engine.rank)
    trainer = Trainer(config=config, engine=engine, task=ToyTask(1), checkpoints=checkpoints, tracker=tracker)
    found = retention.resume_candidates(folder, "auto")
    if found:
        trainer.resume(found)
    if engine.rank == 0:
        with (folder / "lives.jsonl").open("a") as lives:
            lives.write(json.dumps({"start": trainer.state.step, "ranks": engine.world_size}) + "\n")
    if kill is None:  # the undisturbed run, which changes its ranks at a step, or the last life
        tracker.start(trainer.state.step, config.max_steps)
        while trainer.state.step < life["until"]:
            tracker.step(trainer.train_step())
        trainer.save()
    else:
        trainer.train()
    engine.wait()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
