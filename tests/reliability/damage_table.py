"""The outcome of a resume for each kind of damage to each file of the newest checkpoint, as a table.

    python tests/reliability/damage_table.py > tests/reliability/results/damage.md

The damages are those of tests/unit/test_damaged_checkpoint.py and test_damaged_run.py, which assert the outcomes; here
they can be read. The
checkpoint is of 2 ranks and step 10, the one before it of step 5.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "unit"))

from fake_ranks import on_ranks, save
from test_damaged_checkpoint import CASES, DAMAGES
from test_damaged_run import RUN_DAMAGES, make_run, outcome_of

from gptj_train.training.checkpoint import load
from gptj_train.training.retention import resume_candidates


def outcome(good: Path, kind: str, file: str) -> tuple[str, int]:
    """Return the error of ``resume=PATH`` for a damaged checkpoint, and the step that ``resume=auto`` resumes from."""
    with tempfile.TemporaryDirectory() as scratch:
        run = Path(scratch) / "run"
        shutil.copytree(good, run)
        damaged = run / "checkpoints" / "step_00000010"
        DAMAGES[kind][0](damaged / file)

        def resume(rank: Any) -> tuple[str, int]:
            message = "accepted"
            try:
                load(rank, resume_candidates(run, str(damaged)), lambda _: None)
            except ValueError as error:
                message = str(error)
            return message, load(rank, resume_candidates(run, "auto"), lambda _: None).step

        with contextlib.redirect_stdout(sys.stderr):
            message, step = on_ranks(2, resume, seed=1)[0]
        reason = message.partition("or resume=auto (")[2].removesuffix(")") or message
        return reason.replace(f"{damaged}/", ""), step


def main() -> None:
    print("# Damage to a checkpoint, and the outcome of a resume\n")
    print("`python tests/reliability/damage_table.py`: 2 ranks, checkpoints of steps 5 and 10, damage to the second.\n")
    print("| damage | file | resume=PATH: exit code 2, and | resume=auto resumes from step |")
    print("|---|---|---|---|")
    with tempfile.TemporaryDirectory() as scratch:
        good = Path(scratch)
        save(good, 5, 10, world_size=2)
        for kind, file in CASES:
            message, step = outcome(good, kind, file)
            print(f"| {kind} | {file} | {message} | {step} |")
    print("\n# Damage to a run folder outside its checkpoints\n")
    print("The same command again, with resume=auto, as far as the load. RUN is the folder.\n")
    print("| damage | outcome |")
    print("|---|---|")
    for kind in RUN_DAMAGES:
        print(f"| {kind} | {damaged_run(kind)} |")


def damaged_run(kind: str) -> str:
    """Return what a start of the same command does after damage outside the checkpoints."""
    with tempfile.TemporaryDirectory() as scratch:
        run = Path(scratch) / "run"
        with contextlib.redirect_stdout(sys.stderr):
            make_run(run)
        RUN_DAMAGES[kind][0](run)
        access = os.access
        # As in the test: root may read every folder.
        os.access = lambda path, mode: os.stat(path).st_mode & 0o700 != 0 and access(path, mode)  # type: ignore
        try:
            return outcome_of(run)
        finally:
            os.access = access
            (run / "checkpoints").chmod(0o700) if kind == "checkpoints without permissions" else None


if __name__ == "__main__":
    main()
