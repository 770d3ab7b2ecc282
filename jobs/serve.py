"""Serves a trained model over HTTP: an image in, a mask, polygons or an overlay out, and a page to try it on.

Started by `deepskip submit serve`, by any `ray job submit -- python -m deepskip.jobs.serve ...`, or by hand, where it starts a
Ray of its own. docs/serve.md says what it answers.
"""

import sys

from deepskip.checkpoint import State
from deepskip.data_shards import trouble
from deepskip.jobs import models
from deepskip.jobs.serving import settings
from deepskip.jobs.settings import NotHere, stop


def check(argv: list[str]) -> None:
    """Reads the settings and looks for the checkpoint; ends the program with `error:` lines where they do not serve."""
    config, _ = settings.parse(argv)
    load(config)


@trouble.told()
def main(argv: list[str] | None = None) -> None:
    """Serves until it is stopped (SIGTERM, SIGINT); what has been asked until then is still answered."""
    config, token = settings.parse(sys.argv[1:] if argv is None else argv)
    state = load(config)

    from deepskip.jobs.serving import run

    run.serve(config, token, state)


def load(config: settings.ServeConfig) -> State:
    """Reads the model; ends the program where there is none."""
    try:
        return models.find(config.model, config.tracking_uri).state
    except models.ModelNotFound as error:
        stop(f"model: {error}", NotHere)


if __name__ == "__main__":
    main()
