import io
import struct
import zipfile
import zlib

import imagecodecs
import numpy as np
import pytest
import tifffile
from PIL import Image

from deepskip.data_shards import tiff
from deepskip.data_shards.decoding import Limits, TooLarge, decode_image, decode_mask
from deepskip.data_shards.preparation import resample_bands, resize_longest_side
from deepskip.data_shards.sample import encode_image, encode_mask

RNG = np.random.default_rng(0)


def npy(array: np.ndarray, **options: bool) -> bytes:
    file = io.BytesIO()
    np.save(file, array, **options)
    return file.getvalue()


def npz(**arrays: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.savez_compressed(file, **arrays)
    return file.getvalue()


def tif(array: np.ndarray, **options: object) -> bytes:
    file = io.BytesIO()
    tifffile.imwrite(file, array, **options)
    return file.getvalue()


def pil(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def in_format(extension: str, image: np.ndarray) -> bytes:
    return {
        "png": pil(Image.fromarray(image)), "jpg": pil(Image.fromarray(image), "JPEG"), "tif": tif(image, photometric="rgb"),
        "npy": npy(image), "npz": npz(image=image),
    }[extension]  # fmt: skip


def random(*shape: int, dtype: type = np.uint8) -> np.ndarray:
    high = 1000 if dtype is not np.uint8 else 256
    return RNG.integers(0, high, shape).astype(dtype)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.int16, np.float32])
@pytest.mark.parametrize("bands", [1, 2, 3, 4, 31])
def test_what_is_encoded_comes_back(dtype: type, bands: int) -> None:
    image = random(7, 5, bands, dtype=dtype)
    extension, data = encode_image(image)
    assert extension == ("png" if dtype is np.uint8 and bands in (1, 3) else "npy")
    decoded = decode_image(extension, data)
    assert decoded.dtype == dtype
    np.testing.assert_array_equal(decoded, image)
    mask = random(7, 5)
    np.testing.assert_array_equal(decode_mask(*encode_mask(mask)), mask)


