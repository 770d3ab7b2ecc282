"""Make the index of shards that another program wrote: img2dataset, webdataset.ShardWriter, plain tar; local or remote."""

import json
import os
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from deepskip.data_shards import storage
from deepskip.data_shards.decoding import read_image, read_mask
from deepskip.data_shards.entries import SCHEMA, SampleEntry, sample_table, with_statistics
from deepskip.data_shards.index import Index, ShardEntry, save_index, tars_in
from deepskip.data_shards.labels import AS_LABELS, IGNORE_INDEX, Seen, Values, decide_labels, listed
from deepskip.data_shards.percentiles import SHARD_VALUES, PixelSample, finite_or_none
from deepskip.data_shards.pictures import AS_IT_COMES, Picture, Reading, image_of
from deepskip.data_shards.plain_values import plain_number
from deepskip.data_shards.preparation import band_statistics, resample_bands
from deepskip.data_shards.progress import Progress, no_progress, no_word
from deepskip.data_shards.scan import BrokenShard, choose_names, member_name, sample_entry, scan_tar
from deepskip.data_shards.survey import Survey, foreground_note

BAD_SAMPLES = "bad_samples.jsonl"


class IndexingError(ValueError):
    """Shards that cannot be indexed unchanged; the message lists what is wrong."""


Moments = tuple[np.ndarray, np.ndarray, np.ndarray]
Statistics = tuple[np.ndarray, np.ndarray]


@dataclass
class ShardReport:
    """What was found in one shard.

    Attributes:
        shard: Its entry in the index; None if the shard cannot be used.
        samples: Arrow table of its good samples.
        bad: Faulty samples: {"shard", "key", "reason"}, with an empty key for a fault of the whole shard.
        dtypes: Names of the images' dtypes.
        statistics: With transparency kept or dropped: mean and std of each band of each good sample, (bands,) each.
        kept: With transparency kept or dropped: some of the pixels.
        moments: With transparency kept ("keep") or dropped ("drop"): for each band the number of pixels, their sum and the
            sum of their squares, (bands,) each.
        seen: Values of its masks.
        survey: What its files say about themselves.
    """

    shard: ShardEntry | None = None
    samples: pa.Table = field(default_factory=lambda: sample_table([]))
    bad: list[dict[str, str]] = field(default_factory=list)
    dtypes: set[str] = field(default_factory=set)
    statistics: dict[str, list[Statistics]] = field(default_factory=dict)
    kept: dict[str, PixelSample] = field(default_factory=dict)
    moments: dict[str, Moments] = field(default_factory=dict)
    seen: Seen = field(default_factory=Seen)
    survey: Survey = field(default_factory=Survey)


@contextmanager
def local_copy(location: str) -> Iterator[Path]:
    """Yield a local path of a shard: its own, or that of a temporary copy.

    Raises:
        OSError: If a remote shard cannot be fetched.
    """
    if not storage.is_remote(location):
        yield storage.local(location)
        return
    with tempfile.NamedTemporaryFile(prefix="deepskip-shard-", suffix=".tar") as file:
        storage.download(location, Path(file.name))
        yield Path(file.name)


def read_shard(
    base: str,
    name: str,
    names: tuple[str, str],
    bands: int | None,
    ignore_label: int | None,
    reading: Reading,
    values: Values,
    omitted: Mapping[str, str],
) -> ShardReport:
    """Read every sample of a shard once; faults are reported, not raised.

    Args:
        base: Folder or URL of the shards.
        name: Name of the shard.
        names: Member names of image and mask.
        bands: Number of bands that every image is resampled to, or None.
        ignore_label: Mask value that is ignored, or None.
        reading: How images are read.
        values: How masks are read.
        omitted: Keys of samples that are skipped, each with the reason.

    Returns:
        The report of the shard.
    """
    report = ShardReport()
    location = storage.join(base, name)
    entries: list[SampleEntry] = []
    try:
        with local_copy(location) as path, path.open("rb") as file:
            found = scan_tar(path, name)
            for fault in found.bad:
                report.bad.append({"shard": name, "key": fault.key, "reason": fault.reason})
            for key, members in found.samples.items():
                if key in omitted:
                    report.bad.append({"shard": name, "key": key, "reason": omitted[key]})
                    continue
                try:
                    entry, (image_bytes, mask_bytes) = sample_entry(key, members, names, file.fileno())
                    picture = read_image(entry.image.format, image_bytes)
                    stored_mask = read_mask(entry.mask.format, mask_bytes)
                    one = Survey()
                    one.look(key, picture, stored_mask, reading)
                    if one.sizes:
                        raise ValueError(one.sizes[0])
                    mask = values.of(stored_mask)
                except (ValueError, MemoryError) as error:
                    report.bad.append({"shard": name, "key": key, "reason": str(error)})
                    continue
                report.survey.merge(one)
                entries.append(entry)
                measure(report, picture, reading, bands)
                report.seen.add(entry.key, mask, ignore_label)
            if not found.samples and not found.bad:
                raise BrokenShard(f"{name} holds no samples")
            size = os.fstat(file.fileno()).st_size
            report.shard = ShardEntry(name, size, storage.file_sha256(path), len(entries))
            report.samples = sample_table(entries)
    except (BrokenShard, OSError) as error:
        # Here an OSError comes from storage: the network or a permission.
        report = ShardReport(bad=[{"shard": name, "key": "", "reason": str(error)}])
    return report


