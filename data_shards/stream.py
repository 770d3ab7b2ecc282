"""Batches out of shards: each rank's share of every global batch, from any step, and the images of a validation split."""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from data_shards.index import Index, Member, SampleEntry, ShardEntry, load_index
from data_shards.order import Slot, epoch_order, rank_slots, steps_per_epoch
from data_shards.sample import BadSample, decode_image, decode_mask

NORMALIZATIONS = ("image", "dataset", "none")
Batch = dict[str, Any]


class BrokenShard(RuntimeError):
    """A shard is gone, or is no longer the file that was indexed."""


@dataclass(frozen=True)
class Crops:
    """How training crops are cut: size in pixels, share laid around a foreground pixel, seed."""

    size: int
    foreground: float
    seed: int


class Shards(Dataset[Batch]):
    """The samples of one split by number, each read by its offset and checked against the index.

    normalize: whose mean and deviation go with each sample ("image": its own, over the whole image; "dataset": the
    index's; "none": 0 and 1). num_classes: as the model's; the index's by default. crops: None gives whole images.
    An item is {"image" (bands, H, W), "mask" (H, W) int64, "mean" and "std" (bands,), "weight", "epoch", "sample", "key"}.
    Raises BadSample or BrokenShard, which name shard and sample.
    """

    def __init__(
        self,
        folder: Path,
        normalize: str = "image",
        crops: Crops | None = None,
        num_classes: int | None = None,
    ) -> None:
        if normalize not in NORMALIZATIONS:
            raise ValueError(f"normalize is {normalize!r}; it must be one of {', '.join(NORMALIZATIONS)}")
        self.folder, self.normalize, self.crops = folder, normalize, crops
        self.index: Index = load_index(folder)
        self.num_classes = num_classes or self.index.num_classes
        self.shard_sizes = [len(shard.samples) for shard in self.index.shards]
        self.starts = np.concatenate([[0], np.cumsum(self.shard_sizes)])

    def __len__(self) -> int:
        return self.index.num_samples

    def __getitem__(self, slot: Slot) -> Batch:
        shard, entry = self.locate(slot.sample)
        image, mask = self.read(shard, entry)
        mean, std = self.statistics(image)
        if self.crops is not None:
            rng = np.random.default_rng([self.crops.seed, slot.epoch, slot.sample, 0])
            image, mask = random_crop(image, mask, self.crops, self.index.ignore_index, rng)
        dtype = np.uint8 if self.index.dtype == "uint8" else np.float32
        return {
            "image": torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1), dtype)),
            "mask": torch.from_numpy(mask.astype(np.int64)),
            "mean": torch.from_numpy(mean),
            "std": torch.from_numpy(std),
            "weight": float(slot.weight),
            "epoch": slot.epoch,
            "sample": slot.sample,
            "key": entry.key,
        }

    def locate(self, sample: int) -> tuple[ShardEntry, SampleEntry]:
        """Finds the shard and the entry of a sample number."""
        shard = int(np.searchsorted(self.starts, sample, side="right")) - 1
        return self.index.shards[shard], self.index.shards[shard].samples[sample - int(self.starts[shard])]

    def read(self, shard: ShardEntry, entry: SampleEntry) -> tuple[np.ndarray, np.ndarray]:
        """Reads and checks one sample: image (H, W, bands) and mask (H, W)."""
        path = self.folder / shard.name
        descriptor = open_shard(path, shard.bytes)
        try:
            image = decode_image(entry.image.extension, read_member(descriptor, entry.image))
            mask = decode_mask(entry.mask.extension, read_member(descriptor, entry.mask))
        except ValueError as error:
            raise BadSample(str(path), entry.key, str(error)) from error
        if image.shape[:2] != mask.shape:
            raise BadSample(
                str(path), entry.key, f"the image is {image.shape[:2]}, its mask {mask.shape} (height, width)"
            )
        if image.shape[2] != self.index.bands:
            raise BadSample(str(path), entry.key, f"has {image.shape[2]} bands; the index says {self.index.bands}")
        highest = 1 if self.num_classes == 1 else self.num_classes - 1
        wrong = (mask > highest) & (mask != self.index.ignore_index)
        if wrong.any():
            raise BadSample(
                str(path),
                entry.key,
                f"has label {mask[wrong].max()}; with {self.num_classes} classes the highest is {highest}",
            )
        return image, mask

    def statistics(self, image_HWC: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Gives the mean and deviation of each band to normalise by: two arrays (bands,) float32."""
        bands = image_HWC.shape[2]
        if self.normalize == "none":
            return np.zeros(bands, np.float32), np.ones(bands, np.float32)
        if self.normalize == "dataset":
            return np.array(self.index.mean, np.float32), np.array(self.index.std, np.float32)
        flat = image_HWC.reshape(-1, bands)
        return flat.mean(0, dtype=np.float64).astype(np.float32), flat.std(0, dtype=np.float64).astype(np.float32)


@lru_cache(maxsize=64)
def open_shard(path: Path, size: int) -> int:
    """Opens a shard for reading at offsets, once a process; raises BrokenShard where it is not the size indexed."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except OSError as error:
        raise BrokenShard(f"{path} cannot be opened: {error.strerror}. Put it back or pack the data again.") from error
    found = os.fstat(descriptor).st_size
    if found != size:
        os.close(descriptor)
        raise BrokenShard(f"{path} has {found} bytes where its index says {size}. Pack the data again.")
    return descriptor


def read_member(descriptor: int, member: Member) -> bytes:
    """Reads one member's bytes; raises ValueError where the file ends before it does."""
    data = os.pread(descriptor, member.length, member.offset)
    if len(data) != member.length:
        raise ValueError(f"ends after {len(data)} of {member.length} bytes")
    return data


def random_crop(
    image_HWC: np.ndarray, mask_HW: np.ndarray, crops: Crops, ignore_index: int, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Cuts a square crop; a smaller image is padded by its edge and its mask by ignore_index.

    With probability crops.foreground the crop holds a random pixel of a random foreground class of the image.
    """
    size = crops.size
    H, W = mask_HW.shape
    if size > H or size > W:
        pad = ((0, max(0, size - H)), (0, max(0, size - W)))
        image_HWC = np.pad(image_HWC, (*pad, (0, 0)), mode="edge")
        mask_HW = np.pad(mask_HW, pad, constant_values=ignore_index)
        H, W = mask_HW.shape
    # all are drawn whether used or not, so that the image's contents do not shift the stream of random numbers
    around, share, y, x = rng.random(4)
    which = rng.random()
    top, left = int(y * (H - size + 1)), int(x * (W - size + 1))
    if around < crops.foreground:
        classes = [label for label in np.unique(mask_HW) if label not in (0, ignore_index)]
        if classes:
            pixels = np.flatnonzero(mask_HW == classes[int(which * len(classes))])
            row, column = divmod(int(pixels[int(share * len(pixels))]), W)
            # the pixel lies anywhere in the crop with equal chance, as far as the image's border lets it
            top = min(max(row - int(y * size), 0), H - size)
            left = min(max(column - int(x * size), 0), W - size)
    window = slice(top, top + size), slice(left, left + size)
    return image_HWC[window], mask_HW[window]


def collate(items: list[Batch]) -> Batch:
    """Makes a batch of items: tensors stacked, weights a tensor (N,), epoch, sample and key lists."""
    batch: Batch = {name: torch.stack([item[name] for item in items]) for name in ("image", "mask", "mean", "std")}
    batch["weight"] = torch.tensor([item["weight"] for item in items])
    return batch | {name: [item[name] for item in items] for name in ("epoch", "sample", "key")}


def train_batches(
    shards: Shards,
    seed: int,
    global_batch_size: int,
    first_step: int,
    rank: int,
    world_size: int,
    loader_workers: int = 0,
) -> Iterator[Batch]:
    """Yields this rank's share of global batch first_step, first_step + 1, and so on without end.

    loader_workers: decoding processes. Raises ValueError for a split without samples.
    """
    if len(shards) == 0:
        raise ValueError(f"{shards.folder} holds no samples")

    def slots() -> Iterator[list[Slot]]:
        per_epoch = steps_per_epoch(len(shards), global_batch_size)
        epoch, batch = divmod(first_step, per_epoch)
        while True:
            order = epoch_order(seed, epoch, shards.shard_sizes)
            for t in range(batch, per_epoch):
                yield rank_slots(order, epoch, t, global_batch_size, rank, world_size)
            epoch, batch = epoch + 1, 0

    loader = DataLoader(
        shards,
        batch_sampler=slots(),
        collate_fn=collate,
        num_workers=loader_workers,
        prefetch_factor=4 if loader_workers else None,
        pin_memory=torch.cuda.is_available(),
    )
    yield from loader


def whole_images(shards: Shards, rank: int, world_size: int) -> Iterator[Batch]:
    """Yields every world_size-th sample from number `rank` on, whole, one a batch; all ranks together each sample once."""
    for sample in range(rank, len(shards), world_size):
        yield collate([shards[Slot(0, sample, 1)]])
