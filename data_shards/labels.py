"""What the values of masks mean: binary or classes, colours, soft edges, and which value takes no part."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from deepskip.data_shards.pictures import Picture, turned

KINDS = ("auto", "binary", "classes")
WHITE_IS_ZERO = ("ask", "invert", "keep")
IGNORE_INDEX = 255
SHOWN = 20
# with more classes they are rather numbers of objects
MANY = 20
# what nan in a mask of real numbers is read as, and named by --ignore_label nan
NAN_LABEL = -(2**31)
# of a mask with soft edges, most values are near one end or the other; where the highest is lower they are rather classes
NEAR, NEAR_SHARE, SOFTEST = 0.16, 0.8, 50
# colours of a mask that are named in a message
COLOURS_SHOWN = 12


@dataclass(frozen=True)
class Values:
    """How a mask's numbers are read.

    white_is_zero: whether values are turned round in a file that says that 0 is white ("ask": where it is of one bit, as every
    viewer does; more bits are refused). threshold: value from which on a pixel is foreground, of masks with soft edges; ignore:
    value that it leaves as it is, as it does the file's own for no value.
    colours: the label of each colour (red, green, blue), for masks of colours. orientation: "ignore" leaves them as stored.
    """

    white_is_zero: str = "ask"
    threshold: float | None = None
    colours: tuple[tuple[int, int, int, int], ...] = ()
    orientation: str = "auto"
    ignore: int | None = None

    def of(self, picture: Picture) -> np.ndarray:
        """Makes integers (H, W) of a mask, uint8 where they fit, else int32; raises ValueError that says what it is instead."""
        array = picture.array
        if picture.palette is not None:
            array = self.of_palette(array, picture.palette)
        if picture.alpha:
            alpha, array = array[..., picture.alpha[0]], np.delete(array, picture.alpha, axis=2)
            # a mask that is nothing but transparency
            if (array == array[:1, :1]).all() and alpha.min() != alpha.max():
                array = alpha
        if self.orientation != "ignore":
            array = turned(array, picture.orientation)
        if array.ndim == 3 and (array == array[..., :1]).all():
            array = array[..., 0]
        if self.colours:
            array = self.of_colours(array)
        elif array.ndim == 3 and self.threshold is not None:
            # as bright as a colour's brightest
            array = array.max(axis=2)
        if array.ndim != 2 or 0 in array.shape:
            raise ValueError(not_labels(array))
        if picture.white_is_zero:
            array = self.of_white_is_zero(array, picture.white_is_zero)
        if self.threshold is not None:
            return thresholded(array, self.threshold, (self.ignore, picture.nodata or None))
        return as_integers(array)

    def of_palette(self, indices: np.ndarray, palette: np.ndarray) -> np.ndarray:
        """Gives the colours of indices where they are asked for, brightness where greys are out of order, else the indices."""
        used = np.unique(indices)
        if used[-1] >= len(palette):
            raise ValueError(f"has index {used[-1]} of a palette of {len(palette)} colours")
        if self.colours:
            return palette[indices]
        greys = palette[used, 0]
        if (palette[used] != greys[:, None]).any() or (np.diff(greys.astype(int)) > 0).all():
            # white alone may be index 0
            alone = len(used) == 1 and used[0] == 0 and len(palette) > 1 and (palette[:2] == [[255] * 3, [0] * 3]).all()
            return np.ones_like(indices) if alone else indices
        brightness = palette[indices, 0]
        return (brightness == greys.max()).astype(np.uint8) if len(used) == 2 else brightness

    def of_white_is_zero(self, array: np.ndarray, bits: int) -> np.ndarray:
        """Turns values round where that is asked for, or plain."""
        if self.white_is_zero == "invert" or (self.white_is_zero == "ask" and bits == 1):
            return (2**bits - 1 - array.astype(np.int64)).astype(np.uint8 if bits <= 8 else np.int64)
        if self.white_is_zero == "ask":
            raise ValueError(
                f"says that 0 is white (PhotometricInterpretation 0, {bits} bits): --white_is_zero invert makes what viewers "
                "show as white the highest value, --white_is_zero keep takes the values as they are stored"
            )
        return array

    def of_colours(self, array: np.ndarray) -> np.ndarray:
        """Gives each pixel the label of its colour; raises ValueError that lists the colours that have none."""
        if array.dtype != np.uint8:
            raise ValueError(f"has dtype {array.dtype}; colours are of 8 bits")
        packed = colours_of(array)
        labels = np.full(packed.shape, -1, np.int32)
        for red, green, blue, label in self.colours:
            labels[packed == (red << 16 | green << 8 | blue)] = label
        if (labels < 0).any():
            raise ValueError(f"has colours without a label: {shown_colours(packed[labels < 0])}")
        return labels


AS_LABELS = Values()


def colours_of(array: np.ndarray) -> np.ndarray:
    """Packs colours (H, W, 3), or grey (H, W), into one integer each (H, W)."""
    if array.ndim == 2:
        array = np.repeat(array[..., None], 3, axis=2)
    if array.shape[2] != 3:
        raise ValueError(f"has {array.shape[2]} samples a pixel; colours are red, green and blue")
    wide = array.astype(np.int32)
    return wide[..., 0] << 16 | wide[..., 1] << 8 | wide[..., 2]


def shown_colours(packed: np.ndarray) -> str:
    """Lists colours for a message, those of most pixels first."""
    found, counts = np.unique(packed, return_counts=True)
    ordered = found[np.argsort(-counts, kind="stable")]
    more = f" and {len(ordered) - COLOURS_SHOWN} more" if len(ordered) > COLOURS_SHOWN else ""
    return ", ".join(f"#{colour:06x}" for colour in ordered[:COLOURS_SHOWN]) + more


def not_labels(array: np.ndarray) -> str:
    """Says of a mask of colours, or of no known shape, what it is and what to do."""
    text = f"has shape {array.shape}; a mask is (height, width) of integer labels, not of colours"
    if array.ndim != 3 or array.shape[2] != 3 or array.dtype != np.uint8 or 0 in array.shape:
        return text
    packed = colours_of(array)
    if len(np.unique(packed)) > 255:
        return f"{text}; of a lossy JPEG of a black and white mask, --threshold 128 makes all that is bright foreground"
    return (
        f"{text}: {shown_colours(packed)}; --colors FILE says what each means: a CSV of columns color,label with rows such as "
        f"#ff0000,1 (a lossy JPEG of a black and white mask: --threshold 128)"
    )


def thresholded(array: np.ndarray, threshold: float, kept: tuple[float | None, ...] = ()) -> np.ndarray:
    """Gives 1 where a value is as high as a threshold, else 0; nan, and the values of `kept`, stay values of their own."""
    found = (array >= threshold).astype(np.int32)
    for value in kept:
        if value is not None and value == round(value):
            found[array == value] = int(value)
    if array.dtype.kind == "f":
        found[np.isnan(array)] = NAN_LABEL
    return found.astype(np.uint8) if found.min() >= 0 and found.max() <= 255 else found


def as_integers(array: np.ndarray) -> np.ndarray:
    """Gives values as integers; raises ValueError for what are none."""
    if array.dtype.kind not in "biuf":
        raise ValueError(f"has dtype {array.dtype}; a mask holds integer labels")
    if array.dtype.kind == "f":
        missing = np.isnan(array)
        if not (missing | (array == np.round(array))).all():
            raise ValueError(
                "holds values that are no integers; a mask holds labels. Of probabilities, --threshold 0.5 makes all from "
                "there on foreground"
            )
        array = np.where(missing, NAN_LABEL, array)
    if array.dtype != np.uint8 and array.size and (array.min() < NAN_LABEL or array.max() > 2**31 - 1):
        raise ValueError(f"holds labels of dtype {array.dtype} that are too large: up to {array.max()}")
    small = array.dtype in (np.uint8, bool) or (array.min() >= 0 and array.max() <= 255)
    return array.astype(np.uint8 if small else np.int32, copy=False)


@dataclass(frozen=True)
class Labels:
    """How mask values become labels: binary (all that is not 0 is 1) or classes as they stand."""

    binary: bool
    num_classes: int
    ignore_label: int | None
    values: Values = AS_LABELS

    def apply(self, mask_HW: np.ndarray) -> np.ndarray:
        """Turns mask values (H, W) into labels (H, W) uint8."""
        labels = (mask_HW != 0).astype(np.uint8) if self.binary else mask_HW.astype(np.uint8)
        if self.ignore_label is not None:
            labels[mask_HW == self.ignore_label] = IGNORE_INDEX
        return labels


@dataclass
class Seen:
    """What was seen in masks. pixels: of each value. highest: value of each mask, by name. numbered: masks whose values count
    their regions, each one piece; others: masks with regions whose values do not.
    """

    pixels: dict[int, int] = field(default_factory=dict)
    highest: dict[str, int] = field(default_factory=dict)
    numbered: int = 0
    others: int = 0

    def add(self, name: str, mask_HW: np.ndarray, ignore_label: int | None = None) -> None:
        """Counts one mask."""
        found, counts = np.unique(mask_HW, return_counts=True)
        here = {int(v): int(c) for v, c in zip(found, counts, strict=True) if v != ignore_label}
        for value, count in here.items():
            self.pixels[value] = self.pixels.get(value, 0) + count
        # the highest few are enough to name
        if len(self.highest) < 100 or max(here, default=0) > 254 or min(here, default=0) < 0:
            self.highest[name] = min(here) if min(here, default=0) < 0 else max(here, default=0)
        regions = sorted(here.keys() - {0})
        if len(regions) > 1 and regions == list(range(1, len(regions) + 1)) and one_piece_each(mask_HW, len(regions)):
            self.numbered += 1
        elif (regions != [1] and regions) or (regions and not one_piece_each(mask_HW, 1)):
            self.others += 1

    def merge(self, other: "Seen") -> None:
        """Adds what was seen elsewhere."""
        for value, count in other.pixels.items():
            self.pixels[value] = self.pixels.get(value, 0) + count
        self.highest |= other.highest
        self.numbered += other.numbered
        self.others += other.others


def one_piece_each(mask_HW: np.ndarray, count: int) -> bool:
    """Says whether each value 1 to count is a single 8-connected region."""
    from scipy import ndimage

    everywhere = np.ones((3, 3), bool)
    boxes = ndimage.find_objects(mask_HW, count)
    return all(
        box is not None and ndimage.label(mask_HW[box] == value, structure=everywhere)[1] == 1
        for value, box in enumerate(boxes, 1)
    )


def decide_labels(
    seen: Seen, kind: str, num_classes: int | None, ignore_label: int | None, values: Values = AS_LABELS
) -> Labels:
    """Decides what the values that occur in masks mean.

    kind: "binary" (anything but 0 is foreground), "classes" (values are labels), "auto" (binary where a single value stands
    beside 0). num_classes: as the model's, or None to find it. Raises ValueError that says which masks do not fit, and names
    an option with which they do.
    """
    if kind not in KINDS:
        raise ValueError(f"labels is {kind!r}; it must be one of {', '.join(KINDS)}")
    foreground = seen.pixels.keys() - {0}
    binary = kind == "binary" or (kind == "auto" and num_classes in (None, 1) and len(foreground) <= 1)
    if text := doubt(seen, kind, binary, num_classes):
        raise ValueError(text)
    found = 1 if binary else max(foreground, default=0) + 1
    allowed = 1 if num_classes == 1 else (num_classes or found) - 1
    if not binary and num_classes is not None and found > num_classes:
        above = [f"{name} ({label})" for name, label in seen.highest.items() if label > allowed]
        raise ValueError(f"labels above num_classes - 1 = {allowed} in {len(above)} masks: {listed(above)}")
    return Labels(binary, num_classes or found, ignore_label, values)


def doubt(seen: Seen, kind: str, binary: bool, num_classes: int | None) -> str | None:
    """Says why values cannot be taken as they are meant to be, and with which options they can; None where they can."""
    foreground = sorted(seen.pixels.keys() - {0})
    if foreground and foreground[0] < 0:
        names = [f"{name} ({value})" for name, value in seen.highest.items() if value < 0]
        if foreground[0] == NAN_LABEL:
            return "masks hold nan; where that takes no part: --ignore_label nan"
        return f"labels below 0 in {listed(names)}; where such a value takes no part: --ignore_label {foreground[0]}"
    if kind != "classes" and is_soft(seen.pixels):
        return (
            f"mask values between 0 and {foreground[-1]} look like the soft edges of a lossy JPEG or of resampling: "
            f"--threshold {(foreground[-1] + 1) // 2} makes all from there on foreground (1: all but 0); where they are "
            "classes, say --labels classes"
        )
    if binary:
        return None
    if max(foreground, default=0) > 254:
        what = "look like numbers of objects" if len(foreground) > MANY else "are too large for class labels"
        return (
            f"mask values up to {foreground[-1]} {what}; --labels binary makes all but 0 foreground, "
            "--ignore_label names a value that takes no part"
        )
    if kind != "auto" or num_classes is not None:
        return None
    either = "where they number objects, --labels binary makes all but 0 foreground; where they are classes: --labels classes"
    # a model of so many classes would train without a word
    if len(foreground) > MANY:
        return f"masks have {len(foreground)} values beside 0: {either}"
    if seen.numbered and seen.numbered >= seen.others:
        return (
            f"in {seen.numbered} masks the values count its regions, 1 to {foreground[-1]}, each in one piece: {either}"
        )
    if foreground and foreground[-1] > 2 * len(foreground) + 10:
        return (
            f"masks have the values {', '.join(map(str, foreground))} beside 0, which as labels would make "
            f"{foreground[-1] + 1} classes: --labels binary makes all but 0 foreground; --labels classes takes them as they "
            "are; --ignore_label names one that takes no part"
        )
    return None


def is_soft(pixels: Mapping[int, int]) -> bool:
    """Says whether values look like a mask of 0 and its highest value with soft edges: most near one end, some between."""
    highest = max(pixels, default=0)
    if not SOFTEST <= highest <= 255 or len(pixels) < 4:
        return False
    reach = NEAR * highest
    near = sum(count for value, count in pixels.items() if min(value, highest - value) <= reach)
    beside = sum(1 for value in pixels if 0 < value <= reach or highest - reach <= value < highest)
    return beside > 1 and near >= NEAR_SHARE * sum(pixels.values())


def listed(names: list[str]) -> str:
    """Joins names for a message, the first 20 of many."""
    return ", ".join(names[:SHOWN]) + (f" and {len(names) - SHOWN} more" if len(names) > SHOWN else "")
