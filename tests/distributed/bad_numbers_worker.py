"""One rank that trains through non-finite steps, for every place of the training state.

deepspeed --num_gpus N bad_numbers_worker.py OUT_DIR JOBS_JSON

For each job it writes what each bad step changed, and how the next good step compares with a run without bad
steps.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from toy import ToyTask, accumulation, engine_config, optim_config, toy_config, trainer_config
from worker import SILENT

from gptj_train import GPTJForCausalLM
from gptj_train.data.tokenizer import Tokenizer
from gptj_train.tracking import Tracker
from gptj_train.training.checkpoint import Checkpoints
from gptj_train.training.engine import Engine
from gptj_train.training.model_files import ModelFiles
from gptj_train.training.trainer import Trainer

GOOD, BAD = 2, ["nan loss", "inf loss", "inf gradient"]
MICRO_BATCHES = 2


def trainer_of(job: dict[str, Any], out: Path) -> Trainer:
    config = trainer_config(str(out), micro_batch_size=1, max_steps=12)
    engine = Engine(
        build=lambda: GPTJForCausalLM(toy_config()),
        init_from=None,
        engine=engine_config(job["engine"]),
        optim=optim_config(),
        micro_batch_size=config.micro_batch_size,
        accumulation=accumulation(config.micro_batch_size),
        seed=config.seed,
    )
    model_files = ModelFiles(toy_config(), "GPTJForCausalLM", Tokenizer.train(["some text"], 300))
    checkpoints = Checkpoints(out, keep=1, keep_every=0, model_files=model_files)
    tracker = Tracker(SILENT, out, {}, engine.rank)
    return Trainer(config=config, engine=engine, task=ToyTask(1), checkpoints=checkpoints, tracker=tracker)


def state_of(engine: Engine) -> list[Any]:
    """Copies of this rank's weights, masters, moments and counters."""
    optimizer = getattr(engine._engine.optimizer, "optimizer", engine._engine.optimizer)
    held = [getattr(parameter, "ds_tensor", parameter) for parameter in engine._engine.module.parameters()]
    held += [entry for master, state in optimizer.state.items() for entry in (master, *state.values())]
    held += [tensor for _, tensor in engine.full_parameters()]
    return [entry.detach().clone() if torch.is_tensor(entry) else entry for entry in held]


def same(ours: list[Any], theirs: list[Any]) -> bool:
    pairs = zip(ours, theirs, strict=True)
    return all(torch.equal(one, other) if torch.is_tensor(one) else one == other for one, other in pairs)


@contextlib.contextmanager
def poisoned(engine: Engine, kind: str) -> Iterator[None]:
    """One micro-batch of one rank is bad: the last one of rank 1's losses, or the first one of rank 0's gradients."""
    sound, turns, number = engine.forward, iter(range(MICRO_BATCHES)), float(kind.split()[0])
    of_gradient = kind.endswith("gradient")
    bad_turn = 0 if of_gradient else MICRO_BATCHES - 1

    def forward(batch: dict[str, torch.Tensor], targets: float) -> Any:
        bad = engine.rank == (0 if of_gradient else 1) and next(turns) == bad_turn
        norm = engine._engine.module.transformer.ln_f
        hook = norm.register_forward_hook(lambda _, __, out: spoil(out)) if bad and of_gradient else None
        output = sound(batch, targets)
        if hook is not None:
            hook.remove()
        elif bad:
            output.loss = output.loss + number  # its gradients stay as they were
        return output

    def spoil(out: torch.Tensor) -> None:
        out.register_hook(lambda gradient: torch.full_like(gradient, number))

    engine.forward = forward  # type: ignore[method-assign]
    yield
    engine.forward = sound  # type: ignore[method-assign]


def do(job: dict[str, Any], out: Path) -> None:
    trainer = trainer_of(job, out)
    engine = trainer.engine
    for _ in range(GOOD):
        trainer.train_step()
    before = state_of(engine)
    result: dict[str, Any] = {"untouched": [], "lines": [], "port": os.environ["MASTER_PORT"]}
    for kind in BAD:
        with poisoned(engine, kind):
            result["lines"].append(trainer.train_step())
        result["untouched"].append(same(before, state_of(engine)))
    result["finite"] = engine.holds_only_finite()
    line, after = trainer.train_step(), state_of(engine)
    result["state"] = vars(trainer.state)

    other = trainer_of(job, out)
    for _ in range(GOOD):
        other.train_step()
    other.state.step += len(BAD)
    line_without = other.train_step()
    names = ("step", "loss", "lr", "grad_norm")
    result["next step is the same"] = [line[name] for name in names] == [line_without[name] for name in names]
    result["and so is what it left"] = same(after, state_of(other.engine))
    result["and it moved"] = not same(before, after)

    optimizer = getattr(other.engine._engine.optimizer, "optimizer", other.engine._engine.optimizer)
    if other.engine.rank == 1:
        next(iter(optimizer.state.values()))["exp_avg_sq"].view(-1)[3] = float("inf")
    result["finite with a bad moment"] = other.engine.holds_only_finite()
    (out / f"{job['name']}.rank{engine.rank}.json").write_text(json.dumps(result))


def main() -> None:
    for job in json.loads(sys.argv[-1]):
        do(job, Path(sys.argv[-2]))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
