"""Exports a trained model to ONNX and torch.export, checks the files against PyTorch, and writes a model card."""

import io
import sys
from pathlib import Path
from typing import Any

import torch

from deepskip import export
from deepskip.data_shards import storage, trouble
from deepskip.jobs import model_card, models, runs
from deepskip.jobs.options import ExportConfig
from deepskip.jobs.settings import NotHere, parse_settings, stop
from deepskip.predictor import Predictor

CARD = "model.json"
# (N, H, W), none of them a multiple of the network's
CHECKED = ((1, 97, 61), (2, 33, 130), (3, 65, 47))
SMALL = (1, 5, 7)


def check(argv: list[str]) -> None:
    """Ends the program with `error:` lines where the settings are wrong, or there is no such model."""
    prepare(argv)


@trouble.told()
def main(argv: list[str] | None = None) -> None:
    """Exports; what does not equal the model is not written, and the exit status is then 2."""
    config, found, evaluation = prepare(sys.argv[1:] if argv is None else argv)
    folder = config.out or Path("exports") / found.title
    model = Predictor(found.state)
    segmenter = model.segmenter
    print(f"exporting {found.title} (step {model.state['step']})", flush=True)
    try:
        program = export.to_program(segmenter)
    except export.ExportFailed as error:
        stop(f"{found.title} cannot be exported: {error}")
    made: dict[str, bytes] = {}
    checks: dict[str, dict[str, float]] = {}
    for kind in dict.fromkeys(config.formats):
        name = f"model.{kind}"
        try:
            if kind == "onnx":
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
            f"{name}: {len(made[name]) / 1e6:.1f} MB, at most {max(checks[name].values()):.1g} from PyTorch", flush=True
        )
    card = model_card.make(found, model, evaluation, {name: len(data) for name, data in made.items()}, checks)
    try:
        for name, data in made.items():
            storage.write_bytes(folder / name, data)
        storage.write_bytes(folder / "README.md", model_card.to_markdown(card).encode())
        # the last: with it the folder is whole
        runs.write_json(folder / CARD, runs.without_nan(card))
    except OSError as error:
        stop(f"out is {folder}: {error}")
    print(f"{folder} holds {', '.join(made)}, README.md, {CARD}")


def prepare(argv: list[str]) -> tuple[ExportConfig, models.Found, dict[str, Any] | None]:
    """Reads the settings, the model and the evaluation's report; ends the program where one is wrong."""
    config = parse_settings("export", ExportConfig, argv)
    if not config.formats:
        stop("formats is []; name onnx, pt2 or both")
    evaluation = None
    if config.evaluation is not None:
        try:
            if not config.evaluation.is_file():
                stop(f"evaluation is {config.evaluation}: there is no such file", NotHere)
            evaluation = runs.read_json(config.evaluation)
            if not {"data", "threshold", "metrics", "classes", "by_size"} <= evaluation.keys():
                raise ValueError("it is no report of jobs.evaluate")
            if evaluation.get("flips"):
                raise ValueError("it is of --flips true, and exported files answer without; evaluate without")
        except (OSError, ValueError) as error:
            stop(f"evaluation is {config.evaluation}: {error}")
    try:
        return config, models.find(config.model, config.tracking_uri), evaluation
    except models.ModelNotFound as error:
        stop(f"model: {error}", NotHere)


def onnx_runner(data: bytes) -> Any:
    """Gives what runs an ONNX file's bytes by onnxruntime on the CPU: numpy in, numpy out."""
    import onnxruntime

    session = onnxruntime.InferenceSession(data, providers=["CPUExecutionProvider"])
    return lambda image: session.run([export.OUTPUT], {export.INPUT: image})[0]


def program_runner(data: bytes) -> Any:
    """Gives what runs a program's bytes, as whoever loads them does: numpy in, numpy out."""
    program = torch.export.load(io.BytesIO(data)).module()

    def run(image: Any) -> Any:
        with torch.inference_mode():
            return program(torch.from_numpy(image)).numpy()

    return run


if __name__ == "__main__":
    main()
