"""Real Ray heads run on this machine."""

import os
import re
import resource
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import requests

from deepskip.cluster import __main__ as command
from deepskip.cluster import local
from deepskip.cluster.local import MARK, Head, HeadError, PortTaken, environment, head_processes, start_head, stop_head
from deepskip.cluster.settings import of_loopback, past_proxies
from deepskip.data_shards.commands import pack_coins


@pytest.fixture(scope="module")
def head() -> Iterator[Head]:
    started = start_head(num_cpus=1)
    yield started
    stop_head(started)


def test_the_dashboard_is_on_loopback_alone_and_asks_for_its_token(head: Head) -> None:
    assert head.dashboard.startswith("http://127.0.0.1:")
    with pytest.raises(urllib.error.HTTPError) as refused:
        urllib.request.urlopen(f"{head.dashboard}/api/jobs/", timeout=10)
    assert refused.value.code in (401, 403)
    listening = {
        connection.laddr.ip
        for process in head_processes(head)
        for connection in process.net_connections("tcp")
        if connection.status == psutil.CONN_LISTEN and connection.laddr.port == head.dashboard_port
    }
    assert listening == {"127.0.0.1"}


def test_a_job_and_a_driver_started_by_hand_have_its_python_and_reach_it(head: Head, tmp_path: Path) -> None:
    """Run both in an environment that is not activated, where PATH has another Python or none."""
    code = "import sys; print('by', sys.prefix)"
    bare = {"PATH": "/usr/bin:/bin", "HOME": str(tmp_path)} | environment(head)
    ray = [sys.executable, "-m", "ray.scripts.scripts", "job", "submit", "--", "python", "-c", code]
    job = subprocess.run(ray, env=bare, capture_output=True, text=True, timeout=600, check=False)
    assert f"by {sys.prefix}" in job.stdout, job.stdout + job.stderr
    driver = (
        "import os\nfrom deepskip.jobs.train import prepare_environment\nprepare_environment(60)\nimport ray\n"
        "ray.init(log_to_driver=False)\nprint('CPUs', ray.cluster_resources()['CPU'])"
    )
    by_hand = bare | {"RAY_ADDRESS": f"127.0.0.1:{head.port}"}
    found = subprocess.run(
        [sys.executable, "-c", driver], env=by_hand, capture_output=True, text=True, timeout=600, check=False
    )
    assert "CPUs 1.0" in found.stdout, found.stdout + found.stderr


def test_a_training_of_more_workers_than_the_cluster_has(head: Head, tmp_path: Path) -> None:
    pack_coins(tmp_path / "coins", {"train": 2, "val": 1})
    wanted = {"cluster.workers": 500, "cluster.wait_seconds": 1, "run.tracking_uri": "none"}
    wanted |= {"data.path": tmp_path / "coins", "run.storage": tmp_path / "runs"}
    words = [
        sys.executable,
        "-m",
        "deepskip",
        "submit",
        "train",
        *(f"--{key}={value}" for key, value in wanted.items()),
    ]
    variables = os.environ | {"HOME": str(tmp_path)} | environment(head)
    few = subprocess.run(words, cwd=tmp_path, env=variables, capture_output=True, text=True, timeout=600, check=False)
    # The job's status and error are those of the command.
    assert few.returncode == 2
    assert "cluster.workers is 500, each with 1 CPU, but the cluster has" in few.stderr
    assert "Traceback" not in few.stderr


@pytest.mark.parametrize(
    ("address", "loopback"),
    [(None, True), ("127.0.0.1:6379", True), ("http://127.0.0.1:8265", True), ("ray://localhost:10001", True),
     ("local", True), ("10.0.0.7:6379", False), ("http://head.example:8265", False), ("auto", False)],
)  # fmt: skip
def test_what_is_on_loopback(address: str | None, loopback: bool) -> None:
    assert bool(of_loopback(address)) is loopback


