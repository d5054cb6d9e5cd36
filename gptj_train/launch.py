"""How a recipe starts and ends: launcher, command line, config, exit codes."""

from __future__ import annotations

import logging
import os
import re
import signal
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import hydra
import torch.distributed as dist
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from gptj_train.schema import text_keys, unknown_key_message, validated
from gptj_train.training.preemption import SIGNALS, Preempted

T = TypeVar("T")

EXIT_MISTAKE = 2
EXIT_PREEMPTED = 85  # of a job that the same command goes on with
_PACKAGE = Path(__file__).parent
_LAUNCHER_KILLS_WITHIN = 5  # seconds


def recipe(
    cls: type[T], primary: str | None = None, one_process: bool = False
) -> Callable[[Callable[[T], None]], Callable[[], None]]:
    """Decorator: makes ``job(config)`` a command under deepspeed, torchrun, srun or plain python.

    The config is ``configs/<primary, or the name of the recipe's file>.yaml`` with the command line's
    overrides, as a ``cls``. ``one_process`` jobs are done by rank 0; others that a launcher starts just end.
    A ValueError of this package is a user's mistake: one line, exit code 2. Told to end, a job leaves with exit
    code 85: at once, or when the trainer has saved. Anything else keeps its traceback.
    """

    def wrap(job: Callable[[T], None]) -> Callable[[], None]:
        script = Path(job.__code__.co_filename)

        def main() -> None:
            for number in SIGNALS:
                signal.signal(number, lambda *_: sys.exit(_preempted()))
            sys.argv[1:] = [arg for arg in sys.argv[1:] if not arg.startswith("--local_rank")]
            _set_rank_variables()
            if one_process and rank() != 0:
                return
            code = _run(job, cls, script, primary or script.stem)
            if dist.is_initialized() and code in (0, EXIT_PREEMPTED):
                _leave(code)
            sys.exit(code)

        return main

    return wrap


def rank() -> int:
    """This process's number in the job, known before the ranks have met."""
    return int(os.environ["RANK"])


def world_size() -> int:
    """Ranks of this job, known before they have met."""
    return int(os.environ["WORLD_SIZE"])


def _run(job: Callable[[T], None], cls: type[T], script: Path, primary: str) -> int:
    configs = str(script.resolve().parent.parent / "configs")
    try:
        if any(arg.startswith("-") for arg in sys.argv[1:]):
            _run_hydra(script, configs, primary)
        else:
            with hydra.initialize_config_dir(configs, version_base="1.3"):
                composed = hydra.compose(primary, overrides=[_as_typed(arg, text_keys(cls)) for arg in sys.argv[1:]])
            job(validated(composed, cls))
        return 0
    except Preempted as told:
        if rank() == 0:
            print(f"stopped: {told}", file=sys.stderr, flush=True)
        return _preempted()
    except (HydraException, OmegaConfBaseException, YAMLError) as error:
        return _mistake(_hydra_message(error, cls))
    except ValueError as error:
        if not _raised_here(error):
            raise
        return _mistake(str(error))


def _preempted() -> int:
    for number in SIGNALS:  # a launcher ends the others when the first rank has left; every code is to be this one
        signal.signal(number, signal.SIG_IGN)
    return EXIT_PREEMPTED


def _leave(code: int) -> NoReturn:
    """Leave the process group, and end without taking the interpreter apart.

    A thread that a library has not joined aborts the process there, once in about a hundred times, and the
    launcher takes a finished run for a failed one.
    """
    dist.destroy_process_group()
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _as_typed(override: str, texts: set[str]) -> str:
    """Quote a text value for Hydra, whose grammar would else read commas, braces or numbers out of it."""
    key, _, value = override.partition("=")
    quoted = re.fullmatch(r"""'(?:\\.|[^'\\])*'|"(?:\\.|[^"\\])*\"""", value)
    if key.lstrip("+") not in texts or value in ("", "null", "???") or quoted or value.startswith(("${", "[")):
        return override
    escaped = re.sub(r"(\\*)('|$)", lambda end: end[1] * 2 + ("\\'" if end[2] else ""), value)
    if key.endswith("prompt"):  # what reads like an interpolation is part of the text
        escaped = escaped.replace("${", "\\${")
    return f"{key}='{escaped}'"


