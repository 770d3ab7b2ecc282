"""Command line of the data commands, which does not import torch, so that --help is quick."""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from deepskip.data_shards import storage, trouble
from deepskip.data_shards.arguments import with_numbers
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
    """Run one data command.

    Bad input ends the process with status 2 and one line on stderr.

    Args:
        argv: The arguments after the program's name; None takes those of the process.
    """
    numbers = {"--nodata", "--threshold", "--ignore_label"}
    arguments = build_parser().parse_args(with_numbers(sys.argv[1:] if argv is None else argv, numbers))
    # Imported here, so that --help and errors in arguments do not wait for the libraries.
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
    """Build the parser of all data commands."""
    parser = argparse.ArgumentParser(prog="deepskip", description="Make, check and look at WebDataset shards.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    add_sources(commands.add_parser("pack", help="make shards").add_subparsers(required=True, metavar="SOURCE"))

    index = commands.add_parser(
        "index", help="make the index of .tar shards that others wrote, or upgrade an older one"
    )
    index.add_argument("path", help="folder or URL (s3://, gs://, http://) of the shards")
    index.add_argument("--out", help="folder or URL to write the index to (the folder of the shards)")
    index.add_argument("--shards", help="names of the shards, if the location cannot be listed: 'a-{000..099}.tar'")
    index.add_argument("--image", help="suffix of images after the key: jpg, img, image (detected in the first shard)")
    index.add_argument("--mask", help="suffix of masks after the key: png, seg, mask (detected in the first shard)")
    add_labels(index)
    add_reading(index)
    add_values(index)
    index.add_argument("--bands", type=positive, help="resample every image to this number of bands when it is read")
    index.add_argument(
        "--on_bad_sample",
        choices=ON_BAD_SAMPLE,
        default="error",
        help=f"skip: skip faulty samples and shards, and list them in {BAD_SAMPLES} (error)",
    )
    index.add_argument("--workers", type=positive, help="number of processes (one a core)")
    index.set_defaults(run="run_index")

    add_append(commands)
    add_ingest(commands)
    joined = commands.add_parser("compact", help="join the generations of a data set to a new closed set, elsewhere")
    joined.add_argument("path", metavar="DATA", help="a data set, or one split of it: folder or URL")
    joined.add_argument("--out", type=storage.local, required=True, help="folder to make")
    joined.add_argument("--samples_per_shard", type=positive, default=256, help="samples in a shard (256)")
    joined.set_defaults(run="run_compact")

    for name, run, text in (
        ("verify", "run_verify", "compare shards with their index and decode every sample"),
        ("info", "run_info", "counts, sizes, bands, class balance, object sizes"),
    ):
        command = commands.add_parser(name, help=text)
        command.add_argument("path", help="a data set, or one split of it: folder or URL")
        command.add_argument(
            "--cache", type=storage.local, help=f"folder for copies of remote shards ({storage.DEFAULT_CACHE})"
        )
        command.set_defaults(run=run)
        if name == "verify":
            command.add_argument(
                "--remove_strays",
                action="store_true",
                help="remove files of appends that were not committed and are older than --older_than",
            )
            command.add_argument(
                "--older_than", type=float, default=24, help="hours; an append in progress may be as old (24)"
            )
    sheet = commands.add_parser("preview", help="write a picture of some samples with their masks outlined")
    sheet.add_argument("path", help="one split, such as data/coins/train")
    sheet.add_argument("--out", type=storage.local, default=Path("preview.png"), help="picture to write (preview.png)")
    sheet.add_argument("--count", type=positive, default=16, help="number of samples (16)")
    sheet.set_defaults(run="run_preview")

    which = commands.add_parser(
        "order",
        aliases=["plan"],
        help="print which samples and shards a rank reads in each step, from the index alone, as JSON lines",
    )
    which.add_argument("path", metavar="INDEX", help="one split, or its index.json")
    for option, default, text in (
        ("--global-batch-size", 8, "samples in one step over all ranks"),
        ("--world-size", 1, "number of ranks"),
        ("--rank", 0, "rank, counted from 0"),
        ("--epoch", 0, "epoch, counted from 0"),
        ("--from-step", 0, "first step, counted within the epoch"),
        ("--steps", 1, "number of steps"),
        ("--seed", 0, "run.seed of the training"),
        ("--window", 16, "data.shuffle_window of the training, shards"),
        ("--lanes", 1, "data.lanes of the training"),
    ):
        which.add_argument(option, type=int, default=default, help=f"{text} ({default})")
    which.add_argument("--generations", type=positive, help="number of generations, from the first (all)")
    which.add_argument("--fixed-lanes", action="store_true", help="data.fixed_lanes of the training")
    which.set_defaults(run="run_plan")
    return parser


def add_sources(pack: Any) -> None:
    """Add a command for each source of samples: a folder, COCO files, arrays, the built-in coins.

    Args:
        pack: The subparsers of `deepskip pack`.
    """
    folder = pack.add_parser("folder", help="a folder of images and a folder of masks, paired by file stem")
    folder.add_argument(
        "--images", type=storage.local, required=True, help="png, jpg, tif (pages are bands), npy or npz (H, W, bands)"
    )
    folder.add_argument(
        "--masks", type=storage.local, help="labels (H, W), or binary; default: in the .npz files of --images"
    )
    folder.add_argument("--out", type=storage.local, required=True, help="folder to make: OUT/train, OUT/val, OUT/test")
    add_split(folder)
    add_labels(folder)
    add_preparation(folder)
    folder.add_argument(
        "--mask_suffix", default="", help="what follows the image's stem in the mask's, such as _mask in a_mask.png"
    )
    folder.add_argument(
        "--channel_suffix",
        default="",
        help="if each channel is a file of its own: the suffix of the first (_0000, the others count up from it), or "
        "a list (_red,_green)",
    )
    add_reading(folder)
    add_values(folder)
    folder.set_defaults(run="run_pack_folder")

    coco = pack.add_parser("coco", help="a folder of images and a COCO file of objects")
    coco.add_argument("--images", type=storage.local, required=True, help="folder of the images")
    coco.add_argument("--annotations", type=storage.local, required=True, help="the JSON file")
    coco.add_argument("--out", type=storage.local, required=True, help="folder to make: OUT/train, OUT/val, OUT/test")
    coco.add_argument(
        "--categories", type=lambda text: text.split(","), help="category names, which become classes 1, 2, ... (all)"
    )
    coco.add_argument("--binary", action="store_true", help="merge all categories into one foreground class")
    add_split(coco)
    add_preparation(coco)
    add_reading(coco)
    coco.add_argument("--by_basename", action="store_true", help="look up images by the last part of their file names")
    coco.add_argument(
        "--on_bad_annotation",
        choices=ON_BAD_SAMPLE,
        default="error",
        help="skip: skip annotations without a valid outline, and list them",
    )
    coco.set_defaults(run="run_pack_coco")

    arrays = pack.add_parser("arrays", help="one array of images and one of masks")
    arrays.add_argument("--images", type=storage.local, required=True, help=".npy (mapped) or .npz of N images")
    arrays.add_argument("--masks", type=storage.local, required=True, help=".npy or .npz of (N, height, width)")
    arrays.add_argument("--layout", choices=LAYOUTS, default="NHWC", help="axes of the images (NHWC)")
    arrays.add_argument("--out", type=storage.local, required=True, help="folder to make: OUT/train, OUT/val, OUT/test")
    add_split(arrays)
    add_labels(arrays)
    arrays.add_argument("--bands", type=positive, help="resample every image to this number of bands")
    add_storing(arrays)
    arrays.add_argument("--nodata", type=float, help="pixel value that means no data in images; nan too")
    add_values(arrays)
    arrays.set_defaults(run="run_pack_arrays")

    built_in = pack.add_parser("coins", help="the built-in data: real coins on real textures")
    built_in.add_argument(
        "--out", type=storage.local, required=True, help="folder to make: OUT/train, OUT/val, OUT/test"
    )
    for split, count in COINS_DEFAULT.items():
        built_in.add_argument(
            f"--{split}", type=positive, default=count, help=f"number of images for {split} ({count})"
        )
    built_in.add_argument("--seed", type=int, default=COINS_SEED, help=f"seed ({COINS_SEED})")
    built_in.set_defaults(run="run_pack_coins")


def add_append(commands: Any) -> None:
    """Add the command that appends a generation to a data set.

    Args:
        commands: The subparsers of `deepskip`.
    """
    append = commands.add_parser(
        "append",
        help="append samples to a data set as its next generation",
        description="Append samples to a data set as its next generation. Several writers may append at once. What --images is "
        "decides the source: a folder, with --annotations one of a COCO file, or an array. Bands and longest side are those of "
        "the data set. So is how images and masks are read, where no option says otherwise.",
    )
    append.add_argument("path", metavar="DATA", help="a data set, or one split of it: folder or URL")
    append.add_argument("--images", type=storage.local, help="folder of images, or .npy or .npz of N images")
    append.add_argument("--masks", type=storage.local, help="folder of masks, or .npy or .npz of N masks")
    append.add_argument("--annotations", type=storage.local, help="COCO file of --images")
    append.add_argument("--shards", help="in place of --images: folder or URL of .tar shards, which are copied")
    append.add_argument("--split_name", choices=SPLITS, default="train", help="split to append to (train)")
    append.add_argument(
        "--watermark", type=float, help="time of the newest data, in seconds since 1970 (that of the newest file)"
    )
    append.add_argument(
        "--offsets",
        type=json_object,
        help="position in each source after this generation, a JSON object of names and numbers or texts",
    )
    append.add_argument(
        "--repeated_keys", action="store_true", help="accept samples that have keys of earlier generations"
    )
    append.add_argument(
        "--cache", type=storage.local, help=f"folder for copies of remote files ({storage.DEFAULT_CACHE})"
    )
    append.add_argument(
        "--categories", help="of COCO: category names, in the order of the data set's classes (those of the data set)"
    )
    add_reading_as_before(append)
    for option, of, text in (
        ("--mask_suffix", "a folder", "what follows the image's stem in the mask's"),
        ("--channel_suffix", "a folder", "suffixes of the files of an image's channels"),
        ("--layout", "arrays", f"axes of the images: {', '.join(LAYOUTS)} (NHWC)"),
        ("--key_prefix", "arrays", "what precedes a sample's number in its key (stem of --images and _)"),
        ("--image", "shards", "suffix of images after the key"),
        ("--mask", "shards", "suffix of masks after the key"),
    ):
        append.add_argument(option, help=f"of {of}: {text}")
    append.add_argument("--binary", action="store_true", help="of COCO: merge all categories into one foreground class")
    append.add_argument(
        "--by_basename", action="store_true", help="of COCO: look up images by the last part of their names"
    )
    append.set_defaults(run="run_append")


def add_ingest(commands: Any) -> None:
    """Add the command that fills a data set from a source that never ends.

    Args:
        commands: The subparsers of `deepskip`.
    """
    ingest = commands.add_parser(
        "ingest",
        help="append what arrives in a folder, an object store or a Kafka topic, each item once",
        description="Append what arrives at a source to a data set as generations, each item exactly once, until SIGTERM. "
        "After a crash, the same command resumes where the data set ends.",
    )
    ingest.add_argument(
        "--from",
        dest="origin",
        required=True,
        metavar="SOURCE",
        help="folder:DIR, s3://BUCKET/PREFIX (or another object store) or kafka://HOST:PORT/TOPIC",
    )
    ingest.add_argument("--to", required=True, metavar="DATA", help="a data set, or one split of it: folder or URL")
    ingest.add_argument("--split_name", choices=SPLITS, default="train", help="split to append to (train)")
    ingest.add_argument("--name", help="name of the source in keys and offsets (from the source; it stays the same)")
    ingest.add_argument(
        "--samples", type=positive, default=256, help="samples at which a generation is committed (256)"
    )
    ingest.add_argument(
        "--seconds",
        type=float,
        default=60,
        help="seconds after its first sample at which a generation is committed (60)",
    )
    ingest.add_argument("--idle_seconds", type=float, help="end after this time without anything new (never)")
    ingest.add_argument(
        "--wait_for",
        type=storage.local,
        metavar="RUN",
        help="run (runs/NAME) with data.follow to wait for while it is --behind",
    )
    ingest.add_argument("--behind", type=positive, default=10_000, help="samples that it may be behind (10000)")
    ingest.add_argument(
        "--journal",
        type=storage.local,
        help="file that lists what cannot be used, and why (refused.jsonl in the split)",
    )
    ingest.add_argument(
        "--mask_suffix",
        default="",
        help="of a folder or store: what follows the image's stem in the mask's, in one folder (images/ and masks/ in it)",
    )
    ingest.add_argument(
        "--settle_seconds",
        type=float,
        default=2,
        help="of a folder: a file whose writing was not observed counts after this time without a change (2)",
    )
    ingest.add_argument("--poll_seconds", type=float, default=5, help="of a store: seconds between listings (5)")
    ingest.add_argument(
        "--paths_under", help="of Kafka: folder or URL of the files that messages name (such are refused)"
    )
    ingest.add_argument(
        "--kafka_settings", type=json_file, help="of Kafka: JSON file of librdkafka's settings, such as TLS and SASL"
    )
    ingest.add_argument(
        "--cache", type=storage.local, help=f"folder for copies of remote files ({storage.DEFAULT_CACHE})"
    )
    add_reading_as_before(ingest)
    ingest.set_defaults(run="run_ingest")


def add_reading_as_before(parser: argparse.ArgumentParser) -> None:
    """Add the options that define how the files of new samples are read and stored; by default as those of the data set."""
    parser.add_argument("--labels", choices=KINDS, help="meaning of mask values, as for pack (as in the data set)")
    parser.add_argument(
        "--ignore_label", type=mask_value, help="mask value to ignore in training and metrics (that of the data set)"
    )
    add_storing(parser)
    parser.add_argument(
        "--alpha", choices=ALPHA, help="bands flagged as transparency, as for pack (as in the data set)"
    )
    parser.add_argument("--orientation", choices=ORIENTATION, help="rotated images, as for pack (as in the data set)")
    add_values(parser)
    parser.set_defaults(white_is_zero=None)


def json_object(text: str) -> dict[str, Any]:
    """Parse a JSON object."""
    try:
        found = json.loads(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not JSON: {error}") from error
    if not isinstance(found, dict):
        raise argparse.ArgumentTypeError(f"{text!r} is not a JSON object")
    return found


def json_file(text: str) -> dict[str, Any]:
    """Read a file with a JSON object."""
    try:
        return json_object(Path(text).read_text())
    except (OSError, UnicodeDecodeError) as error:
        raise argparse.ArgumentTypeError(f"{text!r} cannot be read: {error}") from error


def add_split(parser: argparse.ArgumentParser) -> None:
    """Add the options that assign samples to splits."""
    parser.add_argument(
        "--split_name", choices=SPLITS, help="put all images into this split, such as those of one COCO file"
    )
    parser.add_argument(
        "--split", type=storage.local, help="CSV with columns stem,split (train, val, test); default: at random"
    )
    parser.add_argument(
        "--val_share", type=float, default=0.2, help="share of samples for validation without --split (0.2)"
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of the random split (0)")


def add_preparation(parser: argparse.ArgumentParser) -> None:
    """Add the options that resample and resize images as they are packed."""
    parser.add_argument("--bands", type=positive, help="resample every image to this number of bands")
    parser.add_argument(
        "--longest_side", type=positive, help="shrink larger images so that the longer side has this many pixels"
    )
    add_storing(parser)


def add_storing(parser: argparse.ArgumentParser) -> None:
    """Add the options that define how samples are stored."""
    parser.add_argument("--samples_per_shard", type=positive, default=256, help="samples in a shard (256)")
    parser.add_argument(
        "--tile",
        type=tile_side,
        help="store images with a longer side, and those of more than 4 bands, as TIFF in tiles of this many pixels a side, of "
        "which a crop or some bands are read alone: a multiple of 16, such as 256 (off)",
    )


def tile_side(text: str) -> int:
    """Parse the side of a tile."""
    if not text.isdigit() or int(text) % 16 or not 16 <= int(text) <= 4096:
        raise argparse.ArgumentTypeError(f"{text!r} is not a multiple of 16 from 16 to 4096")
    return int(text)


def add_labels(parser: argparse.ArgumentParser) -> None:
    """Add the options that define what mask values mean."""
    parser.add_argument(
        "--labels",
        choices=KINDS,
        default="auto",
        help="meaning of mask values; auto: binary if only one value other than 0 occurs",
    )
    parser.add_argument(
        "--num_classes",
        type=positive,
        help="1 for binary, else the number of classes with background; default: from the masks",
    )
    parser.add_argument("--ignore_label", type=mask_value, help="mask value to ignore in training and metrics; nan too")


def positive(text: str) -> int:
    """Parse an integer of 1 or more."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is not 1 or more")
    return value


def mask_value(text: str) -> int:
    """Parse a mask value, an integer or "nan"."""
    value = NAN_LABEL if text.lower() == "nan" else int(text)
    if not NAN_LABEL <= value < 2**31:
        raise argparse.ArgumentTypeError(f"{value} is not a mask value, {NAN_LABEL} to {2**31 - 1}")
    return value


def add_reading(parser: argparse.ArgumentParser) -> None:
    """Add the options that define how image files are read."""
    parser.add_argument(
        "--alpha",
        choices=ALPHA,
        default="auto",
        help="bands flagged as transparency; auto: keep them if any holds data, else drop them",
    )
    parser.add_argument(
        "--orientation",
        choices=ORIENTATION,
        default="auto",
        help="images with an EXIF or TIFF orientation: apply rotates them, ignore does not; auto: decided by the masks' sizes",
    )
    parser.add_argument(
        "--nodata", type=float, help="pixel value that means no data in images, besides the value in each file; nan too"
    )


def add_values(parser: argparse.ArgumentParser) -> None:
    """Add the options that define how mask files are read."""
    parser.add_argument("--threshold", type=float, help="lowest value that is foreground, for masks with soft edges")
    parser.add_argument(
        "--colors", type=storage.local, help="CSV with columns color,label (#ff0000,1), for masks that hold colours"
    )
    parser.add_argument(
        "--white_is_zero",
        choices=WHITE_IS_ZERO,
        default="ask",
        help="masks whose files declare that 0 is white: invert values or keep them; ask: invert 1-bit masks, refuse others",
    )
