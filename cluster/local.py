"""Run a Ray head on this machine.

The head requires a token and listens on loopback only. It runs independently of any other Ray, and leaves no process behind
when it is stopped.
"""

import contextlib
import ctypes
import fcntl
import json
import os
import resource
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
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil

from deepskip.cluster.settings import DRIVER_SETTINGS, LOOPBACK_ONLY, NODE_SETTINGS, past_proxies

HOST = "127.0.0.1"
# All processes of a head, including workers and jobs, are found by this variable in their environment.
MARK = "DEEPSKIP_HEAD"
START_SECONDS = 300.0
# Ray gives its own processes 30 s to find each other, too few on a machine that does other work: they are started again then
STARTS = 3
STARTED_SLOWLY = "node timed out during startup"
STOP_SECONDS = 3.0
# Ray on one machine keeps about this number of files and sockets open.
LEAST_DESCRIPTORS = 200
# Measured: with 4 GB of addresses Ray waits for itself in vain, and with 1 GB its processes abort.
TOO_FEW_ADDRESSES = 4_000_000_000
# Ray's logs and sockets are here: the paths of its sockets may have at most 107 characters.
TEMPORARY = "/tmp"  # noqa: S108 - the folder in it has a random name
LEAST_DISK = 20_000_000


class HeadError(RuntimeError):
    """Raised if the head did not start; the message has the reason and the end of its log."""


class PortTaken(HeadError):
    """Raised if a requested port is in use."""


@dataclass(frozen=True)
class Head:
    """Describe a running head.

    Attributes:
        port: Port of the head on 127.0.0.1.
        dashboard_port: Port of the dashboard on 127.0.0.1.
        token: Token that clients need.
        temporary: Temporary folder of the head, which also marks its processes.
        pid: Number of the process that holds the head.
    """

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
    """Return the environment variables that a client of the head needs."""
    return {
        "RAY_ADDRESS": head.dashboard,
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": head.token,
        "RAY_USAGE_STATS_ENABLED": "0",
    } | past_proxies(os.environ)


def lacking(folder: str = TEMPORARY) -> str | None:
    """Return what this process may have too little of to start a Ray, with the remedy, or None.

    Args:
        folder: Where the Ray has its logs and sockets.
    """
    files, addresses = (resource.getrlimit(what)[0] for what in (resource.RLIMIT_NOFILE, resource.RLIMIT_AS))
    if 0 <= files < LEAST_DESCRIPTORS:
        return f"this process may open {files} files, and Ray needs {LEAST_DESCRIPTORS}: allow more (ulimit -n 4096)"
    # No limit is -1.
    if 0 <= addresses <= TOO_FEW_ADDRESSES:
        return f"this process may have {addresses / 1e6:.0f} MB of addresses, and Ray needs more: ulimit -v unlimited"
    # Ray makes a folder that does not exist.
    free = shutil.disk_usage(folder).free if Path(folder).is_dir() else LEAST_DISK
    if free < LEAST_DISK:
        need = f"and it needs {LEAST_DISK / 1e6:.0f}: free some"
        return f"{free / 1e6:.1f} MB are free in {folder}, where Ray has its logs, {need}"
    return None


def start_head(
    port: int = 0,
    dashboard_port: int = 0,
    num_cpus: int | None = None,
    die_with_parent: bool = False,
) -> Head:
    """Start a Ray head and wait until jobs can be submitted to it.

    Args:
        port: Port of the head; 0 chooses a free one.
        dashboard_port: Port of the dashboard; 0 chooses a free one.
        num_cpus: CPU cores that Ray may use; by default those that this process may use.
        die_with_parent: End the head when this process ends, in whatever way.

    Raises:
        PortTaken: A requested port is in use.
        HeadError: The head ended or was not ready in time, or this process may have too little for it.
    """
    if lack := lacking():
        raise HeadError(lack)
    for left in reversed(range(STARTS)):
        try:
            return _start_head(port, dashboard_port, num_cpus, die_with_parent)
        except HeadError as error:
            if not left or STARTED_SLOWLY not in str(error):
                raise
    raise AssertionError


