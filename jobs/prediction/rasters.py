"""Open images for reading by windows: TIFF, npy and Zarr of any size; other formats are read whole."""

import base64
import contextlib
import math
import struct
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import tifffile

from deepskip.data_shards import tiff
from deepskip.data_shards.decoding import MAX_PIXELS, decode_image, read_image
from deepskip.data_shards.pictures import (
    Picture,
    Reading,
    dropped_alpha,
    image_of,
    suspected_nodata,
    turned,
    without_nodata,
)
from deepskip.jobs.prediction import zarr_codecs
from deepskip.jobs.prediction.georeference import Georeference, of_tiff, of_world_file

READING = Reading(missing=True)
# An image of at most this many decompressed bytes is read whole.
WHOLE_BYTES = 2**26
# The largest chunk that may be decompressed to read a window.
MAX_CHUNK_BYTES = 2**30
# The attributes in which xarray, NetCDF and GDAL name the value of missing pixels.
FILL_ATTRIBUTES = ("_FillValue", "missing_value", "nodata")
# The axes of an image by the names that Zarr arrays give them; others are bands.
AXES = dict.fromkeys(("y", "lat", "latitude", "height", "row", "rows"), "H") | dict.fromkeys(
    ("x", "lon", "longitude", "width", "column", "columns"), "W"
)
# The number of windows of a large image that are read to tell transparency from data, and their sides in pixels.
LOOKS, LOOK_SIDE = 8, 256
# The side of the windows of a large image in which undeclared no-data values are looked for.
CORNER = 64


@dataclass
class Raster:
    """Hold an open image that is read by windows.

    Attributes:
        height: Height, pixels.
        width: Width, pixels.
        bands: Number of bands.
        dtype: Data type of the windows.
        read_raw: Function from rows and columns (slices) to a window (rows, columns, bands) as stored.
        whole: The whole image (height, width, bands) if it is in memory, else None.
        by_rows: Whether reading a few columns costs as much as reading whole rows.
        place: Where on a map the image lies.
        nodata: Values that mark missing pixels. If there is one, windows are float32 or float64 and nan at these pixels.
    """

    height: int
    width: int
    bands: int
    dtype: np.dtype
    read_raw: Callable[[slice, slice], np.ndarray]
    whole: np.ndarray | None = None
    by_rows: bool = False
    place: Georeference = field(default_factory=Georeference)
    nodata: tuple[float, ...] = ()

    def mark_missing(self, said: float | None, reading: Reading) -> None:
        """Set the values that mark missing pixels.

        Args:
            said: Value that the file names, or None.
            reading: Reading options, with a further value or None.
        """
        self.nodata = tuple(value for value in (said, reading.nodata) if value is not None and reading.missing)
        if self.nodata and self.dtype != np.float64:
            self.dtype = np.dtype(np.float32)

    def read(self, rows: slice, columns: slice) -> np.ndarray:
        """Read a window.

        Args:
            rows: Rows to read; start and stop are set.
            columns: Columns to read; start and stop are set.

        Returns:
            Array (rows, columns, bands) of the raster's dtype, nan at missing pixels.

        Raises:
            ValueError: The window cannot be decoded, or has values that are nan or infinite but not marked as missing.
            OSError: The window cannot be read.
        """
        try:
            window = self.read_raw(rows, columns)
        except OSError:
            raise
        # Decoders raise many kinds of exceptions on corrupt data.
        except Exception as error:
            raise ValueError(
                f"does not decode in rows {rows.start} to {rows.stop}: {type(error).__name__}: {error}"
            ) from error
        try:
            return without_nodata(window, *self.nodata).astype(self.dtype, copy=False)
        except ValueError as error:
            what, mark, cure = str(error).partition(";")
            raise ValueError(
                f"{what} in rows {rows.start} to {rows.stop}, columns {columns.start} to {columns.stop}{mark}{cure}"
            ) from error


