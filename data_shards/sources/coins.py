"""The built-in data set: real coins on real photographs, small objects on busy backgrounds, without downloads.

The coins are the 24 of scikit-image's `coins` (Greek coins from Pompeii, Brooklyn Museum), cut out by watershed. They are
placed at random sizes and angles on other photographs of the scikit-image wheel. Each split has its own coins and its own
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

# Read from the wheel, since skimage.data's own functions may use the network.
PHOTOGRAPHS = Path(skimage.__file__).parent / "data"
SPLITS = ("train", "val", "test")
BACKGROUNDS = {
    "train": ("astronaut.png", "camera.png", "coffee.png", "grass.png", "gravel.png", "ihc.png", "rocket.jpg"),
    "val": ("brick.png", "chelsea.png", "moon.png", "motorcycle_left.png"),
    "test": ("hubble_deep_field.jpg", "page.png", "retina.jpg", "text.png"),
}
# Every fifth coin in order of brightness, so that each split has dark and bright ones; the others are for training.
COIN_TURN = {"val": 1, "test": 3}
TURNS = 5

# Grey levels of the coins photograph that are certainly background and certainly coin, as in scikit-image's tutorial.
SURELY_BACKGROUND, SURELY_COIN = 30, 150
# The smallest coin has 1077 pixels, the largest speck 2.
SMALLEST_COIN = 500
MIN_SIZE = 64

MAX_COINS = 8
EMPTY_SHARE = 0.04
BORDER_SHARE = 0.12
# Shares of the image's side: 9 to 19 pixels of 128.
DIAMETERS = 9 / 128, 19 / 128
# Pixels between coins, so that each stays a connected component of its own.
GAP = 3
MAX_ZOOM = 2.5
# Smallest difference of grey level, of 1, between a coin and its background.
VISIBLE = 0.18
METALS = {"silver": (1.0, 1.0, 1.0), "gold": (1.12, 0.98, 0.62), "copper": (1.15, 0.90, 0.72)}


# One coin's window of the image (rows, columns), and its grey level and coverage there, (h, w) float32 in [0, 1].
Layer = tuple[tuple[slice, slice], np.ndarray, np.ndarray]


@dataclass(frozen=True)
class Coin:
    """One coin cut out of the photograph, with its centroid in the middle and room for rotation.

    Attributes:
        grey: Grey levels (side, side) float32 in [0, 1], 0 outside the coin.
        cover: Coverage (side, side) float32, 1 on the coin, else 0.
        diameter: Diameter of a disc of equal area, in pixels of the photograph.
        radius: Radius of the circle around the coin, in pixels of the photograph.
        centre: Row and column of its centroid in the photograph.
    """

    grey: np.ndarray
    cover: np.ndarray
    diameter: float
    radius: float
    centre: tuple[float, float]


def coins(split: str, count: int, seed: int = 0, size: int = 128) -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
    """Return an iterator over samples of a split.

    Sample i depends on (seed, split, i) alone.

    Args:
        split: "train", "val" or "test".
        count: Number of samples.
        seed: Seed of the random numbers.
        size: Side of the images in pixels, at least 64; coins grow with it.

    Returns:
        Iterator over key, image (size, size, 3) uint8 RGB and mask (size, size) uint8, 1 on coins.

    Raises:
        ValueError: If the split is unknown or the size is too small.
        FileNotFoundError: If a photograph is missing.
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
    """Load a photograph of the scikit-image wheel, RGB or grey.

    Raises:
        FileNotFoundError: If it is missing; names it.
    """
    path = PHOTOGRAPHS / name
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing; it ships with scikit-image's wheel: reinstall scikit-image")
    with Image.open(path) as file:
        return file.convert("L" if file.mode == "L" else "RGB")


