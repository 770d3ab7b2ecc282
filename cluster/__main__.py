"""Run `deepskip cluster`: start, stop and show a Ray head on this machine."""

import argparse
import shlex
import sys

from deepskip.cluster.local import (
    HeadError,
    alone,
    environment,
    forget,
    head_processes,
    remember,
    remembered,
    start_head,
)


def port(text: str) -> int:
    """Return the port that a text names; 0 for a free one."""
    value = int(text)
    if not 0 <= value <= 65535:
        raise argparse.ArgumentTypeError(f"{value} is no port; ports are 0 to 65535")
    return value


def main(argv: list[str] | None = None) -> None:
    """Run one command of `deepskip cluster`.

    Args:
        argv: Arguments; those of the command line by default.

    Raises:
        SystemExit: The arguments are invalid or the head cannot start (status 2), or `status` finds no head (status 1).
    """
    parser = argparse.ArgumentParser(
        prog="deepskip cluster", description="Start, stop and show a Ray head on this machine, protected by a token."
    )
    commands = parser.add_subparsers(required=True, dest="command", metavar="COMMAND")
    up = commands.add_parser("up", help="start a Ray head that runs until `down`")
    up.add_argument("--port", type=port, default=0, help="port of the head; a free one by default")
    up.add_argument(
        "--dashboard_port", type=port, default=0, help="port of the dashboard, which takes jobs; a free one by default"
    )
    up.add_argument("--num_cpus", type=int, help="CPU cores that Ray may use; all by default")
    commands.add_parser("down", help="stop the head")
    commands.add_parser("status", help="report whether the head is running, and its address")
    arguments = parser.parse_args(argv)

    with alone():
        head = remembered()
        if arguments.command == "down":
            if head is not None:
                forget(head)
            print("stopped the Ray head" if head else "no Ray head of DeepSkip is running")
            return
        if arguments.command == "status" and head is None:
            print("no Ray head of DeepSkip is running; start one with: deepskip cluster up")
            sys.exit(1)
        if head is None:
            try:
                head = start_head(arguments.port, arguments.dashboard_port, arguments.num_cpus)
            except HeadError as error:
                print(f"error: {error}", file=sys.stderr)
                sys.exit(2)
            remember(head)
    print(f"Ray head running: {head.dashboard} ({len(head_processes(head))} processes). To use it from this shell:")
    for name, value in environment(head).items():
        print(f"export {name}={shlex.quote(value)}")


if __name__ == "__main__":
    main()
