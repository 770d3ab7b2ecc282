"""A Ray head on this machine: behind a token, on loopback alone, beside any other Ray, gone when it is stopped."""

import contextlib
import ctypes
import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil

from deepskip.cluster.settings import DRIVER_SETTINGS, LOOPBACK_ONLY, NODE_SETTINGS, past_proxies

HOST = "127.0.0.1"
# every process of a head carries this variable, workers and jobs too, and is found by it
MARK = "DEEPSKIP_HEAD"
START_SECONDS = 300.0
# Ray gives its own processes 30 s to find each other, too few on a machine that does other work: they are started again then
STARTS = 3
STARTED_SLOWLY = "node timed out during startup"
STOP_SECONDS = 3.0


class HeadError(RuntimeError):
    """The head did not start; says why, with the end of its log."""


class PortTaken(HeadError):
    """A port that was asked for is in use."""


@dataclass(frozen=True)
class Head:
    """A running head: ports on 127.0.0.1, the token, its temporary folder and the process that holds it."""

    port: int
    dashboard_port: int
    token: str
    temporary: str
    pid: int

    @property
    def dashboard(self) -> str:
        """URL of the dashboard, where jobs are submitted."""
        return f"http://{HOST}:{self.dashboard_port}"


def environment(head: Head) -> dict[str, str]:
    """Gives the variables that a client of the head needs in its environment."""
    return {
        "RAY_ADDRESS": head.dashboard,
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": head.token,
        "RAY_USAGE_STATS_ENABLED": "0",
    } | past_proxies(os.environ)


def start_head(
    port: int = 0,
    dashboard_port: int = 0,
    num_cpus: int | None = None,
    num_gpus: int | None = None,
    die_with_parent: bool = False,
) -> Head:
    """Starts a Ray head and waits until jobs can be submitted to it.

    A port of 0 is chosen. num_cpus: as many as this process may use by default; num_gpus: as many as Ray finds.
    die_with_parent: the head ends when this process does, however it ends. Raises PortTaken or HeadError.
    """
    for left in reversed(range(STARTS)):
        try:
            return _start_head(port, dashboard_port, num_cpus, num_gpus, die_with_parent)
        except HeadError as error:
            if not left or STARTED_SLOWLY not in str(error):
                raise
    raise AssertionError


def _start_head(
    port: int, dashboard_port: int, num_cpus: int | None, num_gpus: int | None, die_with_parent: bool
) -> Head:
    for name, asked in (("port", port), ("dashboard_port", dashboard_port)):
        if asked and not is_free(asked):
            raise PortTaken(
                f"--{name} {asked} is taken on {HOST}; stop what listens there, name another, or leave it out"
            )
    # ports are all held while the others are chosen, so no two are the same
    chosen = free_ports(6)
    ports = {
        "--port": port or chosen[0],
        "--dashboard-port": dashboard_port or chosen[1],
        "--dashboard-agent-listen-port": chosen[2],
        "--metrics-export-port": chosen[3],
        "--ray-client-server-port": chosen[4],
        "--runtime-env-agent-port": chosen[5],
        # workers take any free port: ray's own range would be shared with other heads
        "--min-worker-port": 0,
        "--max-worker-port": 0,
    }
    # short, since the paths of its sockets may have at most 107 characters
    temporary = tempfile.mkdtemp(prefix="ds-", dir="/tmp")
    token = secrets.token_hex(32)
    command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block", "--disable-usage-stats"]
    command += [f"--node-ip-address={HOST}", f"--dashboard-host={HOST}", f"--temp-dir={temporary}"]
    command += [f"{name}={value}" for name, value in ports.items()]
    command += [f"--num-cpus={usable_cpus() if num_cpus is None else num_cpus}"]
    command += [f"--num-gpus={num_gpus}"] if num_gpus is not None else []
    head_environment = {
        key: value for key, value in os.environ.items() if not key.startswith(("RAY_ADDRESS", "RAY_AUTH"))
    }
    head_environment |= NODE_SETTINGS | DRIVER_SETTINGS | LOOPBACK_ONLY | past_proxies(os.environ)
    head_environment |= {
        MARK: temporary,
        # jobs run `python`: ours, whether this environment is activated or not
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)]),
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": token,
        # a head whose reports are turned off would still report that they are, to Ray's makers; nothing listens here
        "RAY_USAGE_STATS_REPORT_URL": f"http://{HOST}:9/",
        # a job that is stopped has this long to end its mlflow run; ray's own 3 s are too few
        "RAY_JOB_STOP_WAIT_TIME_S": "20",
    }
    log = Path(temporary) / "start.log"
    parent = os.getpid() if die_with_parent else 0
    hold = [sys.executable, "-m", "deepskip.cluster.holder", temporary, str(parent)]
    with log.open("wb") as output:
        process = subprocess.Popen(
            [*hold, *command], env=head_environment, stdin=subprocess.DEVNULL, stdout=output, stderr=output,
            start_new_session=True, preexec_fn=end_with_parent() if die_with_parent else None,
        )  # fmt: skip
    head = Head(ports["--port"], ports["--dashboard-port"], token, temporary, process.pid)
    try:
        wait_for(head, process, log)
    except BaseException:
        stop_head(head)
        raise
    return head


