"""Find and open the images to segment: files, folders of files, Zarr arrays, shards, and URLs of each."""

import contextlib
import json
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence, Set
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path, PurePosixPath
from urllib.parse import quote, unquote, urlsplit

from deepskip.data_shards import index, storage, trouble
from deepskip.data_shards.decoding import decode_image
from deepskip.data_shards.entries import FORMATS, STORED
from deepskip.data_shards.index import Index
from deepskip.data_shards.pictures import Reading
from deepskip.data_shards.sources.elsewhere import how_to_convert, kind_of
from deepskip.jobs.prediction.georeference import world_files
from deepskip.jobs.prediction.rasters import Raster, in_memory, open_raster
from deepskip.jobs.settings import NotHere, stop

EXTENSIONS = (*FORMATS, "zarr")
WORLD_FILES = (".tfw", ".tifw", ".pgw", ".pngw", ".jgw", ".jpgw", ".bpw", ".wld", ".aux.xml")


@dataclass(frozen=True)
class Item:
    """Describe one image to segment.

    Attributes:
        name: Name of its outputs, with folders and without extension.
        location: Path or URL of the image; for a sample, the folder of its shards.
        extension: Format: the extension in lower case, without the dot.
        bytes: Size of its file; Zarr arrays count as very large, so that they are never grouped.
        stamp: Text that changes when the image or its world file changes.
        sample: Number of the sample in its shards, or None for other images.
        file: Path of the image's file, from the folder that was given.
    """

    name: str
    location: str
    extension: str
    bytes: int
    stamp: str
    sample: int | None = None
    file: str = ""

    @property
    def file_name(self) -> str:
        """The image's own name, for files that list images."""
        return self.file or f"{self.name}.{self.extension}"

    def __str__(self) -> str:
        return self.location if self.sample is None else f"{self.location}: sample {unquote(self.name)}"


def find(places: Sequence[str], out: Path | None = None) -> list[Item]:
    """List the images at files, folders, shards and URLs.

    Args:
        places: Paths and URLs.
        out: Folder of the outputs, which are no images to segment if it lies in one of the folders.

    Raises:
        SystemExit: A place has no images, or two images would be written to the same outputs.
    """
    items = [item for place in places for item in found_at(place, out)]
    names: dict[str, Item] = {}
    clashes = []
    for item in items:
        if (other := names.setdefault(item.name, item)) is not item:
            clashes.append(f"--images: {other} and {item} would both be written to {item.name}")
    for item in items:
        for folder in PurePosixPath(item.name).parents:
            named = names.get(str(folder.with_suffix(""))) if folder.suffix else None
            if named is not None:
                clashes.append(f"--images: the mask of {named} may have the name of the folder of {item}, {folder}")
    if clashes:
        stop(
            "\n".join(
                [*clashes[:20], "rename one image of each pair, or run them separately with different --out folders"]
            )
        )
    return items


def found_at(place: str, out: Path | None = None) -> list[Item]:
    """List the images at one place, without those in `out`; end the program if there are none."""
    try:
        if extension_of(place) == "zarr":
            return [zarr_item(place, plain_name(place))]
        if storage.exists(storage.join(place, index.FILE)) and not is_foreign(place):
            return samples(place)
        if storage.is_remote(place):
            return remote_items(place)
    except (storage.StorageError, index.BrokenIndex, index.MissingIndex) as error:
        stop(f"--images: {error}")
    path = storage.local(place)
    if path.is_file():
        # A file has the name that it would have in its folder.
        return [file_item(path, plain(path.stem) if path.name.startswith(".") else path.stem, path.name)]
    if not path.is_dir():
        stop(f"--images: {place} does not exist", NotHere)
    if out is not None and out.is_dir() and out.samefile(path):
        stop(
            f"--out: {out} is the folder of the images, and the next prediction would take its masks and overlays for images; "
            f"choose another, such as {out / 'predictions'}"
        )
    if next(path.glob("*.tar"), None):
        stop(f"--images: {place} holds .tar files but no {index.FILE}. Make one: deepskip index {place}")
    others: Counter[str] = Counter()
    items = [
        zarr_item(str(each), name) if each.suffix == ".zarr" else file_item(each, name, inside.as_posix())
        for each in walk(path, others=others, out=out)
        for inside in [each.relative_to(path)]
        for name in [inside.with_suffix("").as_posix()]
    ]
    if not items:
        stop(f"--images: {place} holds no images ({', '.join(EXTENSIONS)}){how_to_convert(others, path)}")
    if others:
        kinds = ", ".join(f"{count} {kind}" for kind, count in others.most_common(12))
        print(f"skipped in {place}, since only {', '.join(EXTENSIONS)} are supported: {kinds}", flush=True)
    return items


