"""python -m deepskip: the command `deepskip`."""

from deepskip.jobs.cli import main

if __name__ == "__main__":
    main()
