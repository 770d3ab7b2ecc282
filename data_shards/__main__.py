"""python -m deepskip.data_shards: what `deepskip pack`, `index`, `verify`, `info`, `preview` and `order` do."""

from deepskip.data_shards.command_line import main

if __name__ == "__main__":
    main()
