"""How a recipe starts and ends: launcher, config, exit codes."""

from __future__ import annotations

import logging
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn, TypeVar

import torch.distributed as dist

from gptj_train.errors import UserError
from gptj_train.launch.command_line import compose, run_hydra, split_config_dir
from gptj_train.launch.preemption import SIGNALS, Preempted
from gptj_train.launch.ranks import rank, set_rank_variables

T = TypeVar("T")

EXIT_MISTAKE = 2
EXIT_PREEMPTED = 85  # preempted; rerun the same command to resume
_LAUNCHER_KILLS_WITHIN = 5  # seconds


def recipe(
    cls: type[T], primary: str | None = None, one_process: bool = False
) -> Callable[[Callable[[T], None]], Callable[[], None]]:
    """Make ``job(config)`` a command that runs under deepspeed, torchrun, srun or plain python.

    Exit codes: 0 done; 2 a UserError, printed as one line; 85 preempted, immediately or once the trainer has saved;
    1 with a traceback for any other exception, which is a bug of ours.

    Args:
        cls: the schema of the config.
        primary: name of the primary config; None: the name of the recipe's file.
        one_process: rank 0 does the job; further ranks of a launcher exit.
    """

    def wrap(job: Callable[[T], None]) -> Callable[[], None]:
        script = Path(job.__code__.co_filename)

        def main() -> None:
            for number in SIGNALS:
                signal.signal(number, lambda *_: sys.exit(_preempted()))
            # The deepspeed launcher passes --local_rank=N, which Hydra would reject.
            sys.argv[1:] = [argument for argument in sys.argv[1:] if not argument.startswith("--local_rank")]
            code = _run(job, cls, script, primary or script.stem, one_process)
            if dist.is_initialized() and code in (0, EXIT_PREEMPTED):
                _leave(code)
            sys.exit(code)

        return main

    return wrap


def _run(job: Callable[[T], None], cls: type[T], script: Path, primary: str, one_process: bool) -> int:
    try:
        set_rank_variables()
        if one_process and rank() != 0:
            return 0
        _, overrides = split_config_dir(sys.argv[1:])
        if any(override.startswith("-") for override in overrides):
            run_hydra(script, primary, cls)
        else:
            job(compose(primary, sys.argv[1:], cls))
    except Preempted as reason:
        if rank() == 0:
            print(f"stopped: {reason}", file=sys.stderr, flush=True)
        return _preempted()
    except UserError as error:
        return _mistake(str(error))
    return 0


def _preempted() -> int:
    # The launcher sends SIGTERM to the other ranks once the first has exited; every exit code shall be 85.
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    return EXIT_PREEMPTED


def _leave(code: int) -> NoReturn:
    """Destroy the process group and exit without interpreter teardown.

    A library's unjoined C++ thread aborts the process in about one of a hundred teardowns, and the launcher then
    takes a finished run for a failed one.
    """
    dist.destroy_process_group()
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _mistake(message: str) -> int:
    number = os.environ.get("RANK", "0")
    if number != "0":
        # If rank 0 fails in the same way, it reports, and the launcher ends this process meanwhile.
        time.sleep(_LAUNCHER_KILLS_WITHIN)
        message = f"[rank {number}] {message}"
    print("error: " + " ".join(message.split()), file=sys.stderr, flush=True)
    return EXIT_MISTAKE
