"""Run commands on machines that are short of something: `python -m tests.attacks.shortage [--only WORD] [--out FILE]`.

Each command runs three times: undisturbed, under a shortage, and again without the shortage. Under the shortage it must
succeed, or fail with one line that names the cause and the cure. The last results must equal those of the undisturbed
run. Each ending is printed, and --out gets a table of all in Markdown. The checkout must not be in /tmp, which some rows
cover.
"""

import argparse
import hashlib
import os
import random
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from deepskip import checkpoint
from deepskip.data_shards.commands import pack_coins
from tests.jobs.serving import state

LIMIT_SECONDS = 300
KILLED = "time: killed at any moment"
PYTHON = sys.executable


@dataclass(frozen=True)
class Command:
    """A command to run.

    Attributes:
        words: the arguments, where OUT stands for the output folder.
        same: function that returns the part of the output that must be the same each time.
        module: the Python module that runs it.
    """

    words: str
    same: Callable[[Path], dict[str, str]]
    module: tuple[str, ...] = ("deepskip",)


def files(*patterns: str) -> Callable[[Path], dict[str, str]]:
    """Return a function that computes the SHA-256 of the files that match patterns below a folder."""

    def found(out: Path) -> dict[str, str]:
        paths = {path for pattern in patterns for path in out.glob(pattern) if path.is_file()}
        return {str(path.relative_to(out)): hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(paths)}

    return found


def weights(out: Path) -> dict[str, str]:
    """Return the SHA-256 of a training's last weights."""
    last, _ = checkpoint.newest(out / "run")
    if last is None:
        return {}
    digest = hashlib.sha256()
    for name, tensor in sorted(last["model"].items()):
        digest.update(f"{name}".encode() + tensor.numpy().tobytes())
    return {"weights": digest.hexdigest(), "step": str(last["step"])}


TRAIN = (
    "train --data.path coins --run.name run --run.storage OUT --run.tracking_uri none --model.base_channels 4 --model.levels 3 "
    "--data.crop 64 --optim.steps 40 --optim.global_batch_size 4 --run.checkpoint_every 5 --run.validate_every 20 "
    "--run.panels 0 "
)
COMMANDS = {
    "pack": Command("pack folder --images images --masks masks --out OUT/set --val_share 0.5", files("set/**/*")),
    "train --local": Command(f"{TRAIN} --local --data.loader_workers 2 --cluster.cpus_per_worker 1", weights),
    "predict": Command("predict --model model.pt --images images --out OUT --workers 0", files("masks/**/*.png")),
    "evaluate": Command(
        "evaluate --model model.pt --data coins/val --out OUT/report --track none", files("report/samples.csv")
    ),
    "export": Command("export --model model.pt --out OUT/export --formats '[pt2]'", files("export/README.md")),
    "train": Command(f"{TRAIN} --cluster.workers 1", weights),
    "serve": Command("serve --model model.pt --port 0", files("mask.png"), ("tests.attacks.serve_once", "OUT", "images/0.png")),
}  # fmt: skip
# The server writes no output folder.
WITHOUT_OUT = "serve"


@dataclass(frozen=True)
class Shortage:
    """A shortage: the shell's words around COMMAND, and whether the command may succeed all the same."""

    words: str
    may_pass: bool = False


SHORTAGES = {
    "a full disk": Shortage(
        "mount -t tmpfs -o size=512k none OUT && head -c 400000 /dev/zero > OUT/filler; exec COMMAND"
    ),
    "a disk with room for half": Shortage("mount -t tmpfs -o size=SOME none OUT && exec COMMAND", may_pass=True),
    "a read-only place": Shortage("mount -t tmpfs -o ro none OUT && exec COMMAND"),
    "no permission": Shortage(
        # It runs as root, but without the capabilities that bypass file permissions.
        "chmod 555 OUT && exec setpriv --inh-caps=-all --bounding-set=-dac_override,-dac_read_search COMMAND"
    ),
    "64 MB of /dev/shm": Shortage("mount -t tmpfs -o size=64m none /dev/shm && exec COMMAND", may_pass=True),
    "1 MB of /dev/shm": Shortage("mount -t tmpfs -o size=1m none /dev/shm && exec COMMAND", may_pass=True),
    "256 descriptors": Shortage("exec prlimit --nofile=256:256 COMMAND", may_pass=True),
    "40 descriptors": Shortage("exec prlimit --nofile=40:40 COMMAND", may_pass=True),
    "4 GB of addresses": Shortage("exec prlimit --as=4000000000 COMMAND", may_pass=True),
    "1 GB of addresses": Shortage("exec prlimit --as=1000000000 COMMAND", may_pass=True),
    "a full /tmp": Shortage(
        "mount -t tmpfs -o size=512k none /tmp && head -c 400000 /dev/zero > /tmp/filler; exec COMMAND", may_pass=True
    ),
    "a read-only /tmp": Shortage("mount -t tmpfs -o ro none /tmp && exec COMMAND", may_pass=True),
}


def prepare(work: Path) -> None:
    """Write the files that the commands read."""
    pack_coins(work / "coins", {"train": 16, "val": 4})
    checkpoint.save(state(3, 1) | {"step": 1, "best": None, "mlflow_run_id": None}, work / "model.pt")
    rng = np.random.default_rng(0)
    for name in ("images", "masks"):
        (work / name).mkdir()
    for i in range(12):
        image = rng.integers(0, 255, (300, 280, 3), np.uint8)
        Image.fromarray(image).save(work / "images" / f"{i}.png")
        Image.fromarray((image[..., 0] > 128).astype(np.uint8)).save(work / "masks" / f"{i}.png")


