"""The built-in data set: real coins on real photographs, small objects before busy backgrounds, nothing downloaded.

The coins are the 24 of scikit-image's `coins` (Greek coins from Pompeii, Brooklyn Museum), cut out by watershed. They are
laid at random sizes and angles on other photographs of the scikit-image wheel. Each split has its own coins and its own
photographs.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import skimage
from PIL import Image
from scipy import ndimage
from skimage.filters import sobel
from skimage.measure import label, regionprops
from skimage.segmentation import watershed

# read straight from the wheel: skimage.data's own functions may go to the network
PHOTOGRAPHS = Path(skimage.__file__).parent / "data"
SPLITS = ("train", "val", "test")
BACKGROUNDS = {
    "train": ("astronaut.png", "camera.png", "coffee.png", "grass.png", "gravel.png", "ihc.png", "rocket.jpg"),
    "val": ("brick.png", "chelsea.png", "moon.png", "motorcycle_left.png"),
    "test": ("hubble_deep_field.jpg", "page.png", "retina.jpg", "text.png"),
}
# every fifth coin of those sorted by brightness, so that each split has dark and bright ones; the rest are for training
COIN_TURN = {"val": 1, "test": 3}
TURNS = 5

# grey levels of the coins photograph that are surely background and surely coin, as in scikit-image's tutorial
SURELY_BACKGROUND, SURELY_COIN = 30, 150
# the smallest coin has 1077 pixels, the largest speck 2
SMALLEST_COIN = 500
MIN_SIZE = 64

MAX_COINS = 8
EMPTY_SHARE = 0.04
BORDER_SHARE = 0.12
# in image sides: 9 to 19 pixels of 128
DIAMETERS = 9 / 128, 19 / 128
# between coins, in pixels, so that each stays a connected component of its own
GAP = 3
MAX_ZOOM = 2.5
# grey levels of 1 by which a coin must differ from what it lies on
VISIBLE = 0.18
METALS = {"silver": (1.0, 1.0, 1.0), "gold": (1.12, 0.98, 0.62), "copper": (1.15, 0.90, 0.72)}


# one coin's window of the image (rows, columns), and its grey level and cover there, (h, w) float32 in [0, 1]
Layer = tuple[tuple[slice, slice], np.ndarray, np.ndarray]


@dataclass(frozen=True)
class Coin:
    """One coin cut out of the photograph; (side, side) float32 with its centroid in the middle and room to turn.

    grey: in [0, 1], 0 outside. cover: 1 on the coin, else 0. diameter: of a disc of equal area, radius: of the circle
    around it, both in pixels of the photograph. centre: row and column there.
    """

    grey: np.ndarray
    cover: np.ndarray
    diameter: float
    radius: float
    centre: tuple[float, float]


def coins(split: str, count: int, seed: int = 0, size: int = 128) -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
    """Gives `count` samples of a split: key, image (size, size, 3) uint8 RGB, mask (size, size) uint8, 1 on coins.

    Sample i depends on (seed, split, i) alone. split: "train", "val" or "test". size: in pixels, at least 64; coins
    grow with it. Raises ValueError for another split or size, FileNotFoundError for a photograph that is not there.
    """
    if split not in SPLITS:
        raise ValueError(f"split is {split!r}; allowed are {', '.join(SPLITS)}")
    if size < MIN_SIZE:
        raise ValueError(f"size is {size}; below {MIN_SIZE} pixels a coin is a dot")
    own_coins = coins_of(split)
    own_backgrounds = [photograph(name) for name in BACKGROUNDS[split]]

    def samples() -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
        for i in range(count):
            rng = np.random.default_rng([seed, SPLITS.index(split), i])
            yield f"{split}-{i:06d}", *compose(rng, own_coins, own_backgrounds, size)

    return samples()


@cache
def photograph(name: str) -> Image.Image:
    """Reads a photograph of the scikit-image wheel, RGB or grey; raises FileNotFoundError that names it."""
    path = PHOTOGRAPHS / name
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing; it ships with scikit-image's wheel: reinstall scikit-image")
    with Image.open(path) as file:
        return file.convert("L" if file.mode == "L" else "RGB")


@cache
def cut_out() -> tuple[Coin, ...]:
    """Cuts the coins out of their photograph by watershed on its gradient, in order of rising brightness."""
    grey_HW = np.asarray(photograph("coins.png"))
    markers = np.zeros(grey_HW.shape, np.int32)
    markers[grey_HW < SURELY_BACKGROUND] = 1
    markers[grey_HW > SURELY_COIN] = 2
    regions = label(ndimage.binary_fill_holes(watershed(sobel(grey_HW), markers) == 2))
    found = [region for region in regionprops(regions, grey_HW) if region.area >= SMALLEST_COIN]
    found.sort(key=lambda region: region.intensity_mean)
    return tuple(cut(grey_HW, regions == region.label, region.centroid) for region in found)


def cut(grey_HW: np.ndarray, region_HW: np.ndarray, centre: tuple[float, float]) -> Coin:
    """Cuts one region out of a photograph."""
    rows, columns = np.nonzero(region_HW)
    row, column = round(centre[0]), round(centre[1])
    radius = float(np.hypot(rows - centre[0], columns - centre[1]).max()) + 1
    # the room around it is for shrinking, which looks past the edge by the shrink factor
    half = math.ceil(2 * radius)
    cover = np.zeros((2 * half + 1, 2 * half + 1), np.float32)
    cover[rows - row + half, columns - column + half] = 1
    grey = np.zeros_like(cover)
    grey[rows - row + half, columns - column + half] = grey_HW[rows, columns] / 255
    # shared by every caller
    grey.flags.writeable = cover.flags.writeable = False
    return Coin(grey, cover, 2 * math.sqrt(len(rows) / math.pi), radius, centre)


def coins_of(split: str) -> list[Coin]:
    """Gives the coins of a split; no coin is in two."""
    turns = {turn: name for name, turn in COIN_TURN.items()}
    return [coin for i, coin in enumerate(cut_out()) if turns.get(i % TURNS, "train") == split]


def compose(
    rng: np.random.Generator, coins: list[Coin], backgrounds: list[Image.Image], size: int
) -> tuple[np.ndarray, np.ndarray]:
    """Draws one image (size, size, 3) and its mask (size, size), both uint8."""
    ground_HWC = draw_background(rng, backgrounds[rng.integers(len(backgrounds))], size)
    layers = [lay(rng, coin, diameter, x, y, size) for coin, diameter, x, y in draw_places(rng, coins, size)]
    mask_HW = np.zeros((size, size), np.uint8)
    for window, _, cover in layers:
        mask_HW[window] |= cover > 0.5
    image_HWC = ground_HWC * shade(rng, layers, size)[..., None]
    for window, grey, cover in layers:
        colour = strike(rng, grey, cover, ground_HWC[window])
        image_HWC[window] += (colour - image_HWC[window]) * cover[..., None]
    # the camera's noise lies over coins and ground alike
    image_HWC += rng.uniform(0, 0.02) * rng.standard_normal(image_HWC.shape, dtype=np.float32)
    return (np.clip(image_HWC, 0, 1) * 255).round().astype(np.uint8), mask_HW


def draw_background(rng: np.random.Generator, photograph: Image.Image, size: int) -> np.ndarray:
    """Draws a square of a photograph as (size, size, 3) float32, about [0, 1]; never enlarged where it is large enough."""
    short = min(photograph.size)
    side = min(short, size * rng.uniform(1, max(1, min(MAX_ZOOM, short / size))))
    left, top = (rng.uniform(0, length - side) for length in photograph.size)
    box = left, top, min(left + side, photograph.width), min(top + side, photograph.height)
    crop = photograph.resize((size, size), Image.Resampling.HAMMING, box=box)
    array = np.asarray(crop.convert("RGB"), np.float32) / 255
    array = np.rot90(array, int(rng.integers(4)))
    if rng.random() < 0.5:
        array = array[:, ::-1]
    mean = array.mean()
    return (array - mean) * np.float32(rng.uniform(0.75, 1.1)) + mean * np.float32(rng.uniform(0.75, 1.15))


def draw_places(rng: np.random.Generator, coins: list[Coin], size: int) -> list[tuple[Coin, float, float, float]]:
    """Draws 0 to 8 coins that do not touch: coin, diameter and centre (x, y), all in pixels of the image."""
    count = 0 if rng.random() < EMPTY_SHARE else int(rng.integers(1, MAX_COINS + 1))
    places: list[tuple[Coin, float, float, float]] = []
    taken: list[tuple[float, float, float]] = []
    for _ in range(count):
        coin = coins[rng.integers(len(coins))]
        # even on a logarithmic scale: more small ones than large ones
        diameter = size * DIAMETERS[0] * (DIAMETERS[1] / DIAMETERS[0]) ** rng.random()
        radius = coin.radius * diameter / coin.diameter
        # a coin cut by the border keeps about half of itself or more
        margin = 0 if rng.random() < BORDER_SHARE else radius
        for x, y in rng.uniform(margin, size - margin, (20, 2)):
            if all(math.hypot(x - a, y - b) > radius + r + GAP for a, b, r in taken):
                taken.append((x, y, radius))
                places.append((coin, diameter, x, y))
                break
    return places


def lay(rng: np.random.Generator, coin: Coin, diameter: float, x: float, y: float, size: int) -> Layer:
    """Turns a coin by a random angle and shrinks it to its place: window of the image, grey and cover there (h, w)."""
    shrink = coin.diameter / diameter
    radius = coin.radius / shrink
    left, top = math.floor(x - radius) - 1, math.floor(y - radius) - 1
    side = math.ceil(2 * radius) + 3
    angle = rng.uniform(0, 360)
    middle = coin.cover.shape[0] / 2
    # the part of the cut-out that the window shows, to a fraction of a pixel
    corner_x, corner_y = middle + (left - x) * shrink, middle + (top - y) * shrink
    box = corner_x, corner_y, corner_x + side * shrink, corner_y + side * shrink
    weighted, cover = (
        np.asarray(
            Image.fromarray(plane)
            .rotate(angle, Image.Resampling.BILINEAR)
            .resize((side, side), Image.Resampling.HAMMING, box=box)
        )
        for plane in (coin.grey, coin.cover)
    )
    # the grey outside the coin is 0 and must not darken its edge
    grey = weighted / np.maximum(cover, 1e-3)
    rows, columns = slice(max(top, 0), min(top + side, size)), slice(max(left, 0), min(left + side, size))
    inside = slice(rows.start - top, rows.stop - top), slice(columns.start - left, columns.stop - left)
    return (rows, columns), grey[inside], np.clip(cover, 0, 1)[inside]


def shade(rng: np.random.Generator, layers: list[Layer], size: int) -> np.ndarray:
    """Gives what is left of the light (size, size) beside coins that one lamp throws soft shadows of."""
    strength, angle, reach, blur = rng.uniform((0.1, 0, 0.004, 0.006), (0.6, 2 * math.pi, 0.014, 0.016))
    cover_HW = np.zeros((size, size), np.float32)
    for window, _, cover in layers:
        cover_HW[window] = np.maximum(cover_HW[window], cover)
    offset = reach * size * math.sin(angle), reach * size * math.cos(angle)
    shadow_HW = ndimage.shift(ndimage.gaussian_filter(cover_HW, blur * size), offset, order=1)
    return 1 - np.float32(strength) * shadow_HW


def strike(rng: np.random.Generator, grey: np.ndarray, cover: np.ndarray, ground_HWC: np.ndarray) -> np.ndarray:
    """Gives a coin (h, w) its metal, brightness and contrast: (h, w, 3), told from the ground it lies on."""
    metal = np.array(list(METALS.values())[rng.integers(len(METALS))], np.float32)
    tint = 1 + (metal - 1) * rng.uniform(0.4, 1)
    weight = cover / cover.sum()
    mean, ground = float((grey * weight).sum()), float((ground_HWC.mean(-1) * weight).sum())
    bright = mean * rng.uniform(0.6, 1.25)
    # a coin that cannot be seen is nothing to learn from
    if abs(bright - ground) < VISIBLE:
        bright = ground + VISIBLE if ground < 0.5 else ground - VISIBLE
    struck = bright * (1 + (grey / mean - 1) * rng.uniform(0.9, 1.4))
    return struck[..., None] * tint
