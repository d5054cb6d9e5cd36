"""The recipe decorator: a function of a config becomes a command with launcher, config and exit codes."""

from __future__ import annotations

import errno
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import NoReturn, TypeVar

import torch.distributed as dist

from gptj_train.errors import UserError
from gptj_train.launch.activity import activity
from gptj_train.launch.command_line import HELP, compose, print_help, run_hydra, split_config_dir
from gptj_train.launch.datasets_by_name import with_dataset_files
from gptj_train.launch.exit_codes import EXIT_DONE, EXIT_MISTAKE, EXIT_PREEMPTED
from gptj_train.launch.hub import with_local_folders
from gptj_train.launch.launchers import launcher_has_exited
from gptj_train.launch.preemption import SIGNALS, Preempted, StopRequest, handled_signals
from gptj_train.launch.ranks import rank, set_rank_variables
from gptj_train.launch.run_status import MOST_FRUITLESS, RunStatus

T = TypeVar("T")

_WITHOUT_WEIGHTS = ("plan", "prepare_data")  # recipes that read only a model's config and tokenizer
# Faults of a disk, which no code of ours can mend, wherever they occur.
_DISK_FAULTS = (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS, errno.ESTALE, errno.ENOTCONN)
_FORBIDDEN = (errno.EACCES, errno.EPERM)

_LONGEST_MESSAGE = 1500  # characters
_LAUNCHER_KILLS_WITHIN = 10  # seconds after rank 0 has failed
_LAUNCHER_POLL = 1.0  # seconds


class NothingToDo(Exception):  # noqa: N818 (it ends the command in good order)
    """What was asked for is done already; the command writes nothing and exits with 0."""


def recipe(
    cls: type[T], *, primary: str, one_process: bool = False
) -> Callable[[Callable[[T], None]], Callable[[], None]]:
    """Make ``job(config)`` a command that runs under deepspeed, torchrun, srun or plain python.

    Args:
        cls: the schema of the config.
        primary: name of the primary config, explicit so that a renamed copy of a recipe finds it.
        one_process: only rank 0 runs the job; other ranks of a launcher exit at once.
    """

    def wrap(job: Callable[[T], None]) -> Callable[[], None]:
        script = Path(job.__code__.co_filename)

        def main() -> None:
            # Before training starts there is nothing to save. The trainer installs its own handlers later.
            for number in handled_signals():
                signal.signal(number, _end_now)
            threading.Thread(target=_watch_launcher, name="launcher watch", daemon=True).start()
            # The deepspeed launcher passes --local_rank=N, which Hydra would reject.
            sys.argv[1:] = [argument for argument in sys.argv[1:] if not argument.startswith("--local_rank")]
            code = _run(job, cls, script, primary, one_process)
            if dist.is_initialized() and code in (EXIT_DONE, EXIT_PREEMPTED):
                _leave(code)
            sys.exit(code)

        return main

    return wrap


def _run(job: Callable[[T], None], cls: type[T], script: Path, primary: str, one_process: bool) -> int:
    RunStatus.current = None
    try:
        set_rank_variables()
        if one_process and rank() != 0:
            return EXIT_DONE
        _, overrides = split_config_dir(sys.argv[1:])
        if any(override in HELP for override in overrides):
            print_help(primary, sys.argv[1:], cls)
        elif any(override.startswith("-") for override in overrides):  # --help, --cfg, --multirun and the like
            return run_hydra(script, primary, cls)
        else:
            config = compose(primary, sys.argv[1:], cls)
            config = with_local_folders(config, weights=primary not in _WITHOUT_WEIGHTS)
            job(with_dataset_files(config))
    except NothingToDo as reason:
        if rank() == 0:
            print(reason, flush=True)
    except Preempted as reason:
        if rank() == 0:
            print(f"stopped: {reason}", file=sys.stderr, flush=True)
        return _preempted(str(reason))
    except SystemExit as exit_:  # of _end_now
        if exit_.code != EXIT_PREEMPTED:
            raise
        return _preempted("outside the training loop")
    except UserError as error:
        return _mistake(str(error))
    except OSError as error:
        place = f"{error.filename or 'the disk'}: {error.strerror}"
        if error.errno in _FORBIDDEN:
            return _mistake(f"{place}; correct the permissions, or give another place")
        if error.errno in _DISK_FAULTS:
            return _mistake(f"{place}; free or mend the disk, or give another place")
        raise
    return EXIT_DONE


def _end_now(number: int, frame: FrameType | None) -> NoReturn:
    """End a job that is not in its training loop: it prepares data, loads or exports, and a rerun does that again.

    Before training, or after it has failed, only SIGUSR1, a scheduler's warning, asks for a rerun. SIGTERM may come
    because another rank has failed, and then that is no preemption.
    """
    name = signal.Signals(number).name
    code = EXIT_PREEMPTED if number == signal.SIGUSR1 or StopRequest.has_trained else 128 + number
    if os.environ.get("RANK", "0") == "0":
        if code == EXIT_PREEMPTED:
            line = f"stopped: {name} {activity(frame)}; rerun the same command"
        else:
            line = f"ended by {name} {activity(frame)}, nothing was saved"
        print(line, file=sys.stderr, flush=True)
    _ignore_signals()
    sys.exit(code)


def _watch_launcher() -> None:
    """End this process if its launcher exits outside the training loop, whose steps look for that themselves.

    Without this, ranks whose launcher was killed while they load would train on unseen.
    """
    while StopRequest.in_charge or not launcher_has_exited():
        time.sleep(_LAUNCHER_POLL)
    print("stopped: the launcher has exited outside the training loop; rerun the command", file=sys.stderr, flush=True)
    # Not sys.exit: the main thread may wait in a collective, for ranks that are gone. All files are whole.
    os._exit(EXIT_PREEMPTED)


def _preempted(reason: str) -> int:
    """Return the exit code of a preempted job: that of a mistake where attempt after attempt makes no progress."""
    _ignore_signals()
    status = RunStatus.current
    if status is None:
        return EXIT_PREEMPTED
    status.preempted(reason)
    if not status.is_stuck:
        return EXIT_PREEMPTED
    return _mistake(
        f"attempt {status.attempt} is the last of {MOST_FRUITLESS} in a row that saved no new checkpoint, so this job "
        "is not to be queued again; give it a longer time limit, or see why its steps or saves take so long"
    )


def _ignore_signals() -> None:
    # Once the first rank has exited, the launcher sends SIGTERM to the others: it must not change their exit code.
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def _leave(code: int) -> NoReturn:
    """Destroy the process group and exit without interpreter teardown.

    In about one of a hundred teardowns a library's unjoined C++ thread aborts the process, and the launcher would
    report a finished run as failed.
    """
    dist.destroy_process_group()
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _mistake(message: str) -> int:
    number = os.environ.get("RANK", "0")
    if number != "0":
        # Most mistakes occur on every rank. Then rank 0 prints the line and the launcher kills this process meanwhile,
        # whose code must not be higher than that of the mistake: srun returns the highest.
        for signal_number in SIGNALS:
            signal.signal(signal_number, lambda *_: os._exit(EXIT_MISTAKE))
        time.sleep(_LAUNCHER_KILLS_WITHIN)
        message = f"[rank {number}] {message}"
    one_line = " ".join(message.split())
    if len(one_line) > _LONGEST_MESSAGE:
        # A stranger's value in it has no end; the remedy stands at the end of the line.
        one_line = f"{one_line[:_LONGEST_MESSAGE]} ... {one_line[-200:]}"
    print(f"error: {one_line}", file=sys.stderr, flush=True)
    return EXIT_MISTAKE