def run(
    command: Command, work: Path, out: Path, around: str = "exec COMMAND", kill_after: float | None = None
) -> tuple[int, str]:
    """Run a command in its own mount namespace; return its exit status and its stderr."""
    line = f"{shlex.join([PYTHON, '-m', *command.module])} {command.words}"
    script = around.replace("COMMAND", line).replace("OUT", str(out)).replace("SOME", "300k")
    variables = {key: value for key, value in os.environ.items() if not key.startswith(("RAY_", "MLFLOW_", "TMPDIR"))}
    variables |= {"HOME": str(work), "PYTHONPATH": str(Path(__file__).parents[2]), "CUDA_VISIBLE_DEVICES": ""}
    process = subprocess.Popen(
        ["unshare", "-m", "sh", "-c", script], cwd=work, env=variables, text=True, start_new_session=True,
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
    )  # fmt: skip
    try:
        said = process.communicate(timeout=kill_after or LIMIT_SECONDS)[1]
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        said = process.communicate()[1]
        return (-9 if kill_after else -1), said
    return process.returncode, said


def judged(status: int, said: str, may_pass: bool) -> str:
    """Describe how a command ended under a shortage; a wrong ending begins with FAULT."""
    lines = [line for line in said.splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("error: ")]
    if status == 0:
        return "went well" if may_pass else "FAULT: it ended well"
    if status == -1:
        return f"FAULT: it hung for {LIMIT_SECONDS} s"
    if "Traceback" in said or len(errors) != 1:
        return f"FAULT: status {status}: {lines[-1] if lines else 'nothing said'}"
    return f"status {status}: {errors[0].removeprefix('error: ')}"


def tried(name: str, command: Command, what: str, shortage: Shortage, work: Path, expected: dict[str, str]) -> str:
    """Run a command under a shortage and then without it; return a description."""
    out = work / "out" / f"{name} {what}".replace(" ", "-").replace("/", "")
    out.mkdir(parents=True)
    status, said = run(command, work, out, shortage.words)
    out.chmod(0o755)
    found = judged(status, said, shortage.may_pass)
    if not found.startswith("FAULT"):
        again, said = run(command, work, out)
        if again:
            found = f"FAULT: again: {judged(again, said, False)}"
        elif command.same(out) != expected:
            found = f"FAULT: other results afterwards ({found})"
    shutil.rmtree(out, ignore_errors=True)
    return found


def killed(
    name: str, command: Command, work: Path, expected: dict[str, str], rng: random.Random, seconds: float
) -> str:
    """Kill a command at random moments, then let it finish; return a description."""
    out = work / "out" / f"{name}-killed".replace(" ", "-")
    out.mkdir(parents=True)
    kills = 0
    for _ in range(4):
        status, said = run(command, work, out, kill_after=rng.uniform(0.3, 1.1) * seconds)
        kills += status == -9
        if status not in (0, -9):
            return f"FAULT: status {status}: {said[-200:]}"
        if status == 0:
            # It ended before the kill, so it is tried again from the beginning, with less time.
            shutil.rmtree(out)
            out.mkdir()
            seconds *= 0.7
    status, said = run(command, work, out)
    same = command.same(out) == expected
    shutil.rmtree(out, ignore_errors=True)
    return (
        f"killed {kills} times, then as undisturbed"
        if status == 0 and same and kills
        else f"FAULT: after {kills} kills: {status} {said[-200:]}"
    )


def concerns(name: str, what: str) -> bool:
    """Return whether a command uses what is short."""
    return name != WITHOUT_OUT or what not in SHORTAGES or "OUT" not in SHORTAGES[what].words


def main(argv: list[str] | None = None) -> int:
    """Run the matrix and return the number of faults."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="", help="what the names of command and shortage must hold together")
    parser.add_argument("--commands", nargs="*", default=list(COMMANDS))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args(argv)
    sys.stdout.write(
        "| command | short of | how it ended; then the same command, undisturbed, equals a run that never was |\n"
    )
    found: dict[tuple[str, str], str] = {}
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="shortage-", dir="/var/tmp") as folder:
        work = Path(folder)
        prepare(work)
        for name in arguments.commands:
            command = COMMANDS[name]
            out = work / "out" / "undisturbed"
            out.mkdir(parents=True)
            started = time.monotonic()
            status, said = run(command, work, out)
            seconds = time.monotonic() - started
            expected = command.same(out)
            assert status == 0, said
            assert expected, f"{name} wrote nothing that is compared"
            shutil.rmtree(out)
            for what in (*SHORTAGES, KILLED):
                if arguments.only not in f"{name} {what}" or not concerns(name, what):
                    continue
                if what == KILLED:
                    ended = killed(name, command, work, expected, random.Random(arguments.seed), seconds)
                else:
                    ended = tried(name, command, what, SHORTAGES[what], work, expected)
                found[name, what] = ended
                sys.stdout.write(f"| {name} | {what} | {ended.replace(str(work), '').replace('|', ' ')} |\n")
                sys.stdout.flush()
                if arguments.out:
                    arguments.out.write_text(matrix(found))
    return sum(ended.startswith("FAULT") for ended in found.values())


def matrix(found: dict[tuple[str, str], str]) -> str:
    """Return a Markdown table with a row for each shortage and a column for each command."""
    names = list(dict.fromkeys(name for name, _ in found))
    rows = [f"| short of | {' | '.join(names)} |", f"|---|{'---|' * len(names)}"]
    for what in (*SHORTAGES, KILLED):
        cells = [found.get((name, what), "") for name in names]
        words = ["FAULT" if x.startswith("FAULT") else "one line" if x.startswith("status") else x for x in cells]
        if any(cells):
            rows.append(f"| {what} | {' | '.join(word.split(',')[0] for word in words)} |")
    return "\n".join(rows) + "\n"


if __name__ == "__main__":
    sys.exit(1 if main() else 0)
