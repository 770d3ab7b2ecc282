"""Serve a trained model over HTTP: an image in, a mask, polygons or an overlay out, and a page to try it on.

`deepskip submit serve` starts it, or any `ray job submit -- python -m deepskip.jobs.serve ...`. Started by hand, it
starts its own Ray. docs/serve.md describes the requests and answers.
"""

import sys

from deepskip import publishing
from deepskip.checkpoint import ModelState
from deepskip.data_shards import trouble
from deepskip.jobs import models
from deepskip.jobs.serving import settings
from deepskip.jobs.settings import NotHere, stop


def check(argv: list[str]) -> None:
    """Validate the settings, and that the model exists.

    Args:
        argv: command-line arguments.

    Raises:
        SystemExit: status 2 after `error:` lines, if something is wrong; NotHere if the model or the token file is
            missing.
    """
    config, _ = settings.parse(argv)
    load(config)


@trouble.told()
def main(argv: list[str] | None = None) -> None:
    """Serve until SIGTERM or SIGINT; requests that were received before are still answered.

    Args:
        argv: command-line arguments; None takes those of the process.

    Raises:
        SystemExit: status 2 for invalid settings or a missing model.
    """
    config, token = settings.parse(sys.argv[1:] if argv is None else argv)
    state, sha256 = load(config)

    from deepskip.jobs.serving import run

    run.serve(config, token, state, sha256)


def load(config: settings.ServeConfig) -> tuple[ModelState, str]:
    """Read the model's checkpoint, or the model that is published where config.model says.

    Args:
        config: settings of the server.

    Returns:
        State of the checkpoint, and the digest of a published model; "" for another one.

    Raises:
        NotHere: there is no such model.
    """
    try:
        if (sha256 := models.published(config.model)) is not None:
            return publishing.load(config.model, sha256), sha256
        return models.find(config.model, config.tracking_uri).state, ""
    except (models.ModelNotFound, publishing.BrokenPublication) as error:
        stop(f"model: {error}", NotHere)


if __name__ == "__main__":
    main()
