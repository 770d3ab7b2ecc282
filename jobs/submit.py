"""deepskip submit JOB ...: brings up Ray if none is named, hands the job to `ray job submit`, follows it to its end."""

import argparse
import asyncio
import importlib
import io
import logging
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from deepskip.cluster.local import Head, HeadError, environment, start_head, stop_head
from deepskip.cluster.settings import past_proxies
from deepskip.jobs.settings import NotHere

if TYPE_CHECKING:
    from ray.job_submission import JobSubmissionClient

PROGRESS = "step "
# what ray says at the head of a job's log
CHATTER = re.compile(r"(\d{4}-\d\d-\d\d .*job_manager\.py:\d+ -- |Running entrypoint for job )")
# between progress lines where they cannot overwrite each other
QUIET_SECONDS = 10.0
STOP_SECONDS = 40
# a head answers before its agent, which starts the jobs, is there
NO_AGENT = "No available agent"
STARTING_SECONDS = 60.0
SETTLE_SECONDS = 30.0
STOPPING_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class SubmitError(RuntimeError):
    """The job could not be handed over; says what Ray said."""


class Screen:
    """Prints a job's output: progress lines over one another on a terminal, now and then elsewhere, all else as it is."""

    def __init__(self, terminal: bool, columns: int = 80) -> None:
        self.terminal, self.columns = terminal, columns
        self.live, self.held = False, ""
        self.last_shown = -QUIET_SECONDS

    def show(self, line: str, now: float) -> str:
        """Gives what to write for a line of the job that came `now`, in seconds."""
        if CHATTER.match(line):
            return ""
        if not line.startswith(PROGRESS):
            return f"{self.rest()}{line}\n"
        if self.terminal:
            self.live = True
            # one column is left free: some terminals wrap a full line
            return f"\r{line[: self.columns - 1]}\x1b[K"
        if now - self.last_shown < QUIET_SECONDS:
            self.held = line
            return ""
        self.last_shown, self.held = now, ""
        return f"{line}\n"

    def rest(self) -> str:
        """Gives what ends the progress so far: a line feed, or the last progress line that was held back."""
        text = "\n" if self.live else f"{self.held}\n" if self.held else ""
        self.live, self.held = False, ""
        return text


def main(argv: list[str] | None = None) -> None:
    """Submits a job and exits with 0 when it succeeded, 1 when it failed, 128 + signal when it was stopped."""
    parser = argparse.ArgumentParser(
        prog="deepskip submit",
        description="Submits a job to the cluster at RAY_ADDRESS (as `ray job submit` takes it), or to a Ray head of its own.",
    )
    parser.add_argument("--port", type=int, default=0, help="port of the own head; chosen by default")
    parser.add_argument("--dashboard_port", type=int, default=0, help="port of its dashboard; chosen by default")
    parser.add_argument("job", help="train, predict, ...")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="the job's own; JOB --help lists them")
    arguments = parser.parse_args(argv)
    module = f"deepskip.jobs.{arguments.job}"
    here = Path(__file__).parent
    if not (here / f"{arguments.job}.py").is_file() or not hasattr(importlib.import_module(module), "check"):
        known = sorted(path.stem for path in here.glob("*.py") if "\ndef check(" in path.read_text())
        parser.error(f"there is no job {arguments.job}; jobs are {', '.join(known)}")
    sys.exit(submit(module, arguments.arguments, arguments.port, arguments.dashboard_port))


