"""A Slurm of two nodes on this machine, built from nothing in a folder and taken down again.

Each node is a slurmd in namespaces of its own: it has a host name, and mounts that the other does not see. All daemons
listen on the loopback device. Needs root and Debian's slurmctld, slurmd, slurm-client and munge.
"""

from __future__ import annotations

import json
import os
import re
import secrets
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
from built_from_nothing import BuiltFromNothing

ROOT = Path(__file__).parents[2]
NODES = ("node1", "node2")
LONGEST = 600.0  # seconds that a test waits for anything

CONF = """
ClusterName=test
SlurmctldHost=localhost(127.0.0.1)
SlurmctldPort={port}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
CredType=cred/munge
SlurmUser=root
SlurmdUser=root
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SwitchType=switch/none
MpiDefault=none
ReturnToService=2
SlurmdTimeout=20
SlurmdParameters=config_overrides
SchedulerParameters=sched_interval=5,bf_interval=5
KillWait=60
MinJobAge=3600
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmctldParameters=preempt_send_user_signal
NodeName=node1 NodeHostname=node1 NodeAddr=127.0.0.1 Port={node1} CPUs=16 RealMemory=8000
NodeName=node2 NodeHostname=node2 NodeAddr=127.0.0.1 Port={node2} CPUs=16 RealMemory=8000
PartitionName=main Nodes=node1,node2 Default=YES MaxTime=INFINITE State=UP PriorityTier=1 GraceTime=120
PartitionName=urgent Nodes=node1,node2 MaxTime=INFINITE State=UP PriorityTier=10
"""


class SlurmCluster(BuiltFromNothing):
    """A context manager around the cluster's daemons."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.daemons: dict[str, subprocess.Popen[bytes]] = {}
        self.env = os.environ | {"SLURM_CONF": str(folder / "slurm.conf")}

    def build(self) -> None:
        for name in ("state", "spool-node1", "spool-node2"):
            (self.folder / name).mkdir(parents=True)
        # munged refuses a socket in a folder that others cannot reach.
        self.folder.chmod(0o755)
        key = self.folder / "munge.key"
        key.write_bytes(secrets.token_bytes(1024))
        key.chmod(0o400)
        first = 17000 + os.getpid() % 1000 * 10
        conf = CONF.format(folder=self.folder, port=first, node1=first + 1, node2=first + 2)
        (self.folder / "slurm.conf").write_text(conf)
        hosts = "127.0.0.1 localhost\n" + "".join(f"127.0.0.1 {node}\n" for node in NODES)
        (self.folder / "hosts").write_text(hosts)
        paths = [f"--{name}={self.folder}/munge.{name.partition('-')[0]}" for name in ("key-file", "socket")]
        more = [f"--{name}-file={self.folder}/munged.{name}" for name in ("pid", "log", "seed")]
        self._start("munged", ["munged", "--foreground", "--force", *paths, *more])
        self._wait(lambda: (self.folder / "munge.socket").exists(), "munged")
        self._start("slurmctld", ["slurmctld", "-D"])
        for node in NODES:
            self.start_node(node)
        self._wait(self.is_idle, "the nodes")

    def take_down(self) -> None:
        if "slurmctld" in self.daemons:
            self.command("scancel", "--user=root", check=False)
        for name in ("node1", "node2", "slurmctld", "munged"):
            self.stop(name)

    def start_node(self, node: str) -> None:
        """Start a node's slurmd with its own host name, hosts file and mounts."""
        script = f"mount --bind {self.folder}/hosts /etc/hosts && hostname {node} && exec slurmd -D -N {node}"
        self._start(node, ["unshare", "--mount", "--uts", "--propagation", "private", "bash", "-c", script])

    def stop(self, name: str, *, hard: bool = False) -> None:
        """End a daemon and what it has started; ``hard`` as in a power cut."""
        daemon = self.daemons.pop(name, None)
        if daemon is None:
            return
        # slurmstepd leaves its parent: a node's processes are known by the node's name in their environment or command.
        for process in [daemon, *self.processes_of(name)]:
            process.send_signal(signal.SIGKILL if hard else signal.SIGTERM)
        try:
            daemon.wait(timeout=20)
        except subprocess.TimeoutExpired:
            daemon.kill()
            daemon.wait()
        for process in self.processes_of(name):
            process.kill()

    def processes_of(self, node: str) -> list[psutil.Process]:
        """Return the job steps and tasks of a node, those of this cluster alone."""
        found = []
        for process in psutil.process_iter():
            try:
                environment = process.environ()
            except psutil.Error:
                continue
            ours = environment.get("SLURM_CONF") == self.env["SLURM_CONF"]
            if ours and environment.get("SLURMD_NODENAME") == node:
                found.append(process)
        return found

    def mount(self, node: str, *command: str) -> None:
        """Run a mount command that only this node sees."""
        pid = self.daemons[node].pid
        subprocess.run(["nsenter", "--target", str(pid), "--mount", *command], check=True)

    def command(self, *command: str, check: bool = True) -> str:
        done = subprocess.run(command, env=self.env, capture_output=True, text=True, check=False, cwd=ROOT)
        assert not check or done.returncode == 0, (command, done.stderr)
        return done.stdout.strip()

    def is_idle(self) -> bool:
        states = self.command("sinfo", "--noheader", "--Node", "--partition=main", "--format=%T", check=False)
        return states.split() == ["idle", "idle"]

    def submit(
        self, log: Path, *arguments: str, script: str = "scripts/train.sbatch", options: tuple[str, ...] = ()
    ) -> Job:
        layout = ["--nodes=2", "--ntasks-per-node=1", "--cpus-per-task=1", f"--output={log}"]
        number = self.command("sbatch", "--parsable", *layout, *options, script, *arguments)
        return Job(self, int(number), log)

    def _start(self, name: str, command: list[str]) -> None:
        with (self.folder / f"{name}.out").open("wb") as output:
            self.daemons[name] = subprocess.Popen(
                command, env=self.env, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
            )

    def _wait(self, until: Callable[[], bool], what: str) -> None:
        ends = time.monotonic() + 60
        while not until():
            output = "\n".join(path.read_text() for path in self.folder.glob("*.out"))
            assert time.monotonic() < ends, f"{what} did not start:\n{output}"
            time.sleep(0.5)