@pytest.mark.parametrize("named", ["http_proxy", "HTTP_PROXY", "https_proxy", "HTTPS_PROXY", "all_proxy", "ALL_PROXY"])
@pytest.mark.parametrize(
    ("before", "direct"),
    [
        ({}, []), ({"no_proxy": ".corp.example,10.0.0.7"}, ["a.corp.example", "10.0.0.7"]),
        ({"NO_PROXY": "corp.example"}, ["corp.example"]), ({"no_proxy": "localhost, 127.0.0.1"}, []),
        ({"no_proxy": "*"}, ["pypi.org"]), ({"NO_PROXY": "*"}, ["pypi.org"]),
    ],
)  # fmt: skip
def test_loopback_goes_past_every_proxy_by_urllib_and_requests(
    monkeypatch: pytest.MonkeyPatch, named: str, before: dict[str, str], direct: list[str]
) -> None:
    for name in [name for name in os.environ if name.lower().endswith("_proxy")]:
        monkeypatch.delenv(name)
    proxies = {named: "http://proxy.example:3128"}
    for name, value in (proxies | before | past_proxies(proxies | before)).items():
        monkeypatch.setenv(name, value)
    for host in ("127.0.0.1", "localhost", *direct):
        assert urllib.request.proxy_bypass_environment(f"{host}:8265"), host
        assert not requests.utils.get_environ_proxies(f"http://{host}:8265/api/jobs/"), host
    assert urllib.request.proxy_bypass_environment("::1")
    assert not requests.utils.get_environ_proxies("http://[::1]:5000/")
    # All other hosts are reached as before.
    if "*" not in before.values():
        assert not urllib.request.proxy_bypass_environment("pypi.org")
        found = requests.utils.get_environ_proxies("https://pypi.org/")
        assert {value for name, value in found.items() if name != "no"} == {"http://proxy.example:3128"}
    # A second call changes nothing.
    assert past_proxies(os.environ).items() <= os.environ.items()


def test_where_no_proxy_is_named_nothing_is_set() -> None:
    assert past_proxies({"PATH": "/bin", "no_proxy": "corp.example", "http_proxy": ""}) == {}
    grpc = past_proxies({"grpc_proxy": "http://proxy.example:3128", "no_grpc_proxy": "corp.example"})
    assert grpc["no_grpc_proxy"] == "corp.example,127.0.0.1,localhost,::1"
    # gRPC reads no_proxy if it has no list of its own.
    assert past_proxies({"https_proxy": "http://proxy.example:3128"}) == {
        "no_proxy": "127.0.0.1,localhost,::1", "NO_PROXY": "127.0.0.1,localhost,::1",
    }  # fmt: skip


