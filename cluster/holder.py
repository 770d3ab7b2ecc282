"""Hold a Ray head: `python -m deepskip.cluster.holder TEMPORARY PARENT COMMAND...` starts it and later ends all of it.

`ray start` leaves processes behind if it is killed, or told to end before it handles signals. This process imports little,
and handles signals before it starts anything.
"""

import os
import shutil
import signal
import subprocess
import sys

from deepskip.cluster.local import end_marked, end_with_parent

ENDING_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


def main() -> None:
    """Run COMMAND until it ends, a signal arrives, or process PARENT ends (0 for none).

    At the end all processes with the mark TEMPORARY are ended. After a signal that folder is removed; if the command ends by
    itself, its log there says why.
    """
    temporary, parent, *command = sys.argv[1:]
    for each in ENDING_SIGNALS:
        signal.signal(each, lambda number, frame: sys.exit(128 + number))
    # The parent may have ended before this process asked for a signal at its end.
    if int(parent) not in (0, os.getppid()):
        return
    told = True
    try:
        status = subprocess.Popen(command, preexec_fn=end_with_parent()).wait()
        told = False
        sys.exit(status)
    finally:
        for each in ENDING_SIGNALS:
            signal.signal(each, signal.SIG_IGN)
        end_marked(temporary)
        if told:
            shutil.rmtree(temporary, ignore_errors=True)


if __name__ == "__main__":
    main()