def suspected(raster: Raster) -> float | None:
    """Return a value of a raster that probably means no data although nothing says so, or None.

    Of a large raster the corners and the middle are looked at.

    Args:
        raster: The raster.
    """
    if raster.nodata or raster.dtype == np.uint8:
        return None
    if raster.whole is not None:
        return suspected_nodata(raster.whole)
    rows, columns = (
        [slice(start, min(start + CORNER, length)) for start in (0, length // 2, max(0, length - CORNER))]
        for length in (raster.height, raster.width)
    )
    places = [(0, 0), (0, 2), (1, 1), (2, 0), (2, 2)]
    found = [raster.read(rows[i], columns[j]).reshape(-1, 1, raster.bands) for i, j in places]
    return suspected_nodata(np.concatenate(found))


def in_memory(image_HWC: np.ndarray) -> Raster:
    """Return a raster that holds an array (H, W, bands)."""
    H, W, C = image_HWC.shape
    # Missing pixels are nan already.
    nodata = (math.nan,) if image_HWC.dtype.kind == "f" and np.isnan(image_HWC).any() else ()
    return Raster(H, W, C, image_HWC.dtype, lambda rows, columns: image_HWC[rows, columns], image_HWC, nodata=nodata)


@contextmanager
def open_raster(path: Path | str, extension: str, bands: int | None, reading: Reading = READING) -> Iterator[Raster]:
    """Open an image for as long as the block runs.

    Args:
        path: Path of the image; for Zarr also a URL.
        extension: Format: "png", "tif", "npy", "zarr", ...
        bands: Number of bands that the model takes; None for any. It decides the axes of a Zarr array without axis names,
            and whether a TIFF's fourth band is transparency.
        reading: How transparency, orientation and missing values are handled.

    Yields:
        The open image.

    Raises:
        ValueError: The image cannot be decoded; the message gives the reason.
        OSError: The image cannot be read.
    """
    with ExitStack() as stack:
        try:
            raster = raster_of(Path(path), str(path), extension, bands, reading, stack)
        except OSError:
            raise
        # Libraries raise many kinds of exceptions on bytes that are not an image.
        except Exception as error:
            if type(error) is ValueError:
                raise
            raise ValueError(f"the {extension} file does not decode: {error}") from error
        yield raster


def raster_of(
    path: Path, location: str, extension: str, bands: int | None, reading: Reading, stack: ExitStack
) -> Raster:
    """Open an image by its format.

    Args:
        path: Path of the image.
        location: Path or URL of a Zarr array.
        extension: Format: "png", "tif", "npy", "zarr", ...
        bands: Number of bands that the model takes; None for any.
        reading: How transparency, orientation and missing values are handled.
        stack: Stack that closes the open files.
    """
    if extension in ("tif", "tiff"):
        return open_tiff(stack.enter_context(tiff.open_tiff(path, MAX_PIXELS)), path, bands, reading)
    if extension == "zarr" or (extension == "npy" and path.stat().st_size > WHOLE_BYTES):
        raster, said = open_zarr(location, bands) if extension == "zarr" else (open_npy(path), None)
        raster.mark_missing(said, reading)
        return raster
    place = of_world_file(path)
    # Like GDAL, do not rotate georeferenced images.
    reading = replace(reading, orientation="ignore") if place.transform else reading
    return replace(in_memory(decode_image(extension, path.read_bytes(), bands=bands, reading=reading)), place=place)


def open_npy(path: Path) -> Raster:
    """Open an npy file of shape (H, W) or (H, W, bands), memory-mapped."""
    mapped = np.load(path, mmap_mode="r", allow_pickle=False)
    order = "F" if mapped.flags.f_contiguous and not mapped.flags.c_contiguous else "C"
    layout = {"dtype": mapped.dtype, "offset": mapped.offset, "shape": mapped.shape, "order": order}
    check(mapped.shape, mapped.dtype)
    return from_file(path, layout, "HWC"[: mapped.ndim], by_rows=False)


def from_file(path: Path, layout: dict[str, Any], axes: str, by_rows: bool) -> Raster:
    """Open an uncompressed array that is part of a file.

    Args:
        path: The file.
        layout: Arguments of numpy.memmap: dtype, offset, shape, and order if it is not "C".
        axes: Order of the axes: "HW", "HWC" or "CHW".
        by_rows: Whether reading a few columns costs as much as reading whole rows.
    """
    shape = dict(zip(axes, layout["shape"], strict=True))

    def read(rows: slice, columns: slice) -> np.ndarray:
        # Map the file anew for each window: pages that stay mapped would count as memory of this process.
        mapped = np.memmap(path, mode="r", **layout)
        return cut(mapped, axes, rows, columns)

    dtype = np.dtype(layout["dtype"]).newbyteorder("=")
    return Raster(shape["H"], shape["W"], shape.get("C", 1), dtype, read, by_rows=by_rows)


def cut(array: Any, axes: str, rows: slice, columns: slice) -> np.ndarray:
    """Return a window (rows, columns, bands) of an array, copied into native byte order.

    Args:
        array: Array (or Zarr array) of two or three axes.
        axes: Order of its axes: "HW", "HWC" or "CHW".
        rows: Rows of the window.
        columns: Columns of the window.
    """
    window = np.asarray(array[tuple({"H": rows, "W": columns, "C": slice(None)}[axis] for axis in axes)])
    window = np.transpose(window, [axes.index(axis) for axis in "HWC" if axis in axes])
    window = np.array(window, dtype=window.dtype.newbyteorder("="))
    return window if "C" in axes else window[..., None]


def check(shape: tuple[int, ...], dtype: np.dtype) -> None:
    """Validate the shape and dtype of an image.

    Raises:
        ValueError: The array has not two or three axes, is empty, or is not of integers or real numbers.
    """
    if len(shape) not in (2, 3) or 0 in shape:
        raise ValueError(f"has shape {shape}; an image is (height, width) or (height, width, bands)")
    if np.dtype(dtype).kind not in "iuf":
        raise ValueError(f"has dtype {dtype}; an image is of integers or real numbers")


def open_tiff(file: tifffile.TiffFile, path: Path, bands: int | None, reading: Reading) -> Raster:
    """Open the first series of a TIFF, with pages or planes as bands.

    Palettes are applied. Transparency is handled as in decode_image.

    Args:
        file: The open TIFF.
        path: Its path.
        bands: Number of bands that the model takes; None for any.
        reading: How transparency, orientation and missing values are handled.

    Raises:
        ValueError: The series is not an image, or its chunks are too large to read by windows.
    """
    series, page, place = tiff.series_of(file), file.pages.first, of_tiff(file, path)
    tiff.guard(series, path.stat().st_size)
    # Like GDAL, do not rotate georeferenced images.
    reading = replace(reading, orientation="ignore") if place.transform else reading
    if series.nbytes <= WHOLE_BYTES and path.stat().st_size <= WHOLE_BYTES:
        picture = read_image("tif", path.read_bytes())
        return replace(in_memory(image_of(picture, reading, bands)), place=place)
    kept = [i for i, (axis, n) in enumerate(zip(series.axes, series.shape, strict=True)) if n > 1 or axis in "YX"]
    shape = tuple(series.shape[i] for i in kept)
    axes = "".join({"Y": "H", "X": "W"}.get(series.axes[i], "C") for i in kept)
    if sorted(axes) not in (["H", "W"], ["C", "H", "W"]):
        raise ValueError(f"has axes {series.axes} of {series.shape}; height, width and one axis of bands are read")
    check(shape, values_of(series))
    if series.dataoffset is not None:
        dtype = np.dtype(file.byteorder + series.dtype.char)
        raster = from_file(path, {"dtype": dtype, "offset": series.dataoffset, "shape": shape}, axes, by_rows=False)
    else:
        raster = open_tiff_by_chunks(series, page, shape, axes)
    mask = tiff.mask_of(file, series) if reading.missing else None
    if mask is not None:
        tiff.guard(mask, path.stat().st_size)
        apply_mask(raster, mask)
    said = tiff.said(page, raster.bands)
    if page.photometric == tifffile.PHOTOMETRIC.PALETTE and raster.bands == 1:
        apply_palette(raster, page, said["nodata"])
        said["nodata"] = None if said["nodata"] is None else math.nan
    drop_alpha(raster, said["alpha"], bands, reading)
    raster.mark_missing(said["nodata"], reading)
    if mask is not None:
        raster.nodata = (*raster.nodata, math.nan)
    raster.place = place
    return raster if reading.orientation == "ignore" else turned_raster(raster, said["orientation"])


def open_tiff_by_chunks(series: Any, page: Any, shape: tuple[int, ...], axes: str) -> Raster:
    """Open a compressed or tiled TIFF through tifffile's Zarr view.

    Args:
        series: Series of the TIFF.
        page: First page of the TIFF.
        shape: Lengths of the axes that are kept.
        axes: Order of these axes: "HW", "HWC" or "CHW".

    Raises:
        ValueError: A strip or tile is larger than MAX_CHUNK_BYTES.
    """
    chunk = int(np.prod(page.chunks)) * series.dtype.itemsize
    if chunk > MAX_CHUNK_BYTES:
        raise ValueError(
            f"has strips or tiles of {chunk} bytes, which cannot be read in part; rewrite it with smaller tiles: "
            "gdal_translate -co TILED=YES -co COMPRESS=DEFLATE IN OUT"
        )
    array = zarr_of(lambda zarr: zarr.open(series.aszarr(level=0), mode="r"))

    def read(rows: slice, columns: slice) -> np.ndarray:
        # The Zarr view keeps axes of length 1.
        window = [slice(None)] * array.ndim
        window[series.axes.index("Y")], window[series.axes.index("X")] = rows, columns
        lengths = {"H": rows.stop - rows.start, "W": columns.stop - columns.start}
        found = np.asarray(array[tuple(window)]).reshape(
            [lengths.get(axis, n) for axis, n in zip(axes, shape, strict=True)]
        )
        return cut(found, axes, slice(None), slice(None))

    sizes = dict(zip(axes, shape, strict=True))
    return Raster(sizes["H"], sizes["W"], sizes.get("C", 1), values_of(series), read, by_rows=not page.is_tiled)


def apply_mask(raster: Raster, mask: Any) -> None:
    """Change a raster to return nan, in float32 or float64, where a series that is its mask is 0."""
    raw, valid = raster.read_raw, open_tiff_by_chunks(mask, mask.keyframe, (raster.height, raster.width), "HW").read_raw
    raster.dtype = np.dtype(np.float64 if raster.dtype == np.float64 else np.float32)
    raster.read_raw = lambda rows, columns: np.where(valid(rows, columns) != 0, raw(rows, columns), np.nan)


def values_of(series: Any) -> np.dtype:
    """Return the dtype in which the numbers of a TIFF's series are read: single bits as bytes."""
    return np.dtype(np.uint8 if series.dtype == bool else series.dtype)


def apply_palette(raster: Raster, page: Any, nodata: float | None) -> None:
    """Change a raster to return the colours of a page's palette, nan at indices that mark missing pixels.

    Args:
        raster: Raster of palette indices, changed in place to three bands.
        page: TIFF page with the palette.
        nodata: Index that marks missing pixels, or None.
    """
    raw = raster.read_raw
    colours = tiff.colours_of(page)

    def read(rows: slice, columns: slice) -> np.ndarray:
        indices = raw(rows, columns)[..., 0]
        if nodata is None:
            coloured: np.ndarray = colours[indices]
            return coloured
        return np.where((indices == nodata)[..., None], np.nan, colours[indices]).astype(np.float32)

    raster.read_raw, raster.bands, raster.dtype = read, 3, np.dtype(np.uint8)


def drop_alpha(raster: Raster, alpha: tuple[int, ...], bands: int | None, reading: Reading) -> None:
    """Change a raster to omit its transparency bands.

    They are chosen as in image_of, from windows along the diagonal of the image.

    Args:
        raster: The raster, changed in place.
        alpha: Numbers of the bands that are flagged as transparency.
        bands: Number of bands that the model takes; None for any.
        reading: How transparency is handled.
    """
    if not alpha:
        return
    raw, tops = raster.read_raw, np.linspace(0, raster.height - 1, LOOKS).astype(int)
    lefts = np.linspace(0, raster.width - 1, LOOKS).astype(int)
    seen = [
        raw(slice(top, min(top + LOOK_SIDE, raster.height)), slice(left, min(left + LOOK_SIDE, raster.width)))
        for top, left in zip(tops.tolist(), lefts.tolist(), strict=True)
    ]
    sample = np.concatenate([window.reshape(-1, raster.bands) for window in seen])[None]
    dropped = dropped_alpha(Picture(sample, alpha), reading.alpha, bands)
    if dropped:
        kept = [band for band in range(raster.bands) if band not in dropped]
        raster.read_raw, raster.bands = lambda rows, columns: raw(rows, columns)[..., kept], len(kept)


def turned_raster(raster: Raster, orientation: int) -> Raster:
    """Return a raster whose windows are rotated or mirrored as EXIF's orientation (1 to 8) requires."""
    if orientation == 1:
        return raster
    swapped, raw = orientation > 4, raster.read_raw
    H, W = (raster.width, raster.height) if swapped else (raster.height, raster.width)
    from_below, from_right = orientation in (3, 4, 7, 8), orientation in (2, 3, 6, 7)

    def read(rows: slice, columns: slice) -> np.ndarray:
        if from_below:
            rows = slice(H - rows.stop, H - rows.start)
        if from_right:
            columns = slice(W - columns.stop, W - columns.start)
        return turned(raw(columns, rows) if swapped else raw(rows, columns), orientation)

    return replace(raster, height=H, width=W, read_raw=read, by_rows=raster.by_rows and not swapped)


def open_zarr(location: str, bands: int | None) -> tuple[Raster, float | None]:
    """Open a Zarr array, or the array of a group that is named image, data or 0, or is the only one.

    Axes are found by their names, else by their lengths.

    Args:
        location: Path or URL of the array or group.
        bands: Number of bands that the model takes; None for any.

    Returns:
        The raster, and the value that marks missing pixels if the attributes name one (such as _FillValue), else None.

    Raises:
        ValueError: It is not a readable image, or its chunks are larger than MAX_CHUNK_BYTES.
        OSError: The storage failed.
    """
    try:
        store = zarr_of(lambda zarr: zarr.open(location, mode="r"))
    # Stores and codecs define their own exceptions.
    except Exception as error:
        if isinstance(error, OSError) and not isinstance(error, FileNotFoundError):
            raise
        raise ValueError(f"is not a readable Zarr array: {type(error).__name__}: {error}") from error
    if not hasattr(store, "shape"):
        names = sorted(store.array_keys())
        chosen = next((name for name in ("image", "data", "0") if name in names), names[0] if len(names) == 1 else None)
        if chosen is None:
            raise ValueError(f"is a Zarr group of {', '.join(names) or 'no arrays'}; none is named image, data or 0")
        store = store[chosen]
    check(store.shape, store.dtype)
    # A shard counts as one chunk, because it may be read and decompressed as a whole.
    chunk = math.prod(getattr(store, "shards", None) or store.chunks) * store.dtype.itemsize
    if chunk > MAX_CHUNK_BYTES:
        raise ValueError(f"has chunks of {chunk} bytes; the limit is {MAX_CHUNK_BYTES}")
    zarr_codecs.check_codecs(store)
    axes = zarr_axes(store, bands)
    shape = dict(zip(axes, store.shape, strict=True))

    def read(rows: slice, columns: slice) -> np.ndarray:
        with zarr_codecs.within(chunk):
            return cut(store, axes, rows, columns)

    raster = Raster(
        shape["H"], shape["W"], shape.get("C", 1), np.dtype(store.dtype), read,
        by_rows=store.chunks[axes.index("W")] >= shape["W"],
    )  # fmt: skip
    told = next((store.attrs[name] for name in FILL_ATTRIBUTES if name in store.attrs), None)
    return raster, fill_value(told)


def fill_value(told: Any) -> float | None:
    """Return the value that an attribute names, or None; xarray writes floats into Zarr 3 as base64 of their eight bytes."""
    if isinstance(told, str) and len(told) == 12 and told.endswith("="):
        with contextlib.suppress(ValueError, struct.error):
            return float(struct.unpack("<d", base64.b64decode(told, validate=True))[0])
    return tiff.number(told)


def zarr_axes(array: Any, bands: int | None) -> str:
    """Return the order of a Zarr array's axes: "HW", "HWC" or "CHW".

    Args:
        array: Zarr array of two or three axes.
        bands: Number of bands that the model takes; None for any.
    """
    if array.ndim == 2:
        return "HW"
    names = getattr(array.metadata, "dimension_names", None) or array.attrs.get("_ARRAY_DIMENSIONS") or ()
    known = [AXES.get(str(name).lower(), "C") for name in names]
    if known[1:] == ["H", "W"] or (known[:2] != ["H", "W"] and array.shape[0] == bands != array.shape[2]):
        return "CHW"
    return "HWC"


def zarr_of(open_with: Callable[[Any], Any]) -> Any:
    """Return the result of a function that takes the zarr module.

    Raises:
        ValueError: zarr is not installed.
    """
    try:
        import zarr
    except ImportError as error:
        raise ValueError(f"needs zarr, which is not installed: {error}. pip install '.[geo]'") from error
    return open_with(zarr)
