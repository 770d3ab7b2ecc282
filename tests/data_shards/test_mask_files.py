"""Masks as other programs write them: palettes, transparency, probabilities with a no-data value; and TIFFs page by page."""

import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import tifffile
from PIL import Image

from deepskip.data_shards.dataset import Shards
from deepskip.data_shards.decoding import read_image
from deepskip.data_shards.labels import NAN_LABEL, Values
from deepskip.data_shards.pictures import Picture, Reading
from deepskip.data_shards.sources.folder import pack_folder
from deepskip.data_shards.sources.split import PackError

SIDE = 24
Save = Callable[[Path, np.ndarray], object]


def truth(number: int) -> np.ndarray:
    """Return a mask of three classes; every second one has only the classes 0 and 2."""
    mask = np.zeros((SIDE, SIDE), np.uint8)
    mask[2:9, 3:9] = 2
    if number % 2:
        mask[12:17, 4:20] = 1
    return mask


def packed(folder: Path, masks: list[np.ndarray], save: Save, **options: object) -> list[np.ndarray]:
    """Pack grey images with masks that `save` stores, and return the labels as a training reads them."""
    for name in ("images", "masks"):
        (folder / name).mkdir()
    for number, mask in enumerate(masks):
        Image.fromarray(np.full((SIDE, SIDE), number, np.uint8)).save(folder / "images" / f"{number}.png")
        save(folder / "masks" / f"{number}.png", mask)
    pack_folder(folder / "images", folder / "masks", folder / "out", split_name="train", **options)  # type: ignore[arg-type]
    shards = Shards(str(folder / "out" / "train"), normalize="none")
    found = {entry.key: shards.read(entry)[1] for entry in shards.index.entries(list(range(len(masks))))}
    return [found[str(number)] for number in range(len(masks))]


def with_palette(colours: list[int]) -> Save:
    """Return how to save values as indices of a palette that holds each as a grey."""

    def save(path: Path, mask: np.ndarray) -> None:
        picture = Image.fromarray(np.argsort(colours).astype(np.uint8)[mask], "P")
        picture.putpalette([each for grey in colours for each in (grey, grey, grey)])
        picture.save(path)

    return save


def test_white_may_come_first_also_where_it_is_all_there_is(tmp_path: Path) -> None:
    masks = [truth(0) // 2, np.zeros((SIDE, SIDE), np.uint8), np.ones((SIDE, SIDE), np.uint8), truth(2) // 2]
    for mask, found in zip(masks, packed(tmp_path, masks, with_palette([255, 0])), strict=True):
        np.testing.assert_array_equal(found, mask)


def test_greys_that_a_program_numbered_anew_keep_their_meaning(tmp_path: Path) -> None:
    def quantised(path: Path, mask: np.ndarray) -> None:
        greys = sorted(np.unique(mask).tolist(), reverse=True)
        picture = Image.fromarray(np.searchsorted(-np.array(greys), -mask.astype(int)).astype(np.uint8), "P")
        picture.putpalette([each for grey in greys for each in (grey, grey, grey)])
        picture.save(path)

    masks = [truth(number) for number in range(4)]
    for mask, found in zip(masks, packed(tmp_path, masks, quantised, labels="classes"), strict=True):
        np.testing.assert_array_equal(found, mask)


def test_an_index_of_another_grey_is_refused(tmp_path: Path) -> None:
    def optimised(path: Path, mask: np.ndarray) -> None:
        greys = np.unique(mask)
        picture = Image.fromarray(np.searchsorted(greys, mask).astype(np.uint8), "P")
        picture.putpalette([each for grey in greys.tolist() for each in 3 * [(0, 128, 255)[grey]]])
        picture.save(path)

    with pytest.raises(PackError, match="palettes give the same index different colours in 2 masks, such as"):
        packed(tmp_path, [truth(number) for number in range(4)], optimised)


def test_a_palette_of_equal_greys_gives_its_indices() -> None:
    indices = np.array([[0, 1], [1, 0]], np.uint8)
    for palette in (np.zeros((256, 3), np.uint8), np.full((2, 3), 9, np.uint8)):
        np.testing.assert_array_equal(Values().of(Picture(indices, palette=palette)), indices)


def test_a_colour_map_of_eight_bits_is_read_as_one_of_sixteen() -> None:
    mask = truth(1)
    for scale in (1, 257):
        colours = np.zeros((3, 256), np.uint16)
        colours[:, :3] = np.array([0, 90, 200]) * scale
        file = io.BytesIO()
        tifffile.imwrite(file, mask, photometric="palette", colormap=colours)
        np.testing.assert_array_equal(
            read_image("tif", file.getvalue()).array[..., 0], np.array([0, 90, 200], np.uint8)[mask]
        )


def drawn_in_transparency(path: Path, mask: np.ndarray) -> None:
    picture = np.full((*mask.shape, 4), 255, np.uint8)
    picture[..., 3] = 255 * mask
    Image.fromarray(picture).save(path)


def test_where_nothing_is_drawn_in_transparency_nothing_is_foreground(tmp_path: Path) -> None:
    masks = [truth(0) // 2, np.zeros((SIDE, SIDE), np.uint8), truth(2) // 2]
    for mask, found in zip(masks, packed(tmp_path, masks, drawn_in_transparency), strict=True):
        np.testing.assert_array_equal(found, mask)


def test_an_opaque_mask_among_those_drawn_in_transparency_is_refused(tmp_path: Path) -> None:
    masks = [truth(0) // 2, np.ones((SIDE, SIDE), np.uint8)]
    with pytest.raises(PackError, match="1 masks, such as 0, are drawn in transparency alone, and 1, such as 1, have"):
        packed(tmp_path, masks, drawn_in_transparency)


@pytest.mark.parametrize("nodata", [np.nan, np.inf, -3.4028234663852886e38, -0.5])
def test_a_threshold_leaves_out_the_nodata_value_of_the_file(nodata: float) -> None:
    array = np.array([[0.2, 0.5], [nodata, 0.9]], np.float32)
    found = Values(threshold=0.5).of(Picture(array, nodata=nodata))
    assert found.tolist() == [[0, 1], [NAN_LABEL, 1]]


def test_pages_that_were_written_one_by_one_are_bands() -> None:
    bands = np.random.default_rng(0).integers(0, 255, (4, SIDE, SIDE), np.uint8)
    file = io.BytesIO()
    with tifffile.TiffWriter(file) as writer:
        for band in bands:
            writer.write(band)
        writer.write(bands[0, ::2, ::2], subfiletype=1)
    np.testing.assert_array_equal(read_image("tif", file.getvalue()).array, bands.transpose(1, 2, 0))
    file = io.BytesIO()
    with tifffile.TiffWriter(file) as writer:
        writer.write(bands[0])
        writer.write(bands[1].astype(np.uint16))
    with pytest.raises(ValueError, match="its pages hold values of uint8 and uint16; write all as one type"):
        read_image("tif", file.getvalue())


def test_a_kept_transparency_is_not_resampled(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    (tmp_path / "masks").mkdir()
    Image.fromarray(np.zeros((SIDE, SIDE, 4), np.uint8)).save(tmp_path / "images" / "a.png")
    Image.fromarray(truth(0)).save(tmp_path / "masks" / "a.png")
    with pytest.raises(
        PackError, match=r"in 1 images, such as a, a band that is kept looks like transparency, .* omit --bands 4"
    ):
        pack_folder(
            tmp_path / "images",
            tmp_path / "masks",
            tmp_path / "out",
            bands=4,
            reading=Reading("keep"),
            split_name="train",
        )
