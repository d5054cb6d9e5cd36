"""Wait for all ranks before they connect: with progress on the screen, and a limit that ends in one line."""

from __future__ import annotations

import contextlib
import os
import socket
import sys
import time
from collections.abc import Sequence
from datetime import timedelta
from typing import TYPE_CHECKING

import torch.distributed as dist

from gptj_train.errors import UserError
from gptj_train.launch.ranks import rank, world_size

if TYPE_CHECKING:
    # torch.distributed has it without exporting it, as mypy sees it.
    from torch._C._distributed_c10d import Store

REPORT_EVERY = 30.0
"""Seconds between the lines of a rank that waits."""

# Seconds of one attempt to reach rank 0. Python handles no signal meanwhile, and launchers kill after 30 seconds.
_ONE_ATTEMPT = 5.0
_SHORTEST_POLL, _LONGEST_POLL = 0.02, 1.0  # seconds


def wait_for_ranks(limit: float) -> Store:
    """Return when every rank has come here. Call it on all ranks before they join a process group.

    Rank 0 counts the others at MASTER_ADDR:MASTER_PORT and prints every 30 seconds who is missing; a rank that cannot
    reach that address prints so.

    Args:
        limit: seconds to wait.

    Returns:
        The store at that address, which the process group uses too: keep it until the group exists.

    Raises:
        UserError: ranks are missing after the limit, rank 0 cannot be reached, or its port is taken.
    """
    deadline = time.monotonic() + limit
    store = _host_store() if _hosts_store() else _reach_store(deadline, limit)
    # torchrun keeps its store when it restarts the ranks: those of the last start must not be counted.
    prefix = f"gptj_train/start {os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"
    try:
        store.set(f"{prefix}/rank {rank()}", socket.gethostname())
        if rank() == 0:
            gave_up = _count_ranks(store, prefix, deadline, limit)
            store.set(f"{prefix}/outcome", gave_up)
            if gave_up:
                # The store ends with this process: the others need time to read why.
                time.sleep(2 * _LONGEST_POLL)
        else:
            gave_up = _outcome(store, f"{prefix}/outcome")
    except dist.DistError as error:
        reason = str(error).splitlines()[0]
        raise UserError(
            f"rank 0 at {_address()} has ended while the ranks waited for each other ({reason}); its own message, or "
            "its host's, names the cause"
        ) from None
    if gave_up:
        raise UserError(gave_up)
    return store


def name_ranks(ranks: Sequence[int]) -> str:
    """Write ranks, in ascending order, with runs joined: "rank 3", "ranks 0, 8-15"."""
    runs: list[list[int]] = []
    for number in ranks:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    texts = [str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs]
    return f"{'rank' if len(ranks) == 1 else 'ranks'} {', '.join(texts)}"


def _address() -> str:
    return f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"


def _hosts_store() -> bool:
    # torchrun's agent hosts the store itself.
    return rank() == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"


def _host_store() -> Store:
    try:
        # multi_tenant: torch's own rendezvous opens the port once more in this process, and shares it.
        return dist.TCPStore(  # type: ignore[attr-defined]
            host_name=os.environ["MASTER_ADDR"],
            port=int(os.environ["MASTER_PORT"]),
            is_master=True,
            wait_for_workers=False,
            multi_tenant=True,
        )
    except dist.DistError as error:
        reason = str(error).splitlines()[0]
        raise UserError(
            f"rank 0 cannot listen at {_address()} ({reason}); MASTER_ADDR must be this host, and MASTER_PORT free: "
            "give another one (deepspeed --master_port, torchrun --master-port)"
        ) from None


def _reach_store(deadline: float, limit: float) -> Store:
    next_report = time.monotonic() + REPORT_EVERY
    while True:
        now = time.monotonic()
        if now > deadline:
            raise UserError(
                f"rank 0 was not at {_address()} within {limit:g} s (rendezvous_timeout); see that its host is up and "
                f"its process runs, and that {socket.gethostname()} can reach this address"
            )
        if now > next_report:
            # One line a host is enough.
            if os.environ.get("LOCAL_RANK", "0") == "0":
                _report(f"waiting for rank 0 at {_address()}")
            next_report = now + REPORT_EVERY
        # A plain connection first: where there is no store, torch prints a C++ stack at each attempt.
        if not _is_refused():
            with contextlib.suppress(dist.DistError):
                return dist.TCPStore(  # type: ignore[attr-defined]
                    host_name=os.environ["MASTER_ADDR"],
                    port=int(os.environ["MASTER_PORT"]),
                    is_master=False,
                    wait_for_workers=False,
                    timeout=timedelta(seconds=_ONE_ATTEMPT),
                )
        time.sleep(_LONGEST_POLL)


def _is_refused() -> bool:
    """Return whether nothing answers at rank 0's address."""
    try:
        address = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        socket.create_connection(address, timeout=_ONE_ATTEMPT).close()
    except OSError:  # also a name that is not known yet
        return True
    return False


def _count_ranks(store: Store, prefix: str, deadline: float, limit: float) -> str:
    """Return "" once all ranks are here, or, after the limit, who is missing."""
    missing = list(range(world_size()))
    next_report = time.monotonic() + REPORT_EVERY
    poll = _SHORTEST_POLL
    while True:
        missing = [number for number in missing if not store.check([f"{prefix}/rank {number}"])]
        if not missing:
            return ""
        now = time.monotonic()
        here = world_size() - len(missing)
        if now > deadline:
            return (
                f"{name_ranks(missing)} did not come to {_address()} within {limit:g} s (rendezvous_timeout), {here} "
                f"of {world_size()} did, from {_hosts(store, prefix, missing)}; see that the other hosts are up, "
                "their processes run, and they can reach this address"
            )
        if now > next_report:
            _report(f"waiting for {name_ranks(missing)} (have {here} of {world_size()}) at {_address()}")
            next_report = now + REPORT_EVERY
        time.sleep(poll)
        poll = min(2 * poll, _LONGEST_POLL)


def _hosts(store: Store, prefix: str, missing: Sequence[int]) -> str:
    """Name the hosts of the ranks that are here."""
    hosts: dict[str, None] = {}
    for number in range(world_size()):
        if number not in missing:
            hosts[store.get(f"{prefix}/rank {number}").decode()] = None
    return ", ".join(hosts)


def _outcome(store: Store, key: str) -> str:
    """Wait until rank 0 has counted all ranks, or has given up; return why it gave up, or ""."""
    poll = _SHORTEST_POLL
    while True:
        # Looked for without torch, which prints a C++ stack when the connection is gone.
        if _is_refused():
            raise dist.DistError("nothing answers there any more")
        if store.check([key]):
            return str(store.get(key).decode())
        time.sleep(poll)
        poll = min(2 * poll, _LONGEST_POLL)


def _report(line: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {socket.gethostname()}: {line}", file=sys.stderr, flush=True)
