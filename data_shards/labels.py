"""Meaning of mask values: binary or classes, colours, soft edges, and ignored values."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from deepskip.data_shards.pictures import Picture, turned

KINDS = ("auto", "binary", "classes")
WHITE_IS_ZERO = ("ask", "invert", "keep")
IGNORE_INDEX = 255
SHOWN = 20
# With more values than this, they are more likely object numbers than classes.
MANY = 20
# What nan in a floating-point mask is read as; `--ignore_label nan` stands for it.
NAN_LABEL = -(2**31)
# In a mask with soft edges, most values are near one end or the other. If the highest is lower, they are more likely classes.
NEAR, NEAR_SHARE, SOFTEST = 0.16, 0.8, 50
# Number of a mask's colours that a message names.
COLOURS_SHOWN = 12


@dataclass(frozen=True)
class Values:
    """How a mask's numbers are read.

    Attributes:
        white_is_zero: What happens if a file declares that 0 is white: "invert" the values or "keep" them. "ask" inverts
            1-bit files, as every viewer does, and rejects files with more bits.
        threshold: Lowest value that is foreground, for masks with soft edges; None reads values as labels.
        colours: Red, green, blue and label for each colour, for masks that hold colours.
        orientation: "ignore" keeps masks as stored; otherwise they are rotated as their files say.
        ignore: Value that the threshold leaves unchanged, as it does the file's own no-data value.
    """

    white_is_zero: str = "ask"
    threshold: float | None = None
    colours: tuple[tuple[int, int, int, int], ...] = ()
    orientation: str = "auto"
    ignore: int | None = None

    def of(self, picture: Picture) -> np.ndarray:
        """Convert a mask file's numbers to integers.

        Args:
            picture: The mask as its file stores it, (H, W) or (H, W, bands).

        Returns:
            Integers (H, W), uint8 if they fit, else int32.

        Raises:
            ValueError: If the numbers cannot be read as labels; says what they are and what to do.
        """
        array = picture.array
        if picture.palette is not None:
            array = self.of_palette(array, picture.palette)
        if picture.alpha:
            alpha, array = array[..., picture.alpha[0]], np.delete(array, picture.alpha, axis=2)
            # A mask that is stored only in the transparency channel; where nothing is drawn, nothing is foreground.
            if (array == array[:1, :1]).all() and (alpha.min() != alpha.max() or alpha.max() == 0):
                array = alpha
        if self.orientation != "ignore":
            array = turned(array, picture.orientation)
        if array.ndim == 3 and (array == array[..., :1]).all():
            array = array[..., 0]
        if self.colours:
            array = self.of_colours(array)
        elif array.ndim == 3 and self.threshold is not None:
            # The brightness of a colour is its highest component.
            array = array.max(axis=2)
        if array.ndim != 2 or 0 in array.shape:
            raise ValueError(not_labels(array))
        if picture.white_is_zero:
            array = self.of_white_is_zero(array, picture.white_is_zero)
        if self.threshold is not None:
            return thresholded(array, self.threshold, (self.ignore, picture.nodata or None))
        return as_integers(array)

    def of_palette(self, indices: np.ndarray, palette: np.ndarray) -> np.ndarray:
        """Return the values of a palette image.

        These are the colours if `colours` is set. If they are greys that do not rise with their index, it is their
        brightness, as 0 and 1 if there are only black and white. Otherwise they are the indices.

        Args:
            indices: Palette indices (H, W).
            palette: Colours (n, 3) uint8.

        Returns:
            Colours (H, W, 3), or values (H, W).

        Raises:
            ValueError: If an index is not in the palette.
        """
        used = np.unique(indices)
        if used[-1] >= len(palette):
            raise ValueError(f"has index {used[-1]} of a palette of {len(palette)} colours")
        if self.colours:
            coloured: np.ndarray = palette[indices]
            return coloured
        greys = falling_greys(palette, used)
        if greys is None:
            return indices
        brightness: np.ndarray = palette[indices, 0]
        return (brightness // 255) if set(greys.tolist()) == {0, 255} else brightness

    def of_white_is_zero(self, array: np.ndarray, bits: int) -> np.ndarray:
        """Return the values of a file in which 0 is white, inverted if `white_is_zero` says so.

        Args:
            array: Values (H, W).
            bits: Number of bits of a value in the file.

        Raises:
            ValueError: If white_is_zero is "ask" and a value has more than one bit.
        """
        if self.white_is_zero == "invert" or (self.white_is_zero == "ask" and bits == 1):
            highest: int = 2**bits - 1
            return (highest - array.astype(np.int64)).astype(np.uint8 if bits <= 8 else np.int64)
        if self.white_is_zero == "ask":
            raise ValueError(
                f"declares that 0 is white (PhotometricInterpretation 0, {bits} bits): --white_is_zero invert makes what "
                "viewers show as white the highest value, --white_is_zero keep takes the values as they are stored"
            )
        return array

    def of_colours(self, array: np.ndarray) -> np.ndarray:
        """Return the label of each pixel's colour.

        Args:
            array: Colours (H, W, 3) or grey (H, W), uint8.

        Returns:
            Labels (H, W) int32.

        Raises:
            ValueError: If a colour has no label, or the array does not hold 8-bit colours; lists the colours.
        """
        if array.dtype != np.uint8:
            raise ValueError(f"has dtype {array.dtype}; colours must have 8 bits")
        packed = colours_of(array)
        labels = np.full(packed.shape, -1, np.int32)
        for red, green, blue, label in self.colours:
            labels[packed == (red << 16 | green << 8 | blue)] = label
        if (labels < 0).any():
            raise ValueError(f"has colours without a label: {shown_colours(packed[labels < 0])}")
        return labels


AS_LABELS = Values()


def falling_greys(palette: np.ndarray, used: np.ndarray) -> np.ndarray | None:
    """Return the greys of a palette whose order is not that of brightness, so that its indices mean nothing; else None.

    Args:
        palette: Colours (n, 3) uint8.
        used: Indices that occur in an image, rising (*,).

    Returns:
        The greys (*,) that count: those in use, and where only the first or second is, both of them.
    """
    # An image that is all black or all white may have a palette of white and black.
    counted = used if len(used) > 1 or used[0] > 1 else np.arange(min(2, len(palette)))
    greys: np.ndarray = palette[counted, 0]
    if (palette[counted] != greys[:, None]).any() or len(np.unique(greys)) < len(greys):
        return None
    return None if (np.diff(greys.astype(int)) > 0).all() else greys


def colours_of(array: np.ndarray) -> np.ndarray:
    """Pack colours (H, W, 3), or grey (H, W), into one integer each: (H, W) int32, red in the highest byte.

    Raises:
        ValueError: If there are not three components.
    """
    if array.ndim == 2:
        array = np.repeat(array[..., None], 3, axis=2)
    if array.shape[2] != 3:
        raise ValueError(f"has {array.shape[2]} samples a pixel; colours are red, green and blue")
    wide = array.astype(np.int32)
    return wide[..., 0] << 16 | wide[..., 1] << 8 | wide[..., 2]


def shown_colours(packed: np.ndarray) -> str:
    """Return a list of colours for a message, the most frequent first.

    Args:
        packed: Colours of any shape (*,), packed by `colours_of`.
    """
    found, counts = np.unique(packed, return_counts=True)
    ordered = found[np.argsort(-counts, kind="stable")]
    more = f" and {len(ordered) - COLOURS_SHOWN} more" if len(ordered) > COLOURS_SHOWN else ""
    return ", ".join(f"#{colour:06x}" for colour in ordered[:COLOURS_SHOWN]) + more


def not_labels(array: np.ndarray) -> str:
    """Return a message for a mask of colours or of an unexpected shape (*,): what it is and what to do."""
    text = f"has shape {array.shape}; a mask must be (height, width) of integer labels, not colours"
    if array.ndim != 3 or array.shape[2] != 3 or array.dtype != np.uint8 or 0 in array.shape:
        return text
    packed = colours_of(array)
    if len(np.unique(packed)) > 255:
        return (
            f"{text}; for a lossy JPEG of a black and white mask, --threshold 128 makes all that is bright foreground"
        )
    return (
        f"{text}: {shown_colours(packed)}; --colors FILE gives each a label: a CSV with columns color,label and rows such as "
        f"#ff0000,1 (for a lossy JPEG of a black and white mask: --threshold 128)"
    )


def thresholded(array: np.ndarray, threshold: float, kept: tuple[float | None, ...] = ()) -> np.ndarray:
    """Return 1 where a value is at least the threshold, else 0.

    Args:
        array: Values of any shape (*,).
        threshold: Lowest value that becomes 1.
        kept: Values that stay as they are; nan becomes NAN_LABEL.

    Returns:
        Integers of the same shape (*,), uint8 if they fit, else int32.
    """
    found = (array >= threshold).astype(np.int32)
    for value in kept:
        if value is not None:
            # What no label can be stands for no value, as nan does.
            is_label = math.isfinite(value) and value == round(value) and abs(value) < -NAN_LABEL
            found[array == value] = int(value) if is_label else NAN_LABEL
    if array.dtype.kind == "f":
        found[np.isnan(array)] = NAN_LABEL
    return found.astype(np.uint8) if found.min() >= 0 and found.max() <= 255 else found


def as_integers(array: np.ndarray) -> np.ndarray:
    """Convert the values of a mask to integers.

    Args:
        array: Values of any shape (*,); nan becomes NAN_LABEL.

    Returns:
        Integers of the same shape (*,), uint8 if they fit, else int32.

    Raises:
        ValueError: If values are not integers, or do not fit int32.
    """
    if array.dtype.kind not in "biuf":
        raise ValueError(f"has dtype {array.dtype}; a mask must hold integer labels")
    if array.dtype.kind == "f":
        missing = np.isnan(array)
        if not (missing | (array == np.round(array))).all():
            raise ValueError(
                "holds values that are not integers; a mask must hold labels. For probabilities, --threshold 0.5 makes all "
                "values from 0.5 on foreground"
            )
        array = np.where(missing, NAN_LABEL, array)
    if array.dtype != np.uint8 and array.size and (array.min() < NAN_LABEL or array.max() > 2**31 - 1):
        raise ValueError(f"holds labels of dtype {array.dtype} that are too large: up to {array.max()}")
    small = array.dtype in (np.uint8, bool) or (array.min() >= 0 and array.max() <= 255)
    return array.astype(np.uint8 if small else np.int32, copy=False)


@dataclass(frozen=True)
class Labels:
    """How mask values become labels.

    Attributes:
        binary: Whether every value other than 0 becomes 1; else values are class labels.
        num_classes: 1 for binary, else the number of classes with background.
        ignore_label: Mask value that becomes IGNORE_INDEX, or None.
        values: How a mask's numbers are read.
    """

    binary: bool
    num_classes: int
    ignore_label: int | None
    values: Values = AS_LABELS

    def apply(self, mask_HW: np.ndarray) -> np.ndarray:
        """Convert mask values (H, W) to labels (H, W) uint8."""
        labels = (mask_HW != 0).astype(np.uint8) if self.binary else mask_HW.astype(np.uint8)
        if self.ignore_label is not None:
            labels[mask_HW == self.ignore_label] = IGNORE_INDEX
        return labels


@dataclass
class Seen:
    """Values that occur in masks.

    Attributes:
        pixels: Number of pixels of each value.
        highest: Highest value of each mask by name, or its lowest if that is negative; not for every one of many masks.
        numbered: Number of masks whose values number their regions 1, 2, ..., each in one piece.
        others: Number of masks with regions whose values do not.
    """

    pixels: dict[int, int] = field(default_factory=dict)
    highest: dict[str, int] = field(default_factory=dict)
    numbered: int = 0
    others: int = 0

    def add(self, name: str, mask_HW: np.ndarray, ignore_label: int | None = None) -> None:
        """Count the values of one mask.

        Args:
            name: Name of the mask.
            mask_HW: Integer values (H, W).
            ignore_label: Value that is not counted.
        """
        found, counts = np.unique(mask_HW, return_counts=True)
        here = {int(v): int(c) for v, c in zip(found, counts, strict=True) if v != ignore_label}
        for value, count in here.items():
            self.pixels[value] = self.pixels.get(value, 0) + count
        # A few of the highest are enough for messages.
        if len(self.highest) < 100 or max(here, default=0) > 254 or min(here, default=0) < 0:
            self.highest[name] = min(here) if min(here, default=0) < 0 else max(here, default=0)
        regions = sorted(here.keys() - {0})
        if len(regions) > 1 and regions == list(range(1, len(regions) + 1)) and one_piece_each(mask_HW, len(regions)):
            self.numbered += 1
        elif (regions != [1] and regions) or (regions and not one_piece_each(mask_HW, 1)):
            self.others += 1

    def merge(self, other: "Seen") -> None:
        """Add the counts of other masks."""
        for value, count in other.pixels.items():
            self.pixels[value] = self.pixels.get(value, 0) + count
        self.highest |= other.highest
        self.numbered += other.numbered
        self.others += other.others


def one_piece_each(mask_HW: np.ndarray, count: int) -> bool:
    """Return whether each value from 1 to count is a single 8-connected region of the mask (H, W)."""
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
    """Decide what the values that occur in masks mean.

    Args:
        seen: Values that occur in the masks.
        kind: "binary": every value other than 0 is foreground. "classes": values are labels. "auto": binary if only one value
            other than 0 occurs, else classes.
        num_classes: Number of classes of the model, or None to take it from the masks.
        ignore_label: Value that is ignored, or None.
        values: How the masks were read.

    Raises:
        ValueError: If values do not fit `kind`; names masks and an option with which they fit.
    """
    if kind not in KINDS:
        raise ValueError(f"labels is {kind!r}; it must be one of {', '.join(KINDS)}")
    if num_classes is not None and not 1 <= num_classes <= IGNORE_INDEX:
        raise ValueError(f"num_classes is {num_classes}; it must be 1 to {IGNORE_INDEX}")
    if kind == "classes" and num_classes == 1:
        raise ValueError("num_classes is 1, which means binary; classes are 2 or more, with background")
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
    """Return why values are unlikely to mean what `kind` says, and which options decide it; None without doubt.

    Args:
        seen: Values that occur in the masks.
        kind: "auto", "binary" or "classes".
        binary: Whether the values would be read as binary.
        num_classes: Number of classes of the model, or None.
    """
    foreground = sorted(seen.pixels.keys() - {0})
    if foreground and foreground[0] < 0:
        names = [f"{name} ({value})" for name, value in seen.highest.items() if value < 0]
        if foreground[0] == NAN_LABEL:
            return "masks hold nan; to ignore such pixels: --ignore_label nan"
        return f"labels below 0 in {listed(names)}; to ignore such pixels: --ignore_label {foreground[0]}"
    if kind != "classes" and is_soft(seen.pixels):
        return (
            f"mask values between 0 and {foreground[-1]} look like the soft edges of a lossy JPEG or of resampling: "
            f"--threshold {(foreground[-1] + 1) // 2} makes all from there on foreground (1: all but 0); if they are "
            "classes: --labels classes"
        )
    if binary:
        return None
    if max(foreground, default=0) > 254:
        what = "look like numbers of objects" if len(foreground) > MANY else "are too large for class labels"
        return (
            f"mask values up to {foreground[-1]} {what}; --labels binary makes all but 0 foreground, "
            "--ignore_label names a value to ignore"
        )
    if kind != "auto" or num_classes is not None:
        return None
    either = "if they number objects, --labels binary makes all but 0 foreground; if they are classes: --labels classes"
    # Otherwise a model with this many classes would train without a warning.
    if len(foreground) > MANY:
        return f"masks have {len(foreground)} values other than 0: {either}"
    if seen.numbered and seen.numbered >= seen.others:
        return (
            f"in {seen.numbered} masks the values count its regions, 1 to {foreground[-1]}, each in one piece: {either}"
        )
    if foreground and foreground[-1] > 2 * len(foreground) + 10:
        return (
            f"masks have the values {', '.join(map(str, foreground))} other than 0, which as labels would make "
            f"{foreground[-1] + 1} classes: --labels binary makes all but 0 foreground; --labels classes takes them unchanged; "
            "--ignore_label names one to ignore"
        )
    return None


def is_soft(pixels: Mapping[int, int]) -> bool:
    """Return whether values look like a mask of 0 and its highest value with soft edges.

    That is, most pixels are near one end, and some values lie in between.

    Args:
        pixels: Number of pixels of each value.
    """
    highest = max(pixels, default=0)
    if not SOFTEST <= highest <= 255 or len(pixels) < 4:
        return False
    reach = NEAR * highest
    near = sum(count for value, count in pixels.items() if min(value, highest - value) <= reach)
    beside = sum(1 for value in pixels if 0 < value <= reach or highest - reach <= value < highest)
    return beside > 1 and near >= NEAR_SHARE * sum(pixels.values())


def listed(names: list[str]) -> str:
    """Join names for a message; of many, the first 20."""
    return ", ".join(names[:SHOWN]) + (f" and {len(names) - SHOWN} more" if len(names) > SHOWN else "")
