"""The readers that are compared: each takes a folder and yields the batches of one epoch, 16 images and masks each."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import webdataset
from torch.utils.data import DataLoader

from deepskip.data_shards.bench.samples import SIDE, decode_png, import_streaming
from deepskip.data_shards.crops import Crops
from deepskip.data_shards.dataset import Shards
from deepskip.data_shards.index import load_index
from deepskip.data_shards.order import steps_per_epoch
from deepskip.data_shards.stream import train_batches

BATCH = 16
Reader = Callable[[Path, str, int, int], Iterator[Any]]


def deepskip(folder: Path, kind: str, workers: int, epoch: int, normalize: str = "dataset") -> Iterator[Any]:
    """Yield batches of this project's stream: shuffled, in an exact order."""
    shards = Shards(folder, normalize, Crops(SIDE, 0.5, 0))
    steps = steps_per_epoch(len(shards), BATCH)
    batches = train_batches(shards, 0, BATCH, epoch * steps, 0, 1, workers)
    for _ in range(steps):
        yield next(batches)
    batches.close()  # type: ignore[attr-defined]


def deepskip_image_statistics(folder: Path, kind: str, workers: int, epoch: int) -> Iterator[Any]:
    """Yield batches of this project's stream with the mean and standard deviation of each image, its default."""
    return deepskip(folder, kind, workers, epoch, "image")


def mapped_without_shuffling(folder: Path, kind: str, workers: int, epoch: int) -> Iterator[Any]:
    """Yield batches at the upper limit of speed: known offsets, files mapped into memory, no checks and no shuffling.

    Nothing is yielded for other formats than .npy or with loader processes.
    """
    if kind != "npy" or workers:
        return
    index = load_index(folder)
    maps = [np.memmap(index.shard_location(i), dtype=np.uint8, mode="r") for i in range(len(index.shards))]
    entries = index.entries(list(range(index.num_samples)))
    for first in range(0, len(entries), BATCH):
        part = entries[first : first + BATCH]
        images = np.empty((len(part), SIDE, SIDE, 3), np.uint8)
        masks = np.empty((len(part), SIDE, SIDE), np.uint8)
        for i, (_, image, mask, _, shard, _) in enumerate(part):
            tar = maps[shard]
            # numpy's header of these arrays has 128 bytes.
            images[i] = tar[image.offset + 128 : image.offset + image.length].reshape(SIDE, SIDE, 3)
            masks[i] = tar[mask.offset + 128 : mask.offset + mask.length].reshape(SIDE, SIDE)
        yield torch.from_numpy(images), torch.from_numpy(masks)


def stacked(samples: list[tuple[np.ndarray, np.ndarray]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Stack pairs of image (H, W, 3) and mask (H, W) into batches (N, H, W, 3) and (N, H, W)."""
    images, masks = zip(*samples, strict=True)
    return torch.from_numpy(np.stack(images)), torch.from_numpy(np.stack(masks))


def plain_webdataset(folder: Path, kind: str, workers: int, epoch: int) -> Iterator[Any]:
    """Yield batches of webdataset as its README shows, not shuffled."""
    urls = [str(path) for path in sorted(folder.glob("*.tar"))]
    data = webdataset.WebDataset(urls, shardshuffle=False, workersplitter=webdataset.split_by_worker)
    if kind == "npy":
        data = data.decode().to_tuple("image.npy", "mask.npy")
    else:
        data = data.to_tuple("image.png", "mask.png").map_tuple(decode_png, decode_png)
    yield from webdataset.WebLoader(data.batched(BATCH, collation_fn=stacked), batch_size=None, num_workers=workers)


class Pairs:
    """Collate decoded images and masks of other readers' samples.

    Args:
        kind: "npy" for samples with arrays, "png" for samples with PNG bytes.
    """

    def __init__(self, kind: str) -> None:
        self.kind = kind

    def __call__(self, samples: list[dict[str, Any]]) -> tuple[torch.Tensor, torch.Tensor]:
        """Collate a list of samples into images (N, H, W, 3) and masks (N, H, W)."""
        if self.kind == "npy":
            return stacked([(sample["image"], sample["mask"]) for sample in samples])
        return stacked([(decode_png(sample["image"]), decode_png(sample["mask"])) for sample in samples])


def litdata(folder: Path, kind: str, workers: int, epoch: int) -> Iterator[Any]:
    """Yield batches of litdata, shuffled."""
    from litdata import StreamingDataLoader, StreamingDataset

    data = StreamingDataset(str(folder), shuffle=True, seed=epoch)
    yield from StreamingDataLoader(data, batch_size=BATCH, num_workers=workers, collate_fn=Pairs(kind))


def mosaic(folder: Path, kind: str, workers: int, epoch: int) -> Iterator[Any]:
    """Yield batches of mosaicml-streaming, shuffled (py1e, its default)."""
    streaming = import_streaming()
    streaming.base.util.clean_stale_shared_memory()
    data = streaming.StreamingDataset(local=str(folder), shuffle=True, shuffle_seed=epoch, batch_size=BATCH)
    yield from DataLoader(data, batch_size=BATCH, num_workers=workers, collate_fn=Pairs(kind))
