"""The samples that all readers of the benchmark read, each in its own format."""

import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import skimage.data
import webdataset
from PIL import Image

from deepskip.data_shards.index import Index
from deepskip.data_shards.indexing import index_shards

SIDE = 128
PER_SHARD = 256


def pictures(count: int) -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
    """Yield key, image (128, 128, 3) and mask (128, 128), uint8, as windows of a photograph."""
    rng = np.random.default_rng(0)
    photograph = skimage.data.astronaut()
    for number in range(count):
        top, left = rng.integers(0, photograph.shape[0] - SIDE, 2)
        image = np.ascontiguousarray(photograph[top : top + SIDE, left : left + SIDE])
        yield f"{number:08d}", image, (image[..., 0] > 200).astype(np.uint8)


def encode(array: np.ndarray, kind: str) -> bytes:
    """Encode an array of any shape (*,) as "npy", or an image (H, W, 3) or mask (H, W) as "png"."""
    file = io.BytesIO()
    if kind == "npy":
        np.save(file, array)
    else:
        Image.fromarray(array).save(file, "PNG")
    return file.getvalue()


def decode_png(data: bytes) -> np.ndarray:
    """Decode a PNG with Pillow, as users of the other readers do."""
    return np.asarray(Image.open(io.BytesIO(data)))


def write_tars(folder: Path, kind: str, count: int) -> Index:
    """Write WebDataset shards and their index, and return the index."""
    folder.mkdir(parents=True)
    writer = None
    for number, (key, image, mask) in enumerate(pictures(count)):
        if number % PER_SHARD == 0:
            if writer is not None:
                writer.close()
            writer = webdataset.TarWriter(str(folder / f"shard-{number // PER_SHARD:06d}.tar"), mtime=0, encoder=False)
        assert writer is not None
        writer.write({"__key__": key, f"image.{kind}": encode(image, kind), f"mask.{kind}": encode(mask, kind)})
    if writer is not None:
        writer.close()
    return index_shards(str(folder), workers=1)


def import_streaming() -> Any:
    """Import mosaicml-streaming, whose torchvision cannot load its operators with a CPU build of torch."""
    import torch

    if not hasattr(torch.ops.torchvision, "nms"):
        # Nothing here calls the operators; only their names must exist.
        library = torch.library.Library("torchvision", "DEF")
        for name in TORCHVISION:
            library.define(f"{name}(Tensor x) -> Tensor")
        KEPT.append(library)
    import streaming

    return streaming


TORCHVISION = ("nms", "qnms", "roi_align", "_roi_align_backward", "ps_roi_align", "_ps_roi_align_backward", "roi_pool",
               "_roi_pool_backward", "ps_roi_pool", "_ps_roi_pool_backward", "qroi_align", "deform_conv2d",
               "_deform_conv2d_backward")  # fmt: skip
KEPT: list[Any] = []


def write_mosaic(folder: Path, kind: str, count: int) -> None:
    """Write mosaicml-streaming's MDS shards: arrays unchanged, or PNG bytes."""
    MDSWriter = import_streaming().MDSWriter
    columns = (
        {"image": f"ndarray:uint8:{SIDE},{SIDE},3", "mask": f"ndarray:uint8:{SIDE},{SIDE}"}
        if kind == "npy"
        else {"image": "bytes", "mask": "bytes"}
    )
    with MDSWriter(out=str(folder), columns=columns, size_limit=2**24) as out:
        for _, image, mask in pictures(count):
            values = (image, mask) if kind == "npy" else (encode(image, kind), encode(mask, kind))
            out.write(dict(zip(("image", "mask"), values, strict=True)))


def write_litdata(folder: Path, kind: str, count: int) -> None:
    """Write litdata's chunks: arrays unchanged, or PNG bytes."""
    from litdata.streaming.cache import Cache

    folder.mkdir(parents=True)
    cache = Cache(str(folder), chunk_bytes=2**24)
    for number, (_, image, mask) in enumerate(pictures(count)):
        if kind == "npy":
            cache[number] = {"image": image, "mask": mask}
        else:
            cache[number] = {"image": encode(image, kind), "mask": encode(mask, kind)}
    cache.done()
    cache.merge()
