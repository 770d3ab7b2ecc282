"""A trained model as a graph of plain operators, for ONNX runtimes and for torch without this package.

The graph takes raw images: normalisation, enlargement, padding to a multiple of 2^(levels - 1) and cropping are in it. The
deep-skip stage is in its reference form: upsampling, convolution, concatenation.
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
# antialiased resizing and GroupNormalization need no more, and runtimes of the last three years have it
OPSET = 18
# what an exported graph may differ from PyTorch by, in probability
TOLERANCE = 1e-4


class ExportFailed(RuntimeError):
    """The exported graph is not there, or is not the model; says by how much, at which size."""


def to_program(segmenter: Segmenter) -> ExportedProgram:
    """Exports raw images (N, bands, H, W) fp32 -> probabilities (N, V, H, W) fp32, of any N, H and W, as ATen operators.

    Raises ExportFailed where the network has no such graph, as Mask R-CNN has none.
    """
    if reason := getattr(segmenter.network, "not_exported", None):
        raise ExportFailed(reason)
    segmenter = segmenter.eval()
    side = 4 * smallest_side(segmenter)
    # a batch of 2 and two sides: equal or single numbers would be taken for fixed ones
    example = torch.zeros(2, segmenter.bands, side, side + 16, device=segmenter.mean.device)
    sizes = ({0: Dim.DYNAMIC, 2: Dim.DYNAMIC, 3: Dim.DYNAMIC},)
    try:
        with plain_operators():
            return torch.export.export(segmenter, (example,), dynamic_shapes=sizes)
    # whatever the network of a stranger does that torch.export cannot follow
    except Exception as error:
        network = type(segmenter.network).__name__
        raise ExportFailed(f"torch.export cannot follow {network}: {' '.join(str(error).split())[:300]}") from error


@contextmanager
def plain_operators() -> Iterator[None]:
    """Has the network compute without gradients and by the reference forms of all kernels while the block runs."""
    with backend.chosen("reference"), torch.no_grad():
        yield


def smallest_side(segmenter: Segmenter) -> int:
    """Gives the smallest height and width of images that a program of `to_program` takes; ONNX takes any."""
    return multiple_of(segmenter.network) + 1


def program_bytes(program: ExportedProgram) -> bytes:
    """Gives the file (.pt2) of a program; `torch.export.load(path).module()` runs it."""
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        # torch's archive writer warns of weights that share storage, which is all of them
        warnings.filterwarnings("ignore", message="No complete tensor found")
        torch.export.save(program, buffer)
    return buffer.getvalue()


def onnx_bytes(program: ExportedProgram, properties: Mapping[str, str]) -> bytes:
    """Gives the ONNX file of a program, weights and all; properties: what it says of itself. Needs onnx and onnxscript."""
    import onnx

    with _quiet():
        exported = torch.onnx.export(
            program, (), input_names=[INPUT], output_names=[OUTPUT], opset_version=OPSET, dynamo=True, verbose=False
        )
    assert exported is not None
    model = exported.model_proto
    # plain names for the sides that the exporter numbers, and nothing that still has the numbers
    del model.graph.value_info[:]
    for value in (model.graph.input[0], model.graph.output[0]):
        sides = value.type.tensor_type.shape.dim
        for place, name in ((0, "batch"), (2, "height"), (3, "width")):
            sides[place].dim_param = name
    onnx.helper.set_model_props(model, dict(properties))
    onnx.checker.check_model(model)
    return model.SerializeToString()


@contextmanager
def _quiet() -> Iterator[None]:
    """Keeps the exporter's remarks, on its own inner workings, off the screen."""
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
    """Runs random images of sizes (N, H, W) through a graph and the model, and gives the largest difference at each size.

    runs: takes raw images as numpy, gives probabilities. Raises ExportFailed where one is over TOLERANCE.
    """
    rng = np.random.default_rng(0)
    found = {}
    for N, H, W in sizes:
        noise = rng.normal(size=(N, segmenter.bands, H, W)).astype(np.float32)
        # as the training data lie
        image = noise * segmenter.std.numpy()[..., None, None] + segmenter.mean.numpy()[..., None, None]
        with torch.inference_mode():
            expected: Tensor = segmenter(torch.from_numpy(image))
        difference = float(np.abs(runs(image) - expected.numpy()).max())
        found[f"{N} x {H} x {W}"] = difference
        # nan is no small difference
        if not difference <= TOLERANCE:
            raise ExportFailed(
                f"at {N} x {H} x {W} pixels its probabilities differ from PyTorch's by {difference:.2g}, over {TOLERANCE:g}"
            )
    return found