def measure(report: ShardReport, picture: Picture, reading: Reading, bands: int | None) -> None:
    """Add one image's moments to a report.

    They are computed both with transparency kept and dropped, since only all images together decide which applies.

    Args:
        report: Report of the shard.
        picture: The image, (H, W) or (H, W, bands).
        reading: How images are read; its alpha is not used.
        bands: Number of bands that every image is resampled to, or None.
    """
    found: Moments | None = None
    one: Statistics | None = None
    for way in ("keep", "drop"):
        if found is None or one is None or picture.alpha:
            image = image_of(picture, replace(reading, alpha=way))
            report.dtypes.add(image.dtype.name)
            if bands is not None:
                image = resample_bands(image, bands)
            mean, std = one = band_statistics(image)
            pixels = np.full(len(mean), image.shape[0] * image.shape[1])
            if image.dtype.kind == "f":
                pixels -= np.isnan(image).sum((0, 1))
            found = pixels, pixels * mean, pixels * (std**2 + mean**2)
        report.statistics.setdefault(way, []).append(one)
        report.kept.setdefault(way, PixelSample(SHARD_VALUES)).add(image)
        before = report.moments.setdefault(way, (np.zeros(1, int), np.zeros(1), np.zeros(1)))
        # Images with differing numbers of bands are rejected at the end.
        if len(before[0]) in (1, len(found[0])):
            report.moments[way] = before[0] + found[0], before[1] + found[1], before[2] + found[2]


def index_shards(
    location: str,
    out: str | None = None,
    *,
    shards: list[str] | None = None,
    image: str | None = None,
    mask: str | None = None,
    labels: str = "auto",
    num_classes: int | None = None,
    ignore_label: int | None = None,
    bands: int | None = None,
    on_bad_sample: str = "error",
    reading: Reading = AS_IT_COMES,
    values: Values = AS_LABELS,
    workers: int | None = None,
    progress: Progress = no_progress,
    say: Callable[[str], None] = no_word,
) -> Index:
    """Make and save the index of a folder or URL of .tar shards, reading every sample once.

    Args:
        location: Folder or URL of the shards.
        out: Folder or URL to write the index to; by default next to the shards.
        shards: Names of the shards, if the location cannot be listed (http).
        image: Member name of images ("jpg", "image"); detected in the first shard by default.
        mask: Member name of masks ("seg.png", "mask"); detected in the first shard by default.
        labels: Meaning of mask values, as in `pack_folder`.
        num_classes: Number of classes, as in `pack_folder`.
        ignore_label: Mask value that is ignored, as in `pack_folder`.
        bands: Number of bands that every image is resampled to when it is read.
        on_bad_sample: "error" raises an error that lists the faults; "skip" skips faulty samples and shards, and lists
            them in bad_samples.jsonl next to the index.
        reading: How images are read, as in `pack_folder`.
        values: How masks are read, as in `pack_folder`.
        workers: Number of processes; one a core by default.
        progress: Wraps the reports of the shards as they arrive.
        say: Called with each line about what was decided.

    Returns:
        The index, as saved.

    Raises:
        IndexingError: If shards cannot be listed, read or indexed; lists the faults.
        OSError: If the index cannot be written.
    """
    try:
        found = shards if shards is not None else tars_in(location)
    except (OSError, NotImplementedError) as error:
        raise IndexingError(
            f"{location} cannot be listed ({error}); give the names of the shards: --shards 'a-{{000..099}}.tar'"
        ) from error
    if not found:
        raise IndexingError(f"{location} holds no .tar files")
    names = (image, mask) if image and mask else detect_names(location, found, image, mask)
    reading, values = replace(reading, missing=True), replace(values, ignore=ignore_label)
    workers = min(len(found), workers or os.cpu_count() or 1)
    omitted: dict[str, dict[str, str]] = {}
    for _ in range(2):
        kept: dict[str, PixelSample] = {}
        options = bands, ignore_label, reading, values
        tasks = [(location, name, names, *options, omitted.get(name, {})) for name in found]
        reports = read_shards(tasks, workers, kept, progress)
        omitted = repeated_keys(reports) if on_bad_sample == "skip" else {}
        # What is skipped counts in no statistics, so all are read again without it.
        if not omitted:
            break
    index, bad, notes = merge(reports, labels, num_classes, ignore_label, bands, on_bad_sample, reading, values)
    pixels = kept.get("keep" if index.reading.alpha == "keep" else "drop")
    if pixels is not None:
        index = replace(index, percentiles=finite_or_none(pixels.percentiles()))
    for note in notes:
        say(note)
    target = out or location
    if out is not None and out != location:
        base = location if "://" in location else str(storage.local(location).absolute())
        index = replace(index, base=base)
    if bad:
        lines = "".join(json.dumps(fault) + "\n" for fault in bad)
        storage.write_bytes(storage.join(target, BAD_SAMPLES), lines.encode())
    elif storage.exists(storage.join(target, BAD_SAMPLES)):
        storage.remove(storage.join(target, BAD_SAMPLES))
    save_index(index, target)
    return replace(index, location=target)


