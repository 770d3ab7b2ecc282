"""One split of shards as a dataset: batches of samples by number, read at their offsets in the tar and checked."""

import os
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import NotRequired, TypedDict

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from deepskip.data_shards import storage
from deepskip.data_shards.bands import choose_bands
from deepskip.data_shards.crops import Crops, Item, donor_of, pasted, random_crop
from deepskip.data_shards.decoding import decode_image, decode_mask, npy_header
from deepskip.data_shards.entries import SampleEntry
from deepskip.data_shards.index import Index, load_index
from deepskip.data_shards.labels import AS_LABELS
from deepskip.data_shards.order import Slot
from deepskip.data_shards.pictures import filled, without_values
from deepskip.data_shards.preparation import band_statistics, resample_bands
from deepskip.data_shards.sample import ON_BAD_SAMPLE, BadSample
from deepskip.data_shards.scan import BrokenShard, digest

NORMALIZATIONS = ("image", "dataset", "none")
OPEN_SHARDS = 64
# Largest number of bytes between image and mask that are read along in the same call.
MAX_GAP = 65536


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
            "dataset": those of the index; "none": 0 and 1.
        crops: How training crops are cut; None returns whole images.
        num_classes: Number of classes of the model; that of the index by default.
        on_bad_sample: "error" raises; "skip" puts a repeat of weight 0 in its place and reports the sample in the batch.
        cache: Where copies of remote shards are kept; required for a URL.
        bands: Numbers and ranges of the bands to take, as in `bands.chosen_bands`; None takes all.

    Raises:
        BandError: If the images do not have these bands.
        ValueError: If normalize or on_bad_sample is unknown.
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
    ) -> None:
        for name, value, allowed in (
            ("normalize", normalize, NORMALIZATIONS),
            ("on_bad_sample", on_bad_sample, ON_BAD_SAMPLE),
        ):
            if value not in allowed:
                raise ValueError(f"{name} is {value!r}; it must be one of {', '.join(allowed)}")
        self.folder, self.normalize, self.crops, self.cache = str(folder), normalize, crops, cache
        self.on_bad_sample = on_bad_sample
        self.index: Index = choose_bands(load_index(folder, cache), bands)
        self.num_classes = num_classes or self.index.num_classes
        paste = crops is not None and crops.paste > 0
        # uint8 cannot hold an object's values after they are scaled to another image's contrast.
        self.image_dtype = np.dtype(np.uint8 if self.index.dtype == "uint8" and not paste else np.float32)
        self.mean, self.std = (np.array(values, np.float32) for values in (self.index.mean, self.index.std))
        # Keyed by process: file descriptors are not valid in another loader process.
        self._open: OrderedDict[tuple[int, int], int] = OrderedDict()
        self._broken: dict[int, BrokenShard] = {}

    def __len__(self) -> int:
        return self.index.num_samples

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
        if images.dtype.kind == "f" and not np.isfinite(images).all():
            return None
        return images, masks

    def item(self, slot: Slot, entry: SampleEntry) -> Item:
        """Return one sample; with crops, it is cropped and may have objects of another sample pasted on.

        Raises:
            BadSample: If the sample, or its donor with on_bad_sample "error", cannot be used.
            BrokenShard: If the shard cannot be opened.
        """
        item = self.whole(entry)
        if self.crops is None:
            return item
        crops, place = self.crops, [self.crops.seed, slot.epoch, slot.sample]
        if item.mask.shape != (crops.size, crops.size):
            item = self.cropped(item, crops, np.random.default_rng([*place, 0]))
        if crops.paste:
            # Stream 1 of random numbers belongs to the augmentation.
            rng = np.random.default_rng([*place, 2])
            donor = donor_of(slot.sample, self.index.shard_range(entry.shard), crops.paste, rng)
            if donor is not None and (other := self.donor(donor)) is not None:
                turn = int(rng.integers(8))
                # The donor is cropped around its objects.
                if other.mask.shape != (crops.size, crops.size):
                    other = self.cropped(other, replace(crops, foreground=1.0), rng)
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
        if self.index.reading.missing:
            image = filled(image, mean if self.normalize != "none" else self.mean)
        return Item(image, mask, mean, std)

    def cropped(self, item: Item, crops: Crops, rng: np.random.Generator) -> Item:
        """Return a sample cut to the crops' size."""
        image, mask = random_crop(item.image, item.mask, crops, self.index.ignore_index, rng)
        return item._replace(image=image, mask=mask)

    def donor(self, sample: int) -> Item | None:
        """Return a whole sample to take objects from.

        Args:
            sample: Number of the sample.

        Returns:
            The sample, or None for a bad sample that is skipped; it is reported when its own place in the order comes.

        Raises:
            BadSample: If the sample cannot be used and on_bad_sample is "error".
            BrokenShard: If the shard cannot be opened.
        """
        try:
            return self.whole(self.index.entries([sample])[0])
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
        descriptor = self.open_shard(entry.shard)
        try:
            image, mask = decode_sample(descriptor, entry, self.index)
            highest = 1 if self.num_classes == 1 else self.num_classes - 1
            if mask.max() > highest:
                wrong = mask[(mask > highest) & (mask != self.index.ignore_index)]
                if wrong.size:
                    raise ValueError(
                        f"has label {wrong.max()}; with {self.num_classes} classes the highest is {highest}"
                    )
        except (ValueError, MemoryError) as error:
            raise BadSample(self.index.shard_location(entry.shard), entry.key, str(error)) from error
        return image, mask

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
        # A missing shard is not tried again for each of its samples.
        if number in self._broken:
            raise self._broken[number]
        try:
            descriptor = self._open_file(number)
        except BrokenShard as error:
            self._broken[number] = error
            raise
        self._open[key] = descriptor
        if len(self._open) > OPEN_SHARDS:
            (owner, _), oldest = self._open.popitem(last=False)
            if owner == os.getpid():
                os.close(oldest)
        return descriptor

    def _open_file(self, number: int) -> int:
        shard, location = self.index.shards[number], self.index.shard_location(number)
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
        location, shard = self.index.shard_location(number), self.index.shards[number]
        if not storage.is_remote(location):
            return Path(location.removeprefix("file://"))
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
        if self.normalize == "dataset":
            return self.mean, self.std
        if self.index.has_statistics and entry.number >= 0:
            return self.index.statistics_of(entry.number)
        mean, std = band_statistics(image_HWC)
        return mean.astype(np.float32), std.astype(np.float32)


