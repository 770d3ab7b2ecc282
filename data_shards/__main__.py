"""python -m data_shards: pack, verify, info and preview shards."""

import argparse
import sys
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from data_shards.index import FILE, BrokenIndex, MissingIndex, load_index, verify
from data_shards.sample import BadSample, Sample
from data_shards.sources.coins import coins
from data_shards.sources.folder import LABELS, SPLITS, PackError, pack_folder
from data_shards.stream import Shards
from data_shards.writer import write_shards

COINS_DEFAULT = {"train": 400, "val": 100}
COINS_SEED = 2023


def main(argv: list[str] | None = None) -> None:
    """Runs one command; exits with 2 and one line for bad input."""
    arguments = build_parser().parse_args(argv)
    try:
        arguments.run(arguments)
    except (PackError, MissingIndex, BrokenIndex, BadSample, FileExistsError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


def build_parser() -> argparse.ArgumentParser:
    """Builds the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m data_shards", description="Make, check and look at WebDataset shards."
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    pack = commands.add_parser("pack", help="make shards").add_subparsers(required=True, metavar="SOURCE")
    folder = pack.add_parser("folder", help="a folder of images and a folder of masks, paired by file stem")
    folder.add_argument(
        "--images", type=Path, required=True, help="png, jpg, tif (pages are bands), npy or npz (H, W, bands)"
    )
    folder.add_argument("--masks", type=Path, help="labels (H, W), or binary; default: in the .npz files of --images")
    folder.add_argument("--out", type=Path, required=True, help="folder to make: OUT/train, OUT/val, OUT/test")
    folder.add_argument("--split", type=Path, help="CSV with columns stem,split (train, val, test); default: at random")
    folder.add_argument(
        "--val_share", type=float, default=0.2, help="share for validation where there is no --split (0.2)"
    )
    folder.add_argument("--seed", type=int, default=0, help="seed of the random split (0)")
    folder.add_argument(
        "--labels",
        choices=LABELS,
        default="auto",
        help="what mask values mean; auto: binary where one value stands beside 0",
    )
    folder.add_argument(
        "--num_classes", type=int, help="1 for binary, else classes with the background; default: from the masks"
    )
    folder.add_argument("--ignore_label", type=int, help="mask value that takes no part")
    folder.add_argument("--bands", type=int, help="bring every image to so many bands")
    folder.add_argument("--longest_side", type=int, help="shrink images to at most so many pixels a side")
    folder.add_argument(
        "--mask_suffix", default="", help="what mask stems end with beyond the image's, as in a_mask.png"
    )
    folder.add_argument("--samples_per_shard", type=int, default=256, help="samples a shard (256)")
    folder.set_defaults(run=run_pack_folder)

    built_in = pack.add_parser("coins", help="the built-in data: real coins on real textures")
    built_in.add_argument("--out", type=Path, required=True, help="folder to make: OUT/train and OUT/val")
    for split, count in COINS_DEFAULT.items():
        built_in.add_argument(f"--{split}", type=int, default=count, help=f"images for {split} ({count})")
    built_in.add_argument("--seed", type=int, default=COINS_SEED, help=f"seed ({COINS_SEED})")
    built_in.set_defaults(run=lambda a: pack_coins(a.out, {"train": a.train, "val": a.val}, a.seed))

    for name, run, text in (
        ("verify", run_verify, "compare shards with their index, byte for byte"),
        ("info", run_info, "what is in a data set"),
    ):
        command = commands.add_parser(name, help=text)
        command.add_argument("path", type=Path, help="a data set, or one split of it")
        command.set_defaults(run=run)
    preview = commands.add_parser("preview", help="a picture of some samples with their masks outlined")
    preview.add_argument("path", type=Path, help="one split, such as data/coins/train")
    preview.add_argument("--out", type=Path, default=Path("preview.png"), help="picture to write (preview.png)")
    preview.add_argument("--count", type=int, default=16, help="samples (16)")
    preview.set_defaults(run=run_preview)
    return parser


def pack_coins(out: Path, counts: dict[str, int] = COINS_DEFAULT, seed: int = COINS_SEED) -> None:
    """Packs the built-in coins into out/train and out/val."""
    for split, count in counts.items():
        samples = (Sample(key, image, mask) for key, image, mask in coins(split, count, seed))
        write_shards(samples, out / split, num_classes=1)


def run_pack_folder(arguments: argparse.Namespace) -> None:
    """Packs a folder and says what came of it."""
    names = ("split", "val_share", "seed", "labels", "num_classes", "ignore_label", "bands", "longest_side")  # fmt: skip
    options = {name: getattr(arguments, name) for name in (*names, "mask_suffix", "samples_per_shard")}
    pack_folder(arguments.images, arguments.masks or arguments.images, arguments.out, **options)
    arguments.path = arguments.out
    run_info(arguments)


def splits_of(path: Path) -> list[Path]:
    """Gives the splits of a data set, or the split itself; raises MissingIndex where there is neither."""
    if (path / FILE).is_file():
        return [path]
    found = [path / name for name in SPLITS if (path / name / FILE).is_file()]
    # where there is nothing, this says so
    if not found:
        load_index(path)
    return found


def run_verify(arguments: argparse.Namespace) -> None:
    """Verifies each split; exits with 1 when something is wrong."""
    faults = [fault for folder in splits_of(arguments.path) for fault in verify(folder)]
    print("\n".join(faults) or f"{arguments.path}: every shard is what its index says")
    if faults:
        sys.exit(1)


def run_info(arguments: argparse.Namespace) -> None:
    """Prints one line a split."""
    for folder in splits_of(arguments.path):
        index = load_index(folder)
        size = sum(shard.bytes for shard in index.shards) / 1e6
        classes = "binary" if index.num_classes == 1 else f"{index.num_classes} classes"
        print(
            f"{folder}: {index.num_samples} samples in {len(index.shards)} shards, {size:.1f} MB, "
            f"{index.bands} bands, {index.dtype}, {classes}"
        )


def run_preview(arguments: argparse.Namespace) -> None:
    """Draws samples side by side, the mask's outline in red."""
    shards = Shards(arguments.path)
    count = min(arguments.count, len(shards))
    side, columns = 192, min(8, count)
    sheet = Image.new("RGB", (columns * side, -(-count // columns) * (side + 14)), "white")
    for i in range(count):
        shard, entry = shards.locate(i * len(shards) // count)
        image, mask = shards.read(shard, entry)
        place = (i % columns) * side, (i // columns) * (side + 14)
        picture = Image.fromarray(outlined(image, mask, shards.index.ignore_index)).resize((side - 4, side - 4))
        sheet.paste(picture, place)
        ImageDraw.Draw(sheet).text((place[0], place[1] + side - 3), entry.key[:28], fill="black")
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(arguments.out)
    print(f"wrote {arguments.out}")


def outlined(image_HWC: np.ndarray, mask_HW: np.ndarray, ignore_index: int) -> np.ndarray:
    """Gives an RGB picture (H, W, 3) uint8 of an image's first, middle and last band with the mask's outline in red."""
    bands = [0, image_HWC.shape[2] // 2, image_HWC.shape[2] - 1]
    shown = image_HWC[..., bands].astype(np.float32)
    low, high = np.percentile(shown, (1, 99), axis=(0, 1))
    shown = np.clip((shown - low) / np.maximum(high - low, 1e-6), 0, 1) * 255
    foreground = np.pad((mask_HW != 0) & (mask_HW != ignore_index), 1)
    inside = foreground[2:, 1:-1] & foreground[:-2, 1:-1] & foreground[1:-1, 2:] & foreground[1:-1, :-2]
    shown[foreground[1:-1, 1:-1] & ~inside] = (255, 0, 0)
    return shown.astype(np.uint8)


if __name__ == "__main__":
    main()
