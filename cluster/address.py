"""python -m deepskip.cluster.address: prints the IPv4 address by which other machines reach this one."""

import argparse
import socket
import sys

import psutil


def addresses() -> dict[str, str]:
    """Gives the IPv4 address of every interface that is up, loopback left out."""
    up = {name for name, state in psutil.net_if_stats().items() if state.isup}
    return {
        name: each.address
        for name, found in psutil.net_if_addrs().items()
        for each in found
        if each.family == socket.AF_INET and not each.address.startswith("127.") and name in up
    }


def main(argv: list[str] | None = None) -> None:
    """Prints one address; exits with 2 and a list of the interfaces where the one that was named has none."""
    parser = argparse.ArgumentParser(prog="python -m deepskip.cluster.address", description=__doc__)
    parser.add_argument("--interface", help="as ib0 or eth0; by default the one that leads to other networks")
    interface = parser.parse_args(argv).interface
    found = addresses()
    if interface is None:
        # no packet is sent: the kernel only looks up its route
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            try:
                probe.connect(("192.0.2.1", 9))
                print(probe.getsockname()[0])
                return
            except OSError:
                interface = next(iter(found), "")
    if interface not in found:
        print(f"error: interface {interface!r} has no address; there are {found or 'none'}", file=sys.stderr)
        sys.exit(2)
    print(found[interface])


if __name__ == "__main__":
    main()
