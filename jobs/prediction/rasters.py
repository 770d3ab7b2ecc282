"""Images that are read by windows, so that their size does not matter: TIFF, npy and Zarr; all others are read whole."""

import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import tifffile

from deepskip.data_shards import tiff
from deepskip.data_shards.decoding import MAX_PIXELS, decode_image
from deepskip.jobs.prediction import zarr_codecs

# an image that unpacks to no more is read whole
WHOLE_BYTES = 2**26
# what one read of a window may unpack along with it
MAX_CHUNK_BYTES = 2**30
# tags of a GeoTIFF that say where it lies: scale, tie points, matrix, the keys with their numbers and texts; GDAL's RPC
GEO_TAGS = (33550, 33922, 34264, 34735, 34736, 34737, 50844)
Tag = tuple[int, int, int, Any, bool]


@dataclass
class Raster:
    """An image somewhere. read: rows and columns (slices) -> (rows, columns, bands), the whole image where it is small.

    by_rows: reading some columns costs as much as reading whole rows. tags: where a GeoTIFF lies, as tifffile writes them.
    transform: from x, y of pixel corners to the map, as (a, b, c, d, e, f) of x' = a x + b y + c, y' = d x + e y + f.
    crs: "EPSG:..." of the map.
    """

    height: int
    width: int
    bands: int
    dtype: np.dtype
    read_raw: Callable[[slice, slice], np.ndarray]
    whole: np.ndarray | None = None
    by_rows: bool = False
    tags: list[Tag] = field(default_factory=list)
    transform: tuple[float, ...] | None = None
    crs: str | None = None

    def read(self, rows: slice, columns: slice) -> np.ndarray:
        """Reads a window (rows, columns, bands); raises ValueError where it does not decode or is not finite."""
        try:
            window = self.read_raw(rows, columns)
        except OSError:
            raise
        # decoders fail in many ways
        except Exception as error:
            raise ValueError(
                f"does not decode in rows {rows.start} to {rows.stop}: {type(error).__name__}: {error}"
            ) from error
        if window.dtype.kind == "f" and not np.isfinite(window).all():
            raise ValueError(
                f"has values that are nan or infinite in rows {rows.start} to {rows.stop}, columns {columns.start} to "
                f"{columns.stop}"
            )
        return window


def in_memory(image_HWC: np.ndarray) -> Raster:
    """Makes a raster of an array (H, W, bands)."""
    H, W, C = image_HWC.shape
    return Raster(H, W, C, image_HWC.dtype, lambda rows, columns: image_HWC[rows, columns], image_HWC)


@contextmanager
def open_raster(path: Path | str, extension: str, bands: int | None) -> Iterator[Raster]:
    """Opens an image of a kind ("png", "tif", "npy", "zarr", ...); a path, or for Zarr a URL too.

    bands: how many the model takes, which tells the axes of a Zarr array without names, and whether a TIFF's fourth band is
    transparency; None for any.
    Raises ValueError that says what is wrong with it, or OSError.
    """
    with ExitStack() as stack:
        try:
            raster = raster_of(Path(path), str(path), extension, bands, stack)
        except OSError:
            raise
        # libraries fail in many ways on bytes that are no image
        except Exception as error:
            if type(error) is ValueError:
                raise
            raise ValueError(f"the {extension} file does not decode: {error}") from error
        yield raster


def raster_of(path: Path, location: str, extension: str, bands: int | None, stack: ExitStack) -> Raster:
    """Opens an image by its kind; what must be closed goes onto the stack."""
    if extension == "zarr":
        return open_zarr(location, bands)
    if extension in ("tif", "tiff"):
        return open_tiff(stack.enter_context(tiff.open_tiff(path, MAX_PIXELS)), path, bands)
    if extension == "npy" and path.stat().st_size > WHOLE_BYTES:
        return open_npy(path)
    return in_memory(decode_image(extension, path.read_bytes()))


def open_npy(path: Path) -> Raster:
    """Opens an array (H, W) or (H, W, bands)."""
    mapped = np.load(path, mmap_mode="r", allow_pickle=False)
    order = "F" if mapped.flags.f_contiguous and not mapped.flags.c_contiguous else "C"
    layout = {"dtype": mapped.dtype, "offset": mapped.offset, "shape": mapped.shape, "order": order}
    check(mapped.shape, mapped.dtype)
    return from_file(path, layout, "HWC"[: mapped.ndim], by_rows=False)


