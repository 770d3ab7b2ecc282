"""Export a trained model to ONNX and torch.export, compare the files with PyTorch, and write a model card."""

import io
import sys
from pathlib import Path
from typing import Any, cast

import torch

from deepskip import export, weight_files
from deepskip.checkpoint import NetworkState
from deepskip.data_shards import storage, trouble
from deepskip.inference import build_segmenter
from deepskip.jobs import earlier, model_card, models, runs
from deepskip.jobs.options import ExportConfig
from deepskip.jobs.settings import NotHere, parse_settings, stop
from deepskip.predictor import Predictor

CARD = "model.json"
WEIGHTS = "safetensors"
PAGE = "README.md"
FILES = ("model.onnx", "model.pt2", f"model.{WEIGHTS}", PAGE)
# sizes (N, H, W), with no side a multiple of the network's downsampling
CHECKED = ((1, 97, 61), (2, 33, 130), (3, 65, 47))
SMALL = (1, 5, 7)


def check(argv: list[str]) -> None:
    """Validate the settings, and that the model exists.

    Args:
        argv: command-line arguments.

    Raises:
        SystemExit: status 2 after `error:` lines, if something is wrong; NotHere if the model or the report is missing.
    """
    prepare(argv)


@trouble.told()
def main(argv: list[str] | None = None) -> None:
    """Export a model and write the files and its card, if every file computes what PyTorch computes.

    The file model.json is written last. If it exists, the folder is complete.

    Args:
        argv: command-line arguments; None takes those of the process.

    Raises:
        SystemExit: status 2 if the model cannot be exported, or if a file differs from PyTorch; then nothing is
            written. Status 2 also for invalid settings and a folder that cannot be written.
    """
    config, found, evaluation = prepare(sys.argv[1:] if argv is None else argv)
    kinds = list(dict.fromkeys(config.formats))
    folder = storage.local(config.out) if config.out else Path("exports") / found.title
    earlier.check_folder(folder)
    earlier.check_export(folder / CARD, FILES, [PAGE, *(f"model.{kind}" for kind in kinds)], found)
    model = Predictor(found.state)
    segmenter = model.segmenter
    print(f"exporting {found.title} (step {model.state['step']})", flush=True)
    program = None
    if kinds != [WEIGHTS]:
        try:
            program = export.to_program(segmenter)
        except export.ExportFailed as error:
            stop(f"{found.title} cannot be exported: {error}")
    made: dict[str, bytes] = {}
    checks: dict[str, dict[str, float]] = {}
    for kind in kinds:
        name = f"model.{kind}"
        try:
            if program is None or kind == WEIGHTS:
                made[name] = weight_files.pack(found.state)
                checks[name] = export.compare(segmenter, weights_runner(made[name]), CHECKED)
            elif kind == "onnx":
                made[name] = export.onnx_bytes(program, model_card.properties(found, model, evaluation))
                checks[name] = export.compare(segmenter, onnx_runner(made[name]), (*CHECKED, SMALL))
            else:
                made[name] = export.program_bytes(program)
                checks[name] = export.compare(segmenter, program_runner(made[name]), CHECKED)
        except export.ExportFailed as error:
            stop(f"{name} is not written: {error}. Please report this, with the versions in `pip list`.")
        except ImportError as error:
            stop(
                f"{name} needs a package that is not installed: {error}. pip install '.[export]', or --formats '[pt2]'"
            )
        print(
            f"{name}: {len(made[name]) / 1e6:.1f} MB, differs from PyTorch by at most {max(checks[name].values()):.1g}",
            flush=True,
        )
    card = model_card.make(found, model, evaluation, {name: len(data) for name, data in made.items()}, checks)
    try:
        (folder / CARD).unlink(missing_ok=True)
        for name, data in made.items():
            storage.write_bytes(folder / name, data)
        storage.write_bytes(folder / PAGE, model_card.to_markdown(card).encode())
        # the card is written last: if it exists, the folder is complete
        runs.write_json(folder / CARD, runs.without_nan(card))
    except OSError as error:
        stop(f"out is {folder}: {trouble.in_words(error) or error}")
    print(f"{folder} holds {', '.join(made)}, {PAGE}, {CARD}")


def prepare(argv: list[str]) -> tuple[ExportConfig, models.Found, dict[str, Any] | None]:
    """Read the settings, the model and the report of its evaluation.

    Args:
        argv: command-line arguments.

    Returns:
        The settings, the model, and the report, None if the settings name none.

    Raises:
        SystemExit: status 2 if the settings or the report are invalid; NotHere if the model or the report is missing.
    """
    config = parse_settings("export", ExportConfig, argv)
    if not config.formats:
        stop("formats is []; name onnx, pt2 or safetensors")
    evaluation = None
    if config.evaluation is not None:
        path = storage.local(config.evaluation)
        if not path.is_file():
            stop(f"evaluation is {config.evaluation}: there is no such file", NotHere)
        try:
            evaluation = model_card.read_report(path)
        except (OSError, ValueError) as error:
            stop(f"evaluation is {config.evaluation}: {error}")
    try:
        found = models.find(config.model, config.tracking_uri)
    except models.ModelNotFound as error:
        stop(f"model: {error}", NotHere)
    if evaluation is not None and not earlier.is_of(evaluation["model"], found):
        stop(f"evaluation is {config.evaluation}: it is of {evaluation['model'].get('title')}, not of {found.title}")
    return config, found, evaluation


def onnx_runner(data: bytes) -> Any:
    """Return a function that runs an ONNX model with onnxruntime on the CPU.

    Args:
        data: content of the ONNX file.

    Returns:
        A function from images to probabilities, both numpy float32: (N, bands, H, W) to (N, V, H, W).

    Raises:
        ImportError: onnxruntime is not installed.
    """
    import onnxruntime

    session = onnxruntime.InferenceSession(data, providers=["CPUExecutionProvider"])
    return lambda image: session.run([export.OUTPUT], {export.INPUT: image})[0]


def program_runner(data: bytes) -> Any:
    """Return a function that runs a torch.export program as a user would load it.

    Args:
        data: content of the .pt2 file.

    Returns:
        A function from images to probabilities, both numpy float32: (N, bands, H, W) to (N, V, H, W).
    """
    program = torch.export.load(io.BytesIO(data)).module()

    def run(image: Any) -> Any:
        with torch.inference_mode():
            return program(torch.from_numpy(image)).numpy()

    return run


def weights_runner(data: bytes) -> Any:
    """Return a function that runs the network of a safetensors file.

    Args:
        data: content of the file.

    Returns:
        A function from images to probabilities, both numpy float32: (N, bands, H, W) to (N, V, H, W).
    """
    # What was just written is a model of DeepSkip's own, which was checked as it was found.
    segmenter = build_segmenter(cast(NetworkState, weight_files.unpack(data)))

    def run(image: Any) -> Any:
        with torch.inference_mode():
            return segmenter(torch.from_numpy(image)).numpy()

    return run


if __name__ == "__main__":
    main()
