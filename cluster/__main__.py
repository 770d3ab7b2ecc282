"""deepskip cluster: a Ray head on this machine, up, down and status."""

import argparse
import shlex
import sys

from deepskip.cluster.local import HeadError, environment, forget, head_processes, remember, remembered, start_head


def main(argv: list[str] | None = None) -> None:
    """Runs one command; exits with 2 and one line where it cannot, with 1 from `status` where no head is up."""
    parser = argparse.ArgumentParser(prog="deepskip cluster", description="A Ray head on this machine, behind a token.")
    commands = parser.add_subparsers(required=True, dest="command", metavar="COMMAND")
    up = commands.add_parser("up", help="start a head that stays")
    up.add_argument("--port", type=int, default=0, help="port of the head; chosen by default")
    up.add_argument(
        "--dashboard_port", type=int, default=0, help="port of the dashboard, where jobs go; chosen by default"
    )
    up.add_argument("--num_cpus", type=int, help="CPU cores that Ray may use; all by default")
    commands.add_parser("down", help="stop it")
    commands.add_parser("status", help="say whether it is up, and where")
    arguments = parser.parse_args(argv)

    head = remembered()
    if arguments.command == "down":
        if head is not None:
            forget(head)
        print("the Ray head is down" if head else "no Ray head of DeepSkip is up")
        return
    if arguments.command == "status" and head is None:
        print("no Ray head of DeepSkip is up; deepskip cluster up starts one")
        sys.exit(1)
    if head is None:
        try:
            head = start_head(arguments.port, arguments.dashboard_port, arguments.num_cpus)
        except HeadError as error:
            print(f"error: {error}", file=sys.stderr)
            sys.exit(2)
        remember(head)
    print(f"Ray head up: {head.dashboard} ({len(head_processes(head))} processes). To use it from this shell:")
    for name, value in environment(head).items():
        print(f"export {name}={shlex.quote(value)}")


if __name__ == "__main__":
    main()
