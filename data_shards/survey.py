"""What the files of a data set say of themselves, what is decided by it, and what a person is told."""

import math
from collections import Counter
from dataclasses import dataclass, field, replace

import numpy as np

from deepskip.data_shards.labels import Values, listed
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
# of a data set: with more foreground the mask is rather the wrong way round
MOST_FOREGROUND = 0.5


@dataclass
class Survey:
    """What was seen. Names are of images.

    transparency, data_as_alpha: with a band flagged as transparency that holds no more than that, or more; soft: transparency
    that is neither all nor nothing. kept, dropped: numbers of bands with and without it, with an example of each. apply,
    ignore, unclear: turned by their files, where the mask's size tells that it was drawn on the turned image, on the stored
    one, or tells nothing. sizes: of images and masks that do not fit. white: images where 0 is white. tagged, suspected: by
    the value that stands for none, or looks so. empty: pixels without a value. mask_nodata: masks by the value that stands for
    none. palette, palettes_differ: of masks, the colour of each index, and those that have others.
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

    def look(self, name: str, image: Picture, mask: Picture, reading: Reading) -> None:
        """Takes note of an image and its mask, as they are stored."""
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
        if image.nodata is not None and values.dtype.kind == "f" and np.isnan(values).any():
            # nan is no equal of itself
            self.tagged[NAN if math.isnan(image.nodata) else image.nodata] += 1
        elif (found := suspected_nodata(values)) is not None:
            self.suspected[found] += 1
        if values.dtype.kind == "f":
            self.empty += int(np.isnan(values).all(axis=2).sum())
        self.pixels += values.shape[0] * values.shape[1]

    def look_at_mask(self, name: str, mask: Picture) -> None:
        """Takes note of what a mask says of its values: which stands for none, and what colours its indices have."""
        if mask.nodata not in (None, 0) and (mask.array == mask.nodata).any():
            self.mask_nodata[float(mask.nodata or 0)] += 1
        if mask.palette is None:
            return
        used = [index for index in np.unique(mask.array).tolist() if index < len(mask.palette)]
        # greys are taken by their brightness
        if (mask.palette[used] == mask.palette[used][:, :1]).all() and len(used) > 1:
            return
        for index in used:
            colour = "#{:02x}{:02x}{:02x}".format(*mask.palette[index])
            if self.palette.setdefault(index, colour) != colour:
                self.palettes_differ.append(name)
                return

    def faults_of_masks(self, labels: str, ignore_label: int | None, values: Values) -> list[str]:
        """Lists what masks say that cannot be meant, each with the option that decides it."""
        found = []
        if self.mask_nodata and labels == "auto" and set(self.mask_nodata) != {ignore_label}:
            value, count = self.mask_nodata.most_common(1)[0]
            found.append(
                f"{count} masks say that {shown(value)} stands for no value: --ignore_label={shown(value)} has it take no part"
                ", --labels binary or classes takes it as any other"
            )
        first = self.palette.get(0)
        odd = first not in (None, BLACK) and BLACK in self.palette.values()
        if labels == "auto" and not values.colours and (self.palettes_differ or odd):
            what = (
                f"palettes give the same index other colours in {len(self.palettes_differ)} masks, such as "
                f"{self.palettes_differ[0]}"
                if self.palettes_differ
                else f"palettes have black at another index than 0, which is {first}"
            )
            found.append(
                f"{what}: --colors FILE says what each colour means; --labels binary or classes takes the indices as they are"
            )
        return found

    def look_at_sizes(self, name: str, image: Picture, mask: Picture, orientation: str) -> None:
        """Takes note of which way round an image fits its mask."""
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
        """Adds what was seen elsewhere."""
        for name, value in vars(other).items():
            own = getattr(self, name)
            if isinstance(own, Counter):
                own.update(value)
            elif isinstance(own, dict):
                if name == "palette" and any(own.get(index, colour) != colour for index, colour in value.items()):
                    self.palettes_differ.append(next(iter(other.examples.values()), "one"))
                setattr(self, name, value | own)
            else:
                setattr(self, name, own + value)

    def faults(self, reading: Reading, bands: int | None) -> list[str]:
        """Lists what cannot be decided, each with the option that decides it. bands: what all are brought to, if any."""
        found = list(self.sizes)
        if self.unclear or (self.apply and self.ignore):
            names = self.unclear or [*self.apply, *self.ignore]
            found.append(
                f"{len(names)} images are turned by their EXIF or TIFF orientation and their masks are not, and sizes do not "
                f"tell which way the masks were drawn: {listed(names)}; --orientation apply where they fit the image as "
                "viewers show it, --orientation ignore where they fit it as it is stored"
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

    def cure_of_bands(self, reading: Reading) -> str:
        """Says how images of several numbers of bands are brought to one."""
        other = self.dropped if self.alpha(reading) == "keep" else self.kept
        word = "drop" if other is self.dropped else "keep"
        if len(other) == 1:
            return f"--alpha {word} makes it {next(iter(other))} for all, or bring them to one number with --bands N"
        return "bring them to one number with --bands N"

    def alpha(self, reading: Reading) -> str:
        """Gives what becomes of bands that are flagged as transparency: "keep" or "drop"."""
        if reading.alpha != "auto":
            return reading.alpha
        return "keep" if self.data_as_alpha else "drop"

    def decided(self, reading: Reading, values: Values) -> tuple[Reading, Values]:
        """Gives how all files are read."""
        way = reading.orientation
        if way == "auto" and self.ignore:
            way = "ignore"
        # a default that changes nothing stays as it is
        alpha = self.alpha(reading) if self.transparency or self.data_as_alpha else reading.alpha
        return replace(reading, alpha=alpha, orientation=way), replace(values, orientation=way)

    def notes(self, reading: Reading) -> list[str]:
        """Says what was done, a line for each group of images."""
        lines = []
        if self.data_as_alpha or self.transparency:
            if self.alpha(reading) == "keep":
                what = f"a band flagged as transparency in {len(self.data_as_alpha) + len(self.transparency)} images is kept"
                why = f": in {len(self.data_as_alpha)} it holds data" if self.data_as_alpha else ""
                lines.append(f"{what}{why} (--alpha drop leaves it out)")
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
                f"{len(self.apply)} images are turned as their EXIF or TIFF orientation says: so their masks fit"
            )
        if self.ignore:
            lines.append(f"{len(self.ignore)} images are left as stored, whatever their EXIF says: so their masks fit")
        if self.white:
            lines.append(
                f"{len(self.white)} of {self.images} images say that 0 is white: their values are taken as they are stored"
            )
        named = dict(self.tagged)
        if named:
            words = ", ".join(
                f"{shown(value)} in {count}" for value, count in sorted(named.items(), key=lambda item: -item[1])
            )
            lines.append(f"nodata, as the files say: {words} images")
        if self.empty:
            lines.append(
                f"{self.empty / max(1, self.pixels):.2%} of all pixels have no value: left out of statistics, labelled ignored"
            )
        for value, count in self.suspected.items():
            lines.append(
                f"warning: {shown(value)} in {count} images looks as if it stood for no value, and counts as one; "
                f"--nodata={shown(value)} leaves it out"
            )
        return lines


def shown(value: float) -> str:
    """Writes a number so that it is read back as the same one."""
    return str(int(value)) if math.isfinite(value) and value == int(value) and abs(value) < 2**53 else repr(value)


def foreground_note(pixels: dict[int, int], binary: bool) -> list[str]:
    """Warns where more than half of all pixels are foreground."""
    total = sum(pixels.values())
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