@cache
def cut_out() -> tuple[Coin, ...]:
    """Cut the coins out of their photograph by watershed on its gradient, and return them in order of rising brightness."""
    grey_HW = np.asarray(photograph("coins.png"))
    markers = np.zeros(grey_HW.shape, np.int32)
    markers[grey_HW < SURELY_BACKGROUND] = 1
    markers[grey_HW > SURELY_COIN] = 2
    regions = label(ndimage.binary_fill_holes(watershed(sobel(grey_HW), markers) == 2))
    found = [region for region in regionprops(regions, grey_HW) if region.area >= SMALLEST_COIN]
    found.sort(key=lambda region: region.intensity_mean)
    return tuple(cut(grey_HW, regions == region.label, region.centroid) for region in found)


def cut(grey_HW: np.ndarray, region_HW: np.ndarray, centre: tuple[float, float]) -> Coin:
    """Cut one coin out of a photograph.

    Args:
        grey_HW: Photograph (H, W) uint8.
        region_HW: Whether a pixel belongs to the coin, (H, W) bool.
        centre: Row and column of the coin's centroid.
    """
    rows, columns = np.nonzero(region_HW)
    row, column = round(centre[0]), round(centre[1])
    radius = float(np.hypot(rows - centre[0], columns - centre[1]).max()) + 1
    # Shrinking needs a margin, since its filter reaches past the edge by the shrink factor.
    half = math.ceil(2 * radius)
    cover = np.zeros((2 * half + 1, 2 * half + 1), np.float32)
    cover[rows - row + half, columns - column + half] = 1
    grey = np.zeros_like(cover)
    grey[rows - row + half, columns - column + half] = grey_HW[rows, columns] / 255
    # The arrays are shared by every caller.
    grey.flags.writeable = cover.flags.writeable = False
    return Coin(grey, cover, 2 * math.sqrt(len(rows) / math.pi), radius, centre)


def coins_of(split: str) -> list[Coin]:
    """Return the coins of a split; no coin is in two splits."""
    turns = {turn: name for name, turn in COIN_TURN.items()}
    return [coin for i, coin in enumerate(cut_out()) if turns.get(i % TURNS, "train") == split]


def compose(
    rng: np.random.Generator, coins: list[Coin], backgrounds: list[Image.Image], size: int
) -> tuple[np.ndarray, np.ndarray]:
    """Draw one image (size, size, 3) and its mask (size, size), both uint8.

    Args:
        rng: Source of random numbers.
        coins: Coins to choose from.
        backgrounds: Photographs to choose from.
        size: Side of the image in pixels.
    """
    ground_HWC = draw_background(rng, backgrounds[rng.integers(len(backgrounds))], size)
    layers = [lay(rng, coin, diameter, x, y, size) for coin, diameter, x, y in draw_places(rng, coins, size)]
    mask_HW = np.zeros((size, size), np.uint8)
    for window, _, cover in layers:
        mask_HW[window] |= cover > 0.5
    image_HWC = ground_HWC * shade(rng, layers, size)[..., None]
    for window, grey, cover in layers:
        colour = strike(rng, grey, cover, ground_HWC[window])
        image_HWC[window] += (colour - image_HWC[window]) * cover[..., None]
    # The camera's noise covers coins and background alike.
    image_HWC += rng.uniform(0, 0.02) * rng.standard_normal(image_HWC.shape, dtype=np.float32)
    return (np.clip(image_HWC, 0, 1) * 255).round().astype(np.uint8), mask_HW


def draw_background(rng: np.random.Generator, photograph: Image.Image, size: int) -> np.ndarray:
    """Draw a random square of a photograph, enlarged only if the photograph is too small.

    Args:
        rng: Source of random numbers.
        photograph: The photograph.
        size: Side of the result in pixels.

    Returns:
        Background (size, size, 3) float32, roughly in [0, 1].
    """
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
    contrast, brightness = np.float32(rng.uniform(0.75, 1.1)), np.float32(rng.uniform(0.75, 1.15))
    changed: np.ndarray = (array - mean) * contrast + mean * brightness
    return changed