def decode_sample(descriptor: int, entry: SampleEntry, index: Index) -> tuple[np.ndarray, np.ndarray]:
    """Read and decode one sample from an open tar.

    Args:
        descriptor: File descriptor of the tar.
        entry: Index entry of the sample.
        index: The index, which defines bands, labels and how files are read.

    Returns:
        Image (H, W, bands) and mask (H, W) uint8 labels.

    Raises:
        ValueError: If bytes are missing or changed, a file does not decode, sizes differ or the bands are wrong.
    """
    kinds = entry.image, entry.mask
    start = min(member.offset for member in kinds)
    span = max(member.offset + member.length for member in kinds) - start
    # Image and mask mostly lie next to each other: one read for both.
    if span <= entry.image.length + entry.mask.length + MAX_GAP:
        data = memoryview(os.pread(descriptor, span, start))
        parts = [data[m.offset - start : m.offset - start + m.length] for m in kinds]
    else:
        parts = [memoryview(os.pread(descriptor, m.length, m.offset)) for m in kinds]
    for member, part in zip(kinds, parts, strict=True):
        if len(part) != member.length:
            raise ValueError(f"ends after {len(part)} of {member.length} bytes")
    if digest(parts) != entry.digest:
        raise ValueError("has other bytes than when it was indexed (xxh3 differs)")
    bands = index.stored_bands if index.preparation["bands"] is None else None
    image = decode_image(entry.image.format, parts[0], bands=bands, reading=index.reading)
    mask = decode_mask(entry.mask.format, parts[1], index.labels.values if index.labels else AS_LABELS)
    if image.shape[:2] != mask.shape:
        raise ValueError(f"the image is {image.shape[:2]}, its mask {mask.shape} (height, width)")
    if image.shape[2] != index.stored_bands:
        if index.preparation["bands"] != index.stored_bands:
            raise ValueError(f"has {image.shape[2]} bands; the index says {index.stored_bands}")
        image = resample_bands(image, index.stored_bands)
    if index.chosen is not None:
        image = np.take(image, index.chosen, axis=2)
    if index.labels is not None:
        mask = index.labels.apply(mask)
    if not index.reading.missing:
        return image, mask.astype(np.uint8, copy=False)
    return image, without_values(image, mask.astype(np.uint8), index.ignore_index)
