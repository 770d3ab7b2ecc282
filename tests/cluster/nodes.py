"""Ray nodes on one machine that fail independently, each with its own namespaces and address.

A node is `unshare`. Its child is process 1 of the node and restarts Ray whenever Ray ends, as a kubelet does. All nodes
are connected to a bridge in another namespace, so nothing is visible outside and two test runs never meet. A node ends
with its process 1, which ends with `unshare`, which ends with the test run in any case. Nothing is left behind. If
namespaces are not allowed, the nodes are process groups on loopback, and networks cannot be cut.
"""

import ctypes
import json
import os
import secrets
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from deepskip.cluster.local import end_with_parent, free_ports
from deepskip.cluster.settings import DRIVER_SETTINGS, NODE_SETTINGS

ROOT = Path(__file__).parents[2]
RAY = f"{shlex.quote(sys.executable)} -m ray.scripts.scripts"
# This variable is in the environment of each process of a node.
MARK = "DEEPSKIP_TEST_NODE"
UP_SECONDS = 120.0
CLONE_NEWNET = 0x40000000


def namespaces_allowed() -> bool:
    """Return whether this machine allows network, mount and process namespaces."""
    if os.geteuid() != 0 or not all(map(shutil.which, ("unshare", "nsenter", "ip", "mount"))):
        return False
    trial = "ip link set lo up && ip link add br0 type bridge && mount -t tmpfs none /mnt"
    command = ["unshare", "--net", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc", "sh", "-c", trial]
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


@dataclass
class Node:
    """One node: number, address, mark, the process that holds it, and its process 1 as seen from outside."""

    number: int
    address: str
    mark: str
    holder: subprocess.Popen[bytes]
    init: int


class Nodes:
    """A cluster, whose node 0 is the head without CPUs for workers; the others have one CPU each.

    Args:
        folder: folder of the logs.
        variables: more environment variables for each process.
    """

    def __init__(self, folder: Path, variables: dict[str, str] | None = None) -> None:
        self.folder = folder
        self.folder.mkdir(parents=True, exist_ok=True)
        self.isolated = namespaces_allowed()
        # The path is short, since the paths of Ray's sockets may have at most 107 characters.
        self.temporary = Path(tempfile.mkdtemp(prefix="dsn-", dir="/tmp"))
        self.port, self.dashboard_port = free_ports(2)
        self.variables = NODE_SETTINGS | DRIVER_SETTINGS | (variables or {})
        self.variables |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
        self.nodes: dict[int, Node] = {}
        self.switch: subprocess.Popen[bytes] | None = None
        if self.isolated:
            self.switch = self._hold(["--net", "--pid"], "while :; do sleep 1000; done", dict(os.environ))
            self._in_switch("ip link add br0 type bridge && ip link set br0 up")

    def address(self, number: int) -> str:
        """Return a node's address."""
        return f"10.77.0.{number + 1}" if self.isolated else "127.0.0.1"

    def _hold(self, namespaces: list[str], script: str, environment: dict[str, str]) -> subprocess.Popen[bytes]:
        command = ["bash", "-c", script]
        if self.isolated:
            command = ["unshare", *namespaces, "--fork", "--kill-child", "--mount-proc", *command]
        with (self.folder / "nodes.log").open("ab") as log:
            return subprocess.Popen(
                command, env=environment, stdin=subprocess.PIPE, stdout=log, stderr=log, cwd=ROOT,
                # unshare ignores SIGTERM.
                start_new_session=True, preexec_fn=end_with_parent(signal.SIGKILL),
            )  # fmt: skip

    def _in_switch(self, script: str) -> None:
        assert self.switch is not None
        command = ["nsenter", "--target", str(child_of(self.switch.pid)), "--net", "bash", "-ec", script]
        subprocess.run(command, check=True, capture_output=True, timeout=20)

    def start(self, number: int) -> Node:
        """Start a node, 0 being the head, without waiting for Ray."""
        address = self.address(number)
        options = f"--block --disable-usage-stats --node-ip-address={address} --num-cpus={min(number, 1)}"
        options += " --min-worker-port=0 --max-worker-port=0 --object-store-memory=100000000"
        if number:
            options += f" --address={self.address(0)}:{self.port}"
        else:
            options += f" --head --port={self.port} --temp-dir={self.temporary}"
            options += f" --dashboard-host={address} --dashboard-port={self.dashboard_port}"
        script = f"while :; do {RAY} start {options}; sleep 0.5; done"
        if self.isolated:
            # As on another machine, the node has its own folder for Ray's files and its own hosts file.
            own = self.temporary / f"node{number}"
            own.mkdir(exist_ok=True)
            hosts = self.temporary / f"hosts{number}"
            hosts.write_text(f"127.0.0.1 localhost\n127.0.1.1 node{number}\n")
            script = (
                f"read go; hostname node{number}; mount --bind {hosts} /etc/hosts; mount --bind {own} {self.temporary}; "
                f"{script}"
            )
        mark = secrets.token_hex(8)
        holder = self._hold(["--net", "--mount", "--pid", "--uts"], script, self.environment(mark))
        node = Node(number, address, mark, holder, child_of(holder.pid) if self.isolated else holder.pid)
        self.nodes[number] = node
        if self.isolated:
            plug = f"v{number}"
            self._in_switch(
                f"ip link add {plug} type veth peer name eth0 netns {node.init}; ip link set {plug} master br0 up"
            )
            inside = f"ip link set lo up; ip addr add {address}/24 dev eth0; ip link set eth0 up"
            subprocess.run(["nsenter", "-t", str(node.init), "-n", "bash", "-ec", inside], check=True, timeout=20)
            assert holder.stdin is not None
            holder.stdin.write(b"go\n")
            holder.stdin.close()
        return node

    def environment(self, mark: str) -> dict[str, str]:
        """Return the environment of a node's processes."""
        own = {key: value for key, value in os.environ.items() if not key.startswith(("RAY_", "MLFLOW_"))}
        return own | self.variables | {MARK: mark, "HOME": str(self.folder), "PYTHONUNBUFFERED": "1"}

    def wait(self, count: int, seconds: float = UP_SECONDS) -> None:
        """Wait until Ray has exactly `count` living nodes, including the head."""
        until(lambda: self.living() == count, seconds, f"{count} living nodes")

    def living(self) -> int:
        """Return how many nodes the head considers alive, or -1 if it does not answer."""
        url = f"http://{self.address(0)}:{self.dashboard_port}/api/v0/nodes"
        request = urllib.request.Request(url, headers={"Authorization": f"Bearer {self.variables['RAY_AUTH_TOKEN']}"})

        def ask() -> int:
            with urllib.request.urlopen(request, timeout=5) as answer:
                listed = json.load(answer)["data"]["result"]["result"]
            return sum(node["state"] == "ALIVE" for node in listed)

        try:
            return self.in_network(ask)
        except (OSError, KeyError, TypeError, ValueError):
            return -1

    def in_network(self, action: Callable[[], Any]) -> Any:
        """Run a function in a thread that uses the head's network; return its result."""
        if not self.isolated:
            return action()
        found: list[Any] = []

        def run() -> None:
            with Path(f"/proc/{self.nodes[0].init}/ns/net").open() as network:
                if ctypes.CDLL(None, use_errno=True).setns(network.fileno(), CLONE_NEWNET):
                    found.append(OSError(ctypes.get_errno(), "setns"))
                    return
            try:
                found.append(action())
            except Exception as error:
                found.append(error)

        thread = threading.Thread(target=run)
        thread.start()
        thread.join()
        if isinstance(found[0], Exception):
            raise found[0]
        return found[0]

    def run(
        self, command: list[str], output: Path, variables: dict[str, str] | None = None, number: int = 0
    ) -> subprocess.Popen[bytes]:
        """Start a program on a machine, by default the head's, in the project's folder."""
        node = self.nodes[number]
        address = {"RAY_ADDRESS": f"{self.address(0)}:{self.port}"}
        environment = self.environment(node.mark) | address | (variables or {})
        enter = ["nsenter", "-t", str(node.init), "--net", "--mount", "--pid", "--uts", f"--wd={ROOT}"]
        with output.open("ab") as log:
            return subprocess.Popen(
                [*enter, *command] if self.isolated else command,
                env=environment, stdout=log, stderr=log, stdin=subprocess.DEVNULL, cwd=ROOT,
                preexec_fn=end_with_parent(),
            )  # fmt: skip

    def processes(self, node: Node) -> list[psutil.Process]:
        """Find the living processes of a node."""
        found = []
        for process in psutil.process_iter():
            try:
                if process.environ().get(MARK) == node.mark:
                    found.append(process)
            except (psutil.Error, OSError):
                continue
        return found

    def outside(self, node: Node, inside: int) -> psutil.Process:
        """Find a process of a node by its number inside the node."""
        for process in self.processes(node):
            try:
                status = Path(f"/proc/{process.pid}/status").read_text()
            except OSError:
                continue
            numbers = next(line for line in status.splitlines() if line.startswith("NSpid:")).split()
            if int(numbers[-1]) == inside:
                return process
        raise ProcessLookupError(f"node {node.number} has no process {inside}")

    def kill(self, number: int) -> None:
        """Kill a machine with all its processes."""
        node = self.nodes.pop(number)
        if self.isolated:
            # The process that holds the namespaces ends with their process 1, and so does everything in them.
            os.kill(node.init, signal.SIGKILL)
            node.holder.wait(timeout=30)
        processes = self.processes(node)
        for process in processes:
            try:
                process.kill()
            except psutil.NoSuchProcess:
                continue
        psutil.wait_procs(processes, timeout=30)
        node.holder.wait(timeout=30)
        if self.isolated:
            until(lambda: not self._plugged(number), 20, f"the plug of node {number} to go")

    def _plugged(self, number: int) -> bool:
        try:
            self._in_switch(f"ip link show v{number}")
        except subprocess.CalledProcessError:
            return False
        return True

    def restore(self) -> None:
        """Restore the cluster to three machines, and wait for them."""
        for number in range(3):
            if number not in self.nodes:
                self.start(number)
        for number in [n for n in self.nodes if n > 2]:
            self.kill(number)
        self.wait(3)

    def cut(self, number: int) -> None:
        """Disconnect a node, so that packets to and from it are lost."""
        self._in_switch(f"ip link set v{number} nomaster")

    def mend(self, number: int) -> None:
        """Connect a node again."""
        self._in_switch(f"ip link set v{number} master br0")

    def stop(self) -> None:
        """End all processes and leave nothing behind."""
        for number in sorted(self.nodes, reverse=True):
            self.kill(number)
        if self.switch is not None:
            self.switch.kill()
            self.switch.wait(timeout=30)
        shutil.rmtree(self.temporary, ignore_errors=True)


def child_of(pid: int) -> int:
    """Wait for the only child of a process and return its number."""
    until(lambda: psutil.Process(pid).children(), 20, "a child")
    return int(psutil.Process(pid).children()[0].pid)


def until(true: Callable[[], Any], seconds: float, what: str, every: float = 0.1) -> Any:
    """Wait for a condition and return its value; raise a TimeoutError that names what is missing."""
    deadline = time.monotonic() + seconds
    while True:
        if value := true():
            return value
        if time.monotonic() > deadline:
            raise TimeoutError(f"waited {seconds:g} s for {what}")
        time.sleep(every)
