"""Index of a folder of shards: where each sample lies, and the properties of the data that a network needs.

There are two files next to the shards. index.json holds the split's properties and its shards. It names an Arrow file with
the samples, up to a hundred million, as columns that are mapped into memory and not read. index.json is written last.
Generations that are appended later have manifests (`manifest`), and are read with it as one split.
"""

import contextlib
import hashlib
import json
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from deepskip.data_shards import index_check, manifest, storage
from deepskip.data_shards.entries import SCHEMA, STATISTICS, STORED, Member, SampleEntry, schema_of
from deepskip.data_shards.labels import Labels
from deepskip.data_shards.origin import Origin, origin_of
from deepskip.data_shards.percentiles import centre_and_scale
from deepskip.data_shards.pictures import AS_IT_COMES, Reading
from deepskip.data_shards.plain_values import (
    PERCENTILES,
    labels_of,
    percentiles_of,
    plain_labels,
    plain_number,
    reading_of,
)

FILE = manifest.INDEX
FORMAT = "deepskip-shards"
VERSION = 3
# Version 2 has no statistics of single images.
READABLE = (2, VERSION)


@dataclass(frozen=True)
class ShardEntry:
    """One tar file in the index.

    Attributes:
        name: File name.
        bytes: Size in bytes.
        sha256: sha256 of its contents, as hexadecimal digits.
        samples: Number of samples.
    """

    name: str
    bytes: int
    sha256: str
    samples: int