def draw_places(rng: np.random.Generator, coins: list[Coin], size: int) -> list[tuple[Coin, float, float, float]]:
    """Draw 0 to 8 coins that do not touch: coin, diameter and centre (x, y), all in pixels of the image."""
    count = 0 if rng.random() < EMPTY_SHARE else int(rng.integers(1, MAX_COINS + 1))
    places: list[tuple[Coin, float, float, float]] = []
    taken: list[tuple[float, float, float]] = []
    for _ in range(count):
        coin = coins[rng.integers(len(coins))]
        # Uniform on a logarithmic scale: more small coins than large ones.
        diameter = size * DIAMETERS[0] * (DIAMETERS[1] / DIAMETERS[0]) ** rng.random()
        radius = coin.radius * diameter / coin.diameter
        # About half or more of a coin that the border cuts stays visible.
        margin = 0 if rng.random() < BORDER_SHARE else radius
        for x, y in rng.uniform(margin, size - margin, (20, 2)):
            if all(math.hypot(x - a, y - b) > radius + r + GAP for a, b, r in taken):
                taken.append((x, y, radius))
                places.append((coin, diameter, x, y))
                break
    return places


def lay(rng: np.random.Generator, coin: Coin, diameter: float, x: float, y: float, size: int) -> Layer:
    """Rotate a coin by a random angle and shrink it to its place.

    Args:
        rng: Source of random numbers.
        coin: The coin.
        diameter: Its diameter in the image, in pixels.
        x: Column of its centre in the image.
        y: Row of its centre in the image.
        size: Side of the image in pixels.

    Returns:
        Window of the image, and grey level and coverage there, (h, w) each.
    """
    shrink = coin.diameter / diameter
    radius = coin.radius / shrink
    left, top = math.floor(x - radius) - 1, math.floor(y - radius) - 1
    side = math.ceil(2 * radius) + 3
    angle = rng.uniform(0, 360)
    middle = coin.cover.shape[0] / 2
    # The part of the cut-out that the window shows, to a fraction of a pixel.
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
    # The grey level outside the coin is 0, and must not darken its edge.
    grey = weighted / np.maximum(cover, 1e-3)
    rows, columns = slice(max(top, 0), min(top + side, size)), slice(max(left, 0), min(left + side, size))
    inside = slice(rows.start - top, rows.stop - top), slice(columns.start - left, columns.stop - left)
    return (rows, columns), grey[inside], np.clip(cover, 0, 1)[inside]


def shade(rng: np.random.Generator, layers: list[Layer], size: int) -> np.ndarray:
    """Return the share of light (size, size) that remains around the coins, which cast soft shadows of one lamp.

    Args:
        rng: Source of random numbers.
        layers: The coins in the image.
        size: Side of the image in pixels.
    """
    strength, angle, reach, blur = rng.uniform((0.1, 0, 0.004, 0.006), (0.6, 2 * math.pi, 0.014, 0.016))
    cover_HW = np.zeros((size, size), np.float32)
    for window, _, cover in layers:
        cover_HW[window] = np.maximum(cover_HW[window], cover)
    offset = reach * size * math.sin(angle), reach * size * math.cos(angle)
    shadow_HW: np.ndarray = ndimage.shift(ndimage.gaussian_filter(cover_HW, blur * size), offset, order=1)
    return 1 - np.float32(strength) * shadow_HW


def strike(rng: np.random.Generator, grey: np.ndarray, cover: np.ndarray, ground_HWC: np.ndarray) -> np.ndarray:
    """Colour a coin with a random metal, brightness and contrast, so that it differs from its background.

    Args:
        rng: Source of random numbers.
        grey: Grey levels (h, w).
        cover: Coverage (h, w).
        ground_HWC: Background (h, w, 3).

    Returns:
        Colours (h, w, 3).
    """
    metal = np.array(list(METALS.values())[rng.integers(len(METALS))], np.float32)
    tint = 1 + (metal - 1) * rng.uniform(0.4, 1)
    weight = cover / cover.sum()
    mean, ground = float((grey * weight).sum()), float((ground_HWC.mean(-1) * weight).sum())
    bright = mean * rng.uniform(0.6, 1.25)
    # An invisible coin would be nothing to learn from.
    if abs(bright - ground) < VISIBLE:
        bright = ground + VISIBLE if ground < 0.5 else ground - VISIBLE
    struck = bright * (1 + (grey / mean - 1) * rng.uniform(0.9, 1.4))
    return struck[..., None] * tint