def read_shards(
    tasks: Sequence[tuple[Any, ...]], workers: int, kept: dict[str, PixelSample], progress: Progress
) -> list[ShardReport]:
    """Read shards, in several processes if there are more than one.

    Args:
        tasks: Arguments of `read_shard` for each.
        workers: Number of processes.
        kept: Samples of pixels by treatment of transparency, which are extended.
        progress: Wraps the reports as they arrive.

    Returns:
        The report of each shard.
    """
    if workers == 1:
        return list(gathered(progress((read_shard(*task) for task in tasks), len(tasks)), kept))
    with ProcessPoolExecutor(workers) as pool:
        return list(gathered(progress(pool.map(read_shard, *zip(*tasks, strict=True)), len(tasks)), kept))


def gathered(reports: Iterable[ShardReport], kept: dict[str, PixelSample]) -> Iterator[ShardReport]:
    """Yield the reports of shards, and move their pixels to one sample as they come, so that memory stays bounded.

    Args:
        reports: The reports.
        kept: Samples by treatment of transparency, which are extended.
    """
    for report in reports:
        for way, pixels in report.kept.items():
            before = kept.setdefault(way, PixelSample())
            # Images of several numbers of bands are refused later.
            if len({part.shape[1] for part in (*before.pixels, *pixels.pixels)}) == 1:
                before.merge(pixels)
        report.kept = {}
        yield report


def detect_names(location: str, shards: list[str], image: str | None, mask: str | None) -> tuple[str, str]:
    """Return the member names of image and mask, detected in the first readable shard of the first five.

    Args:
        location: Folder or URL of the shards.
        shards: Names of the shards.
        image: Member name of images, if known.
        mask: Member name of masks, if known.

    Raises:
        IndexingError: If no shard can be read or the names are ambiguous; says which options to give.
    """
    reasons = []
    for name in shards[:5]:
        try:
            with local_copy(storage.join(location, name)) as path:
                samples = scan_tar(path, name).samples
            counts = Counter(member_name(suffix) for members in samples.values() for suffix in members)
            if not samples:
                raise BrokenShard(f"{name} holds no samples")
            if image or mask:
                known = image or mask
                others = [
                    n for n in counts if n not in (known, member_name(str(known)), "json", "txt", "cls", "__key__")
                ]
                if len(others) != 1:
                    raise ValueError(
                        f"next to .{known} there are {', '.join(others) or 'no others'}; give --image and --mask"
                    )
                return (str(image), others[0]) if image else (others[0], str(mask))
            return choose_names(counts, len(samples))
        except (BrokenShard, OSError) as error:
            reasons.append(str(error))
        except ValueError as error:
            raise IndexingError(f"{location}: {name}: {error}") from error
    raise IndexingError("\n".join(reasons))


