"""The command line of the data commands; without torch, so that --help is quick."""

import argparse
import sys
from pathlib import Path
from typing import Any

from deepskip.data_shards import storage, trouble
from deepskip.data_shards.index import BrokenIndex, MissingIndex
from deepskip.data_shards.indexing import BAD_SAMPLES, IndexingError
from deepskip.data_shards.labels import KINDS, NAN_LABEL, WHITE_IS_ZERO
from deepskip.data_shards.pictures import ALPHA, ORIENTATION
from deepskip.data_shards.sample import LAYOUTS, ON_BAD_SAMPLE, BadSample
from deepskip.data_shards.scan import BrokenShard
from deepskip.data_shards.sources.split import SPLITS, PackError

COINS_DEFAULT = {"train": 400, "val": 100, "test": 100}
COINS_SEED = 2023


def main(argv: list[str] | None = None) -> None:
    """Runs one command; exits with 2 and one line for bad input."""
    arguments = build_parser().parse_args(argv)
    # for what is done, and not for what is told of it
    from deepskip.data_shards import commands

    try:
        with trouble.told():
            getattr(commands, arguments.run)(arguments)
    except (
        PackError,
        IndexingError,
        MissingIndex,
        BrokenIndex,
        BadSample,
        BrokenShard,
        FileExistsError,
        ValueError,
        storage.StorageError,
    ) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


