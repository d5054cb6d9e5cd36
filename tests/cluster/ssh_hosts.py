"""Two hosts with ssh on this machine, built from nothing: network namespaces joined by a cable that can be cut.

Each host has its own name, mounts and sshd; addresses are the namespaces' own. Needs root, iproute2, openssh-server,
openssh-client and pdsh.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import psutil
from built_from_nothing import BuiltFromNothing

ROOT = Path(__file__).parents[2]
HOSTS = {"host1": "10.77.0.1", "host2": "10.77.0.2"}

SSHD = """
Port 22
HostKey {folder}/host_key
AuthorizedKeysFile {folder}/ssh/id_ed25519.pub
StrictModes no
PermitRootLogin yes
UsePAM no
PidFile none
MaxStartups 100
SetEnv {environment}
"""

CLIENT = """
Host *
  IdentityFile {folder}/ssh/id_ed25519
  StrictHostKeyChecking no
  UserKnownHostsFile /dev/null
  LogLevel ERROR
"""


class SshHosts(BuiltFromNothing):
    """A context manager around the namespaces and their sshd."""

    def __init__(self, folder: Path, environment: dict[str, str]) -> None:
        """``environment`` is what every process on the hosts inherits, also those that ssh starts."""
        self.folder, self.environment = folder, environment
        self._tag = f"gj{os.getpid()}"
        self._daemons: dict[str, subprocess.Popen[bytes]] = {}
        self._started: list[subprocess.Popen[str]] = []

    def build(self) -> None:
        ssh = self.folder / "ssh"
        ssh.mkdir(parents=True)
        for key in (ssh / "id_ed25519", self.folder / "host_key"):
            subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(key)], check=True)
        (ssh / "config").write_text(CLIENT.format(folder=self.folder))
        names = [f"{address} {host}\n" for host, address in HOSTS.items()]
        (self.folder / "hosts").write_text("127.0.0.1 localhost\n" + "".join(names))
        pairs = " ".join(f'"{name}={value}"' for name, value in self.environment.items())
        (self.folder / "sshd_config").write_text(SSHD.format(folder=self.folder, environment=pairs))
        Path("/run/sshd").mkdir(exist_ok=True)
        first, second = (self._namespace(host) for host in HOSTS)
        for namespace in (first, second):
            _ip("netns", "add", namespace)
            _ip("-n", namespace, "link", "set", "lo", "up")
        _ip("link", "add", "eth0", "netns", first, "type", "veth", "peer", "name", "eth0", "netns", second)
        for host, address in HOSTS.items():
            _ip("-n", self._namespace(host), "address", "add", f"{address}/24", "dev", "eth0")
            self.plug_in(host)
        # ssh looks where the system says that the user is at home, whatever HOME is.
        of_user = os.path.expanduser("~root/.ssh")
        for host in HOSTS:
            script = (
                f"mount --bind {self.folder}/hosts /etc/hosts && mkdir -p {of_user} && "
                f"mount --bind {self.folder}/ssh {of_user} && hostname {host} && "
                f"exec /usr/sbin/sshd -D -e -f {self.folder}/sshd_config"
            )
            unshare = ["unshare", "--mount", "--uts", "--propagation", "private", "bash", "-c", script]
            with (self.folder / f"{host}.out").open("wb") as output:
                self._daemons[host] = subprocess.Popen(
                    ["ip", "netns", "exec", self._namespace(host), *unshare],
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                )
        for host in HOSTS:
            deadline = time.monotonic() + 30
            while subprocess.run(self.on("host1", "ssh", host, "true"), check=False, capture_output=True).returncode:
                assert time.monotonic() < deadline, (self.folder / f"{host}.out").read_text()
                time.sleep(0.3)

    def take_down(self) -> None:
        for process in self._started:
            _end(process.pid)
        for daemon in self._daemons.values():
            _end(daemon.pid)
            daemon.wait()
        for host in HOSTS:
            # What ssh has started has other parents; all of it is in the namespace.
            listed = subprocess.run(["ip", "netns", "pids", self._namespace(host)], capture_output=True, text=True)
            for pid in listed.stdout.split():
                _end(int(pid))
            subprocess.run(["ip", "netns", "del", self._namespace(host)], check=False, capture_output=True)

    def on(self, host: str, *command: str) -> list[str]:
        """Return the command line that runs a command on a host."""
        return ["nsenter", "--target", str(self._daemons[host].pid), "--net", "--mount", "--uts", *command]

    def start(self, host: str, *command: str, **environment: str) -> subprocess.Popen[str]:
        """Start a command on a host, in the repository."""
        log = (self.folder / f"log{len(self._started)}").open("w+")
        process = subprocess.Popen(
            self.on(host, *command),
            env=os.environ | self.environment | environment,
            stdout=log,
            stderr=subprocess.STDOUT,
            text=True,
            cwd=ROOT,
            start_new_session=True,
        )
        self._started.append(process)
        return process

    def log(self, process: subprocess.Popen[str]) -> str:
        return (self.folder / f"log{self._started.index(process)}").read_text()

    def pull_out(self, host: str) -> None:
        """Pull a host's network cable."""
        _ip("-n", self._namespace(host), "link", "set", "eth0", "down")

    def plug_in(self, host: str) -> None:
        _ip("-n", self._namespace(host), "link", "set", "eth0", "up")

    def _namespace(self, host: str) -> str:
        return f"{self._tag}-{host}"


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True)


def _end(pid: int) -> None:
    """Kill a process and its descendants."""
    try:
        process = psutil.Process(pid)
        processes = [process, *process.children(recursive=True)]
    except psutil.NoSuchProcess:
        return
    for one in processes:
        try:
            one.send_signal(signal.SIGKILL)
        except psutil.NoSuchProcess:
            continue


def why_not_here() -> str:
    """Return what this machine lacks for the hosts; "" for nothing."""
    tools = ("ip", "nsenter", "unshare", "ssh", "ssh-keygen", "pdsh", "/usr/sbin/sshd")
    missing = [tool for tool in tools if shutil.which(tool) is None]
    if missing:
        return f"not installed: {', '.join(missing)}; apt-get install openssh-server openssh-client pdsh iproute2"
    return "" if os.geteuid() == 0 else "needs root, for namespaces"