class Job:
    """A submitted job."""

    def __init__(self, cluster: SlurmCluster, number: int, log: Path) -> None:
        self.cluster, self.number, self._log = cluster, number, log

    def facts(self) -> dict[str, str]:
        """Return what scontrol knows of the job."""
        text = self.cluster.command("scontrol", "show", "job", str(self.number), "--oneliner")
        return dict(pair.split("=", 1) for pair in text.split() if "=" in pair)

    @property
    def state(self) -> str:
        return self.facts()["JobState"]

    @property
    def restarts(self) -> int:
        return int(self.facts()["Restarts"])

    @property
    def log(self) -> str:
        return self._log.read_text() if self._log.exists() else ""

    def wait_for(self, until: Callable[[], Any], what: str) -> None:
        ends = time.monotonic() + LONGEST
        held_since = None
        while not until():
            assert time.monotonic() < ends, f"waited for {what}; {self.state}; log:\n{self.log[-5000:]}"
            if self.facts()["Reason"] != "BeginTime":
                held_since = None
            elif held_since is None:
                held_since = time.monotonic()
            elif time.monotonic() - held_since > 5:
                # Slurm holds a requeued job for two minutes. It is needed for seconds: in the second of its requeue
                # the job's credential is revoked, and it could not start.
                update = ["scontrol", "update", f"JobId={self.number}", "StartTime=now"]
                self.cluster.command(*update, check=False)
            time.sleep(0.3)

    def end(self) -> str:
        """Wait until the job is over and no process of it is left; return its final state."""
        final = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "PREEMPTED", "OUT_OF_MEMORY")
        self.wait_for(lambda: self.state in final, "its end")
        return self.state

    def exit_code(self) -> int:
        return int(self.facts()["ExitCode"].partition(":")[0])

    def signal_batch(self, name: str) -> None:
        """Send the batch script what Slurm sends it before the time limit."""
        self.cluster.command("scancel", "--batch", f"--signal={name}", str(self.number))

    def rank_on(self, node: str) -> psutil.Process:
        def is_rank(process: psutil.Process) -> bool:
            with_name = any(part.endswith("clm.py") for part in process.cmdline())
            return (
                with_name and process.environ().get("SLURM_JOB_ID") == str(self.number) and "python" in process.name()
            )

        return next(process for process in self.cluster.processes_of(node) if is_rank(process))


def steps_done(folder: Path) -> int:
    """Return the last step in a run's metrics."""
    return max(losses(folder), default=0)


def losses(folder: Path) -> dict[int, float]:
    """Return step -> loss of a run."""
    found = {}
    try:
        text = (folder / "metrics.jsonl").read_text()
    except OSError:
        return {}
    for line in text.splitlines():
        # The last line may be half written.
        if re.search(r"}$", line):
            values = json.loads(line)
            if values.get("kind") == "train":
                found[values["step"]] = values["loss"]
    return found


def why_not_here() -> str:
    """Return what this machine lacks for the cluster; "" for nothing."""
    missing = [tool for tool in ("slurmctld", "slurmd", "munged", "unshare", "nsenter") if shutil.which(tool) is None]
    if missing:
        return f"not installed: {', '.join(missing)}; apt-get install slurmctld slurmd slurm-client munge"
    return "" if os.geteuid() == 0 else "needs root, for namespaces and mounts"


def job_environment() -> dict[str, str]:
    """Return the variables that a job on this cluster inherits."""
    return {
        "VENV": sys.prefix,
        "PYTHONPATH": str(ROOT),
        "DS_ACCELERATOR": "cpu",
        "OMP_NUM_THREADS": "1",
        "GLOO_SOCKET_IFNAME": "lo",
        "HF_HUB_OFFLINE": "1",
    }
