"""What the values of masks mean: binary or classes, and which value takes no part."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

KINDS = ("auto", "binary", "classes")
IGNORE_INDEX = 255
SHOWN = 20
# with more classes they are rather numbers of objects
MANY = 20


@dataclass(frozen=True)
class Labels:
    """How mask values become labels: binary (all that is not 0 is 1) or classes as they stand."""

    binary: bool
    num_classes: int
    ignore_label: int | None

    def apply(self, mask_HW: np.ndarray) -> np.ndarray:
        """Turns mask values (H, W) into labels (H, W) uint8."""
        labels = (mask_HW != 0).astype(np.uint8) if self.binary else mask_HW.astype(np.uint8)
        if self.ignore_label is not None:
            labels[mask_HW == self.ignore_label] = IGNORE_INDEX
        return labels


def decide_labels(
    values: set[int], kind: str, num_classes: int | None, ignore_label: int | None, highest: Mapping[str, int]
) -> Labels:
    """Decides what the values that occur in masks mean.

    values: all that occur, without ignore_label. kind: "binary" (anything but 0 is foreground), "classes" (values are
    labels), "auto" (binary where a single value stands beside 0). num_classes: as the model's, or None to find it.
    highest: the highest value of each mask, by name, for the message. Raises ValueError that says which masks do not fit.
    """
    if kind not in KINDS:
        raise ValueError(f"labels is {kind!r}; it must be one of {', '.join(KINDS)}")
    foreground = values - {0}
    binary = kind == "binary" or (kind == "auto" and num_classes in (None, 1) and len(foreground) <= 1)
    faults = []
    if not binary and max(foreground, default=0) > 254:
        what = (
            "look like instance numbers or a lossy JPEG" if len(foreground) > MANY else "are too large for class labels"
        )
        faults.append(
            f"mask values up to {max(foreground)} {what}; --labels binary makes all but 0 foreground, "
            "--ignore_label names a value that takes no part"
        )
    elif not binary and kind == "auto" and num_classes is None and len(foreground) > MANY:
        # a model of so many classes would train without a word
        faults.append(
            f"masks have {len(foreground)} values beside 0: where they number objects, --labels binary makes all but 0 "
            "foreground; where they are classes, say --labels classes"
        )
    found = 1 if binary else max(foreground, default=0) + 1
    allowed = 1 if num_classes == 1 else (num_classes or found) - 1
    if not binary and num_classes is not None and found > num_classes:
        above = [f"{name} ({label})" for name, label in highest.items() if label > allowed]
        faults.append(f"labels above num_classes - 1 = {allowed} in {len(above)} masks: {listed(above)}")
    if faults:
        raise ValueError("\n".join(faults))
    return Labels(binary, num_classes or found, ignore_label)


def listed(names: list[str]) -> str:
    """Joins names for a message, the first 20 of many."""
    return ", ".join(names[:SHOWN]) + (f" and {len(names) - SHOWN} more" if len(names) > SHOWN else "")
