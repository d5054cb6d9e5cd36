"""This process's rank and the number of ranks, from the launcher's environment."""

from __future__ import annotations

import contextlib
import os
import re
import socket
from collections.abc import Iterator

from gptj_train.errors import UserError


def rank() -> int:
    """Return this process's global rank; known before torch.distributed starts."""
    return int(os.environ["RANK"])


def world_size() -> int:
    """Return the number of ranks; known before torch.distributed starts."""
    return int(os.environ["WORLD_SIZE"])


def ranks_on_host() -> int:
    """Return the number of ranks on this host; known before torch.distributed starts."""
    # LOCAL_WORLD_SIZE is set by torchrun and by set_rank_variables under srun, LOCAL_SIZE by the deepspeed launcher.
    return int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or 1)


def set_rank_variables() -> None:
    """Set RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT where the launcher has not.

    Under srun they come from Slurm's own variables; plain python is a job of one rank.

    Raises:
        UserError: srun over several nodes without MASTER_ADDR.
    """
    env = os.environ
    # Only srun sets SLURM_STEP_*. The batch script itself is not a task, whatever SLURM_NTASKS says.
    tasks = int(env.get("SLURM_STEP_NUM_TASKS", "1"))
    if "RANK" not in env and "SLURM_PROCID" in env and tasks > 1:
        _set_from_slurm(tasks)
    env.setdefault("RANK", "0")
    env.setdefault("WORLD_SIZE", "1")
    env.setdefault("LOCAL_RANK", "0")
    env.setdefault("MASTER_ADDR", "127.0.0.1")
    if "MASTER_PORT" not in env:
        env["MASTER_PORT"] = str(_free_port())


def _set_from_slurm(tasks: int) -> None:
    env = os.environ
    local_rank = int(env["SLURM_LOCALID"])
    if visible := env.get("CUDA_VISIBLE_DEVICES"):
        # With --gpus-per-task a task sees its own GPU only, which is then number 0.
        local_rank %= len(visible.split(","))
    env["RANK"] = env["SLURM_PROCID"]
    env["WORLD_SIZE"] = str(tasks)
    env["LOCAL_RANK"] = str(local_rank)
    # "4(x2),3": the first number is this node's, or that of nodes like it.
    tasks_on_node = re.match(r"\d+", env.get("SLURM_STEP_TASKS_PER_NODE", ""))
    env.setdefault("LOCAL_WORLD_SIZE", tasks_on_node[0] if tasks_on_node else "1")
    # Every rank must compute the same port, and two jobs on a node different ones.
    env.setdefault("MASTER_PORT", str(20000 + int(env.get("SLURM_JOB_ID", "0")) % 20000))
    if "MASTER_ADDR" not in env and env.get("SLURM_NNODES", "1") != "1":
        raise UserError("srun over several nodes needs MASTER_ADDR; submit the job with scripts/train.sbatch")


@contextlib.contextmanager
def port_in_use_is_a_mistake() -> Iterator[None]:
    """Explain the failure of torch.distributed to listen on MASTER_PORT.

    Raises:
        UserError: another process listens there, such as a run whose launcher was killed.
    """
    try:
        yield
    except RuntimeError as error:  # torch's DistNetworkError has no error number
        if "EADDRINUSE" not in str(error):
            raise
        port = os.environ["MASTER_PORT"]
        raise UserError(
            f"port {port} on {socket.gethostname()}, where the ranks would meet, is in use by another process; "
            f"wait for that run or end it ('ss -ltnp sport = :{port}' shows it), or give another port: "
            "deepspeed --master_port=PORT, torchrun --master-port=PORT, MASTER_PORT=PORT under srun"
        ) from None


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port
