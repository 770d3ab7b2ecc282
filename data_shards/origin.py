"""How the files of a split's samples were read when they were packed, so that new files and other splits are read alike."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from deepskip.data_shards.labels import AS_LABELS, NAN_LABEL, Values, listed


@dataclass(frozen=True)
class Origin:
    """The options by which a split's files were read.

    Attributes:
        labels: Meaning of mask values: "auto", "binary" or "classes".
        ignore_label: Mask value that is ignored, or None.
        values: How masks are read.
        alpha: `Reading.alpha` of the images.
        orientation: `Reading.orientation` of the images.
        classes: Names of the classes 1, 2, ... of a COCO file; of a binary split, those that are foreground. () for masks.
    """

    labels: str = "auto"
    ignore_label: int | None = None
    values: Values = AS_LABELS
    alpha: str = "auto"
    orientation: str = "auto"
    classes: tuple[str, ...] = ()

    @property
    def plain(self) -> dict[str, Any]:
        """Return it as the JSON of an index stores it."""
        return {
            "labels": self.labels,
            "ignore_label": self.ignore_label,
            "white_is_zero": self.values.white_is_zero,
            "threshold": self.values.threshold,
            "colours": self.values.colours,
            "alpha": self.alpha,
            "orientation": self.orientation,
            "classes": self.classes,
        }

    @property
    def options(self) -> str:
        """Return the options of `deepskip pack` that decide what its masks mean, as text; "" if there are none."""
        ignored = "nan" if self.ignore_label == NAN_LABEL else self.ignore_label
        told = {
            "labels": self.labels if self.labels != "auto" else None,
            "ignore_label": ignored,
            "threshold": self.values.threshold,
            "colors": "..." if self.values.colours else None,
        }
        return " ".join(f"--{name} {value}" for name, value in told.items() if value is not None)


def origin_of(raw: dict[str, Any] | None) -> Origin | None:
    """Convert plain values, which have been checked, to an origin; None for an index that has none."""
    if raw is None:
        return None
    values = Values(raw["white_is_zero"], raw["threshold"], tuple(tuple(colour) for colour in raw["colours"]))
    return Origin(raw["labels"], raw["ignore_label"], values, raw["alpha"], raw["orientation"], tuple(raw["classes"]))


def class_conflict(classes: Sequence[str], others: Sequence[str], where: str) -> str | None:
    """Return why the classes of samples are not those of others, or None.

    Args:
        classes: Names of the classes 1, 2, ... of the samples; () says nothing.
        others: Names of those of the others, likewise.
        where: Name of the others in the message.
    """
    if not classes or not others or list(classes) == list(others):
        return None
    return (
        f"the classes are {numbered(classes)}, but {numbered(others)} in {where}; "
        f"pack with those: --categories '{','.join(others)}'"
    )


def numbered(classes: Sequence[str]) -> str:
    """Return names of classes with their numbers, as text."""
    return listed([f"{number} {name}" for number, name in enumerate(classes, 1)])
