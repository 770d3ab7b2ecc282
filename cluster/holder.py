"""python -m deepskip.cluster.holder TEMPORARY PARENT COMMAND...: starts a Ray head, and ends all of it at its own end.

`ray start` leaves its processes behind when it is told to end before it listens, or is killed. This has nothing to import, and
starts nothing before it listens.
"""

import os
import signal
import subprocess
import sys

from deepskip.cluster.local import end_marked, end_with_parent

ENDING_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


def main() -> None:
    """Waits for COMMAND, a signal, or the end of process PARENT (0: of none), and ends what carries the mark TEMPORARY."""
    temporary, parent, *command = sys.argv[1:]
    for each in ENDING_SIGNALS:
        signal.signal(each, lambda number, frame: sys.exit(128 + number))
    # whose parent ended before it could ask to be told of it
    if int(parent) not in (0, os.getppid()):
        return
    try:
        sys.exit(subprocess.Popen(command, preexec_fn=end_with_parent()).wait())
    finally:
        for each in ENDING_SIGNALS:
            signal.signal(each, signal.SIG_IGN)
        end_marked(temporary)


if __name__ == "__main__":
    main()
