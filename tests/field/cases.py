"""Files as people really have them: each case packs a folder and checks numbers; docs/files.md lists the cases."""

import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import imagecodecs
import numpy as np
import pytest
import tifffile
from PIL import Image
from scipy import ndimage

from deepskip.data_shards.labels import Values
from deepskip.data_shards.pictures import Reading
from deepskip.data_shards.preparation import band_statistics
from deepskip.data_shards.sources.split import PackError
from tests.field.folders import Scene, iou, packed, write

# Each case is (what the file is, what happens, options, function). The first three are shown on the page.
CASES: dict[str, tuple[str, str, str, Callable[[Path], None]]] = {}


def case(what: str, happens: str, options: str = "") -> Callable[[Callable[[Path], None]], Callable[[Path], None]]:
    """Add a case to the page."""

    def noted(function: Callable[[Path], None]) -> Callable[[Path], None]:
        CASES[function.__name__] = what, happens, options, function
        return function

    return noted


def equal_masks(found: dict[str, Scene], made: dict[str, Scene]) -> None:
    """Check that the masks found are the true ones."""
    assert found.keys() == made.keys()
    for key, (_, mask) in found.items():
        np.testing.assert_array_equal(mask, made[key][1], err_msg=key)


@case("a TIFF's transparency band that holds data", "kept, and reported", "`--alpha drop`")
def near_infrared(root: Path) -> None:
    near = {}

    def image(path: Path, made: Scene) -> None:
        near[path.name] = np.dstack([made[0], made[0][..., 0] // 2 + 100])
        tifffile.imwrite(path.with_suffix(".tif"), near[path.name], photometric="rgb", extrasamples=["unassalpha"])

    write(root, image)
    found, said = packed(root)
    for key, (pixels, _) in found.items():
        np.testing.assert_array_equal(pixels, near[key])
    assert "a band flagged as transparency in 4 images is kept: in 4 it holds data" in said
    assert {pixels.shape[2] for pixels, _ in packed(root, reading=Reading("drop"))[0].values()} == {3}
    # A request for four bands returns the four that exist.
    found, _ = packed(root, bands=4)
    np.testing.assert_array_equal(found["0"][0], near["0"])


@case(
    "a TIFF's transparency band that is all or nothing",
    "dropped, and reported",
    "`--alpha keep`",
)
def plain_transparency(root: Path) -> None:
    stacks = {}

    def image(path: Path, made: Scene) -> None:
        opaque = np.full(made[1].shape, 255, np.uint8)
        stacks[path.name] = np.dstack([made[0], opaque, made[0][..., 1:]])
        tifffile.imwrite(
            path.with_suffix(".tif"),
            stacks[path.name],
            photometric="rgb",
            planarconfig="contig",
            extrasamples=[2, 0, 0],
        )

    write(root, image)
    found, said = packed(root)
    for key, (pixels, _) in found.items():
        np.testing.assert_array_equal(pixels, np.delete(stacks[key], 3, axis=2))
    assert "transparency of 4 images is dropped" in said
    assert packed(root, reading=Reading("keep"))[0]["0"][0].shape == (64, 80, 6)


@case("transparency of a PNG", "dropped, and reported", "`--alpha keep`")
def png_transparency(root: Path) -> None:
    def image(path: Path, made: Scene) -> None:
        Image.fromarray(np.dstack([made[0], made[0][..., 0]])).save(path.with_suffix(".png"))

    made = write(root, image)
    found, said = packed(root)
    for key, (pixels, _) in found.items():
        np.testing.assert_array_equal(pixels, made[key][0])
    assert "transparency of 4 images is dropped, more than all or nothing in 4 of them" in said


@case("a 16-bit grey PNG with transparency", "one band of 16 bits")
def grey_of_16_bits(root: Path) -> None:
    def image(path: Path, made: Scene) -> None:
        grey = made[0][..., 0].astype(np.uint16) * 100 + 37
        path.with_suffix(".png").write_bytes(imagecodecs.png_encode(np.dstack([grey, np.full_like(grey, 65535)])))

    made = write(root, image)
    for key, (pixels, _) in packed(root)[0].items():
        np.testing.assert_array_equal(pixels[..., 0], made[key][0][..., 0].astype(np.float32) * 100 + 37)


@case(
    "1-bit masks in which 0 is white (by TIFF tag or palette)",
    "white is foreground",
)
def white_is_zero(root: Path) -> None:
    def fax(path: Path, made: Scene) -> None:
        one_bit = Image.fromarray(made[1] * 255).convert("1")
        if path.name in "01":
            one_bit.save(path.with_suffix(".tif"), compression="group4", tiffinfo={262: 0})
        else:
            palette = Image.fromarray(1 - made[1], "P")
            palette.putpalette([255, 255, 255, 0, 0, 0])
            palette.save(path.with_suffix(".png"))

    made = write(root, mask=fax)
    equal_masks(packed(root)[0], made)


@case("8-bit masks in which 0 is white", "refused", "`--white_is_zero invert` or `keep`")
def white_is_zero_of_8_bits(root: Path) -> None:
    def mask(path: Path, made: Scene) -> None:
        tifffile.imwrite(path.with_suffix(".tif"), 255 - made[1] * 255, photometric="miniswhite")

    made = write(root, mask=mask)
    with pytest.raises(PackError, match=r"declares that 0 is white.*--white_is_zero invert.*--white_is_zero keep"):
        packed(root)
    equal_masks(packed(root, values=Values("invert"))[0], made)
    found, said = packed(root, values=Values("keep"))
    np.testing.assert_array_equal(found["0"][1], 1 - made["0"][1])
    assert "of all mask pixels are foreground" in said


@case("JPEG masks, and masks with soft edges", "refused, with a threshold to use", "`--threshold 128`")
def lossy_masks(root: Path) -> None:
    for quality in (75, 95):
        for side in (5, 10):

            def mask(path: Path, made: Scene, quality: int = quality) -> None:
                Image.fromarray(made[1] * 255).save(path.with_suffix(".jpg"), quality=quality)

            here = root / f"{quality}-{side}"
            made = write(here, mask=mask, side=side)
            for labels in ("auto", "binary"):
                with pytest.raises(PackError, match=r"soft edges.*--threshold 128"):
                    packed(here, labels=labels)
            found, _ = packed(here, values=Values(threshold=128))
            assert min(iou(mask, made[key][1]) for key, (_, mask) in found.items()) > 0.97


@case("masks of probabilities", "refused", "`--threshold 0.5`")
def probabilities(root: Path) -> None:
    def mask(path: Path, made: Scene) -> None:
        np.save(path.with_suffix(".npy"), made[1] * 0.8 + 0.1)

    made = write(root, mask=mask)
    with pytest.raises(PackError, match=r"not integers.*--threshold 0\.5"):
        packed(root)
    equal_masks(packed(root, values=Values(threshold=0.5))[0], made)


@case(
    "images with an EXIF or TIFF orientation, masks without one",
    "decided by the mask's size; refused if that fits both",
    "`--orientation apply` or `ignore`",
)
def turned_images(root: Path) -> None:
    def exif(number: int) -> Image.Exif:
        found = Image.Exif()
        found[0x112] = number
        return found

    def image(path: Path, made: Scene, number: int = 3) -> None:
        kind = int(path.name) % 3
        if kind == 2:
            tifffile.imwrite(
                path.with_suffix(".tif"), made[0], photometric="rgb", extratags=[(274, "H", 1, number, True)]
            )
        else:
            Image.fromarray(made[0]).save(path.with_suffix((".jpg", ".png")[kind]), exif=exif(number), quality=95)

    made = write(root / "half", image)
    with pytest.raises(
        PackError, match=r"4 images have an EXIF or TIFF orientation.*--orientation apply.*--orientation ignore"
    ):
        packed(root / "half")
    for word, turn in (("ignore", 0), ("apply", 2)):
        for key, (pixels, mask) in packed(root / "half", reading=Reading(orientation=word))[0].items():
            # The truth lies on stored pixels.
            true = np.rot90(made[key][1], turn)
            assert pixels[true == 1].mean() > 150
            assert pixels[true == 0].mean() < 60
            np.testing.assert_array_equal(mask, made[key][1])
    # The size shows a quarter turn.
    made = write(root / "quarter", lambda path, found: image(path, found, 6))
    found, said = packed(root / "quarter")
    assert "4 images are read as stored" in said
    assert all(pixels[made[key][1] == 1].mean() > 150 for key, (pixels, _) in found.items())
    made = write(
        root / "shown", lambda path, found: image(path, found, 6),
        lambda path, found: Image.fromarray(np.rot90(found[1] * 255, -1)).save(path.with_suffix(".png")),
    )  # fmt: skip
    found, said = packed(root / "shown")
    assert "4 images are rotated by their EXIF" in said
    assert all(pixels[mask == 1].mean() > 150 for pixels, mask in found.values())


def gap(path: Path, made: Scene, tag: bool, value: float = -9999) -> None:
    """Write a grey TIFF of real numbers with two bands, whose first 24 columns are missing."""
    grey = made[0][..., :2].astype(np.float32)
    grey[:, :24] = value
    tags = [(42113, "s", 0, str(value), True)] if tag else []
    tifffile.imwrite(path.with_suffix(".tif"), grey, photometric="minisblack", planarconfig="contig", extratags=tags)


def contrast(pixels: np.ndarray, mask: np.ndarray, mean: np.ndarray, std: np.ndarray) -> np.ndarray:
    """Return how many deviations objects stand out by in each band, as the network sees it."""
    z = (pixels - mean) / std
    return z[mask == 1].mean(0) - z[mask == 0].mean(0)


@case("pixels of GDAL's nodata value", "ignored, and filled with the band's mean")
def nodata(root: Path) -> None:
    made = write(root, lambda path, found: gap(path, found, True), width=100)
    found, said = packed(root)
    assert "no data, as declared by the files: -9999 in 4 images" in said
    for key, (pixels, mask) in found.items():
        assert (mask[:, :24] == 255).all()
        np.testing.assert_array_equal(mask[:, 24:], made[key][1][:, 24:])
        # The contrast is that of the same image, cut to the pixels with values.
        seen, true = made[key][0][:, 24:, :2], made[key][1][:, 24:]
        expected = contrast(seen, true, *band_statistics(seen.astype(np.float64)))
        assert np.isfinite(pixels).all()
        stored = np.where(np.arange(100)[None, :, None] < 24, np.nan, made[key][0][..., :2].astype(np.float32))
        got = contrast(pixels[:, 24:], mask[:, 24:], *band_statistics(stored))
        np.testing.assert_allclose(got, expected, rtol=0.01)
        np.testing.assert_allclose(pixels[0, 0], seen.mean((0, 1)), rtol=1e-5)


@case("values like -9999 without a nodata tag", "kept as values, with a warning", "`--nodata -9999`")
def nodata_without_a_tag(root: Path) -> None:
    write(root, lambda path, found: gap(path, found, False), width=100)
    found, said = packed(root)
    assert found["0"][0].min() == -9999
    assert "warning: -9999 in 4 images looks like a no-data value" in said
    found, said = packed(root, reading=Reading(nodata=-9999))
    assert "warning" not in said
    assert (found["0"][1][:, :24] == 255).all()
    assert found["0"][0].min() >= 0


@case("values beyond 1e15 without a nodata tag", "refused", "`--nodata=-3.4028235e38`")
def nodata_at_the_end_of_float32(root: Path) -> None:
    lowest = float(np.finfo(np.float32).min)
    write(root, lambda path, found: gap(path, found, False, lowest))
    with pytest.raises(
        PackError, match=r"has values beyond 1e\+15; if -3\.40282\S*e\+38 means no data: --nodata=-3\.40282"
    ):
        packed(root)
    # A value may be rounded as its dtype rounds it.
    assert (packed(root, reading=Reading(nodata=-3.4028235e38))[0]["0"][1][:, :24] == 255).all()


@case("floating-point images with NaN", "refused", "`--nodata nan`")
def nodata_nan(root: Path) -> None:
    write(root, lambda path, found: gap(path, found, False, np.nan))
    with pytest.raises(PackError, match=r"nan or infinite.*--nodata nan"):
        packed(root)
    assert (packed(root, reading=Reading(nodata=np.nan))[0]["0"][1][:, :24] == 255).all()


@case("masks that number the objects", "refused", "`--labels binary` or `classes`")
def numbered_objects(root: Path) -> None:
    def mask(path: Path, made: Scene) -> None:
        tifffile.imwrite(path.with_suffix(".tif"), ndimage.label(made[1])[0].astype(np.uint16))

    made = write(root, mask=mask)
    with pytest.raises(PackError, match=r"the values count its regions.*--labels binary.*--labels classes"):
        packed(root)
    equal_masks(packed(root, labels="binary")[0], made)


@case("coloured masks", "refused, with the colours found", "`--colors FILE`")
def colours(root: Path) -> None:
    def mask(path: Path, made: Scene) -> None:
        table = np.array([[0, 0, 0], [255, 0, 0]], np.uint8)
        Image.fromarray(table[made[1]]).save(path.with_suffix(".png"))

    made = write(root, mask=mask)
    with pytest.raises(PackError, match=r"#000000, #ff0000; --colors FILE"):
        packed(root)
    equal_masks(packed(root, values=Values(colours=((0, 0, 0, 0), (255, 0, 0, 1))))[0], made)
    with pytest.raises(PackError, match=r"colours without a label: #ff0000"):
        packed(root, values=Values(colours=((0, 0, 0, 0),)))


@case("masks with negative values or NaN", "refused", "`--ignore_label -9999`, `--ignore_label nan`")
def values_below_zero(root: Path) -> None:
    def mask(path: Path, made: Scene) -> None:
        labels = made[1].astype(np.int16)
        labels[:5] = -9999
        tifffile.imwrite(path.with_suffix(".tif"), labels)

    write(root, mask=mask)
    with pytest.raises(PackError, match=r"labels below 0.*--ignore_label -9999"):
        packed(root)
    found, _ = packed(root, ignore_label=-9999)
    assert all((labels[:5] == 255).all() and labels[5:].max() == 1 for _, labels in found.values())


@case("masks next to images, with a suffix", "paired", "`--mask_suffix _mask`")
def one_folder(root: Path) -> None:
    made = write(root, mask=lambda path, found: None)
    for key, (_, mask) in made.items():
        Image.fromarray(mask * 255).save(root / "i" / f"{key}_mask.png")
    equal_masks(packed(root, masks=root / "i", mask_suffix="_mask")[0], made)


@case(
    "an image's channels in separate files",
    "refused, with the option that joins them",
    "`--channel_suffix _0000`",
)
def channels(root: Path) -> None:
    def image(path: Path, made: Scene) -> None:
        for channel in range(3):
            Image.fromarray(made[0][..., channel]).save(path.with_name(f"{path.name}_{channel:04d}.png"))

    made = write(root, image)
    with pytest.raises(PackError, match=r"--channel_suffix _0000"):
        packed(root)
    found, _ = packed(root, channel_suffix="_0000")
    for key, (pixels, _) in found.items():
        np.testing.assert_array_equal(pixels, made[key][0])
    (root / "i" / "2_0001.png").unlink()
    with pytest.raises(PackError, match=r"image 2 has no file for _0001"):
        packed(root, channel_suffix="_0000")


@case("BMP and GIF", "read")
def bmp_and_gif(root: Path) -> None:
    def mask(path: Path, made: Scene) -> None:
        Image.fromarray(made[1] * 255).save(path.with_suffix((".bmp", ".gif")[int(path.name) % 2]))

    made = write(root, lambda path, found: Image.fromarray(found[0]).save(path.with_suffix(".bmp")), mask)
    found, _ = packed(root)
    equal_masks(found, made)
    np.testing.assert_array_equal(found["3"][0], made["3"][0])


@case("other file types, hidden files, folders", "skipped, and counted")
def other_files(root: Path) -> None:
    write(root)
    for name in ("._0.png", "notes.txt", "a.xml", "b.xml"):
        (root / "i" / name).write_bytes(b"x")
    (root / "i" / "more").mkdir()
    found, said = packed(root)
    assert len(found) == 4
    assert "skipped, since" in said
    for words in ("2 .xml", "1 .txt", "1 hidden files", "1 folders"):
        assert words in said


@case("NIfTI, HDF5, MATLAB, ENVI, WebP, ...", "refused, with a command that converts them")
def other_formats(root: Path) -> None:
    (root / "i").mkdir(parents=True)
    (root / "m").mkdir()
    for name, words in (
        ("a.nii.gz", "nibabel"),
        ("a.h5", "h5py"),
        ("a.mat", "scipy"),
        ("a.hdr", "spectral"),
        ("a.webp", "PIL"),
    ):
        for path in (root / "i").iterdir():
            path.unlink()
        (root / "i" / name).write_bytes(b"x")
        with pytest.raises(PackError, match=f"(?s)holds no images.*python -c .*{words}"):
            packed(root)


@case("masks that are mostly foreground", "packed, with a warning")
def mostly_foreground(root: Path) -> None:
    write(root, mask=lambda path, found: Image.fromarray(255 - found[1] * 255).save(path.with_suffix(".png")))
    assert "of all mask pixels are foreground" in packed(root)[1]


@case("class numbers with large gaps", "refused", "`--labels classes` or `binary`")
def gaps_between_classes(root: Path) -> None:
    def mask(path: Path, made: Scene) -> None:
        labels = made[1] * 100
        labels[:2] = 200
        Image.fromarray(labels).save(path.with_suffix(".png"))

    write(root, mask=mask)
    with pytest.raises(PackError, match=r"would make 201 classes.*--labels binary.*--labels classes"):
        packed(root)
    assert set(np.unique(packed(root, labels="classes")[0]["0"][1])) == {0, 100, 200}


@case(
    "masks with a colour palette",
    "indices are labels; refused if palettes differ or index 0 is not black",
    "`--colors FILE`",
)
def palettes(root: Path) -> None:
    def mask(path: Path, made: Scene, swapped: bool) -> None:
        drawn = Image.fromarray(1 - made[1] if swapped else made[1], "P")
        drawn.putpalette([255, 0, 0, 0, 0, 0] if swapped else [0, 0, 0, 255, 0, 0])
        drawn.save(path.with_suffix(".png"))

    made = write(root / "same", mask=lambda path, found: mask(path, found, False))
    equal_masks(packed(root / "same")[0], made)
    for name, swapped in (("mixed", lambda path: path.name in "01"), ("other", lambda path: True)):
        made = write(root / name, mask=lambda path, found, swapped=swapped: mask(path, found, swapped(path)))
        with pytest.raises(PackError, match=r"palettes .*--colors FILE"):
            packed(root / name)
        equal_masks(packed(root / name, values=Values(colours=((0, 0, 0, 0), (255, 0, 0, 1))))[0], made)


@case("masks drawn in transparency only", "transparency is the mask")
def transparency_as_mask(root: Path) -> None:
    def mask(path: Path, made: Scene) -> None:
        Image.fromarray(np.dstack([np.full((*made[1].shape, 3), 255, np.uint8), made[1] * 255])).save(
            path.with_suffix(".png")
        )

    made = write(root, mask=mask)
    equal_masks(packed(root)[0], made)


@case("grey PNG masks of 2 or 4 bits", "values as stored")
def short_masks(root: Path) -> None:
    def mask(path: Path, made: Scene) -> None:
        labels = made[1].copy()
        labels[:2] = 2
        # The header is grey with two bits, as PNG optimizers write it.
        rows = np.packbits(np.unpackbits(labels[..., None], axis=2)[..., 6:].reshape(labels.shape[0], -1), axis=1)
        raw = b"".join(b"\0" + row.tobytes() for row in rows)
        parts = [
            (b"IHDR", struct.pack(">IIBBBBB", *labels.shape[::-1], 2, 0, 0, 0, 0)),
            (b"IDAT", zlib.compress(raw)),
            (b"IEND", b""),
        ]
        data = b"\x89PNG\r\n\x1a\n"
        for kind, body in parts:
            data += struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        path.with_suffix(".png").write_bytes(data)

    made = write(root, mask=mask)
    for key, (_, labels) in packed(root, labels="classes")[0].items():
        np.testing.assert_array_equal(labels[2:], made[key][1][2:])
        assert (labels[:2] == 2).all()


@case("ignored values in masks with a threshold", "stay ignored")
def threshold_and_ignored(root: Path) -> None:
    for value, words in ((255, {"ignore_label": 255}), (-1, {"ignore_label": -1})):

        def mask(path: Path, made: Scene, value: int = value) -> None:
            labels = made[1].astype(np.int16) * 200
            labels[:2] = value
            tifffile.imwrite(path.with_suffix(".tif"), labels)

        made = write(root / str(value), mask=mask)
        for key, (_, labels) in packed(root / str(value), values=Values(threshold=128), **words)[0].items():
            assert (labels[:2] == 255).all()
            np.testing.assert_array_equal(labels[2:], made[key][1][2:])


@case("no mask has foreground, a 0, or a pixel that counts", "packed, with a warning")
def nothing_to_find(root: Path) -> None:
    write(root / "none", mask=lambda path, found: Image.fromarray(found[1] * 0).save(path.with_suffix(".png")))
    assert "warning: no mask has any foreground" in packed(root / "none")[1]
    assert "warning: every pixel of every mask is ignored" in packed(root / "none", ignore_label=0)[1]
    write(root / "ones", mask=lambda path, found: Image.fromarray(found[1] + 1).save(path.with_suffix(".png")))
    assert "warning: no mask has the value 0" in packed(root / "ones", labels="classes")[1]