def merge(
    reports: Iterable[ShardReport],
    labels: str,
    num_classes: int | None,
    ignore_label: int | None,
    bands: int | None,
    on_bad_sample: str,
    reading: Reading,
    values: Values,
) -> tuple[Index, list[dict[str, str]], list[str]]:
    """Merge the reports of all shards into one index.

    Args:
        reports: One report for each shard, in the order of the index.
        labels: Meaning of mask values, as in `pack_folder`.
        num_classes: Number of classes, or None to take it from the masks.
        ignore_label: Mask value that is ignored, or None.
        bands: Number of bands that every image is resampled to, or None.
        on_bad_sample: "error" or "skip".
        reading: How images are read.
        values: How masks are read.

    Returns:
        The index, the list of skipped samples, and lines about what was decided.

    Raises:
        IndexingError: If there are faults that are not skipped, or no usable sample.
    """
    reports = list(reports)
    bad = [fault for report in reports for fault in report.bad]
    whole = [report for report in reports if report.shard is not None]
    survey, seen = Survey(), Seen()
    for report in whole:
        survey.merge(report.survey)
        seen.merge(report.seen)
    if faults := survey.faults(reading, bands) + survey.faults_of_masks(labels, ignore_label, values):
        raise IndexingError("\n".join(faults))
    reading, values = survey.decided(reading, values)
    counts = survey.kept if reading.alpha == "keep" else survey.dropped
    bad += [
        {"shard": shard, "key": key, "reason": reason}
        for shard, keys in repeated_keys(whole).items()
        for key, reason in keys.items()
    ]
    if bad and on_bad_sample == "error":
        told = listed([f"{f['shard']}{': sample ' + f['key'] if f['key'] else ''}: {f['reason']}" for f in bad])
        raise IndexingError(f"{len(bad)} faults: {told}\nTo skip such samples and list them: --on_bad_sample skip")
    if not counts:
        raise IndexingError("no shard holds a usable sample")
    try:
        how = decide_labels(seen, labels, num_classes, ignore_label, values)
    except ValueError as error:
        raise IndexingError(str(error)) from error
    way = "keep" if reading.alpha == "keep" else "drop"
    statistics = [one for report in whole for one in report.statistics.get(way, [])]
    moments = [report.moments[way] for report in whole if way in report.moments]
    pixels = np.maximum(np.sum([m[0] for m in moments], axis=0), 1)
    mean = np.sum([m[1] for m in moments], axis=0) / pixels
    std = np.sqrt(np.maximum(np.sum([m[2] for m in moments], axis=0) / pixels - mean**2, 0))
    as_they_stand = ignore_label in (None, IGNORE_INDEX) and (not how.binary or max(seen.pixels, default=0) <= 1)
    index = Index(
        shards=tuple(report.shard for report in whole if report.shard is not None),
        samples=with_statistics(
            pa.concat_tables([report.samples for report in whole]), *map(np.stack, zip(*statistics, strict=True))
        ),
        bands=bands or next(iter(counts)),
        dtype="uint8" if set().union(*(r.dtypes for r in whole)) == {"uint8"} else "float32",
        num_classes=how.num_classes,
        ignore_index=IGNORE_INDEX,
        mean=tuple(mean.tolist()),
        std=tuple(std.tolist()),
        preparation={"bands": bands, "longest_side": None}
        | ({} if reading.nodata is None else {"nodata": plain_number(reading.nodata)}),
        labels=None if as_they_stand and replace(values, ignore=None) == AS_LABELS else how,
        # The no-data value of files counts if any file has one; otherwise images are read as before.
        reading=replace(reading, missing=bool(survey.empty or survey.tagged or reading.nodata is not None)),
    )
    return index, bad, [*survey.notes(reading), *foreground_note(seen.pixels, how.binary)]


def repeated_keys(reports: Sequence[ShardReport]) -> dict[str, dict[str, str]]:
    """Return for each shard the keys of samples that an earlier shard has too, and the reason to skip them.

    Args:
        reports: One report for each shard, in the order of the index.
    """
    whole = [report for report in reports if report.shard is not None]
    keys = pa.chunked_array([report.samples["key"].combine_chunks() for report in whole], SCHEMA.field("key").type)
    counted = pc.value_counts(keys)
    repeated = set(counted.filter(pc.greater(counted.field("counts"), 1)).field("values").to_pylist())
    first: dict[str, str] = {}
    found: dict[str, dict[str, str]] = {}
    for report in whole if repeated else ():
        assert report.shard is not None
        for key in repeated.intersection(report.samples["key"].to_pylist()):
            if (name := first.setdefault(key, report.shard.name)) != report.shard.name:
                found.setdefault(report.shard.name, {})[key] = f"the key is also in {name}"
    return found