def is_foreign(place: str) -> bool:
    """Return whether a folder on this machine has an index.json of another program, and no shards."""
    if storage.is_remote(place) or next(storage.local(place).glob("*.tar"), None):
        return False
    try:
        found = json.loads(storage.read_bytes(storage.join(place, index.FILE)))
    except ValueError:
        return True
    return not isinstance(found, dict) or found.get("format") != index.FORMAT


def walk(
    folder: Path, above: Set[tuple[int, int]] = frozenset(), others: Counter[str] | None = None, out: Path | None = None
) -> Iterator[Path]:
    """Yield the images of a folder and its subfolders, sorted, without hidden files and the inner files of Zarr arrays.

    Pipes, broken links, links back to a parent folder and results of other predictions are reported and skipped.

    Args:
        folder: The folder to search.
        above: Identities of the folders that led here.
        others: Counter to fill with the kinds of files that are not images.
        out: Folder to pass over, with the results of this prediction.
    """
    above = {*above, identity(folder)}
    for each in sorted(folder.iterdir()):
        if each.name.startswith("."):
            continue
        if each.is_dir() and each.suffix != ".zarr":
            if identity(each) in above:
                trouble.passed_over(each, "a link back to a folder that it is in")
            elif out is not None and out.is_dir() and out.samefile(each):
                continue
            elif (each / "masks").is_dir() and next((each / "done").rglob("*.json"), None):
                trouble.passed_over(each, "results of deepskip predict")
            else:
                yield from walk(each, above, others, out)
        elif extension_of(each.name) in EXTENSIONS:
            if each.is_file() or each.is_dir():
                yield each
            else:
                trouble.passed_over(each, "no file" if each.exists() else "a link to nothing")
        # World files belong to the image of the same name.
        elif others is not None and not each.name.lower().endswith(WORLD_FILES):
            others[kind_of(each)] += 1


def identity(folder: Path) -> tuple[int, int]:
    """Return a folder's device and inode numbers, which are the same through every link."""
    status = folder.stat()
    return status.st_dev, status.st_ino


def file_item(path: Path, name: str, file: str) -> Item:
    """Return the item of an image file, with the name of its outputs and its own."""
    status = path.stat()
    worlds = [each.stat() for each in world_files(path) if each.is_file()]
    stamp = "-".join(f"{each.st_size}-{each.st_mtime_ns}" for each in (status, *worlds))
    return Item(name, str(path), extension_of(path.name), status.st_size, stamp, file=file)


def zarr_item(location: str, name: str) -> Item:
    """Return the item of a Zarr array, stamped by the number, size and newest time of its files.

    Remote arrays have an empty stamp.

    Raises:
        SystemExit: There is no such local folder.
    """
    stamp = ""
    if not storage.is_remote(location):
        folder = storage.local(location)
        if not folder.is_dir():
            stop(f"--images: {location} does not exist", NotHere)
        found = [each.stat() for each in folder.rglob("*")]
        stamp = (
            f"{len(found)}-{sum(each.st_size for each in found)}-{max((each.st_mtime_ns for each in found), default=0)}"
        )
    # The huge size keeps the array from being grouped with small files.
    return Item(name, location, "zarr", 2**40, stamp)


def samples(folder: str) -> list[Item]:
    """List the samples of shards; their keys are not trusted as paths, so the names are quoted."""
    table = index_of(folder)
    # Images in tiles are TIFF files.
    kinds = {each: "tif" if each == "tiles" else each for each in STORED}
    return [
        Item(plain(entry.key), folder, kinds[entry.image.format], entry.image.length, str(entry.digest), number)
        for start in range(0, table.num_samples, 65536)
        for number, entry in enumerate(table.entries(list(range(start, min(start + 65536, table.num_samples)))), start)
    ]