@pytest.mark.parametrize("number", ["99999", "-5"])
def test_what_is_no_port_is_said(number: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        command.main(["up", "--port", number])
    assert ended.value.code == 2
    assert f"{number} is no port; ports are 0 to 65535" in capsys.readouterr().err


def test_a_taken_port_is_named_at_once(head: Head) -> None:
    with pytest.raises(PortTaken, match=f"--dashboard_port {head.dashboard_port} is in use"):
        start_head(dashboard_port=head.dashboard_port)
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(PortTaken, match=f"--port {port} is in use"):
            start_head(port=port)


def test_a_start_that_ray_finds_too_slow_is_made_again(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    log, process = tmp_path / "start.log", subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    log.write_text(
        "starting\nTraceback (most recent call last):\n  File x\nException: The current node timed out during startup.\n"
    )
    wanted = Head(1, 2, "token", "folder", 3)
    starts: list[int] = []

    def slowly(*_: object) -> Head:
        starts.append(1)
        if len(starts) < 3:
            local.wait_for(wanted, process, log)
        return wanted

    monkeypatch.setattr(local, "_start_head", slowly)
    assert start_head() == wanted
    # An error that a retry cannot cure is raised at once, in one line.
    log.write_text("Traceback (most recent call last):\n  File x\nOSError: no space\n")
    starts.clear()
    with pytest.raises(HeadError, match=r"ended with status 0\. The end of its log:\nOSError: no space$"):
        start_head()
    assert len(starts) == 1


def test_with_too_few_files_addresses_or_disk_no_ray_is_started(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(local, "_start_head", lambda *_: pytest.fail("it was started"))
    limits = {resource.RLIMIT_NOFILE: -1, resource.RLIMIT_AS: -1}
    monkeypatch.setattr(resource, "getrlimit", lambda what: (limits[what], limits[what]))
    assert local.lacking() is None
    for files, addresses, said in (
        (40, -1, "this process may open 40 files, and Ray needs 200: allow more (ulimit -n 4096)"),
        (1024, 10**9, "this process may have 1000 MB of addresses, and Ray needs more: ulimit -v unlimited"),
    ):
        limits |= {resource.RLIMIT_NOFILE: files, resource.RLIMIT_AS: addresses}
        with pytest.raises(HeadError, match=re.escape(said)):
            start_head()
    limits |= {resource.RLIMIT_NOFILE: -1, resource.RLIMIT_AS: -1}
    monkeypatch.setattr("shutil.disk_usage", lambda folder: SimpleNamespace(free={"/tmp": 120_000}[folder]))
    said = "0.1 MB are free in /tmp, where Ray has its logs, and it needs 20: free some"
    with pytest.raises(HeadError, match=re.escape(said)):
        start_head()
    assert local.lacking("/no/such/folder") is None


def test_two_ups_at_once_start_one_head(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    started: list[Head] = []

    def start(*arguments: int | None) -> Head:
        time.sleep(0.3)
        started.append(Head(1, 2, "token", str(tmp_path), 4))
        return started[-1]

    monkeypatch.setattr(command, "start_head", start)
    for module in (command, local):
        monkeypatch.setattr(module, "head_processes", lambda head: [SimpleNamespace(pid=head.pid)])
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(command.main, [["up"]] * 2))
    assert len(started) == 1
    assert local.remembered() == started[0]


def test_up_status_down_beside_another_head(head: Head, tmp_path: Path) -> None:
    variables = os.environ | {"HOME": str(tmp_path), "XDG_STATE_HOME": str(tmp_path / "state")}

    def cluster(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "deepskip.cluster", *arguments]
        return subprocess.run(command, env=variables, capture_output=True, text=True, timeout=600, check=False)

    assert cluster("status").returncode == 1
    up = cluster("up", "--num_cpus", "1")
    try:
        assert up.returncode == 0, up.stderr
        assert "export RAY_ADDRESS=http://127.0.0.1:" in up.stdout
        state = tmp_path / "state" / "deepskip" / "head.json"
        assert state.stat().st_mode & 0o777 == 0o600
        # A second `up` finds the first head.
        assert cluster("up").stdout.splitlines()[1:] == up.stdout.splitlines()[1:]
        assert cluster("status").returncode == 0
    finally:
        assert cluster("down").returncode == 0
    assert not state.exists()
    assert cluster("status").returncode == 1
    # The other head still runs, and the home folder holds no token.
    assert head_processes(head)
    assert [path.name for path in tmp_path.iterdir()] == ["state"]


def test_stopping_leaves_nothing_and_may_be_done_twice() -> None:
    head = start_head(num_cpus=1)
    assert len(head_processes(head)) > 2
    assert environment(head)["RAY_AUTH_TOKEN"] == head.token
    stop_head(head)
    stop_head(head)
    assert not Path(head.temporary).exists()
    left = []
    for process in psutil.process_iter():
        try:
            left += [process] if process.environ().get(MARK) == head.temporary else []
        except (psutil.Error, OSError):
            continue
    assert not left


def test_it_ends_with_a_parent_that_is_killed_and_leaves_nothing() -> None:
    code = (
        "from cluster.local import start_head; h = start_head(num_cpus=1, die_with_parent=True); "
        "print(h.temporary, h.pid, flush=True); import time; time.sleep(600)"
    )
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    temporary, pid = parent.stdout.readline().split()
    head = Head(0, 0, "", temporary, int(pid))
    try:
        processes = head_processes(head)
        assert processes
        parent.kill()
        parent.wait()
        assert psutil.wait_procs(processes, timeout=90)[1] == []
        assert not Path(temporary).exists()
    finally:
        stop_head(head)
