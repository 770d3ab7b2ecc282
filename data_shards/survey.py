"""Survey of the files of a data set: what they say about themselves, what is decided from it, and what is reported."""

import math
from collections import Counter
from dataclasses import dataclass, field, replace

import numpy as np

from deepskip.data_shards.labels import Values, falling_greys, listed
from deepskip.data_shards.pictures import (
    Picture,
    Reading,
    dropped_alpha,
    image_of,
    is_transparency,
    suspected_nodata,
    turned,
)

NAN, BLACK = math.nan, "#000000"
# With a larger share of foreground in a data set, the masks are probably inverted.
MOST_FOREGROUND = 0.5


@dataclass
class Survey:
    """What was found in the images and masks of a data set. Lists of names hold names of images.

    Attributes:
        images: Number of images.
        transparency: Images with a band flagged as transparency that holds nothing else.
        data_as_alpha: Images with a band flagged as transparency that holds data.
        soft: Number of images whose transparency is neither all nor nothing.
        kept: Number of images by their number of bands, with transparency kept.
        dropped: Number of images by their number of bands, with transparency dropped.
        examples: An image for each ("keep" or "drop", number of bands).
        apply: Images with an orientation whose masks fit the rotated image.
        ignore: Images with an orientation whose masks fit the stored image.
        unclear: Images with an orientation whose masks fit both.
        sizes: Messages about images and masks of different sizes.
        white: Images in which 0 is white.
        tagged: Number of images by the no-data value that they declare and hold.
        suspected: Number of images by a value that probably means no data.
        empty: Number of pixels without a value.
        pixels: Number of pixels.
        mask_nodata: Number of masks by the no-data value that they declare and hold.
        palette: Colour of each index in masks with a palette.
        palettes_differ: Masks whose palettes have other colours.
        by_brightness: Masks whose palettes are read by brightness, other than those of black and white.
        drawn: Masks of one colour whose transparency varies, so that they are drawn in it.
        opaque: Masks of one colour that are not transparent anywhere.
    """

    images: int = 0
    transparency: list[str] = field(default_factory=list)
    data_as_alpha: list[str] = field(default_factory=list)
    soft: int = 0
    kept: Counter[int] = field(default_factory=Counter)
    dropped: Counter[int] = field(default_factory=Counter)
    examples: dict[tuple[str, int], str] = field(default_factory=dict)
    apply: list[str] = field(default_factory=list)
    ignore: list[str] = field(default_factory=list)
    unclear: list[str] = field(default_factory=list)
    sizes: list[str] = field(default_factory=list)
    white: list[str] = field(default_factory=list)
    tagged: Counter[float] = field(default_factory=Counter)
    suspected: Counter[float] = field(default_factory=Counter)
    empty: int = 0
    pixels: int = 0
    mask_nodata: Counter[float] = field(default_factory=Counter)
    palette: dict[int, str] = field(default_factory=dict)
    palettes_differ: list[str] = field(default_factory=list)
    by_brightness: list[str] = field(default_factory=list)
    drawn: list[str] = field(default_factory=list)
    opaque: list[str] = field(default_factory=list)

    def look(self, name: str, image: Picture, mask: Picture, reading: Reading) -> None:
        """Record an image and its mask, as they are stored.

        Args:
            name: Name of the image in messages.
            image: The image's file.
            mask: The mask's file.
            reading: How images are read.

        Raises:
            ValueError: If the image has values that are nan or infinite.
        """
        self.images += 1
        have = image.array.shape[2] if image.array.ndim == 3 else 1
        for way, counts, bands in (
            ("keep", self.kept, have),
            ("drop", self.dropped, have - len(dropped_alpha(image, "drop"))),
        ):
            counts[bands] += 1
            self.examples.setdefault((way, bands), name)
        if image.alpha:
            plain = all(is_transparency(image.array[..., band]) for band in image.alpha)
            (self.transparency if plain or image.sure else self.data_as_alpha).append(name)
            self.soft += image.sure and not plain
        if image.white_is_zero:
            self.white.append(name)
        self.look_at_sizes(name, image, mask, reading.orientation)
        self.look_at_mask(name, mask)
        way = "keep" if reading.alpha == "keep" else "drop"
        values = image_of(image, replace(reading, alpha=way, orientation="ignore"))
        declared = NAN if image.nodata is None or math.isnan(image.nodata) else image.nodata
        told = image.nodata is not None or image.invalid is not None
        if told and values.dtype.kind == "f" and np.isnan(values).any():
            # nan does not equal itself, so all nan are counted under one object.
            self.tagged[declared] += 1
        elif (found := suspected_nodata(values)) is not None:
            self.suspected[found] += 1
        if values.dtype.kind == "f":
            self.empty += int(np.isnan(values).all(axis=2).sum())
        self.pixels += values.shape[0] * values.shape[1]

    def look_at_mask(self, name: str, mask: Picture) -> None:
        """Record what a mask says about its values: its no-data value, and the colours of its indices."""
        if mask.nodata not in (None, 0) and (mask.array == mask.nodata).any():
            self.mask_nodata[float(mask.nodata or 0)] += 1
        if mask.alpha:
            alpha, colour = mask.array[..., mask.alpha[0]], np.delete(mask.array, mask.alpha, axis=2)
            if (colour == colour[:1, :1]).all() and alpha.max() > 0:
                (self.opaque if alpha.min() == alpha.max() else self.drawn).append(name)
        if mask.palette is None:
            return
        used = np.unique(mask.array)
        used = used[used < len(mask.palette)]
        greys = falling_greys(mask.palette, used) if len(used) else None
        if greys is not None:
            if set(greys.tolist()) != {0, 255}:
                self.by_brightness.append(name)
            return
        colours = {index: "#{:02x}{:02x}{:02x}".format(*mask.palette[index]) for index in used.tolist()}
        if any(self.palette.get(index, colour) != colour for index, colour in colours.items()):
            self.palettes_differ.append(name)
        self.palette = colours | self.palette

    def faults_of_masks(self, labels: str, ignore_label: int | None, values: Values) -> list[str]:
        """Return what masks say that is ambiguous, each with the option that decides it.

        Args:
            labels: "auto", "binary" or "classes".
            ignore_label: Mask value that is ignored, or None.
            values: How masks are read.
        """
        found = []
        if self.mask_nodata and labels == "auto" and set(self.mask_nodata) != {ignore_label}:
            value, count = self.mask_nodata.most_common(1)[0]
            found.append(
                f"{count} masks declare {shown(value)} as no data: --ignore_label={shown(value)} ignores it"
                ", --labels binary or classes reads it as any other value"
            )
        if self.drawn and self.opaque:
            found.append(
                f"{len(self.drawn)} masks, such as {self.drawn[0]}, are drawn in transparency alone, and {len(self.opaque)}, "
                f"such as {self.opaque[0]}, have one colour and no transparency, which may mean all foreground or none: store "
                "all masks without transparency, as grey of 0 and 255"
            )
        first = self.palette.get(0)
        odd = first not in (None, BLACK) and BLACK in self.palette.values()
        # Of two greys, the darker first, both are what a binary mask may have.
        two = all(map(is_grey, self.palette.values())) and max(self.palette, default=0) < 2
        differ = [] if two else self.palettes_differ
        # An index stands for its brightness in some masks, and not in others.
        if any(colour != f"#{3 * f'{index:02x}'}" for index, colour in self.palette.items() if is_grey(colour)):
            differ = [*differ, *self.by_brightness]
        if labels == "auto" and not values.colours and (differ or odd):
            what = (
                f"palettes give the same index different colours in {len(differ)} masks, such as {differ[0]}"
                if differ
                else f"palettes have black at an index other than 0, and index 0 is {first}"
            )
            found.append(
                f"{what}: --colors FILE gives each colour a label; --labels binary or classes takes the indices unchanged"
            )
        return found

    def look_at_sizes(self, name: str, image: Picture, mask: Picture, orientation: str) -> None:
        """Record in which orientation an image fits its mask."""
        stored = image.array.shape[:2], mask.array.shape[:2]
        shown = tuple(turned(each.array, each.orientation).shape[:2] for each in (image, mask))
        fits = {"apply": shown[0] == shown[1], "ignore": stored[0] == stored[1]}
        asked = fits.get(orientation, any(fits.values()))
        if not asked:
            (H, W), (h, w) = shown if orientation != "ignore" else stored
            self.sizes.append(f"the mask of {name} is {h} x {w} (height x width), its image {H} x {W}")
        elif orientation == "auto" and image.orientation != mask.orientation:
            told = self.unclear if all(fits.values()) else self.apply if fits["apply"] else self.ignore
            told.append(name)

    def merge(self, other: "Survey") -> None:
        """Add the findings of another survey."""
        for name, value in vars(other).items():
            own = getattr(self, name)
            if isinstance(own, Counter):
                # A nan from another process is another object, and a key of its own.
                own.update({NAN if isinstance(key, float) and math.isnan(key) else key: n for key, n in value.items()})
            elif isinstance(own, dict):
                if name == "palette" and any(own.get(index, colour) != colour for index, colour in value.items()):
                    self.palettes_differ.append(next(iter(other.examples.values()), "one"))
                setattr(self, name, value | own)
            else:
                setattr(self, name, own + value)

    def faults(self, reading: Reading, bands: int | None) -> list[str]:
        """Return what cannot be decided, each with the option that decides it.

        Args:
            reading: How images are read.
            bands: Number of bands that all images are resampled to, or None.
        """
        found = list(self.sizes)
        if self.unclear or (self.apply and self.ignore):
            names = self.unclear or [*self.apply, *self.ignore]
            found.append(
                f"{len(names)} images have an EXIF or TIFF orientation and their masks do not, and the sizes do not tell in "
                f"which orientation the masks were drawn: {listed(names)}; --orientation apply if they fit the image as "
                "viewers show it, --orientation ignore if they fit it as it is stored"
            )
        way = self.alpha(reading)
        counts = self.kept if way == "keep" else self.dropped
        if len(counts) > 1 and bands is None:
            seen = ", ".join(
                f"{count} bands: {images} images such as {self.examples[way, count]}"
                for count, images in sorted(counts.items())
            )
            found.append(f"images differ in their number of bands ({seen}); {self.cure_of_bands(reading)}")
        return found

    def faults_of_resampling(self, reading: Reading, bands: int | None) -> list[str]:
        """Return that bands cannot be resampled if one is kept that later readers would take for transparency.

        Args:
            reading: How images are read.
            bands: Number of bands that all images are resampled to, or None.
        """
        if bands is None or not self.transparency or self.alpha(reading) == "drop":
            return []
        return [
            f"in {len(self.transparency)} images, such as {self.transparency[0]}, a band that is kept looks like transparency, "
            f"which is dropped before bands are resampled: omit --bands {bands}, or give --alpha drop"
        ]

    def cure_of_bands(self, reading: Reading) -> str:
        """Return which option gives all images the same number of bands."""
        other = self.dropped if self.alpha(reading) == "keep" else self.kept
        word = "drop" if other is self.dropped else "keep"
        if len(other) == 1:
            return f"--alpha {word} makes it {next(iter(other))} for all, or resample them to one number with --bands N"
        return "resample them to one number with --bands N"

    def alpha(self, reading: Reading) -> str:
        """Return whether bands flagged as transparency are kept or dropped: "keep" or "drop"."""
        if reading.alpha != "auto":
            return reading.alpha
        return "keep" if self.data_as_alpha else "drop"

    def decided(self, reading: Reading, values: Values) -> tuple[Reading, Values]:
        """Return how all images and all masks are read."""
        way = reading.orientation
        if way == "auto" and self.ignore:
            way = "ignore"
        # A default that changes nothing is not replaced.
        alpha = self.alpha(reading) if self.transparency or self.data_as_alpha else reading.alpha
        return replace(reading, alpha=alpha, orientation=way), replace(values, orientation=way)

    def notes(self, reading: Reading) -> list[str]:
        """Return a line for each decision, with the number of images that it concerns."""
        lines = []
        if self.data_as_alpha or self.transparency:
            if self.alpha(reading) == "keep":
                what = f"a band flagged as transparency in {len(self.data_as_alpha) + len(self.transparency)} images is kept"
                why = f": in {len(self.data_as_alpha)} it holds data" if self.data_as_alpha else ""
                lines.append(f"{what}{why} (--alpha drop removes it)")
            else:
                lines.append(
                    f"transparency of {len(self.data_as_alpha) + len(self.transparency)} images is dropped"
                    + (
                        f", more than all or nothing in {more} of them"
                        if (more := len(self.data_as_alpha) + self.soft)
                        else ""
                    )
                    + " (--alpha keep makes it a band)"
                )
        if self.apply:
            lines.append(
                f"{len(self.apply)} images are rotated by their EXIF or TIFF orientation, since their masks fit that"
            )
        if self.ignore:
            lines.append(
                f"{len(self.ignore)} images are read as stored, since their masks fit that and not their orientation"
            )
        if self.white:
            lines.append(
                f"{len(self.white)} of {self.images} images declare that 0 is white: their values are read as stored"
            )
        named = dict(self.tagged)
        if named:
            words = ", ".join(
                f"{shown(value)} in {count}" for value, count in sorted(named.items(), key=lambda item: -item[1])
            )
            lines.append(f"no data, as declared by the files: {words} images")
        if self.empty:
            lines.append(
                f"{self.empty / max(1, self.pixels):.2%} of all pixels have no value: omitted from statistics, labelled ignored"
            )
        for value, count in self.suspected.items():
            lines.append(
                f"warning: {shown(value)} in {count} images looks like a no-data value, but is read as a number; "
                f"--nodata={shown(value)} removes it"
            )
        return lines


def is_grey(colour: str) -> bool:
    """Return whether a colour, written as #rrggbb, is grey."""
    return colour[1:3] == colour[3:5] == colour[5:]


def shown(value: float) -> str:
    """Return a number as text that parses to the same number."""
    return str(int(value)) if math.isfinite(value) and value == int(value) and abs(value) < 2**53 else repr(value)


def foreground_note(pixels: dict[int, int], binary: bool) -> list[str]:
    """Return a warning if masks have no counted pixels, no foreground, no background, or mostly foreground.

    Args:
        pixels: Number of pixels of each value.
        binary: Whether labels are binary.
    """
    total = sum(pixels.values())
    if not total:
        return ["warning: every pixel of every mask is ignored, so that nothing can be learned from them"]
    if not any(pixels[value] for value in pixels if value):
        return ["warning: no mask has any foreground"]
    if 0 not in pixels:
        return ["warning: no mask has the value 0, which is background: classes begin at 1"]
    share = 1 - pixels.get(0, 0) / max(1, total)
    if not binary or share <= MOST_FOREGROUND:
        return []
    return [
        f"warning: {share:.0%} of all mask pixels are foreground; masks of small objects are mostly background: are they "
        "inverted?"
    ]
