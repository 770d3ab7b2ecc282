"""Segment images of any number and size into masks of the same formats; the job can be stopped and resumed."""

import json
import os
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from deepskip.checkpoint import DataState, NetworkState
from deepskip.cluster.settings import of_loopback
from deepskip.data_shards import storage, trouble
from deepskip.jobs import models
from deepskip.jobs.options import PredictConfig
from deepskip.jobs.prediction import done, inputs
from deepskip.jobs.prediction.features import COCO_FILE, join_coco
from deepskip.jobs.prediction.inputs import Item
from deepskip.jobs.prediction.options import Options
from deepskip.jobs.prediction.progress import Progress
from deepskip.jobs.settings import NotHere, parse_settings, stop
from deepskip.predictor import class_names

# exit status after Ctrl-C
INTERRUPTED = 128 + signal.SIGINT
# options that change the outputs; --tile does so with norms other than batch norm
READING = ("nodata", "alpha", "orientation")
DECIDING = ("probabilities", "overlays", "polygons", "threshold", "precision", "tile")


def parse(argv: list[str] | None) -> tuple[str, list[str], Path, Options]:
    """Read the settings.

    Args:
        argv: command-line arguments; None takes those of the process.

    Returns:
        The model's name, the places of the images, the output folder and the options.

    Raises:
        SystemExit: status 2 if a setting is invalid; 0 after --help.
    """
    config = parse_settings("predict", PredictConfig, sys.argv[1:] if argv is None else argv)
    if storage.is_remote(config.out):
        stop(
            f"out is {config.out}; it must be a folder, because rasters are written piece by piece; copy the outputs from there"
        )
    options = Options(**{field.name: getattr(config, field.name) for field in fields(Options)})
    return config.model, config.images, storage.local(config.out), options


def check(argv: list[str]) -> None:
    """Validate the settings, and that the model and the images exist.

    Args:
        argv: command-line arguments.

    Raises:
        SystemExit: status 2 after `error:` lines, if something is wrong; NotHere if the model is missing.
    """
    run_or_path, places, out, _ = parse(argv)
    read_checkpoint(run_or_path)
    inputs.find(places, out)


def read_checkpoint(run_or_path: str) -> NetworkState:
    """Read the parts of a model's checkpoint that inference needs.

    Args:
        run_or_path: any name of the model, as in `models.find`.

    Returns:
        A state with "config", "data", "model" (the EMA weights if there are any, else the weights) and "ema", which is
        None.

    Raises:
        NotHere: there is no such model.
    """
    try:
        state = models.find(run_or_path).state
    except models.ModelNotFound as error:
        stop(f"model: {error}", NotHere)
    # optimizer and random states are not sent to the workers
    weights = state["ema"] or state["model"]
    preparation = {"bands": None, "longest_side": None, **(state["data"].get("preparation") or {})}
    data: DataState = {**state["data"], "preparation": preparation}
    return {"config": state["config"], "data": data, "ema": None, "model": weights}


def is_relative(place: str) -> bool:
    """Return whether a place is a path relative to the current folder."""
    return "://" not in place and not Path(place).is_absolute()


def fingerprint(state: NetworkState, options: Options) -> str:
    """Compute a SHA-256 of all that determines the outputs: the weights, the model's settings and the options.

    Args:
        state: the model, as `read_checkpoint` returns it.
        options: options of the prediction.

    Returns:
        The digest, in hexadecimal.
    """
    from deepskip.weight_files import digest_of

    data = {key: value for key, value in state["data"].items() if key in ("in_channels", "num_classes", "mean", "std")}
    settings = [state["config"]["model"], state["config"]["data"]["normalize"], data, state["data"]["preparation"]]
    deciding: list[Any] = [getattr(options, name) for name in DECIDING]
    if options.flips:
        # without flips the digest is the one of versions that had no flips
        deciding.append("flips")
    if told := {name: getattr(options, name) for name in READING if getattr(options, name) != getattr(Options, name)}:
        deciding.append(repr(told))
    return digest_of(state["model"], json.dumps([*settings, deciding]).encode())