def _start_head(port: int, dashboard_port: int, num_cpus: int | None, die_with_parent: bool) -> Head:
    for name, asked in (("port", port), ("dashboard_port", dashboard_port)):
        if asked and not is_free(asked):
            raise PortTaken(
                f"--{name} {asked} is in use on {HOST}; stop the process that listens there, or choose another port"
            )
    # All ports are held while the others are chosen, so no two are the same.
    chosen = free_ports(6)
    ports = {
        "--port": port or chosen[0],
        "--dashboard-port": dashboard_port or chosen[1],
        "--dashboard-agent-listen-port": chosen[2],
        "--metrics-export-port": chosen[3],
        "--ray-client-server-port": chosen[4],
        "--runtime-env-agent-port": chosen[5],
        # Workers take any free port: Ray's default range would be shared with other heads.
        "--min-worker-port": 0,
        "--max-worker-port": 0,
    }
    temporary = tempfile.mkdtemp(prefix="ds-", dir=TEMPORARY)
    token = secrets.token_hex(32)
    command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block", "--disable-usage-stats"]
    command += [f"--node-ip-address={HOST}", f"--dashboard-host={HOST}", f"--temp-dir={temporary}"]
    command += [f"{name}={value}" for name, value in ports.items()]
    command += [f"--num-cpus={usable_cpus() if num_cpus is None else num_cpus}"]
    head_environment = {
        key: value for key, value in os.environ.items() if not key.startswith(("RAY_ADDRESS", "RAY_AUTH"))
    }
    head_environment |= NODE_SETTINGS | DRIVER_SETTINGS | LOOPBACK_ONLY | past_proxies(os.environ)
    head_environment |= {
        MARK: temporary,
        # Jobs run `python`; make it this one, whether its environment is activated or not.
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)]),
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": token,
        # With usage statistics disabled, Ray would still report that to its makers. Nothing listens at this address.
        "RAY_USAGE_STATS_REPORT_URL": f"http://{HOST}:9/",
        # A stopped job has this long to end its MLflow run; Ray's default of 3 s is too short.
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
    """Wait until the head accepts jobs.

    Args:
        head: The head.
        process: The process that holds it.
        log: Its log file.

    Raises:
        HeadError: The process ended, or START_SECONDS passed.
    """
    request = urllib.request.Request(f"{head.dashboard}/api/jobs/", headers={"Authorization": f"Bearer {head.token}"})
    # Bypass proxies, which must not see the token.
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
    # The holder has removed it if somebody else has ended the head.
    text = log.read_text(errors="replace") if log.exists() else ""
    lines = [line for line in text.splitlines() if line.strip()]
    # of a traceback the last line says what it is
    tail = lines[-1:] if any(line.startswith("Traceback") for line in lines) else lines[-15:]
    raise HeadError("\n".join([f"the Ray head {state}. The end of its log:", *tail]))


def stop_head(head: Head) -> None:
    """End all processes of the head, and no others, and remove its temporary folder; may be called twice."""
    end_marked(head.temporary)
    # If this process started the head, reap it: a zombie would stay until this process ends.
    with contextlib.suppress(ChildProcessError):
        os.waitpid(head.pid, os.WNOHANG)
    shutil.rmtree(head.temporary, ignore_errors=True)


def end_marked(mark: str) -> None:
    """End all processes that carry a mark, except this one: terminate them first, then kill those that are left."""
    send = psutil.Process.terminate
    # Repeat, because a process may have been starting another one.
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
    """Return the head's living processes, found by the mark in their environment, without this process."""
    return marked_processes(head.temporary)


def marked_processes(mark: str) -> list[psutil.Process]:
    """Return the living processes that carry a mark, without this process."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.pid != os.getpid() and process.environ().get(MARK) == mark:
                found.append(process)
        # Skip processes of other users, and those that end meanwhile.
        except (psutil.Error, OSError):
            continue
    return found


def usable_cpus() -> int:
    """Return the number of CPU cores that this process may run on."""
    return len(os.sched_getaffinity(0))


def is_free(port: int) -> bool:
    """Return whether nothing listens on a port of 127.0.0.1."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except OSError:
            return False
        return True


def free_ports(count: int) -> list[int]:
    """Return `count` different free ports of 127.0.0.1."""
    probes = [socket.socket() for _ in range(count)]
    try:
        for probe in probes:
            probe.bind((HOST, 0))
        return [probe.getsockname()[1] for probe in probes]
    finally:
        for probe in probes:
            probe.close()


def end_with_parent(number: int = signal.SIGTERM) -> Callable[[], None]:
    """Return a function that makes the calling process receive a signal when its parent ends (Linux only)."""
    libc = ctypes.CDLL(None)
    PR_SET_PDEATHSIG = 1
    return lambda: libc.prctl(PR_SET_PDEATHSIG, number) and None


def state_file() -> Path:
    """Return the path of the file that stores the head of `deepskip cluster up`."""
    base = os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state"
    return Path(base) / "deepskip" / "head.json"


@contextlib.contextmanager
def alone() -> Iterator[None]:
    """Keep other commands of this user from starting or stopping a head while the block runs."""
    folder = state_file().parent
    folder.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def remember(head: Head) -> None:
    """Write the head to the state file, readable only by its owner because it holds the token."""
    path = state_file()
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.touch(mode=0o600)
    temporary.write_text(json.dumps(asdict(head)))
    temporary.replace(path)


def remembered() -> Head | None:
    """Return the head of `deepskip cluster up` if it is running, else None; clean up after a head that died."""
    path = state_file()
    if not path.is_file():
        return None
    try:
        head = Head(**json.loads(path.read_text()))
    except (ValueError, TypeError):
        path.unlink()
        return None
    # Compare the mark as well, because process numbers are reused.
    if any(process.pid == head.pid for process in head_processes(head)):
        return head
    forget(head)
    return None


def forget(head: Head) -> None:
    """Stop a head and remove the state file."""
    stop_head(head)
    state_file().unlink(missing_ok=True)