@dataclass(frozen=True)
class Index:
    """A split: its shards, its samples in the order of the tars, and their common properties.

    Attributes:
        shards: The tar files.
        samples: Arrow table of `schema_of`, one row for each sample.
        bands: Number of bands of every image.
        dtype: "uint8" if every image is uint8, else "float32".
        num_classes: 1 for binary, else the number of classes, where class 0 is background.
        ignore_index: Label of ignored pixels.
        mean: Mean of each band over all pixels of the split, in the images' own units.
        std: Standard deviation of each band, likewise.
        preparation: What was done to the source images and must be done to new ones: "bands" and "longest_side", each a
            number or None, and "nodata" if a no-data value was named.
        formats: File formats that the format columns of `samples` refer to by position.
        labels: How mask values become labels when they are read; None if they are labels.
        base: Location of the shards, if they are not next to the index.
        source: Fingerprint of the files and options that the split was packed from.
        location: Where the index was read from.
        reading: How images are read.
        percentiles: The percentiles `percentiles.SHARES` of each band over the split, (3, bands); None in older indexes.
        origin: How the files were read that the samples were packed from; None for shards of other programs and older indexes.
        chosen: Numbers of the bands that are taken of each image (`bands.choose_bands`); None takes all.
        generations: The generations whose samples these are, in their order; () if it was not loaded.
    """

    shards: tuple[ShardEntry, ...]
    samples: pa.Table
    bands: int
    dtype: str
    num_classes: int
    ignore_index: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    preparation: dict[str, Any]
    formats: tuple[str, ...] = STORED
    labels: Labels | None = None
    base: str | None = None
    source: str | None = None
    location: str = field(default="", compare=False)
    reading: Reading = AS_IT_COMES
    percentiles: tuple[tuple[float, ...], ...] | None = None
    origin: Origin | None = None
    chosen: tuple[int, ...] | None = None
    generations: tuple[manifest.Generation, ...] = field(default=(), compare=False)

    @property
    def classes(self) -> list[str]:
        """Return the names of the classes 1, 2, ...; [] of a binary split, or if they are not known."""
        return list(self.origin.classes) if self.origin is not None and self.num_classes > 1 else []

    @property
    def stored_bands(self) -> int:
        """Return the number of bands of every image before some are chosen."""
        return self.bands if self.chosen is None else int(self.preparation["of"])

    def normalization(self, how: str) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Return what images are normalised by with `data.normalize: dataset` or `robust`: centre and scale, (bands,) each.

        Args:
            how: `data.normalize`.

        Raises:
            ValueError: If it is "robust" and the index is too old.
        """
        if how != "robust":
            return self.mean, self.std
        if self.percentiles is None:
            raise ValueError(
                f"data.normalize is robust, but the index of {self.location} has no percentiles; add them: "
                f"deepskip index {self.location}"
            )
        return centre_and_scale(self.percentiles)

    @property
    def num_samples(self) -> int:
        """Return the number of samples in all shards."""
        return len(self.samples)

    @cached_property
    def shard_sizes(self) -> np.ndarray:
        """Return the number of samples in each shard: (shards,) int64."""
        return np.array([shard.samples for shard in self.shards], np.int64)

    @cached_property
    def _ends(self) -> np.ndarray:
        return np.cumsum(self.shard_sizes)

    @cached_property
    def _columns(self) -> dict[str, np.ndarray]:
        # With a single chunk nothing is copied.
        return {name: self.samples[name].chunk(0).to_numpy() for name in SCHEMA.names[1:]} if len(self.samples) else {}

    @cached_property
    def _keys(self) -> Any:
        return self.samples["key"]

    @cached_property
    def _statistics(self) -> tuple[np.ndarray, np.ndarray] | None:
        if not len(self.samples) or STATISTICS[0] not in self.samples.column_names:
            return None
        shape = len(self.samples), self.stored_bands
        mean, std = (self.samples[name].chunk(0).flatten().to_numpy().reshape(shape) for name in STATISTICS)
        return mean, std

    @property
    def has_statistics(self) -> bool:
        """Return whether the index holds the statistics of each image."""
        return self._statistics is not None

    def statistics_of(self, samples: int | list[int]) -> tuple[np.ndarray, np.ndarray]:
        """Return the mean and standard deviation of each band of one image, or of N images.

        Args:
            samples: Number of a sample, or N numbers, in an index that holds them.

        Returns:
            Mean and standard deviation, each (bands,) or (N, bands) float32.
        """
        assert self._statistics is not None
        mean, std = (values[samples] for values in self._statistics)
        return (mean, std) if self.chosen is None else (mean[..., self.chosen], std[..., self.chosen])

    @property
    def digests(self) -> np.ndarray:
        """Return the digest of each sample: (samples,) uint64."""
        return self._columns["digest"]

    def shard_range(self, shard: int) -> range:
        """Return the sample numbers of a shard."""
        end = int(self._ends[shard])
        return range(end - self.shards[shard].samples, end)

    def shards_of(self, samples: list[int]) -> list[int]:
        """Return the numbers of the shards that hold samples, each once, in ascending order."""
        found: list[int] = np.unique(np.searchsorted(self._ends, samples, side="right")).tolist()
        return found

    def shard_location(self, shard: int) -> str:
        """Return the path or URL of a shard."""
        return storage.join(self.base or self.location, self.shards[shard].name)

    def shard(self, number: int) -> ShardEntry:
        """Return a shard by its number."""
        return self.shards[number]

    def keys(self, samples: list[int]) -> list[str]:
        """Return the keys of samples, by their numbers."""
        keys: list[str] = self._keys.take(pa.array(samples, pa.int64())).to_pylist()
        return keys

    def entries(self, samples: list[int]) -> list[SampleEntry]:
        """Return the index entries of samples, by their numbers."""
        # Column by column: taking single numbers out of arrays would take longer than reading the sample.
        taken = {name: values[samples].tolist() for name, values in self._columns.items()}
        shards = np.searchsorted(self._ends, samples, side="right").tolist()
        images, masks = (
            map(
                Member,
                [self.formats[code] for code in taken[f"{kind}_format"]],
                taken[f"{kind}_offset"],
                taken[f"{kind}_length"],
            )
            for kind in ("image", "mask")
        )
        return list(map(SampleEntry, self.keys(samples), images, masks, taken["digest"], shards, samples))


class MissingIndex(FileNotFoundError):
    """There are no shards, or no index of them, at a location."""


class BrokenIndex(ValueError):
    """An index that cannot be read."""


class NewerIndex(BrokenIndex):
    """An index that a later DeepSkip wrote: it is not broken."""


def load_index(folder: str | Path, cache: storage.Cache | None = None, generations: int | None = None) -> Index:
    """Load a split's index from a folder or URL, with the generations that were appended to it.

    Args:
        folder: Path or URL of the split.
        cache: Where the samples files of a remote index are kept; by default in a temporary file of this process.
        generations: Number of generations to load, from the first; None loads all.

    Raises:
        MissingIndex: If there is no index; says what is there and which command makes one.
        BrokenIndex: If the index or a manifest is damaged or of another version; says why. A NewerIndex if a later DeepSkip
            wrote it.
        OSError: If the location cannot be read.
    """
    location = str(folder)
    first, opened = load_first(location, cache)
    try:
        chain = manifest.read_chain(location, [first], generations)
    except manifest.BrokenChain as error:
        raise BrokenIndex(
            f"{error}. Put the files back that were changed or removed, or pack the samples again"
        ) from error
    return replace(opened, generations=(first,)) if len(chain) == 1 else _joined(opened, chain, cache)


def _joined(first: Index, chain: list[manifest.Generation], cache: storage.Cache | None) -> Index:
    """Return the index of all generations of a chain, with the properties and statistics of the first."""
    location, later = first.location, chain[1:]
    try:
        with ThreadPoolExecutor(manifest.READERS) as pool:
            tables = list(pool.map(lambda generation: load_samples(location, generation.raw, cache), later))
    except (ValueError, FileNotFoundError, storage.ChangedFile) as error:
        raise BrokenIndex(f"a generation of {location} cannot be read: {error}") from error
    formats = [first.formats, *(generation.raw["formats"] for generation in later)]
    return replace(
        first,
        shards=(*first.shards, *(ShardEntry(**shard) for each in later for shard in each.raw["shards"])),
        samples=manifest.join_tables([first.samples, *tables], formats),
        formats=STORED,
        generations=tuple(chain),
    )


def load_first(location: str, cache: storage.Cache | None = None) -> tuple[manifest.Generation, Index]:
    """Load generation 0 of a split, which is its index.json.

    Args:
        location: Path or URL of the split.
        cache: As for `load_index`.

    Returns:
        Its fields, and its index.

    Raises:
        MissingIndex: As `load_index`.
        BrokenIndex: As `load_index`.
        OSError: If the location cannot be read.
    """
    path = storage.join(location, FILE)
    try:
        text = storage.read_bytes(path)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise MissingIndex(f"no shards at {location}: {_what_is_there(location)}") from error
    try:
        raw = json.loads(text)
        if not isinstance(raw, dict) or raw.get("format") != FORMAT or raw.get("version") not in READABLE:
            version = raw.get("version") if isinstance(raw, dict) and raw.get("format") == FORMAT else None
            if isinstance(version, int) and version > VERSION:
                # A new index would lose what the later version added.
                raise NewerIndex(f"{path} has version {version}; this reads up to {VERSION}. Install a later DeepSkip.")
            said = f"{raw.get('format')!r} version {raw.get('version')!r}" if isinstance(raw, dict) else "not an object"
            raise ValueError(f"it is {said[:200]}, this reads {FORMAT} version {VERSION}")
        index_check.check_index(raw, STORED)
        index = Index(
            tuple(ShardEntry(**shard) for shard in raw["shards"]), load_samples(location, raw, cache), raw["bands"],
            raw["dtype"], raw["num_classes"], raw["ignore_index"], tuple(raw["mean"]), tuple(raw["std"]),
            raw["preparation"], tuple(raw["formats"]), labels_of(raw["labels"]), raw["base"],
            raw["source"], location, reading_of(raw.get("reading")),
            percentiles_of(raw.get("percentiles")), origin_of(raw.get("origin")),
        )  # fmt: skip
        return manifest.first_generation(text, raw), index
    except NewerIndex:
        raise
    except (ValueError, RecursionError, FileNotFoundError, storage.ChangedFile) as error:
        raise BrokenIndex(
            f"{path} cannot be read: {error}. Make a new one: deepskip index {location}, or pack again."
        ) from error


def save_index(index: Index, folder: str | Path, extra: dict[str, Any] | None = None) -> None:
    """Write a split's index into a folder or URL, whole or not at all; an older index stays valid until then.

    Args:
        index: The index.
        folder: Path or URL of the split.
        extra: More fields of index.json.

    Raises:
        ValueError: If generations were appended to the index that is there.
        OSError: If a file cannot be written.
    """
    location = str(folder)
    refuse_chain(location)
    data = samples_file(index.samples)
    # Named by its contents, so that the file of an older index.json is never overwritten.
    name = f"samples-{hashlib.sha256(data).hexdigest()[:16]}.arrow"
    raw = {"format": FORMAT, "version": VERSION} | plain_fields(index, name, data) | (extra or {})
    older = _samples_file(location)
    storage.write_bytes(storage.join(location, name), data)
    storage.write_bytes(storage.join(location, FILE), json.dumps(raw).encode())
    if older not in (None, name):
        # Without permission to remove it, the older file stays.
        with contextlib.suppress(OSError, NotImplementedError):
            storage.remove(storage.join(location, str(older)))


def refuse_chain(location: str) -> None:
    """Raise ValueError if generations were appended to the index at a location, which then never changes."""
    if manifest.read_if_exists(location, 1) is not None:
        raise ValueError(
            f"generations were appended to {location}, so its index never changes; make a new set of all its samples: "
            f"deepskip compact {location} --out FOLDER"
        )


def samples_file(samples: pa.Table) -> bytes:
    """Return the bytes of an Arrow file of a table of samples."""
    sink = pa.BufferOutputStream()
    table = samples.combine_chunks()
    with pa.ipc.new_file(sink, table.schema) as writer:
        # A single batch, so that each column is one piece of memory.
        writer.write_table(table, max_chunksize=max(1, len(table)))
    data: bytes = sink.getvalue().to_pybytes()
    return data


def plain_fields(index: Index, name: str, data: bytes) -> dict[str, Any]:
    """Return the fields of an index or manifest as JSON stores them, without format and version.

    Args:
        index: The index.
        name: Name of its samples file.
        data: Contents of that file.
    """
    names = ("bands", "dtype", "num_classes", "ignore_index", "mean", "std", "preparation", "formats", "base", "source")
    raw: dict[str, Any] = {name: getattr(index, name) for name in names} | {
        "labels": plain_labels(index.labels),
        "samples": {
            "file": name,
            "bytes": len(data),
            "sha256": hashlib.sha256(data).hexdigest(),
            "count": index.num_samples,
        },
        "shards": [asdict(shard) for shard in index.shards],
    }
    if index.percentiles is not None:
        raw["percentiles"] = dict(zip(PERCENTILES, index.percentiles, strict=True))
    if index.reading != AS_IT_COMES:
        raw["reading"] = asdict(index.reading) | {"nodata": plain_number(index.reading.nodata)}
    if index.origin is not None:
        raw["origin"] = index.origin.plain
    return raw


def _samples_file(location: str) -> str | None:
    try:
        name = json.loads(storage.read_bytes(storage.join(location, FILE)))["samples"]["file"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None
    return name if index_check.plain_name(name) else None


def load_samples(location: str, raw: dict[str, Any], cache: storage.Cache | None) -> pa.Table:
    """Map the samples' columns into memory, with bytes and contents checked, since Arrow itself would follow any offset.

    Args:
        location: Path or URL of the split.
        raw: Fields of its index.json or of a manifest, which have been checked.
        cache: As for `load_index`.
    """
    told = raw["samples"]
    path = storage.join(location, told["file"])
    if not storage.is_remote(path):
        local = storage.local(path)
        if not local.is_file():
            raise FileNotFoundError(f"{told['file']}, which it names, is missing")
        if local.stat().st_size != told["bytes"]:
            raise ValueError(f"{told['file']} has {local.stat().st_size} bytes, but it says {told['bytes']}")
        return _table_of(local, raw, known=False)
    if cache is not None:
        return _table_of(cache.fetch(path, told["bytes"], told["sha256"]), raw, known=True)
    with tempfile.NamedTemporaryFile(prefix="deepskip-index-") as file:
        storage.download(path, Path(file.name), told["bytes"], told["sha256"])
        return _table_of(Path(file.name), raw, known=True)


def _table_of(path: Path, raw: dict[str, Any], known: bool) -> pa.Table:
    """Read and check a local samples file; a large one is checked once on each machine.

    Args:
        path: The samples file.
        raw: Contents of index.json.
        known: Whether its sha256 has been compared already.
    """
    name, marker = raw["samples"]["file"], index_check.remembered(path, raw)
    checked = marker is not None and marker.exists()
    if not known and not checked and storage.file_sha256(path) != raw["samples"]["sha256"]:
        raise ValueError(f"{name} has other contents than when it was written (sha256 differs)")
    try:
        with pa.ipc.open_file(pa.memory_map(str(path))) as reader:
            table = reader.read_all()
    # Arrow raises MemoryError and OSError for some damaged files.
    except (pa.ArrowException, MemoryError, OSError) as error:
        raise ValueError(f"{name} is damaged: {error}") from error
    if table.schema not in (SCHEMA, schema_of(raw["bands"])):
        raise ValueError(f"{name} has other columns than expected: {table.schema.names}")
    if not checked:
        index_check.check_table(table, raw)
        index_check.remember(marker)
    return table.combine_chunks() if table["key"].num_chunks > 1 else table


def tars_in(location: str) -> list[str]:
    """Return the names of the .tar files in a folder or URL.

    Raises:
        FileNotFoundError: If the folder does not exist.
        OSError: If it cannot be listed.
        NotImplementedError: If its file system has no listing.
    """
    return [name for name in storage.names(location) if name.endswith(".tar")]


def _what_is_there(location: str) -> str:
    parent = location.rstrip("/").rpartition("/")[0] or "DIR"
    pack = f"Pack some: deepskip pack folder --images DIR --masks DIR --out {parent}"
    try:
        tars = len(tars_in(location))
    # No listing over http, no such folder, or no permission.
    except Exception:
        return f"it does not exist or cannot be listed. {pack}"
    if tars:
        return f"it holds {tars} .tar files but no {FILE}. Make one: deepskip index {location}"
    return f"it holds no {FILE}. {pack}"
