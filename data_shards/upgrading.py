"""Add to an index of an earlier version what later versions hold: the statistics of each image."""

import os
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np

from deepskip.data_shards import storage
from deepskip.data_shards.dataset import Shards
from deepskip.data_shards.entries import with_statistics
from deepskip.data_shards.index import BrokenIndex, Index, MissingIndex, load_index, save_index
from deepskip.data_shards.percentiles import SHARD_VALUES, PixelSample, finite_or_none
from deepskip.data_shards.preparation import band_statistics
from deepskip.data_shards.progress import Progress, no_progress


def can_upgrade(location: str) -> bool:
    """Return whether a folder or URL has a valid index of samples that lacks their statistics.

    Args:
        location: Folder or URL of a split.
    """
    try:
        index = load_index(location)
    except (MissingIndex, BrokenIndex):
        return False
    return index.num_samples > 0 and not (index.has_statistics and index.percentiles)


def upgrade(location: str, cache: storage.Cache, workers: int | None = None, progress: Progress = no_progress) -> Index:
    """Read every image once and save the index anew, with their statistics; all else stays as it is.

    Args:
        location: Folder or URL of a split that has an index.
        cache: Where copies of remote shards are kept.
        workers: Number of processes; one a core by default.
        progress: Wraps the shards as they are read.

    Returns:
        The index, as saved.

    Raises:
        BadSample: If a sample is not what the index says.
        BrokenShard: If a shard is missing or has changed.
        OSError: If the index cannot be written.
    """
    index = load_index(location, cache)
    shards = range(len(index.shards))
    workers = min(len(shards), workers or os.cpu_count() or 1)
    if workers == 1:
        found = list(progress((statistics_of(location, cache.folder, cache.limit, n) for n in shards), len(shards)))
    else:
        with ProcessPoolExecutor(workers) as pool:
            arguments = [location] * len(shards), [cache.folder] * len(shards), [cache.limit] * len(shards), shards
            found = list(progress(pool.map(statistics_of, *arguments), len(shards)))
    mean, std = (np.concatenate(values) for values in ([one[0] for one in found], [one[1] for one in found]))
    kept = PixelSample()
    for _, _, pixels in found:
        if pixels.pixels:
            kept.merge(pixels)
    percentiles = finite_or_none(kept.percentiles())
    index = replace(index, samples=with_statistics(index.samples, mean, std), percentiles=percentiles)
    save_index(index, location)
    return index


def statistics_of(location: str, folder: Path, limit: int, shard: int) -> tuple[np.ndarray, np.ndarray, PixelSample]:
    """Compute the statistics of each image of a shard.

    Args:
        location: Folder or URL of the split.
        folder: Folder of the cache of remote shards.
        limit: Size of the cache in bytes.
        shard: Number of the shard.

    Returns:
        Mean and standard deviation, each (samples, bands) float64, and some of the pixels.

    Raises:
        BadSample: If a sample is not what the index says.
        BrokenShard: If the shard is missing or has changed.
    """
    shards = Shards(location, "none", cache=storage.Cache(folder, limit))
    entries = shards.index.entries(list(shards.index.shard_range(shard)))
    kept = PixelSample(SHARD_VALUES)
    found = np.empty((2, len(entries), shards.index.bands))
    for number, entry in enumerate(entries):
        image, _ = shards.read(entry)
        found[:, number] = band_statistics(image)
        kept.add(image)
    return found[0], found[1], kept