def from_file(path: Path, layout: dict[str, Any], axes: str, by_rows: bool) -> Raster:
    """Opens an array that lies in a file as it is; layout: numpy.memmap's arguments; axes: as "HWC" or "CHW"."""
    shape = dict(zip(axes, layout["shape"], strict=True))

    def read(rows: slice, columns: slice) -> np.ndarray:
        # mapped for each window anew: pages that stayed mapped would count as this process's memory
        mapped = np.memmap(path, mode="r", **layout)
        return cut(mapped, axes, rows, columns)

    dtype = np.dtype(layout["dtype"]).newbyteorder("=")
    return Raster(shape["H"], shape["W"], shape.get("C", 1), dtype, read, by_rows=by_rows)


def cut(array: Any, axes: str, rows: slice, columns: slice) -> np.ndarray:
    """Takes a window of an array of some axes, as (rows, columns, bands) of this machine's byte order."""
    window = np.asarray(array[tuple({"H": rows, "W": columns, "C": slice(None)}[axis] for axis in axes)])
    window = np.transpose(window, [axes.index(axis) for axis in "HWC" if axis in axes])
    window = np.array(window, dtype=window.dtype.newbyteorder("="))
    return window if "C" in axes else window[..., None]


def check(shape: tuple[int, ...], dtype: np.dtype) -> None:
    """Raises ValueError for what is no image."""
    if len(shape) not in (2, 3) or 0 in shape:
        raise ValueError(f"has shape {shape}; an image is (height, width) or (height, width, bands)")
    if np.dtype(dtype).kind not in "iuf":
        raise ValueError(f"has dtype {dtype}; an image is of integers or real numbers")


def open_tiff(file: tifffile.TiffFile, path: Path, bands: int | None) -> Raster:
    """Opens a TIFF: its first series; pages or planes are bands, palettes are applied.

    Transparency is dropped, but where the model takes as many bands as there are with it: GDAL calls a fourth band
    transparency by default, whatever it is.
    """
    series, page = file.series[0], file.pages.first
    tiff.guard(series, path.stat().st_size)
    opaque = bool(page.extrasamples) and page.samplesperpixel == bands
    if series.nbytes <= WHOLE_BYTES and path.stat().st_size <= WHOLE_BYTES and not opaque:
        raster = in_memory(decode_image("tif", path.read_bytes()))
    else:
        kept = [i for i, (axis, n) in enumerate(zip(series.axes, series.shape, strict=True)) if n > 1 or axis in "YX"]
        shape = tuple(series.shape[i] for i in kept)
        axes = "".join({"Y": "H", "X": "W"}.get(series.axes[i], "C") for i in kept)
        if sorted(axes) not in (["H", "W"], ["C", "H", "W"]):
            raise ValueError(f"has axes {series.axes} of {series.shape}; height, width and one axis of bands are read")
        check(shape, series.dtype)
        if series.dataoffset is not None:
            dtype = np.dtype(file.byteorder + series.dtype.char)
            raster = from_file(path, {"dtype": dtype, "offset": series.dataoffset, "shape": shape}, axes, by_rows=False)
        else:
            raster = open_tiff_by_chunks(series, page, shape, axes)
        if not opaque:
            apply_palette_and_alpha(raster, page)
    read_georeference(file, raster)
    return raster


def open_tiff_by_chunks(series: Any, page: Any, shape: tuple[int, ...], axes: str) -> Raster:
    """Opens a TIFF that is compressed, or in tiles, through tifffile's view of it as a Zarr array."""
    chunk = int(np.prod(page.chunks)) * series.dtype.itemsize
    if chunk > MAX_CHUNK_BYTES:
        raise ValueError(
            f"is written in pieces of {chunk} bytes, of which none can be read in part; write it in tiles: "
            "gdal_translate -co TILED=YES -co COMPRESS=DEFLATE IN OUT"
        )
    array = zarr_of(lambda zarr: zarr.open(series.aszarr(level=0), mode="r"))

    def read(rows: slice, columns: slice) -> np.ndarray:
        # tifffile keeps axes of length 1
        window = [slice(None)] * array.ndim
        window[series.axes.index("Y")], window[series.axes.index("X")] = rows, columns
        lengths = {"H": rows.stop - rows.start, "W": columns.stop - columns.start}
        found = np.asarray(array[tuple(window)]).reshape(
            [lengths.get(axis, n) for axis, n in zip(axes, shape, strict=True)]
        )
        return cut(found, axes, slice(None), slice(None))

    sizes = dict(zip(axes, shape, strict=True))
    return Raster(sizes["H"], sizes["W"], sizes.get("C", 1), series.dtype, read, by_rows=not page.is_tiled)


