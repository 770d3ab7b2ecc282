"""One split of shards as a dataset: batches of samples by number, read at their offsets in the tar and checked."""

import copy
import math
import os
import time
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import NotRequired, TypedDict

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from deepskip.data_shards import storage, tiles
from deepskip.data_shards.bands import choose_bands
from deepskip.data_shards.crops import Crops, Item, crop_place, cut, donor_of, pasted, random_crop
from deepskip.data_shards.decoding import npy_header
from deepskip.data_shards.entries import SampleEntry
from deepskip.data_shards.index import Index, load_index
from deepskip.data_shards.order import Slot
from deepskip.data_shards.pictures import filled, without_values
from deepskip.data_shards.preparation import LARGEST, band_statistics
from deepskip.data_shards.sample import ON_BAD_SAMPLE, BadSample
from deepskip.data_shards.scan import BrokenShard, UnreachedShard, digest
from deepskip.data_shards.stored import MAX_GAP, StoredSample, read_stored

NORMALIZATIONS = ("image", "dataset", "robust", "none")
OPEN_SHARDS = 64
# Seconds before a shard whose storage did not answer is tried again.
UNREACHED_SECONDS = 60.0


class SkipReport(TypedDict):
    """Which bad sample was skipped, and why.

    Attributes:
        shard: Location of the shard.
        key: Key of the sample.
        epoch: Epoch in which it was read.
        reason: What is wrong with it.
    """

    shard: str
    key: str
    epoch: int
    reason: str


class Batch(TypedDict):
    """N samples.

    Attributes:
        image: Images (N, bands, H, W) uint8 or float32, in channels-last memory.
        mask: Labels (N, H, W) uint8.
        mean: Mean of each band of each image, or that of the index, (N, bands) float32.
        std: Standard deviation likewise, (N, bands) float32.
        weight: Weights of the samples, (N,) float32; 0 for repeats.
        padded: Whether any weight is 0.
        epoch: Epoch of each sample, N numbers.
        sample: Number of each sample, N numbers.
        key: Key of each sample, N names.
        bad: Reports of the skipped samples.
        draws: What `stream.Entries` adds: the changes of each sample, (N, 7 + bands) float32.
        noise_seed: What `stream.Entries` adds: seed of the noise of each sample, N integers.
    """

    image: Tensor
    mask: Tensor
    mean: Tensor
    std: Tensor
    weight: Tensor
    padded: NotRequired[bool]
    epoch: list[int]
    sample: list[int]
    key: list[str]
    bad: NotRequired[list[SkipReport]]
    draws: NotRequired[Tensor]
    noise_seed: NotRequired[list[int]]


