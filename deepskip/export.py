"""Export a trained model as a graph of plain operators, for ONNX runtimes and for torch without this package.

The graph takes raw images. Normalisation, enlargement, padding to a multiple of 2^(levels - 1) and cropping are part of
it. The deep-skip stage is in its reference form: upsampling, convolution, concatenation.
"""

import io
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor
from torch.export import Dim, ExportedProgram

from deepskip.inference import Segmenter
from deepskip.kernels import backend
from deepskip.network import multiple_of

INPUT, OUTPUT = "image", "probabilities"
# Antialiased resizing and GroupNormalization need no later opset, and runtimes of the last three years have this one.
OPSET = 18
# The largest accepted difference between an exported graph and PyTorch, in probability.
TOLERANCE = 1e-4


class ExportFailed(RuntimeError):
    """The graph could not be exported, or differs from the model; the message says by how much and at which size."""


def to_program(segmenter: Segmenter) -> ExportedProgram:
    """Export a model as a program of ATen operators that takes images of any number and size.

    The program maps raw images (N, bands, H, W) fp32 to probabilities (N, V, H, W) fp32.

    Args:
        segmenter: the model. It is set to evaluation mode.

    Raises:
        ExportFailed: if the network has no such graph, such as Mask R-CNN, or torch.export cannot trace it.
    """
    if reason := getattr(segmenter.network, "not_exported", None):
        raise ExportFailed(reason)
    segmenter = segmenter.eval()
    side = 4 * smallest_side(segmenter)
    # A batch of 2 and two different sides: torch.export would take a 1, or equal sides, for fixed.
    example = torch.zeros(2, segmenter.bands, side, side + 16, device=segmenter.mean.device)
    sizes = ({0: Dim.DYNAMIC, 2: Dim.DYNAMIC, 3: Dim.DYNAMIC},)
    try:
        with plain_operators():
            return torch.export.export(segmenter, (example,), dynamic_shapes=sizes)
    # An untrusted network may raise any error that torch.export passes on.
    except Exception as error:
        network = type(segmenter.network).__name__
        raise ExportFailed(f"torch.export cannot trace {network}: {' '.join(str(error).split())[:300]}") from error


@contextmanager
def plain_operators() -> Iterator[None]:
    """Run the block without gradients and with the reference forms of all kernels."""
    with backend.chosen("reference"), torch.no_grad():
        yield


def smallest_side(segmenter: Segmenter) -> int:
    """Return the smallest height and width, in pixels, that a program of `to_program` takes; ONNX takes any."""
    return multiple_of(segmenter.network) + 1


def program_bytes(program: ExportedProgram) -> bytes:
    """Return the bytes of a program's file (.pt2); `torch.export.load(path).module()` runs it."""
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        # Torch's archive writer warns of weights that share storage, and all of them do.
        warnings.filterwarnings("ignore", message="No complete tensor found")
        torch.export.save(program, buffer)
    return buffer.getvalue()


def onnx_bytes(program: ExportedProgram, properties: Mapping[str, str]) -> bytes:
    """Return the bytes of a program's ONNX file, weights included; needs onnx and onnxscript.

    Args:
        program: program that `to_program` returned.
        properties: metadata to store in the file.
    """
    import onnx

    with _quiet():
        exported = torch.onnx.export(
            program, (), input_names=[INPUT], output_names=[OUTPUT], opset_version=OPSET, dynamo=True, verbose=False
        )
    assert exported is not None
    model = exported.model_proto
    # The exporter numbers the dimensions: give them names, and remove the value infos that still have the numbers.
    del model.graph.value_info[:]
    for value in (model.graph.input[0], model.graph.output[0]):
        sides = value.type.tensor_type.shape.dim
        for place, name in ((0, "batch"), (2, "height"), (3, "width")):
            sides[place].dim_param = name
    onnx.helper.set_model_props(model, dict(properties))
    onnx.checker.check_model(model)
    content: bytes = model.SerializeToString()
    return content


@contextmanager
def _quiet() -> Iterator[None]:
    """Suppress the exporter's messages about its own internals."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir")]
    before = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, before, strict=True):
            logger.setLevel(level)


def compare(
    segmenter: Segmenter, runs: Callable[[np.ndarray], np.ndarray], sizes: Sequence[tuple[int, int, int]]
) -> dict[str, float]:
    """Compare an exported graph with the model on random images.

    Args:
        segmenter: the model, on the CPU.
        runs: the graph: takes raw images (N, bands, H, W) fp32 and returns probabilities (N, V, H, W), both numpy
            arrays.
        sizes: (N, H, W) of each comparison.

    Returns:
        The largest difference in probability by size, such as "1 x 64 x 96".

    Raises:
        ExportFailed: if a difference is over TOLERANCE.
    """
    rng = np.random.default_rng(0)
    found = {}
    for N, H, W in sizes:
        noise = rng.normal(size=(N, segmenter.bands, H, W)).astype(np.float32)
        # Images with the mean and deviation of the training data.
        image = noise * segmenter.std.numpy()[..., None, None] + segmenter.mean.numpy()[..., None, None]
        # A constant band: its mean, rounded by another runtime, may not be taken for its deviation.
        image[0, -1] = image[0, -1, 0, 0]
        if segmenter.how == "image" and N > 1:
            # Low contrast on a large offset, where a runtime's rounding of the mean would show.
            image[-1] = 60000 + rng.random(image[-1].shape, np.float32)
        with torch.inference_mode():
            expected: Tensor = segmenter(torch.from_numpy(image))
        difference = float(np.abs(runs(image) - expected.numpy()).max())
        found[f"{N} x {H} x {W}"] = difference
        # The comparison is negated, so that nan fails too.
        if not difference <= TOLERANCE:
            raise ExportFailed(
                f"at {N} x {H} x {W} pixels its probabilities differ from PyTorch's by {difference:.2g}, over {TOLERANCE:g}"
            )
    return found