@trouble.told()
def main(argv: list[str] | None = None) -> None:
    """Segment the images; those that cannot be segmented are skipped and listed at the end.

    Args:
        argv: command-line arguments; None takes those of the process.

    Raises:
        SystemExit: status 1 if images could not be segmented, 2 for invalid settings, INTERRUPTED (130) after Ctrl-C.
    """
    run_or_path, places, out, options = parse(argv)
    state = read_checkpoint(run_or_path)
    if "runtime_resources" in Path.cwd().parts and (not out.is_absolute() or any(map(is_relative, places))):
        stop(
            "--out or --images is relative to a copy of your folder on the cluster; give paths that every machine sees"
        )
    items = inputs.find(places, out)
    made_by = fingerprint(state, options)
    make_folder(out)
    done.remove_leftovers(out)
    left = [item for item in items if not done.is_done(out, item, made_by)]
    if left:
        # it is of all images, and some are made anew
        (out / COCO_FILE).unlink(missing_ok=True)
    if len(left) < len(items):
        print(f"{len(items) - len(left)} of {len(items)} images are done already", flush=True)
    progress = Progress(len(left))
    faults = []
    notes: dict[str, list[str]] = {}
    try:
        for outcome in outcomes(left, state, options, out, made_by, progress):
            progress.count(outcome.pixels)
            if outcome.fault:
                faults.append(outcome.fault)
            elif outcome.note:
                notes.setdefault(outcome.note, []).append(outcome.name)
    except KeyboardInterrupt:
        progress.end()
        print(
            f"stopped after {progress.done} of {len(left)} images; run the same command again to resume",
            file=sys.stderr,
        )
        sys.exit(INTERRUPTED)
    progress.end()
    if options.polygons == "coco":
        # what an earlier model left of an image that now fails is not this model's
        names = [item.name for item in items if done.is_done(out, item, made_by)]
        join_coco(out, names, class_names(state["data"]))
    if not left:
        return
    seconds = time.monotonic() - progress.started
    print(
        f"{len(left) - len(faults)} of {len(left)} images segmented into {out} in {seconds:.1f} s, "
        f"{progress.pixels / seconds / 1e6:.2f} MPixel/s"
    )
    for note, names in notes.items():
        # a name may have bytes that are not UTF-8
        first = names[0].encode(errors="backslashreplace").decode()
        print(f"note: {len(names)} images, such as {first}: each {note}")
    for fault in sorted(faults):
        print(f"error: {fault}", file=sys.stderr)
    if faults:
        print(f"error: {len(faults)} of {len(left)} images could not be segmented", file=sys.stderr)
        sys.exit(1)


def make_folder(out: Path) -> None:
    """Make the folder of the outputs.

    Args:
        out: the folder.

    Raises:
        SystemExit: status 2 if it cannot be made, or has files where outputs go although no prediction wrote to it.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError, FileNotFoundError) as error:
        stop(f"--out: the folder {out} cannot be made: {(error.strerror or '').lower()}")
    if found := done.of_others(out):
        stop(
            f"--out: {found} was not made by a prediction and could be overwritten; choose another folder, such as "
            f"{out / 'predictions'}"
        )


def outcomes(
    items: Sequence[Item], state: NetworkState, options: Options, out: Path, made_by: str, progress: Progress
) -> Iterator[Any]:
    """Segment images in this process or on Ray.

    Args:
        items: images to segment.
        state: the model, as `read_checkpoint` returns it.
        options: options of the prediction.
        out: output folder.
        made_by: fingerprint of the model and the options.
        progress: shows the progress within a large image, if this process does the work.

    Yields:
        An Outcome for each image.

    Raises:
        SystemExit: status 2 if the options do not fit the model or the machine.
    """
    if not items:
        return
    from deepskip.inference import build_segmenter
    from deepskip.jobs.prediction import memory

    try:
        memory.check_tile(options, build_segmenter(state).network)
    except ValueError as error:
        stop(str(error))
    workers = options.workers
    if workers == 0 or (workers is None and not os.environ.get("RAY_ADDRESS")):
        from deepskip.jobs.prediction.segment import PredictionWorker

        try:
            predictor = PredictionWorker(state, options, out, made_by)
        except ValueError as error:
            stop(str(error))
        yield from predictor.run(items, progress.part)
    else:
        # Ray reads these variables when it is imported
        settings = {"RAY_USAGE_STATS_ENABLED": "0"} | of_loopback(os.environ.get("RAY_ADDRESS"))
        for name, value in settings.items():
            os.environ.setdefault(name, value)

        from deepskip.jobs.prediction.fleet import over_ray

        yield from over_ray(items, state, options, out, made_by)


if __name__ == "__main__":
    main()
