"""Load a checkpoint to resume from, and check that the run continues as it would have without a pause."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from gptj_train.data.sampler import fingerprint
from gptj_train.errors import UserError
from gptj_train.tasks.task import Task
from gptj_train.training.best import forget_best
from gptj_train.training.checkpoint import load
from gptj_train.training.engine import Engine
from gptj_train.training.schedule import Cycles, check_warmup, extended, extension_note
from gptj_train.training.state import TrainState
from gptj_train.training.trainer_config import TrainerConfig, changed_settings

_MOST_NAMED = 5  # differences in a message
_LONGEST_VALUE = 60  # characters


def resumed_state(
    engine: Engine,
    folders: Sequence[Path],
    *,
    config: TrainerConfig,
    task: Task,
    data: Mapping[str, Any],
    held_out: str,
    note: Callable[[str], None],
) -> TrainState:
    """Load the first intact checkpoint of some, and return its state as this run continues it. Collective.

    Args:
        data: what decides the batches (``data.identity``); rank 0's counts.
        held_out: ``held_out_hash`` of the task.
        note: called with a line for the user.

    Raises:
        UserError: none is intact, the next batch is not the one that the checkpoint expects, or the checkpoint is
            later than ``max_steps``.
    """
    state = load(engine, list(folders), note)
    check_not_past(state.step, config.steps)
    # Config or data may have been corrected: the run gets all its attempts again.
    state.skipped_in_a_row = 0
    # A resumed run must continue the straight one: other data or another order is never silent.
    if state.next_batch != next_batch(task, state.step):
        raise other_data(state.step, state.data, engine.gathered([data])[0])
    changed = changed_settings(state.settings, config)
    if changed:
        note(f"changed since the checkpoint: {', '.join(changed)}")
    if state.best_step >= 0:
        _check_best(state, folders[0], config=config, held_out=held_out, note=note)
    planned, state.schedule = _schedules(state, config)
    line = extension_note(planned, state.schedule, state.step, config.optim, config.extend)
    if line and state.step < config.steps:
        note(line)
    return state


def next_batch(task: Task, step: int) -> str:
    """Return the hash of the global batch of a step, the same on any number of ranks."""
    return fingerprint(task.training_batches(step, rank=0, world_size=1))


def held_out_hash(task: Task) -> str:
    """Return the hash of the first held-out batch, the same on any number of ranks; "" without held-out data."""
    first = [batch.inputs for batch in itertools.islice(task.evaluation_batches(rank=0, world_size=1), 1)]
    return fingerprint(first) if first else ""


def _check_best(
    state: TrainState, folder: Path, *, config: TrainerConfig, held_out: str, note: Callable[[str], None]
) -> None:
    """Forget the best evaluation if later ones cannot be compared with it, or its checkpoint is another run's.

    Args:
        folder: the checkpoint that the run resumes from.
    """
    if state.held_out and state.held_out != held_out:
        note(f"other held-out data than before: the best of step {state.best_step} no longer counts")
        forget_best(state)
    elif folder.parent.resolve() != (Path(config.output_dir) / "checkpoints").resolve():
        note(f"the best of step {state.best_step} is another run's, and no longer counts")
        forget_best(state)


def check_not_past(step: int, max_steps: int) -> None:
    """Refuse a ``max_steps`` that a checkpoint has already passed."""
    if step > max_steps:
        raise UserError(
            f"max_steps={max_steps} is below the checkpoint's step {step}; give a larger max_steps, resume=PATH of an "
            "earlier checkpoint, or another output_dir"
        )


def other_data(step: int, before: Mapping[str, Any], now: Mapping[str, Any]) -> UserError:
    """Return the error for a checkpoint that expects another batch than the data give.

    Args:
        before, now: what decides the batches (``data.identity``), of the checkpoint and of this run; empty in
            checkpoints of gptj_train 0.2.
    """
    differences = _differences(before, now) if before else []
    if differences:
        named = "; ".join(differences[:_MOST_NAMED])
        more = f"; and {len(differences) - _MOST_NAMED} more" if len(differences) > _MOST_NAMED else ""
        what = f"{named}{more}; restore that"
    else:
        what = "restore data (files, weights, packing, isolate), tokenizer, seed, sequence_length and global_batch_size"
    return UserError(
        f"step {step} would see other data than the checkpoint expects: {what}, or start a new run with "
        "init_from=<that checkpoint> and another output_dir"
    )


def _differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    lines = []
    for name in [*before, *(name for name in now if name not in before)]:
        old, new = before.get(name), now.get(name)
        if old == new:
            continue
        if name not in now:
            lines.append(f"{name} is not there any more")
        elif name not in before:
            lines.append(f"{name} is new")
        else:
            lines.append(f"{name} {_short(old)} -> {_short(new)}")
    return lines


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= _LONGEST_VALUE else text[: _LONGEST_VALUE - 3] + "..."


def _schedules(state: TrainState, config: TrainerConfig) -> tuple[Cycles, Cycles]:
    """Return the cycles of the learning rate by the checkpoint's number of steps, and by the config's.

    Raises:
        UserError: the warm-up is not shorter than the steps that ``extend=rewarm`` adds.
    """
    steps = state.settings.get("max_steps")
    if not isinstance(steps, int) or steps < state.step:  # damaged, or not saved by a run
        steps = config.steps
    before = state.schedule or [[0, steps]]
    now = extended(before, steps, config.steps, config.extend)
    start, end = now[-1]
    if now != before:
        check_warmup(config.optim, end - start, f"the extension (steps {start + 1} to {end})")
    return before, now