def submit(module: str, arguments: list[str], port: int = 0, dashboard_port: int = 0) -> int:
    """Checks a job's arguments, runs `python -m module arguments` as a Ray job and gives the exit status."""
    os.environ.update(past_proxies(os.environ))
    # bad arguments end here, within a second, with no cluster started
    look(module, arguments)
    try:
        with stoppable(), cluster(port, dashboard_port) as head:
            return run_job(module, arguments, head)
    except (HeadError, SubmitError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except Stopped as stopped:
        return 128 + stopped.signal


def look(module: str, arguments: list[str]) -> None:
    """Checks a job's arguments; what this machine does not have is only said where the job will run on others."""
    said = io.StringIO()
    try:
        with redirect_stderr(said):
            importlib.import_module(module).check(arguments)
    except NotHere:
        if not os.environ.get("RAY_ADDRESS"):
            raise
        text = said.getvalue().replace("error: ", "not on this machine, so left to the cluster's: ")
        said = io.StringIO(text)
    finally:
        sys.stderr.write(said.getvalue())


class Stopped(BaseException):
    """The user, or whoever started us, wants the job to stop."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.signal = number


@contextmanager
def stoppable() -> Iterator[None]:
    """Turns the first stopping signal into Stopped and ignores further ones, so that cleaning up is not cut short."""

    def stop(number: int, frame: object) -> None:
        for each in STOPPING_SIGNALS:
            signal.signal(each, signal.SIG_IGN)
        raise Stopped(number)

    before = {number: signal.signal(number, stop) for number in STOPPING_SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def cluster(port: int, dashboard_port: int) -> Iterator[Head | None]:
    """Uses the cluster at RAY_ADDRESS (None), or a head that lives as long as the block."""
    if os.environ.get("RAY_ADDRESS"):
        yield None
        return
    say("starting Ray on 127.0.0.1")
    head = start_head(port, dashboard_port, die_with_parent=True)
    before = {name: os.environ.get(name) for name in environment(head)}
    try:
        os.environ.update(environment(head))
        yield head
    finally:
        for name, value in before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value
        stop_head(head)


def run_job(module: str, arguments: list[str], head: Head | None) -> int:
    """Submits, follows and ends one job; gives its exit status."""
    address = os.environ["RAY_ADDRESS"]
    submission = f"{module.rsplit('.', 1)[-1]}-{uuid.uuid4().hex[:12]}"
    ray = [sys.executable, "-m", "ray.scripts.scripts", "job"]
    command = [*ray, "submit", "--no-wait", "--submission-id", submission]
    if head is not None:
        # the same files: nothing to upload, and the job runs where the user stands
        entrypoint = (
            f"cd {shlex.quote(str(Path.cwd()))} && exec {shlex.join([sys.executable, '-u', '-m', module, *arguments])}"
        )
        command += ["--", "sh", "-c", entrypoint]
    else:
        command += ["--working-dir", ".", "--", "python", "-u", "-m", module, *arguments]
    hand_over(command, address)
    say(f"submitted {submission} to {address}")

    from ray.job_submission import JobStatus, JobSubmissionClient

    # it tells of its connection
    logging.disable(logging.WARNING)
    client = JobSubmissionClient(address)
    screen = Screen(sys.stdout.isatty(), shutil.get_terminal_size().columns)
    try:
        asyncio.run(follow(client, submission, screen))
        deadline = time.monotonic() + SETTLE_SECONDS
        while not (status := client.get_job_status(submission)).is_terminal() and time.monotonic() < deadline:
            time.sleep(0.2)
    except Stopped:
        write(screen.rest())
        say("stopping the job")
        with suppress(subprocess.TimeoutExpired):
            stop = [*ray, "stop", submission]
            subprocess.run(stop, capture_output=True, timeout=STOP_SECONDS, check=False, start_new_session=True)
        raise
    write(screen.rest())
    if status != JobStatus.SUCCEEDED:
        message = client.get_job_info(submission).message or ""
        # a job that ended by itself has said why; what ray did to it has not been said yet
        if "exited with code" not in message and "failed with exit code" not in message:
            print(f"error: job {submission} is {status}: {message}", file=sys.stderr)
    return 0 if status == JobStatus.SUCCEEDED else 1


def hand_over(command: list[str], address: str) -> None:
    """Runs `ray job submit`; a cluster whose agents are still starting is asked again. Raises SubmitError."""
    deadline = time.monotonic() + STARTING_SECONDS
    while (
        handed := subprocess.run(command, capture_output=True, text=True, check=False, start_new_session=True)
    ).returncode:
        output = handed.stdout + handed.stderr
        # nothing was taken on then, so the submission's name is still free
        if NO_AGENT not in output or time.monotonic() > deadline:
            said = "\n".join(output.strip().splitlines()[-15:])
            raise SubmitError(f"`ray job submit` to {address} failed:\n{said}")
        time.sleep(1)


async def follow(client: "JobSubmissionClient", submission: str, screen: Screen) -> None:
    """Shows the job's output until the job or the connection ends."""
    unfinished = ""
    async for text in client.tail_job_logs(submission):
        *lines, unfinished = (unfinished + text).split("\n")
        for line in lines:
            write(screen.show(line, time.monotonic()))
    if unfinished:
        write(screen.show(unfinished, time.monotonic()))


def say(line: str) -> None:
    """Prints a line of our own."""
    print(line, flush=True)


def write(text: str) -> None:
    """Writes to the terminal at once."""
    sys.stdout.write(text)
    sys.stdout.flush()


if __name__ == "__main__":
    main()
