"""Segments a folder of images with a trained model: a mask and an overlay for each."""

import argparse
import os
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from data_shards.sample import EXTENSIONS, decode_image, resample_bands, resize_longest_side
from deepskip import checkpoint
from deepskip.figures import overlay
from deepskip.inference import Segmenter, build_segmenter
from jobs.settings import stop


def build_parser() -> argparse.ArgumentParser:
    """Builds the command line."""
    parser = argparse.ArgumentParser(prog="python -m jobs.predict", description="Segments every image of a folder.")
    parser.add_argument(
        "--checkpoint", type=Path, required=True, help="a run's folder (runs/NAME) or a checkpoint file"
    )
    parser.add_argument(
        "--images", type=Path, required=True, help="folder of images, or one image, as the model was trained on"
    )
    parser.add_argument("--out", type=Path, required=True, help="folder for masks/STEM.png and overlays/STEM.png")
    parser.add_argument(
        "--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu, cuda, cuda:1, ..."
    )
    return parser


def check(argv: list[str]) -> None:
    """Ends the program with `error:` lines where there is no checkpoint or no image."""
    arguments = build_parser().parse_args(argv)
    image_files(arguments.images)
    if not arguments.checkpoint.exists():
        stop(
            f"--checkpoint: {arguments.checkpoint} does not exist; name a run's folder (runs/NAME) or a checkpoint file"
        )


def main(argv: list[str] | None = None) -> None:
    """Predicts; images that cannot be read are named and passed over, and the exit status is then 1."""
    arguments = build_parser().parse_args(argv)
    files = image_files(arguments.images)
    try:
        state = checkpoint.load_for_inference(arguments.checkpoint)
    except checkpoint.CheckpointError as error:
        stop(f"--checkpoint: {error}")
    segmenter = build_segmenter(state).to(arguments.device)
    for folder in ("masks", "overlays"):
        (arguments.out / folder).mkdir(parents=True, exist_ok=True)
    faults = []
    started = time.perf_counter()
    for number, path in enumerate(files, 1):
        try:
            image = decode_image(path.suffix[1:].lower(), path.read_bytes())
            labels = predict_source(segmenter, image, state["data"]["preparation"])
        except ValueError as error:
            faults.append(f"{path} {error}")
            continue
        # a mask of 0 and 1 looks black in every viewer
        shown = labels * 255 if segmenter.network.num_classes == 1 else labels
        write_png(shown, arguments.out / "masks" / f"{path.stem}.png")
        write_png(overlay(image, labels), arguments.out / "overlays" / f"{path.stem}.png")
        if sys.stdout.isatty():
            print(f"\r{number}/{len(files)} images", end="", flush=True)
    seconds = time.perf_counter() - started
    print(f"\r{len(files) - len(faults)} of {len(files)} images segmented into {arguments.out} in {seconds:.1f} s")
    for fault in faults:
        print(f"error: {fault}", file=sys.stderr)
    if faults:
        sys.exit(1)


def image_files(path: Path) -> list[Path]:
    """Lists the images of a folder, or the one image; ends the program where there is none, or a stem occurs twice."""
    if path.is_file():
        return [path]
    if not path.is_dir():
        stop(f"--images: {path} does not exist")
    files = sorted(p for p in path.iterdir() if p.suffix[1:].lower() in EXTENSIONS)
    if not files:
        stop(f"--images: {path} holds no images ({', '.join(EXTENSIONS)})")
    stems = [p.stem for p in files]
    if twice := sorted({stem for stem in stems if stems.count(stem) > 1}):
        stop(
            f"--images: {path} has several files named {', '.join(twice[:20])}; their masks would overwrite each other"
        )
    return files


def predict_source(segmenter: Segmenter, image_HWC: np.ndarray, preparation: dict[str, int | None]) -> np.ndarray:
    """Segments a source image as the training data was prepared: labels (H, W) uint8 at the image's own size."""
    height, width = image_HWC.shape[:2]
    bands, longest_side = preparation["bands"], preparation["longest_side"]
    if bands is not None:
        image_HWC = resample_bands(image_HWC, bands)
    if longest_side is not None:
        image_HWC, _ = resize_longest_side(image_HWC, None, longest_side)
    if image_HWC.shape[:2] == (height, width):
        return segmenter.predict(image_HWC)
    # probabilities are enlarged rather than labels: outlines come out smooth
    small = torch.from_numpy(segmenter.probabilities(image_HWC))[None]
    large = F.interpolate(small, size=(height, width), mode="bilinear", align_corners=False)[0]
    labels = large[0] > 0.5 if len(large) == 1 else large.argmax(0)
    return labels.numpy().astype(np.uint8)


def write_png(picture: np.ndarray, path: Path) -> None:
    """Writes a PNG whole or not at all."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    Image.fromarray(picture).save(temporary, "PNG")
    temporary.replace(path)


if __name__ == "__main__":
    main()
