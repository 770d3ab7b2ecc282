"""Run `deepskip submit JOB`: start Ray if no cluster is named, submit the job to it, and follow the job to its end."""

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
# lines that Ray writes at the beginning of a job's log
CHATTER = re.compile(r"(\d{4}-\d\d-\d\d .*job_manager\.py:\d+ -- |Running entrypoint for job )")
# seconds between progress lines, where they cannot overwrite each other
QUIET_SECONDS = 10.0
STOP_SECONDS = 40
# a head answers before its agent, which starts the jobs, is ready
NO_AGENT = "No available agent"
STARTING_SECONDS = 60.0
SETTLE_SECONDS = 30.0
STOPPING_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class SubmitError(RuntimeError):
    """The job could not be submitted; the message quotes Ray."""


class Screen:
    """Display of a job's output: progress lines overwrite each other on a terminal, and are thinned out elsewhere.

    All other lines are unchanged.

    Args:
        terminal: whether the output is a terminal.
        columns: width of the terminal.
    """

    def __init__(self, terminal: bool, columns: int = 80) -> None:
        self.terminal, self.columns = terminal, columns
        self.live, self.held = False, ""
        self.last_shown = -QUIET_SECONDS

    def show(self, line: str, now: float) -> str:
        """Return what to write for a line of the job.

        Args:
            line: the line, without a line feed.
            now: when it arrived, seconds of a monotonic clock.
        """
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
        """Return what ends the progress so far: a line feed, or the last progress line that was held back."""
        text = "\n" if self.live else f"{self.held}\n" if self.held else ""
        self.live, self.held = False, ""
        return text


def main(argv: list[str] | None = None) -> None:
    """Submit a job and exit with its status.

    Args:
        argv: command-line arguments; None takes those of the process.

    Raises:
        SystemExit: always. Status 0 if the job succeeded, 1 if it failed, 2 if it could not be submitted, 128 + signal
            if it was stopped.
    """
    parser = argparse.ArgumentParser(
        prog="deepskip submit",
        description="Submit a job to the cluster at RAY_ADDRESS (as in `ray job submit`), or to a Ray head started for it.",
    )
    parser.add_argument("--port", type=int, default=0, help="port of a head that is started here; 0 takes a free one")
    parser.add_argument("--dashboard_port", type=int, default=0, help="port of its dashboard; 0 takes a free one")
    parser.add_argument("job", help="train, predict, ...")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="arguments of the job; JOB --help lists them")
    arguments = parser.parse_args(argv)
    module = f"deepskip.jobs.{arguments.job}"
    here = Path(__file__).parent
    if not (here / f"{arguments.job}.py").is_file() or not hasattr(importlib.import_module(module), "check"):
        known = sorted(path.stem for path in here.glob("*.py") if "\ndef check(" in path.read_text())
        parser.error(f"unknown job {arguments.job}; jobs are {', '.join(known)}")
    sys.exit(submit(module, arguments.arguments, arguments.port, arguments.dashboard_port))


def submit(module: str, arguments: list[str], port: int = 0, dashboard_port: int = 0) -> int:
    """Validate the arguments of a job, and run `python -m module arguments` as a Ray job.

    Args:
        module: full name of the job's module.
        arguments: command-line arguments of the job.
        port: port of a Ray head that is started for the job; 0 takes a free one.
        dashboard_port: port of its dashboard; 0 takes a free one.

    Returns:
        The exit status: 0 if the job succeeded, 1 if it failed, 2 if it could not be submitted, 128 + signal if it was
            stopped.

    Raises:
        SystemExit: status 2 if an argument is invalid.
    """
    os.environ.update(past_proxies(os.environ))
    # invalid arguments are found within a second, before a cluster is started
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
    """Validate the arguments of a job.

    With a cluster at RAY_ADDRESS, what this machine lacks is only reported, because the job checks it there.

    Args:
        module: full name of the job's module.
        arguments: command-line arguments of the job.

    Raises:
        SystemExit: status 2 if an argument is invalid; NotHere if something is missing and no cluster is named.
    """
    said = io.StringIO()
    try:
        with redirect_stderr(said):
            importlib.import_module(module).check(arguments)
    except NotHere:
        if not os.environ.get("RAY_ADDRESS"):
            raise
        text = said.getvalue().replace("error: ", "not on this machine, so checked by the job: ")
        said = io.StringIO(text)
    finally:
        sys.stderr.write(said.getvalue())