def wait_for(head: Head, process: subprocess.Popen[bytes], log: Path) -> None:
    """Waits until the head takes jobs; raises HeadError when it ends or START_SECONDS pass."""
    request = urllib.request.Request(f"{head.dashboard}/api/jobs/", headers={"Authorization": f"Bearer {head.token}"})
    # the token is for nobody else
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline and process.poll() is None:
        try:
            with direct.open(request, timeout=5):
                return
        except (urllib.error.URLError, OSError):
            time.sleep(0.1)
    state = (
        f"ended with status {process.poll()}"
        if process.poll() is not None
        else f"was not ready after {START_SECONDS:g} s"
    )
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    # of a traceback the last line says what it is
    tail = lines[-1:] if any(line.startswith("Traceback") for line in lines) else lines[-15:]
    raise HeadError("\n".join([f"the Ray head {state}. The end of its log:", *tail]))


def stop_head(head: Head) -> None:
    """Ends every process of the head, and no other, and removes its temporary folder; may be called twice."""
    end_marked(head.temporary)
    # the head is our child where this process started it; a zombie would stay until we end
    with contextlib.suppress(ChildProcessError):
        os.waitpid(head.pid, os.WNOHANG)
    shutil.rmtree(head.temporary, ignore_errors=True)


def end_marked(mark: str) -> None:
    """Ends every process that carries a mark, but this one: asks first, and kills until none is left."""
    send = psutil.Process.terminate
    # a process that was just starting another is asked again
    for _ in range(10):
        processes = marked_processes(mark)
        if not processes:
            return
        for process in processes:
            with contextlib.suppress(psutil.NoSuchProcess):
                send(process)
        psutil.wait_procs(processes, timeout=STOP_SECONDS)
        send = psutil.Process.kill


def head_processes(head: Head) -> list[psutil.Process]:
    """Finds the head's living processes by the mark in their environment; never this process itself."""
    return marked_processes(head.temporary)


def marked_processes(mark: str) -> list[psutil.Process]:
    """Finds the living processes that carry a mark; never this process itself."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.pid != os.getpid() and process.environ().get(MARK) == mark:
                found.append(process)
        # other people's processes, and those that end while we look
        except (psutil.Error, OSError):
            continue
    return found


def usable_cpus() -> int:
    """Counts the CPU cores that this process may run on."""
    return len(os.sched_getaffinity(0))


def is_free(port: int) -> bool:
    """Says whether nothing listens on a port of loopback."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except OSError:
            return False
        return True


def free_ports(count: int) -> list[int]:
    """Finds so many different free ports."""
    probes = [socket.socket() for _ in range(count)]
    try:
        for probe in probes:
            probe.bind((HOST, 0))
        return [probe.getsockname()[1] for probe in probes]
    finally:
        for probe in probes:
            probe.close()


def end_with_parent(number: int = signal.SIGTERM) -> Callable[[], None]:
    """Gives a function that a child calls to be sent a signal when its parent ends (Linux)."""
    libc = ctypes.CDLL(None)
    PR_SET_PDEATHSIG = 1
    return lambda: libc.prctl(PR_SET_PDEATHSIG, number) and None


def state_file() -> Path:
    """Names the file that remembers the head of `deepskip cluster up`."""
    base = os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state"
    return Path(base) / "deepskip" / "head.json"


def remember(head: Head) -> None:
    """Writes the head to the state file, readable by its owner alone: it holds the token."""
    path = state_file()
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.touch(mode=0o600)
    temporary.write_text(json.dumps(asdict(head)))
    temporary.replace(path)


def remembered() -> Head | None:
    """Gives the head of `deepskip cluster up` if it lives; a head that died is cleaned up and forgotten."""
    path = state_file()
    if not path.is_file():
        return None
    try:
        head = Head(**json.loads(path.read_text()))
    except (ValueError, TypeError):
        path.unlink()
        return None
    # by the mark and not by the number alone: numbers are used again
    if any(process.pid == head.pid for process in head_processes(head)):
        return head
    forget(head)
    return None


def forget(head: Head) -> None:
    """Stops a head and removes the state file."""
    stop_head(head)
    state_file().unlink(missing_ok=True)
