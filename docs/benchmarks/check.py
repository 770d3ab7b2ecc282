"""Score masks of a published benchmark with numpy and scikit-image alone, as a check of DeepSkip's own figures.

The masks are those that `deepskip predict` has written, or are made here from an ONNX file:

    python docs/benchmarks/check.py --masks NUDT-SIRST/masks --split split.csv --predictions predictions/masks
    python docs/benchmarks/check.py --masks NUDT-SIRST/masks --split split.csv --images NUDT-SIRST/images --onnx model.onnx

The split is a CSV with columns stem,split, of which the rows "test" count, or a text file with a stem in each line.
"""

import argparse
import csv
from collections.abc import Callable
from pathlib import Path

import numpy as np
from skimage.io import imread
from skimage.measure import label, regionprops

# A target and a prediction belong together if their centroids are less than this many pixels apart.
DISTANCE = 3


def tested(path: Path) -> list[str]:
    """Return the stems of the test images, sorted."""
    if path.suffix == ".csv":
        with path.open(newline="") as file:
            return sorted(row["stem"] for row in csv.DictReader(file) if row["split"] == "test")
    return sorted(path.read_text().split())


def score(
    stems: list[str], truth_of: Callable[[str], np.ndarray], guess_of: Callable[[str], np.ndarray]
) -> dict[str, float]:
    """Return iou, niou, pd and fa as docs/benchmark-runs.md defines them.

    Args:
        stems: names of the images.
        truth_of: returns the mask (H, W) bool of an image.
        guess_of: returns the predicted mask (H, W) bool of an image.
    """
    intersection = union = targets = detected = false_pixels = pixels = 0
    ious = []
    for stem in stems:
        truth, guess = truth_of(stem), guess_of(stem)
        if truth.shape != guess.shape:
            raise SystemExit(f"{stem}: the mask is {truth.shape}, the prediction {guess.shape}")
        both, either = int((truth & guess).sum()), int((truth | guess).sum())
        intersection, union, pixels = intersection + both, union + either, pixels + truth.size
        if either:
            ious.append(both / either)
        free = regionprops(label(guess, connectivity=2))
        for target in regionprops(label(truth, connectivity=2)):
            targets += 1
            for found in free:
                if np.hypot(*np.subtract(found.centroid, target.centroid)) < DISTANCE:
                    detected += 1
                    free.remove(found)
                    break
        false_pixels += sum(int(region.area) for region in free)
    return {
        "iou": intersection / max(union, 1),
        "niou": float(np.mean(ious)) if ious else 0.0,
        "pd": detected / max(targets, 1),
        "fa": false_pixels / max(pixels, 1),
    }


def reader(folder: Path) -> Callable[[str], np.ndarray]:
    """Return a function that reads where the picture of a stem is not 0, (H, W) bool."""
    return lambda stem: np.asarray(grey(folder, stem) > 0)


def grey(folder: Path, stem: str) -> np.ndarray:
    """Return the first channel of the picture of a stem, (H, W)."""
    found = sorted(path for path in folder.iterdir() if path.stem == stem)
    if len(found) != 1:
        raise SystemExit(f"{folder} has {len(found)} files {stem}.*; it must have one")
    picture = imread(found[0])
    return np.asarray(picture if picture.ndim == 2 else picture[..., 0])


def predictor(model: Path, folder: Path) -> Callable[[str], np.ndarray]:
    """Return a function that predicts the mask (H, W) bool of an image with onnxruntime, at a probability of 0.5."""
    import onnxruntime

    session = onnxruntime.InferenceSession(str(model), providers=["CPUExecutionProvider"])

    def predict(stem: str) -> np.ndarray:
        (probabilities,) = session.run(None, {"image": grey(folder, stem)[None, None].astype(np.float32)})
        return np.asarray(probabilities[0, 0] > 0.5)

    return predict


def main(argv: list[str] | None = None) -> None:
    """Print the scores.

    Args:
        argv: command-line arguments; None takes those of the process.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--masks", type=Path, required=True, help="folder of the true masks")
    parser.add_argument("--split", type=Path, required=True, help="CSV with columns stem,split, or a list of stems")
    parser.add_argument("--predictions", type=Path, help="folder of predicted masks")
    parser.add_argument("--onnx", type=Path, help="ONNX file that predicts, with --images")
    parser.add_argument("--images", type=Path, help="folder of the images, for --onnx")
    arguments = parser.parse_args(argv)
    if (arguments.predictions is None) == (arguments.onnx is None) or (arguments.onnx and not arguments.images):
        parser.error("give --predictions, or --onnx and --images")
    guess_of = predictor(arguments.onnx, arguments.images) if arguments.onnx else reader(arguments.predictions)
    found = score(tested(arguments.split), reader(arguments.masks), guess_of)
    print(", ".join(f"{name} {value:.6g}" for name, value in found.items()))


if __name__ == "__main__":
    main()
