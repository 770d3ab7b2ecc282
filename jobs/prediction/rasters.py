"""Images that are read by windows, so that their size does not matter: TIFF, npy and Zarr; all others are read whole."""

import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import tifffile

from deepskip.data_shards import tiff
from deepskip.data_shards.decoding import MAX_PIXELS, decode_image, read_image
from deepskip.data_shards.pictures import Picture, Reading, dropped_alpha, image_of, turned, without_nodata
from deepskip.jobs.prediction import zarr_codecs
from deepskip.jobs.prediction.georeference import Georeference, of_tiff, of_world_file

READING = Reading(missing=True)
# an image that unpacks to no more is read whole
WHOLE_BYTES = 2**26
# what one read of a window may unpack along with it
MAX_CHUNK_BYTES = 2**30
# in which arrays of xarray, NetCDF and GDAL say what stands for no value
FILL_ATTRIBUTES = ("_FillValue", "missing_value", "nodata")
# windows of a large image that are looked at to tell transparency from data, and their sides
LOOKS, LOOK_SIDE = 8, 256


@dataclass
class Raster:
    """An image somewhere. read: rows and columns (slices) -> (rows, columns, bands), the whole image where it is small.

    by_rows: reading some columns costs as much as reading whole rows. place: where on a map it lies. nodata: values that stand
    for none; where there are any, windows are of real numbers, and nan there.
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
        """Takes note of the values that stand for none: what the file says, and what was named."""
        self.nodata = tuple(value for value in (said, reading.nodata) if value is not None and reading.missing)
        if self.nodata and self.dtype != np.float64:
            self.dtype = np.dtype(np.float32)

    def read(self, rows: slice, columns: slice) -> np.ndarray:
        """Reads a window (rows, columns, bands), nan where there is no value; raises ValueError that says what is wrong."""
        try:
            window = self.read_raw(rows, columns)
        except OSError:
            raise
        # decoders fail in many ways
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


def in_memory(image_HWC: np.ndarray) -> Raster:
    """Makes a raster of an array (H, W, bands)."""
    H, W, C = image_HWC.shape
    # what has no value is nan already
    nodata = (math.nan,) if image_HWC.dtype.kind == "f" and np.isnan(image_HWC).any() else ()
    return Raster(H, W, C, image_HWC.dtype, lambda rows, columns: image_HWC[rows, columns], image_HWC, nodata=nodata)


@contextmanager
def open_raster(path: Path | str, extension: str, bands: int | None, reading: Reading = READING) -> Iterator[Raster]:
    """Opens an image of a kind ("png", "tif", "npy", "zarr", ...); a path, or for Zarr a URL too.

    bands: how many the model takes, which tells the axes of a Zarr array without names, and whether a TIFF's fourth band is
    transparency; None for any. reading: what becomes of transparency, orientation and what has no value.
    Raises ValueError that says what is wrong with it, or OSError.
    """
    with ExitStack() as stack:
        try:
            raster = raster_of(Path(path), str(path), extension, bands, reading, stack)
        except OSError:
            raise
        # libraries fail in many ways on bytes that are no image
        except Exception as error:
            if type(error) is ValueError:
                raise
            raise ValueError(f"the {extension} file does not decode: {error}") from error
        yield raster


def raster_of(
    path: Path, location: str, extension: str, bands: int | None, reading: Reading, stack: ExitStack
) -> Raster:
    """Opens an image by its kind; what must be closed goes onto the stack."""
    if extension in ("tif", "tiff"):
        return open_tiff(stack.enter_context(tiff.open_tiff(path, MAX_PIXELS)), path, bands, reading)
    if extension == "zarr" or (extension == "npy" and path.stat().st_size > WHOLE_BYTES):
        raster, said = open_zarr(location, bands) if extension == "zarr" else (open_npy(path), None)
        raster.mark_missing(said, reading)
        return raster
    place = of_world_file(path)
    # what lies on a map is not turned, as GDAL has it
    reading = replace(reading, orientation="ignore") if place.transform else reading
    return replace(in_memory(decode_image(extension, path.read_bytes(), bands=bands, reading=reading)), place=place)


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


def open_tiff(file: tifffile.TiffFile, path: Path, bands: int | None, reading: Reading) -> Raster:
    """Opens a TIFF: its first series; pages or planes are bands, palettes are applied, transparency goes as in decode_image."""
    series, page, place = file.series[0], file.pages.first, of_tiff(file, path)
    tiff.guard(series, path.stat().st_size)
    # what lies on a map is not turned, as GDAL has it
    reading = replace(reading, orientation="ignore") if place.transform else reading
    if series.nbytes <= WHOLE_BYTES and path.stat().st_size <= WHOLE_BYTES:
        picture = read_image("tif", path.read_bytes())
        return replace(in_memory(image_of(picture, reading, bands)), place=place)
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
    said = tiff.said(page, raster.bands)
    if page.photometric == tifffile.PHOTOMETRIC.PALETTE and raster.bands == 1:
        apply_palette(raster, page, said["nodata"])
        said["nodata"] = None if said["nodata"] is None else math.nan
    drop_alpha(raster, said["alpha"], bands, reading)
    raster.mark_missing(said["nodata"], reading)
    raster.place = place
    return raster if reading.orientation == "ignore" else turned_raster(raster, said["orientation"])


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


def apply_palette(raster: Raster, page: Any, nodata: float | None) -> None:
    """Has windows come in the colours of a palette, nan where the index stands for no value."""
    raw, colours = raster.read_raw, (page.colormap >> 8).astype(np.uint8).T

    def read(rows: slice, columns: slice) -> np.ndarray:
        indices = raw(rows, columns)[..., 0]
        if nodata is None:
            return colours[indices]
        return np.where((indices == nodata)[..., None], np.nan, colours[indices]).astype(np.float32)

    raster.read_raw, raster.bands, raster.dtype = read, 3, np.dtype(np.uint8)


def drop_alpha(raster: Raster, alpha: tuple[int, ...], bands: int | None, reading: Reading) -> None:
    """Has windows come without the bands that are transparency, as image_of decides it, by windows all over the image."""
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
    """Makes a raster whose windows come turned, as EXIF's orientation says."""
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
    """Opens a Zarr array, or of a group the one called image, data or 0; axes by their names, else by their lengths.

    Gives what stands for no value too, where the array's attributes say so (xarray's and NetCDF's _FillValue).
    """
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

    raster = Raster(
        shape["H"], shape["W"], shape.get("C", 1), np.dtype(store.dtype), read,
        by_rows=store.chunks[axes.index("W")] >= shape["W"],
    )  # fmt: skip
    told = next((store.attrs[name] for name in FILL_ATTRIBUTES if name in store.attrs), None)
    return raster, tiff.number(told)


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