def apply_palette_and_alpha(raster: Raster, page: Any) -> None:
    """Has windows come as decode_image gives whole images."""
    raw = raster.read_raw
    if page.photometric == tifffile.PHOTOMETRIC.PALETTE and raster.bands == 1:
        colours = (page.colormap >> 8).astype(np.uint8).T
        raster.read_raw, raster.bands, raster.dtype = (
            lambda rows, columns: colours[raw(rows, columns)[..., 0]],
            3,
            np.dtype(np.uint8),
        )
    elif raster.bands > 1 and any(int(kind) in (1, 2) for kind in page.extrasamples):
        bands = raster.bands - len(page.extrasamples)
        raster.read_raw, raster.bands = lambda rows, columns: raw(rows, columns)[..., :bands], bands


def read_georeference(file: tifffile.TiffFile, raster: Raster) -> None:
    """Notes where a GeoTIFF lies: its tags as they are, the map's transform and EPSG code."""
    page = file.pages.first
    for code in GEO_TAGS:
        if (tag := page.tags.get(code)) is not None:
            count = 0 if isinstance(tag.value, str) else tag.count
            raster.tags.append((code, int(tag.dtype), count, tag.value, True))
    found = file.geotiff_metadata or {}
    if "ModelTransformation" in found:
        a, b, _, c, d, e, _, f = np.asarray(found["ModelTransformation"], float).ravel()[:8]
        raster.transform = a, b, c, d, e, f
    elif "ModelPixelScale" in found and "ModelTiepoint" in found:
        (sx, sy), tie = found["ModelPixelScale"][:2], np.ravel(found["ModelTiepoint"])
        raster.transform = sx, 0.0, tie[3] - tie[0] * sx, 0.0, -sy, tie[4] + tie[1] * sy
    if raster.transform and int(found.get("GTRasterTypeGeoKey", 1)) == 2:
        # the numbers are of pixels' centres
        a, b, c, d, e, f = raster.transform
        raster.transform = a, b, c - (a + b) / 2, d, e, f - (d + e) / 2
    epsg = int(found.get("ProjectedCSTypeGeoKey", found.get("GeographicTypeGeoKey", 0)))
    raster.crs = f"EPSG:{epsg}" if 0 < epsg < 32767 else None


def open_zarr(location: str, bands: int | None) -> Raster:
    """Opens a Zarr array, or of a group the one called image, data or 0; axes by their names, else by their lengths."""
    try:
        store = zarr_of(lambda zarr: zarr.open(location, mode="r"))
    # stores and codecs have errors of their own
    except Exception as error:
        if isinstance(error, OSError) and not isinstance(error, FileNotFoundError):
            raise
        raise ValueError(f"is no Zarr array that can be read: {type(error).__name__}: {error}") from error
    if not hasattr(store, "shape"):
        names = sorted(store.array_keys())
        chosen = next((name for name in ("image", "data", "0") if name in names), names[0] if len(names) == 1 else None)
        if chosen is None:
            raise ValueError(f"is a Zarr group of {', '.join(names) or 'no arrays'}; looked for image, data, 0")
        store = store[chosen]
    check(store.shape, store.dtype)
    # a shard is read and unpacked as one where its chunks cannot be
    chunk = math.prod(getattr(store, "shards", None) or store.chunks) * store.dtype.itemsize
    if chunk > MAX_CHUNK_BYTES:
        raise ValueError(f"has chunks of {chunk} bytes; at most {MAX_CHUNK_BYTES} are read at once")
    zarr_codecs.check_codecs(store)
    axes = zarr_axes(store, bands)
    shape = dict(zip(axes, store.shape, strict=True))

    def read(rows: slice, columns: slice) -> np.ndarray:
        with zarr_codecs.within(chunk):
            return cut(store, axes, rows, columns)

    return Raster(
        shape["H"], shape["W"], shape.get("C", 1), np.dtype(store.dtype), read,
        by_rows=store.chunks[axes.index("W")] >= shape["W"],
    )  # fmt: skip


def zarr_axes(array: Any, bands: int | None) -> str:
    """Tells the axes of a Zarr array: "HW", "HWC" or "CHW"."""
    if array.ndim == 2:
        return "HW"
    names = getattr(array.metadata, "dimension_names", None) or array.attrs.get("_ARRAY_DIMENSIONS") or ()
    first = [str(name).lower()[:1] for name in names]
    if first[1:] == ["y", "x"] or (not first and array.shape[0] == bands != array.shape[2]):
        return "CHW"
    return "HWC"


def zarr_of(open_with: Callable[[Any], Any]) -> Any:
    """Opens something through zarr; raises ValueError that says what to install where it is missing."""
    try:
        import zarr
    except ImportError as error:
        raise ValueError(f"is read through zarr, which is not installed: {error}. pip install '.[geo]'") from error
    return open_with(zarr)
