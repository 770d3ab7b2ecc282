"""Run the command `deepskip` as `python -m deepskip`."""

from deepskip.jobs.cli import main

if __name__ == "__main__":
    main()