def test_pictures_of_every_kind() -> None:
    grey, grey16, rgb = random(6, 9), random(6, 9, dtype=np.uint16), random(6, 9, 3)
    rgb16 = random(6, 9, 3, dtype=np.uint16) + 5000
    alpha = np.dstack([rgb, random(6, 9)])
    cases = [
        ("png", pil(Image.fromarray(grey)), grey[..., None]),
        ("png", pil(Image.fromarray(grey16)), grey16[..., None]),
        ("png", pil(Image.fromarray(rgb)), rgb),
        ("png", pil(Image.fromarray(alpha)), rgb),
        ("png", imagecodecs.png_encode(rgb16), rgb16),
        ("tif", tif(grey16), grey16[..., None]),
        ("tiff", tif(rgb, photometric="rgb"), rgb),
        ("png", imagecodecs.png_encode(np.dstack([grey16, np.full_like(grey16, 65535)])), grey16[..., None]),
        ("png", imagecodecs.png_encode(np.dstack([rgb16, rgb16[..., :1]])), rgb16),
        ("bmp", pil(Image.fromarray(rgb), "BMP"), rgb),
        ("gif", pil(Image.fromarray(grey // 9 * 9), "GIF"), (grey // 9 * 9)[..., None]),
        ("tif", tif(random(4, 6, 9) * 0 + grey, photometric="minisblack"), np.repeat(grey[..., None], 4, 2)),
        ("npy", npy(grey > 100), (grey > 100)[..., None].astype(np.uint8)),
        ("npz", npz(cube=rgb16, mask=grey), rgb16),
        ("npz", npz(anything=rgb), rgb),
    ]
    for extension, data, expected in cases:
        decoded = decode_image(extension, data)
        np.testing.assert_array_equal(decoded, expected, err_msg=extension)
        assert decoded.dtype == expected.dtype
    indices = Image.fromarray(grey % 4).convert("P")
    indices.putpalette([0, 0, 0, 255, 0, 0, 0, 255, 0, 0, 0, 255])
    colours = np.array([[0, 0, 0], [255, 0, 0], [0, 255, 0], [0, 0, 255]], np.uint8)
    np.testing.assert_array_equal(decode_image("png", pil(indices)), colours[np.asarray(indices)])
    # In a mask, the indices of a palette are the labels.
    np.testing.assert_array_equal(decode_mask("png", pil(indices)), np.asarray(indices))


@pytest.mark.parametrize("pages", [1, 2, 5, 31])
def test_pages_of_a_tiff_are_bands(pages: int) -> None:
    cube = random(pages, 12, 10, dtype=np.uint16)
    expected = np.moveaxis(cube, 0, -1)
    np.testing.assert_array_equal(decode_image("tif", tif(cube, photometric="minisblack")), expected)
    contiguous = tif(expected, photometric="minisblack", **({"planarconfig": "contig"} if pages > 1 else {}))
    np.testing.assert_array_equal(decode_image("tif", contiguous), expected)


def test_exif_orientation_is_applied() -> None:
    image = Image.fromarray(np.repeat(np.arange(0, 240, 8, dtype=np.uint8)[None], 20, 0))
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = decode_image("jpg", pil(image, "JPEG", exif=exif, quality=95))[..., 0]
    assert turned.shape == (30, 20)
    assert np.abs(turned.astype(int) - np.rot90(np.asarray(image), -1)).max() < 6


@pytest.mark.parametrize("extension", ["png", "jpg", "tif", "npy", "npz"])
def test_garbage_and_truncation(extension: str) -> None:
    whole = in_format(extension, random(30, 30, 3))
    for data in (b"", b"no image at all", whole[: len(whole) // 2], bytes(500)):
        with pytest.raises(ValueError, match=f"the {extension} file does not decode"):
            decode_image(extension, data)


def test_a_picture_too_large_is_refused_before_it_is_unpacked() -> None:
    def png_of(width: int, height: int, depth: int, colour: int) -> bytes:
        def chunk(kind: bytes, data: bytes) -> bytes:
            return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

        header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
        return (
            b"\x89PNG\r\n\x1a\n"
            + chunk(b"IHDR", header)
            + chunk(b"IDAT", zlib.compress(bytes(50_000)))
            + chunk(b"IEND", b"")
        )

    for depth, colour in ((8, 0), (8, 2), (16, 2)):
        with pytest.raises(ValueError, match="60000 x 60000 pixels"):
            decode_image("png", png_of(60000, 60000, depth, colour))


def test_an_array_that_claims_more_than_it_has() -> None:
    data = bytearray(npy(np.zeros((4, 4, 3), np.uint8)))
    data = data.replace(b"(4, 4, 3), }", b"(90000, 90000, 3), }")
    with pytest.raises(ValueError, match="claims shape"):
        decode_image("npy", bytes(data))


def test_a_zip_bomb_is_refused() -> None:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("image.npy", npy(np.zeros((200, 200), np.uint8)))
    with pytest.raises(TooLarge, match="at most 10000 are read"):
        decode_image("npz", file.getvalue(), Limits(bytes=10_000))


@pytest.mark.parametrize("extension", ["png", "jpg", "tif", "npy", "npz"])
def test_limits_of_a_caller(extension: str) -> None:
    whole = in_format(extension, random(30, 20, 3))
    assert decode_image(extension, whole, Limits(pixels=600)).shape == (30, 20, 3)
    with pytest.raises(TooLarge, match="30 x 20 pixels; at most 599 are read"):
        decode_image(extension, whole, Limits(pixels=599))


@pytest.mark.parametrize("compression", ["jpeg", "png", "webp", "jpeg2000"])
def test_a_tile_that_holds_a_larger_image_than_its_place(compression: str) -> None:
    image = random(64, 80, 3)
    whole = tif(image, photometric="rgb", compression=compression)
    assert decode_image("tif", whole).shape == (64, 80, 3)
    with tifffile.TiffFile(io.BytesIO(whole)) as file:
        places = [file.pages.first.tags[tag].valueoffset for tag in ("ImageLength", "ImageWidth")]
    for place in places:
        smaller = whole[:place] + struct.pack("<H", 16) + whole[place + 2 :]
        with pytest.raises(ValueError, match="holds an image of 64 x 80"):
            decode_image("tif", smaller)


def test_a_tile_whose_size_cannot_be_seen() -> None:
    with pytest.raises(ValueError, match="tiles of LERC, whose size cannot be determined"):
        decode_image("tif", tif(random(20, 20), compression="lerc"))


def test_a_tiff_of_very_many_pages_and_a_jpeg_of_very_many_scans() -> None:
    file = io.BytesIO()
    with tifffile.TiffWriter(file) as writer:
        writer.write(np.zeros((tiff.MAX_PAGES + 1, 1, 1), np.uint8), photometric="minisblack", metadata=None)
    with pytest.raises(ValueError, match="more than 4096 pages"):
        decode_image("tif", file.getvalue())
    jpeg = pil(Image.fromarray(random(8, 8)), "JPEG", progressive=True)
    assert decode_image("jpg", jpeg).shape == (8, 8, 1)
    with pytest.raises(ValueError, match="scans; at most 100"):
        decode_image("jpg", jpeg + b"\xff\xda" * 101)


@pytest.mark.parametrize("mode", ["L", "RGB", "CMYK"])
@pytest.mark.parametrize("options", [{"subsampling": 0}, {"subsampling": 2, "progressive": True}, {"quality": 20}])
def test_a_jpeg_has_the_values_that_pillow_reads(mode: str, options: dict) -> None:
    # Of one image in 25, Pillow reads all pixels without the last two bytes; not of these, whatever ran before.
    rng = np.random.default_rng(0)
    for height, width in ((65, 131), (1, 1)):
        pixels = rng.integers(0, 256, (height, width, 3)).astype(np.uint8)
        data = pil(Image.fromarray(pixels).convert(mode), "JPEG", **options)
        with Image.open(io.BytesIO(data)) as image:
            expected = np.asarray(image.convert("RGB") if mode == "CMYK" else image).reshape(height, width, -1)
        np.testing.assert_array_equal(decode_image("jpg", data), expected)
        np.testing.assert_array_equal(decode_image("jpg", data + b"\0\0"), expected)
        for cut in (len(data) - 1, len(data) - 2, len(data) - 20):
            if height > 1 or cut == len(data) - 20:
                with pytest.raises((ValueError, OSError)):
                    decode_image("jpg", data[:cut])


def test_pickles_are_not_run() -> None:
    data = npy(np.array([{"a": 1}], dtype=object), allow_pickle=True)
    for extension, payload in (("npy", data), ("npz", npz(image=np.array([{"a": 1}], dtype=object)))):
        with pytest.raises(ValueError, match="object"):
            decode_image(extension, payload)


def test_values_that_are_no_image() -> None:
    bad = np.zeros((4, 4), np.float32)
    bad[1, 1] = np.nan
    with pytest.raises(ValueError, match="nan or infinite"):
        decode_image("npy", npy(bad))
    with pytest.raises(ValueError, match=r"shape \(4,\)"):
        decode_image("npy", npy(np.zeros(4)))
    with pytest.raises(ValueError, match="complex"):
        decode_image("npy", npy(np.zeros((4, 4), complex)))
    with pytest.raises(ValueError, match=r"\.exe file; images and masks are png"):
        decode_image("exe", b"")


def test_masks() -> None:
    labels = random(5, 6)
    three = np.repeat(labels[..., None], 3, 2)
    np.testing.assert_array_equal(decode_mask("png", pil(Image.fromarray(three))), labels)
    np.testing.assert_array_equal(decode_mask("npy", npy(labels.astype(np.float64))), labels)
    large = labels.astype(np.int64) + 300
    assert decode_mask("npy", npy(large)).dtype == np.int32
    ones = Image.fromarray((labels > 99).astype(np.uint8) * 255).convert("1")
    assert set(np.unique(decode_mask("png", pil(ones)))) == {0, 255}
    three[0, 0, 1] += 1
    for array, message in (
        (three, "not colours"),
        (labels - 0.5, "not integers"),
        (labels.astype(int) + 2**31, "too large"),
    ):
        with pytest.raises(ValueError, match=message):
            decode_mask("npy", npy(array))


def test_bands_are_averaged_over_equal_shares_of_the_spectrum() -> None:
    cube = RNG.random((3, 4, 102))
    for bands in (32, 51, 7):
        # Compute it with finer steps: cut each band into `bands` equal slices.
        fine = np.repeat(cube, bands, axis=2).reshape(3, 4, bands, 102).mean(3)
        np.testing.assert_allclose(resample_bands(cube, bands), fine, rtol=1e-12)
    few = RNG.random((3, 4, 4))
    more = resample_bands(few, 9)
    assert more.shape == (3, 4, 9)
    expected = [
        np.interp((np.arange(9) + 0.5) * 4 / 9, np.arange(4) + 0.5, few[y, x]) for y in range(3) for x in range(4)
    ]
    np.testing.assert_allclose(more.reshape(12, 9), expected, rtol=1e-12)
    np.testing.assert_array_equal(resample_bands(cube[..., :1], 3), np.repeat(cube[..., :1], 3, 2))
    assert resample_bands(random(2, 2, 8, dtype=np.uint16), 3).dtype == np.uint16


def test_resizing() -> None:
    image, mask = np.full((100, 60, 5), 1234, np.int16), np.zeros((100, 60), np.uint8)
    mask[:50] = 7
    small, small_mask = resize_longest_side(image, mask, 50)
    assert small_mask is not None
    assert (small.shape, small_mask.shape, small.dtype, small_mask.dtype) == ((50, 30, 5), (50, 30), np.int16, np.uint8)
    assert (small == 1234).all()
    assert (small_mask[:25] == 7).all()
    assert not small_mask[25:].any()
    same, _ = resize_longest_side(image, None, 100)
    assert same is image