class Shards(Dataset[Batch]):
    """Samples of one split, read at their offsets in the tar and checked against the index.

    `shards[slots]` is the `Batch` of these slots.

    Args:
        folder: Path or URL of the split.
        normalize: Source of the mean and standard deviation of each sample. "image": its own, over the whole image;
            "dataset": those of the index; "robust": median and range of percentiles of the index; "none": 0 and 1.
        crops: How training crops are cut; None returns whole images.
        num_classes: Number of classes of the model; that of the index by default.
        on_bad_sample: "error" raises; "skip" puts a repeat of weight 0 in its place and reports the sample in the batch.
        cache: Where copies of remote shards are kept; required for a URL.
        bands: Numbers and ranges of the bands to take, as in `bands.chosen_bands`; None takes all.
        generations: Number of generations of the split to read, from the first; None reads all.
        fill: Whether pixels without a value get their band's mean; else whole images have nan there.

    Raises:
        BandError: If the images do not have these bands.
        ValueError: If normalize or on_bad_sample is unknown, or normalize is robust and the index has no percentiles.
        MissingIndex: If there is no index at `folder`.
        BrokenIndex: If the index cannot be read.
        BadSample: On reading, for a sample that cannot be used; names shard and sample.
        BrokenShard: On reading, for a shard that cannot be opened or has changed; names the shard.
    """

    def __init__(
        self,
        folder: str | Path,
        normalize: str = "image",
        crops: Crops | None = None,
        num_classes: int | None = None,
        on_bad_sample: str = "error",
        cache: storage.Cache | None = None,
        bands: Sequence[int | str] | None = None,
        generations: int | None = None,
        fill: bool = True,
    ) -> None:
        for name, value, allowed in (
            ("normalize", normalize, NORMALIZATIONS),
            ("on_bad_sample", on_bad_sample, ON_BAD_SAMPLE),
        ):
            if value not in allowed:
                raise ValueError(f"{name} is {value!r}; it must be one of {', '.join(allowed)}")
        self.folder, self.normalize, self.crops, self.cache = str(folder), normalize, crops, cache
        self.fill = fill
        self.on_bad_sample = on_bad_sample
        self.index: Index = choose_bands(load_index(folder, cache, generations), bands)
        self.num_classes = num_classes or self.index.num_classes
        paste = crops is not None and crops.paste > 0
        # uint8 cannot hold an object's values after they are scaled to another image's contrast.
        whole = self.index.dtype == "uint8" and (fill or not self.index.reading.missing)
        self.image_dtype = np.dtype(np.uint8 if whole and not paste else np.float32)
        self.mean, self.std = (np.array(values, np.float32) for values in self.index.normalization(normalize))
        # Keyed by process: file descriptors are not valid in another loader process.
        self._open: OrderedDict[tuple[int, int], int] = OrderedDict()
        # The error of each shard that could not be opened, and until when it is raised without another try.
        self._broken: dict[int, tuple[BrokenShard, float]] = {}

    def __len__(self) -> int:
        return self.index.num_samples

    def uncropped(self) -> "Shards":
        """Return the same split with whole images."""
        whole = copy.copy(self)
        whole.crops, whole._open = None, OrderedDict()
        whole.image_dtype = np.dtype(np.uint8 if self.index.dtype == "uint8" else np.float32)
        return whole

    def __getitem__(self, slots: Sequence[Slot]) -> Batch:
        entries = self.index.entries([slot.sample for slot in slots])
        weights = [float(slot.weight) for slot in slots]
        bad: list[SkipReport] = []
        read = self.read_straight(entries)
        if read is not None:
            images, masks = read
            means, stds = self.batch_statistics(images, entries)
        else:
            items: list[Item | None] = []
            for slot, entry in zip(slots, entries, strict=True):
                try:
                    items.append(self.item(slot, entry))
                except (BadSample, BrokenShard) as error:
                    if self.on_bad_sample == "error":
                        raise
                    weights[len(items)] = 0.0
                    bad.append(self.report(slot, entry, error))
                    items.append(None)
            repeat = next((item for item in items if item is not None), None) or self.blank()
            whole = [repeat if item is None else item for item in items]
            images = np.stack([item.image for item in whole]).astype(self.image_dtype, copy=False)
            masks = np.stack([item.mask for item in whole])
            means, stds = np.stack([item.mean for item in whole]), np.stack([item.std for item in whole])
        return {
            # Files hold (N, H, W, bands), which is channels-last memory: no transposition is needed.
            "image": torch.from_numpy(images).permute(0, 3, 1, 2),
            "mask": torch.from_numpy(masks),
            "mean": torch.from_numpy(means),
            "std": torch.from_numpy(stds),
            "weight": torch.tensor(weights),
            "padded": 0.0 in weights,
            "epoch": [slot.epoch for slot in slots],
            "sample": [slot.sample for slot in slots],
            "key": [entry.key for entry in entries],
            "bad": bad,
        }

    # torch's loader requests whole batches by this name.
    __getitems__ = __getitem__

    def read_straight(self, entries: list[SampleEntry]) -> tuple[np.ndarray, np.ndarray] | None:
        """Read a batch of .npy samples of the crops' size straight into the batch's memory, with one call for each sample.

        Args:
            entries: Index entries of N samples.

        Returns:
            Images (N, H, W, bands) and masks (N, H, W) uint8, with H = W = crops.size. None if the samples are of another kind
            or if anything is wrong with one of them: reading them one by one then finds out what.
        """
        index = self.index
        if self.crops is None or self.crops.paste or index.labels is not None or index.reading.missing:
            return None
        if index.chosen is not None:
            return None
        if any((entry.image.format, entry.mask.format) != ("npy", "npy") for entry in entries):
            return None
        N, size = len(entries), self.crops.size
        images = np.empty((N, size, size, self.index.bands), self.image_dtype)
        masks = np.empty((N, size, size), np.uint8)
        image_header, mask_header = npy_header(images.shape[1:], images.dtype), npy_header(masks.shape[1:], masks.dtype)
        image_length, mask_length = len(image_header) + images[0].nbytes, len(mask_header) + masks[0].nbytes
        gap = bytearray(MAX_GAP)
        header_found, mask_header_found = bytearray(len(image_header)), bytearray(len(mask_header))
        try:
            for i, (_, image, mask, expected, shard, _) in enumerate(entries):
                between = mask.offset - image.offset - image.length
                if (image.length, mask.length) != (image_length, mask_length) or not 0 <= between <= MAX_GAP:
                    return None
                image_bytes, mask_bytes = images[i].data.cast("B"), masks[i].data.cast("B")
                parts = [header_found, image_bytes, memoryview(gap)[:between], mask_header_found, mask_bytes]
                if os.preadv(self.open_shard(shard), parts, image.offset) != image_length + between + mask_length:
                    return None
                if header_found != image_header or mask_header_found != mask_header:
                    return None
                if digest((header_found, image_bytes, mask_header_found, mask_bytes)) != expected:
                    return None
        except (OSError, BrokenShard):
            return None
        highest = 1 if self.num_classes == 1 else self.num_classes - 1
        if masks.max() > highest and ((masks > highest) & (masks != self.index.ignore_index)).any():
            return None
        # A nan is its batch's lowest and highest value.
        if images.dtype.kind == "f" and not (images.min() >= -LARGEST and images.max() <= LARGEST):
            return None
        return images, masks

    def item(self, slot: Slot, entry: SampleEntry) -> Item:
        """Return one sample; with crops, it is cropped and may have objects of another sample pasted on.

        Raises:
            BadSample: If the sample, or its donor with on_bad_sample "error", cannot be used.
            BrokenShard: If the shard cannot be opened.
        """
        if self.crops is None:
            return self.whole(entry)
        crops, place = self.crops, [self.crops.seed, slot.epoch, slot.sample]
        item = self.cropped(entry, crops, np.random.default_rng([*place, 0]))
        if crops.paste:
            # Stream 1 of random numbers belongs to the augmentation.
            rng = np.random.default_rng([*place, 2])
            donor = donor_of(slot.sample, self.index.shard_range(entry.shard), crops.paste, rng)
            turn = int(rng.integers(8))
            if donor is not None and (other := self.donor(donor, crops, rng)) is not None:
                item = pasted(item, other, self.index.ignore_index, turn)
        return item

    def whole(self, entry: SampleEntry) -> Item:
        """Return one sample uncropped, with the statistics to normalise it by; pixels without a value get the mean.

        Raises:
            BadSample: If the sample cannot be used.
            BrokenShard: If the shard cannot be opened.
        """
        image, mask = self.read(entry)
        mean, std = self.statistics(image, entry)
        if self.index.reading.missing and self.fill:
            image = filled(image, mean if self.normalize != "none" else self.mean)
        return Item(image, mask, mean, std)

    def cropped(self, entry: SampleEntry, crops: Crops, rng: np.random.Generator) -> Item:
        """Return one sample cut to the crops' size; of an image in tiles, only those that the crop touches are read.

        Args:
            entry: Index entry of the sample.
            crops: How the crop is cut.
            rng: Source of random numbers; none are drawn for an image of the crops' size.

        Raises:
            BadSample: If the sample cannot be used.
            BrokenShard: If the shard cannot be opened.
        """
        ignore_index = self.index.ignore_index
        # The labels of pixels without a value, and an image's own statistics, need the whole image.
        alone = not self.index.reading.missing and (self.normalize != "image" or self.index.has_statistics)
        if entry.image.format == tiles.FORMAT and alone:
            with self.reading(entry) as stored:
                if stored.mask.shape == (crops.size, crops.size):
                    rows = columns = slice(0, crops.size)
                else:
                    rows, columns = crop_place(stored.mask, crops, ignore_index, rng)
                window = stored.window(rows, columns)
                image, mask = cut(window, stored.mask[rows, columns], crops.size, ignore_index)
            return Item(image, mask, *self.statistics(image, entry))
        item = self.whole(entry)
        if item.mask.shape == (crops.size, crops.size):
            return item
        image, mask = random_crop(item.image, item.mask, crops, ignore_index, rng)
        return item._replace(image=image, mask=mask)

    def donor(self, sample: int, crops: Crops, rng: np.random.Generator) -> Item | None:
        """Return a sample to take objects from, cropped around them.

        Args:
            sample: Number of the sample.
            crops: Size of the crop.
            rng: Source of random numbers.

        Returns:
            The crop, or None for a bad sample that is skipped; it is reported when its own place in the order comes.

        Raises:
            BadSample: If the sample cannot be used and on_bad_sample is "error".
            BrokenShard: If the shard cannot be opened.
        """
        try:
            return self.cropped(self.index.entries([sample])[0], replace(crops, foreground=1.0), rng)
        except BadSample:
            if self.on_bad_sample == "error":
                raise
            return None

    def blank(self) -> Item:
        """Return an item without contents, all of it ignored, for a batch that has no good sample at all."""
        side, bands = self.crops.size if self.crops else 32, self.index.bands
        mask = np.full((side, side), self.index.ignore_index, np.uint8)
        image = np.zeros((side, side, bands), self.image_dtype)
        return Item(image, mask, np.zeros(bands, np.float32), np.ones(bands, np.float32))

    def report(self, slot: Slot, entry: SampleEntry, error: BadSample | BrokenShard) -> SkipReport:
        """Return which sample was skipped and why."""
        reason = error.reason if isinstance(error, BadSample) else str(error)
        shard = self.index.shard_location(entry.shard)
        return {"shard": shard, "key": entry.key, "epoch": slot.epoch, "reason": reason}

    def read(self, entry: SampleEntry) -> tuple[np.ndarray, np.ndarray]:
        """Read and check one sample.

        Args:
            entry: Index entry of the sample.

        Returns:
            Image (H, W, bands), nan where it has no value, and mask (H, W) uint8.

        Raises:
            BadSample: If the sample cannot be decoded, has changed or has a label that num_classes does not allow.
            BrokenShard: If the shard cannot be opened.
        """
        with self.reading(entry) as stored:
            image, mask = stored.whole(), stored.mask
            if self.index.reading.missing:
                mask = without_values(image, mask, self.index.ignore_index)
        return image, mask

    @contextmanager
    def reading(self, entry: SampleEntry) -> Iterator[StoredSample]:
        """Read one sample and check its labels; what is wrong with it, also with what is read of it later, is a BadSample.

        Args:
            entry: Index entry of the sample.

        Yields:
            The sample.

        Raises:
            BadSample: If the sample cannot be decoded, has changed or has a label that num_classes does not allow.
            BrokenShard: If the shard cannot be opened.
        """
        descriptor = self.open_shard(entry.shard)
        try:
            stored = read_stored(descriptor, entry, self.index)
            highest = 1 if self.num_classes == 1 else self.num_classes - 1
            if stored.mask.max() > highest:
                wrong = stored.mask[(stored.mask > highest) & (stored.mask != self.index.ignore_index)]
                if wrong.size:
                    raise ValueError(
                        f"has label {wrong.max()}; with {self.num_classes} classes the highest is {highest}"
                    )
            yield stored
        except (ValueError, MemoryError) as error:
            raise BadSample(self.index.shard_location(entry.shard), entry.key, str(error)) from error

    def open_shard(self, number: int) -> int:
        """Open a shard and keep it open; a remote one is fetched first.

        Args:
            number: Number of the shard in the index.

        Returns:
            A file descriptor for reads at given offsets.

        Raises:
            BrokenShard: If the shard is missing or is not the file that was indexed.
        """
        key = os.getpid(), number
        if key in self._open:
            self._open.move_to_end(key)
            return self._open[key]
        # A missing shard is not tried again for each of its samples, and one that cannot be reached not at once.
        known, until = self._broken.get(number, (None, 0.0))
        if known is not None and time.monotonic() < until:
            raise known
        try:
            descriptor = self._open_file(number)
        except BrokenShard as error:
            passing = isinstance(error, UnreachedShard)
            self._broken[number] = error, time.monotonic() + UNREACHED_SECONDS if passing else math.inf
            raise
        self._open[key] = descriptor
        if len(self._open) > OPEN_SHARDS:
            (owner, _), oldest = self._open.popitem(last=False)
            if owner == os.getpid():
                os.close(oldest)
        return descriptor

    def _open_file(self, number: int) -> int:
        shard, location = self.index.shard(number), self.index.shard_location(number)
        again = f"Put it back, or make a new index: deepskip index {self.folder}"
        try:
            descriptor = None
            while descriptor is None:
                path = self.local_path(number)
                try:
                    descriptor = os.open(path, os.O_RDONLY)
                except FileNotFoundError:
                    # Another process removed the copy to make room in the cache.
                    if not storage.is_remote(location):
                        raise
        except storage.ChangedFile as error:
            raise BrokenShard(f"{error}. {again}") from error
        except storage.Unreached as error:
            raise UnreachedShard(str(error)) from error
        except storage.StorageError as error:
            raise BrokenShard(str(error)) from error
        except OSError as error:
            raise BrokenShard(f"{location} cannot be opened: {error.strerror or error}. {again}") from error
        found = os.fstat(descriptor).st_size
        if found != shard.bytes:
            os.close(descriptor)
            raise BrokenShard(f"{location} has {found} bytes where its index says {shard.bytes}. {again}")
        return descriptor

    def local_path(self, number: int) -> Path:
        """Return the path of a shard, or of its copy in the cache, which is fetched first if needed.

        Args:
            number: Number of the shard in the index.

        Raises:
            ValueError: If the shard is remote and there is no cache.
            OSError: If the shard cannot be fetched; a StorageError if the remote file has changed or cannot be reached.
        """
        location, shard = self.index.shard_location(number), self.index.shard(number)
        if not storage.is_remote(location):
            return storage.local(location)
        if self.cache is None:
            raise ValueError(f"{location} is remote: reading it needs a cache")
        return self.cache.fetch(location, shard.bytes, shard.sha256)

    def batch_statistics(self, images_NHWC: np.ndarray, entries: list[SampleEntry]) -> tuple[np.ndarray, np.ndarray]:
        """Return the statistics of each image of a batch (N, H, W, bands): mean and std, each (N, bands) float32."""
        if self.normalize != "image":
            N = len(images_NHWC)
            mean, std = self.statistics(images_NHWC[0], entries[0])
            return np.repeat(mean[None], N, 0), np.repeat(std[None], N, 0)
        if self.index.has_statistics:
            return self.index.statistics_of([entry.number for entry in entries])
        found = [self.statistics(image, entry) for image, entry in zip(images_NHWC, entries, strict=True)]
        return np.stack([mean for mean, _ in found]), np.stack([std for _, std in found])

    def statistics(self, image_HWC: np.ndarray, entry: SampleEntry) -> tuple[np.ndarray, np.ndarray]:
        """Return the statistics that normalise an image.

        Args:
            image_HWC: The whole image (H, W, bands).
            entry: Its entry in the index, which may hold its statistics.

        Returns:
            Mean and std of each band, each (bands,) float32.
        """
        bands = image_HWC.shape[2]
        if self.normalize == "none":
            return np.zeros(bands, np.float32), np.ones(bands, np.float32)
        if self.normalize in ("dataset", "robust"):
            return self.mean, self.std
        if self.index.has_statistics and entry.number >= 0:
            return self.index.statistics_of(entry.number)
        mean, std = band_statistics(image_HWC)
        return mean.astype(np.float32), std.astype(np.float32)
