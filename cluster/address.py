"""Print the IPv4 address at which other machines reach this one."""

import argparse
import socket
import sys

import psutil


def addresses() -> dict[str, str]:
    """Return an IPv4 address of each interface that is up, by the interface's name, without loopback addresses."""
    up = {name for name, state in psutil.net_if_stats().items() if state.isup}
    return {
        name: each.address
        for name, found in psutil.net_if_addrs().items()
        for each in found
        if each.family == socket.AF_INET and not each.address.startswith("127.") and name in up
    }


def main(argv: list[str] | None = None) -> None:
    """Print one address.

    Args:
        argv: Arguments; those of the command line by default.

    Raises:
        SystemExit: The named interface has no address (status 2); the message lists those that have one.
    """
    parser = argparse.ArgumentParser(prog="python -m deepskip.cluster.address", description=__doc__)
    parser.add_argument(
        "--interface", help="network interface, such as ib0 or eth0; by default that of the default route"
    )
    interface = parser.parse_args(argv).interface
    found = addresses()
    if interface is None:
        # No packet is sent: the kernel only looks up the route.
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            try:
                probe.connect(("192.0.2.1", 9))
                print(probe.getsockname()[0])
                return
            except OSError:
                interface = next(iter(found), "")
    if interface not in found:
        print(f"error: interface {interface!r} has no address; interfaces with one: {found or 'none'}", file=sys.stderr)
        sys.exit(2)
    print(found[interface])


if __name__ == "__main__":
    main()