def build_parser() -> argparse.ArgumentParser:
    """Builds the command line."""
    parser = argparse.ArgumentParser(prog="deepskip", description="Make, check and look at WebDataset shards.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    add_sources(commands.add_parser("pack", help="make shards").add_subparsers(required=True, metavar="SOURCE"))

    index = commands.add_parser("index", help="make the index of .tar shards that others wrote")
    index.add_argument("path", help="folder or URL (s3://, gs://, http://) of the shards")
    index.add_argument("--out", help="where the index goes (beside the shards)")
    index.add_argument("--shards", help="their names, where the place cannot be listed: 'a-{000..099}.tar'")
    index.add_argument(
        "--image", help="what images are called after the key: jpg, img, image (found from the first shard)"
    )
    index.add_argument(
        "--mask", help="what masks are called after the key: png, seg, mask (found from the first shard)"
    )
    add_labels(index)
    add_reading(index)
    add_values(index)
    index.add_argument("--bands", type=int, help="bring every image to so many bands when it is read")
    index.add_argument(
        "--on_bad_sample",
        choices=ON_BAD_SAMPLE,
        default="error",
        help=f"skip: leave faulty samples and shards out and list them in {BAD_SAMPLES} (error)",
    )
    index.add_argument("--workers", type=int, help="processes (one a core)")
    index.set_defaults(run="run_index")

    for name, run, text in (
        ("verify", "run_verify", "compare shards with their index and decode every sample"),
        ("info", "run_info", "counts, sizes, bands, class balance, object sizes"),
    ):
        command = commands.add_parser(name, help=text)
        command.add_argument("path", help="a data set, or one split of it: folder or URL")
        command.add_argument("--cache", type=Path, help=f"folder for copies of remote shards ({storage.DEFAULT_CACHE})")
        command.set_defaults(run=run)
    sheet = commands.add_parser("preview", help="a picture of some samples with their masks outlined")
    sheet.add_argument("path", help="one split, such as data/coins/train")
    sheet.add_argument("--out", type=Path, default=Path("preview.png"), help="picture to write (preview.png)")
    sheet.add_argument("--count", type=int, default=16, help="samples (16)")
    sheet.set_defaults(run="run_preview")

    which = commands.add_parser(
        "plan", help="which samples a rank takes in which step, from the index alone, as JSON lines"
    )
    which.add_argument("path", metavar="INDEX", help="one split, or its index.json")
    for option, default, text in (
        ("--global-batch-size", 8, "samples in one step over all ranks"),
        ("--world-size", 1, "number of ranks"),
        ("--rank", 0, "which of them, 0 first"),
        ("--epoch", 0, "epoch, 0 first"),
        ("--from-step", 0, "first step, counted within the epoch"),
        ("--steps", 1, "how many"),
        ("--seed", 0, "run.seed of the training"),
        ("--window", 16, "data.shuffle_window of the training, shards"),
    ):
        which.add_argument(option, type=int, default=default, help=f"{text} ({default})")
    which.set_defaults(run="run_plan")
    return parser


def add_sources(pack: Any) -> None:
    """Adds what shards are made of: a folder, COCO files, arrays, the built-in coins."""
    folder = pack.add_parser("folder", help="a folder of images and a folder of masks, paired by file stem")
    folder.add_argument(
        "--images", type=Path, required=True, help="png, jpg, tif (pages are bands), npy or npz (H, W, bands)"
    )
    folder.add_argument("--masks", type=Path, help="labels (H, W), or binary; default: in the .npz files of --images")
    folder.add_argument("--out", type=Path, required=True, help="folder to make: OUT/train, OUT/val, OUT/test")
    add_split(folder)
    add_labels(folder)
    add_preparation(folder)
    folder.add_argument(
        "--mask_suffix", default="", help="what mask stems end with beyond the image's, as in a_mask.png"
    )
    folder.add_argument(
        "--channel_suffix",
        default="",
        help="where an image's channels are files of their own: what the first ends with (_0000, others count up from it), or "
        "a list (_red,_green)",
    )
    add_reading(folder)
    add_values(folder)
    folder.set_defaults(run="run_pack_folder")

    coco = pack.add_parser("coco", help="a folder of images and a COCO file of objects")
    coco.add_argument("--images", type=Path, required=True, help="folder of the images")
    coco.add_argument("--annotations", type=Path, required=True, help="the JSON file")
    coco.add_argument("--out", type=Path, required=True, help="folder to make: OUT/train, OUT/val, OUT/test")
    coco.add_argument("--split_name", choices=SPLITS, help="put all into this split: COCO has a file a split")
    coco.add_argument("--categories", type=lambda text: text.split(","), help="names, as classes 1, 2, ... (all)")
    coco.add_argument("--binary", action="store_true", help="all categories are one foreground")
    add_split(coco)
    add_preparation(coco)
    add_reading(coco)
    coco.add_argument("--by_basename", action="store_true", help="look for images by the last part of their names")
    coco.add_argument(
        "--on_bad_annotation",
        choices=ON_BAD_SAMPLE,
        default="error",
        help="skip: leave out annotations that outline nothing, and list them",
    )
    coco.set_defaults(run="run_pack_coco")

    arrays = pack.add_parser("arrays", help="one array of images and one of masks")
    arrays.add_argument("--images", type=Path, required=True, help=".npy (mapped) or .npz of N images")
    arrays.add_argument("--masks", type=Path, required=True, help=".npy or .npz of (N, height, width)")
    arrays.add_argument("--layout", choices=LAYOUTS, default="NHWC", help="axes of the images (NHWC)")
    arrays.add_argument("--out", type=Path, required=True, help="folder to make: OUT/train, OUT/val, OUT/test")
    add_split(arrays)
    add_labels(arrays)
    arrays.add_argument("--bands", type=int, help="bring every image to so many bands")
    arrays.add_argument("--samples_per_shard", type=int, default=256, help="samples a shard (256)")
    arrays.add_argument("--nodata", type=float, help="value that stands for none in images; nan too")
    add_values(arrays)
    arrays.set_defaults(run="run_pack_arrays")

    built_in = pack.add_parser("coins", help="the built-in data: real coins on real textures")
    built_in.add_argument("--out", type=Path, required=True, help="folder to make: OUT/train, OUT/val, OUT/test")
    for split, count in COINS_DEFAULT.items():
        built_in.add_argument(f"--{split}", type=int, default=count, help=f"images for {split} ({count})")
    built_in.add_argument("--seed", type=int, default=COINS_SEED, help=f"seed ({COINS_SEED})")
    built_in.set_defaults(run="run_pack_coins")


def add_split(parser: argparse.ArgumentParser) -> None:
    """Adds the options that say which sample goes into which split."""
    parser.add_argument("--split", type=Path, help="CSV with columns stem,split (train, val, test); default: at random")
    parser.add_argument(
        "--val_share", type=float, default=0.2, help="share for validation where there is no --split (0.2)"
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of the random split (0)")


def add_preparation(parser: argparse.ArgumentParser) -> None:
    """Adds the options that say what is done to images on the way."""
    parser.add_argument("--bands", type=int, help="bring every image to so many bands")
    parser.add_argument("--longest_side", type=int, help="shrink images to at most so many pixels a side")
    parser.add_argument("--samples_per_shard", type=int, default=256, help="samples a shard (256)")


def add_labels(parser: argparse.ArgumentParser) -> None:
    """Adds the options that say what mask values mean."""
    parser.add_argument(
        "--labels",
        choices=KINDS,
        default="auto",
        help="what mask values mean; auto: binary where one value stands beside 0",
    )
    parser.add_argument(
        "--num_classes", type=int, help="1 for binary, else classes with the background; default: from the masks"
    )
    parser.add_argument("--ignore_label", type=mask_value, help="mask value that takes no part; nan too")


def mask_value(text: str) -> int:
    """Reads a mask's value, which may be nan."""
    return NAN_LABEL if text.lower() == "nan" else int(text)


def add_reading(parser: argparse.ArgumentParser) -> None:
    """Adds the options that say how image files are read."""
    parser.add_argument(
        "--alpha",
        choices=ALPHA,
        default="auto",
        help="bands flagged as transparency; auto: kept where any holds data, else dropped",
    )
    parser.add_argument(
        "--orientation",
        choices=ORIENTATION,
        default="auto",
        help="images that EXIF or TIFF says are turned: apply turns them, ignore leaves them; auto: as masks' sizes tell",
    )
    parser.add_argument(
        "--nodata", type=float, help="value that stands for none in images, beside what their files say; nan too"
    )


def add_values(parser: argparse.ArgumentParser) -> None:
    """Adds the options that say how mask files are read."""
    parser.add_argument(
        "--threshold", type=float, help="value from which on a pixel is foreground, for masks of soft edges"
    )
    parser.add_argument("--colors", type=Path, help="CSV of columns color,label (#ff0000,1), for masks of colours")
    parser.add_argument(
        "--white_is_zero",
        choices=WHITE_IS_ZERO,
        default="ask",
        help="masks whose files say that 0 is white: turn their values round, or keep them; of 1 bit they are turned",
    )