class Stopped(BaseException):
    """A signal asks for the job to be stopped.

    Attributes:
        signal: number of the signal.
    """

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.signal = number


@contextmanager
def stoppable() -> Iterator[None]:
    """Convert the first stopping signal to Stopped, and ignore later ones so that they do not interrupt cleanup."""

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
    """Use the cluster at RAY_ADDRESS, or start a Ray head that lives as long as the block.

    Args:
        port: port of the head; 0 takes a free one.
        dashboard_port: port of its dashboard; 0 takes a free one.

    Yields:
        The head, or None for the cluster at RAY_ADDRESS.

    Raises:
        HeadError: the head does not start.
    """
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
    """Submit one job and follow it to its end; if this process is stopped, the job is stopped too.

    Args:
        module: full name of the job's module.
        arguments: command-line arguments of the job.
        head: the head that was started for the job; None for the cluster at RAY_ADDRESS.

    Returns:
        The exit status: that of the job, or 1 if Ray ended the job before it could exit.

    Raises:
        SubmitError: the job could not be submitted.
        Stopped: a signal arrived; the job has been stopped.
    """
    address = os.environ["RAY_ADDRESS"]
    submission = f"{module.rsplit('.', 1)[-1]}-{uuid.uuid4().hex[:12]}"
    ray = [sys.executable, "-m", "ray.scripts.scripts", "job"]
    command = [*ray, "submit", "--no-wait", "--submission-id", submission]
    if head is not None:
        # the head sees the same files, so nothing is uploaded, and the job runs in the current folder
        entrypoint = (
            f"cd {shlex.quote(str(Path.cwd()))} && exec {shlex.join([sys.executable, '-u', '-m', module, *arguments])}"
        )
        command += ["--", "sh", "-c", entrypoint]
    else:
        command += ["--working-dir", ".", "--", "python", "-u", "-m", module, *arguments]
    hand_over(command, address)
    say(f"submitted {submission} to {address}")

    from ray.job_submission import JobStatus, JobSubmissionClient

    # the client logs each connection
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
    if status == JobStatus.SUCCEEDED:
        return 0
    job = client.get_job_info(submission)
    message = job.message or ""
    # a job that exited has printed the reason; the reason for which Ray ended it is only here
    if "exited with code" not in message and "failed with exit code" not in message:
        print(f"error: job {submission} is {status}: {message}", file=sys.stderr)
    # Ray gives the number of a signal as a negative status
    return max(job.driver_exit_code or 0, 0) or 1


def hand_over(command: list[str], address: str) -> None:
    """Run `ray job submit`, and retry while the agents of the cluster are starting.

    Args:
        command: the command with its arguments.
        address: address of the cluster, for the error message.

    Raises:
        SubmitError: the command failed.
    """
    deadline = time.monotonic() + STARTING_SECONDS
    while (
        handed := subprocess.run(command, capture_output=True, text=True, check=False, start_new_session=True)
    ).returncode:
        output = handed.stdout + handed.stderr
        # without an agent Ray accepted nothing, so the submission's ID is still free
        if NO_AGENT not in output or time.monotonic() > deadline:
            said = "\n".join(output.strip().splitlines()[-15:])
            raise SubmitError(f"`ray job submit` to {address} failed:\n{said}")
        time.sleep(1)


async def follow(client: "JobSubmissionClient", submission: str, screen: Screen) -> None:
    """Show the output of a job until the job or the connection ends.

    Args:
        client: connection to the cluster.
        submission: ID of the job.
        screen: formats the output.
    """
    unfinished = ""
    async for text in client.tail_job_logs(submission):
        *lines, unfinished = (unfinished + text).split("\n")
        for line in lines:
            put(screen, line)
    if unfinished:
        put(screen, unfinished)


def put(screen: Screen, line: str) -> None:
    """Write a line of the job: errors to stderr, as a command that runs without Ray does; all else to stdout."""
    if line.startswith("error: "):
        write(screen.rest())
        print(line, file=sys.stderr, flush=True)
    else:
        write(screen.show(line, time.monotonic()))


def say(line: str) -> None:
    """Print a line of this program, as opposed to the job's."""
    print(line, flush=True)


def write(text: str) -> None:
    """Write text to stdout at once."""
    sys.stdout.write(text)
    sys.stdout.flush()


if __name__ == "__main__":
    main()
