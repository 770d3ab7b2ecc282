"""Run `deepskip pack`, `index`, `verify`, `info`, `preview` and `plan` as `python -m deepskip.data_shards`."""

from deepskip.data_shards.command_line import main

if __name__ == "__main__":
    main()