def _run_hydra(script: Path, configs: str, primary: str) -> None:
    """Hydra's own switches: --help, --cfg, --multirun and the like."""
    os.environ["HYDRA_FULL_ERROR"] = "1"  # else Hydra itself prints its errors and exits with 1

    @hydra.main(version_base="1.3", config_path=configs, config_name=primary)
    def sweep(composed: DictConfig) -> None:
        # Each job of a sweep is a process of its own: a process group cannot be started twice.
        settings = HydraConfig.get()
        folder = composed.get("output_dir")
        own = [f"output_dir={folder}/{settings.job.num}"] if folder else []
        command = [sys.executable, str(script), *settings.overrides.task, *own]
        if code := subprocess.run(command, check=False).returncode:
            sys.exit(code)

    sweep()


def _mistake(message: str) -> int:
    if rank() != 0:
        # Where rank 0 makes the same mistake, it speaks and the launcher ends this process meanwhile.
        time.sleep(_LAUNCHER_KILLS_WITHIN)
        message = f"[rank {rank()}] {message}"
    print("error: " + " ".join(message.split()), file=sys.stderr, flush=True)
    return EXIT_MISTAKE


def _raised_here(error: BaseException) -> bool:
    frames = traceback.extract_tb(error.__traceback__)
    # Hydra, too, raises ValueError for some overrides (engine=null).
    rooms = _PACKAGE, Path(hydra.__file__).parent
    return bool(frames) and any(Path(frames[-1].filename).is_relative_to(room) for room in rooms)


def _hydra_message(error: BaseException, cls: type) -> str:
    text = str(error)
    if key := re.search(r"Could not override '([^']+)'", text):
        return unknown_key_message(key[1], cls)
    if choice := re.search(
        r"Could not find '([^']+)'.*?Available options in '[^']+':\s*(.*?)\n(?:Config|$)", text, re.S
    ):
        group, _, name = choice[1].rpartition("/")
        return f"no {group or 'config'} named {name!r}; there are: {', '.join(choice[2].split())}"
    return f"the command line or config cannot be read: {text.partition('full_key:')[0]}"


def _set_rank_variables() -> None:
    """The launcher's environment; under srun from Slurm's own names; for plain python a job of one."""
    env = os.environ
    # Only srun sets SLURM_STEP_*: the batch script itself is no task, whatever SLURM_NTASKS says.
    if "RANK" not in env and "SLURM_PROCID" in env and int(env.get("SLURM_STEP_NUM_TASKS", "1")) > 1:
        # A task may be shown its own GPU alone, which is number 0 then.
        gpus = len(env.get("CUDA_VISIBLE_DEVICES", "").split(",")) if env.get("CUDA_VISIBLE_DEVICES") else 1 << 30
        local = str(int(env["SLURM_LOCALID"]) % gpus)
        env.update(RANK=env["SLURM_PROCID"], WORLD_SIZE=env["SLURM_STEP_NUM_TASKS"], LOCAL_RANK=local)
        here = re.match(r"\d+", env.get("SLURM_STEP_TASKS_PER_NODE", ""))
        env.setdefault("LOCAL_WORLD_SIZE", here[0] if here else "1")
        env.setdefault("MASTER_PORT", str(20000 + int(env.get("SLURM_JOB_ID", "0")) % 20000))
        if "MASTER_ADDR" not in env and env.get("SLURM_NNODES", "1") != "1":
            sys.exit(_mistake("srun over several nodes needs MASTER_ADDR; start it by scripts/clm.sbatch"))
    defaults: dict[str, Any] = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}
    for name, value in defaults.items():
        env.setdefault(name, value)
    env.setdefault("MASTER_PORT", str(_free_port()))


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