@lru_cache(maxsize=16)
def index_of(folder: str) -> Index:
    """Load the index of a folder of shards, cached in this process."""
    return index.load_index(folder)


def remote_items(place: str) -> list[Item]:
    """List the one image at a URL, or the images of a folder if the storage can list it.

    Raises:
        SystemExit: The folder holds no images.
    """
    fs, path = storage.filesystem(place)

    def item(info: dict[str, object], location: str) -> Item:
        stamp = "-".join(
            str(info.get(key)) for key in ("size", "ETag", "etag", "mtime", "LastModified") if info.get(key)
        )
        return Item(plain_name(location), location, extension_of(location), int(str(info.get("size") or 0)), stamp)

    if extension_of(place) in EXTENSIONS:
        return [item(storage.with_retries(place, lambda: fs.info(path)), place)]
    found = storage.with_retries(place, lambda: fs.ls(path, detail=True))
    listed = [
        item(info, storage.join(place, info["name"].rstrip("/").rsplit("/", 1)[-1]))
        for info in sorted(found, key=lambda info: info["name"])
        if extension_of(info["name"]) in EXTENSIONS
    ]
    if not listed:
        stop(f"--images: {place} holds no images ({', '.join(EXTENSIONS)})")
    return listed


def extension_of(location: str) -> str:
    """Return the extension in lower case, without the dot; the query of a URL is ignored."""
    path = urlsplit(location).path if "://" in location else location
    return Path(path.rstrip("/")).suffix[1:].lower()


def plain_name(location: str) -> str:
    """Return the last part of a path or URL as a safe file name, without its extension."""
    path = urlsplit(location).path if "://" in location else location
    return plain(Path(path.rstrip("/")).stem)


def plain(name: str) -> str:
    """Return a safe file name for any string; different strings get different names."""
    quoted = quote(name, safe=" +=,@()[]")
    return f"%2E{quoted[1:]}" if quoted.startswith(".") else quoted


@contextmanager
def opened(item: Item, bands: int | None, reading: Reading) -> Iterator[Raster]:
    """Open an image; a remote file is fetched into a temporary file for as long as the image is open.

    Args:
        item: The image.
        bands: Number of bands that the model takes; None for any.
        reading: How transparency, orientation and missing values are handled. For samples, the settings of their shards
            take precedence.

    Yields:
        The open image.

    Raises:
        ValueError: The image cannot be decoded; the message gives the reason.
        OSError: The image cannot be read.
    """
    if item.sample is not None:
        stored = index_of(item.location).reading
        # Read the image as the training reads its shards; --nodata applies if the shards name no value.
        own = replace(stored, missing=True, nodata=reading.nodata if stored.nodata is None else stored.nodata)
        yield in_memory(
            decode_image(item.extension, sample_bytes(item.location, item.sample), bands=bands, reading=own)
        )
        return
    with contextlib.ExitStack() as stack:
        location = item.location.removeprefix("file://")
        if storage.is_remote(location) and item.extension != "zarr":
            suffix = f".{item.extension}"
            file = stack.enter_context(tempfile.NamedTemporaryFile(prefix="deepskip-", suffix=suffix))
            storage.download(location, Path(file.name))
            location = file.name
        yield stack.enter_context(open_raster(location, item.extension, bands, reading))


def sample_bytes(folder: str, number: int) -> bytes:
    """Read the encoded image of a sample from its shard.

    Args:
        folder: Folder or URL of the shards.
        number: Number of the sample.
    """
    table = index_of(folder)
    entry = table.entries([number])[0]
    location, start, stop = (
        table.shard_location(entry.shard),
        entry.image.offset,
        entry.image.offset + entry.image.length,
    )
    if storage.is_remote(location):
        fs, path = storage.filesystem(location)
        part: bytes = storage.with_retries(location, lambda: fs.cat_file(path, start=start, end=stop))
        return part
    with Path(location.removeprefix("file://")).open("rb") as file:
        file.seek(start)
        return file.read(stop - start)
