"""What a trained network is worth: its threshold chosen on validation, and the test split's metrics, by size and by image."""

import math
from typing import Any

import numpy as np
import torch
from scipy import ndimage
from torch import Tensor, nn

from deepskip.flips import MIRRORINGS
from deepskip.inference import to_probabilities
from deepskip.loss import BCEDiceLoss
from deepskip.metrics import EIGHT_NEIGHBOURS, SegmentationMetrics
from jobs.comparison.samples import IGNORE_INDEX, Split

# thresholds are steps of a logit: where foreground is rare, all that matters may lie under a probability of 0.05
STEPS_PER_LOGIT, HIGHEST_LOGIT = 8, 8
BINS = 2 * HIGHEST_LOGIT * STEPS_PER_LOGIT
# areas in pixels
SIZES = (0, 16, 64, 256, 1024)
PLACES = ("best", "median", "worst")


@torch.inference_mode()
def probabilities(
    network: nn.Module, split: Split, batch_size: int, test_flips: bool = False, bf16: bool = False
) -> tuple[Tensor, Tensor]:
    """Predicts a split: probabilities (N, S, S) fp32, and loss sums (5,) over it as `BCEDiceLoss.sums` gives them."""
    network.eval()
    device = split.images.device
    found = []
    criterion = BCEDiceLoss(ignore_index=IGNORE_INDEX)
    sums = torch.zeros(5, dtype=torch.float64, device=device)
    for start in range(0, len(split), batch_size):
        image = split.images[start : start + batch_size].contiguous(memory_format=torch.channels_last)
        total = torch.zeros_like(image[:, 0])
        mirrorings = MIRRORINGS if test_flips else MIRRORINGS[:1]
        for axes in mirrorings:
            with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
                logits = network(image.flip(axes) if axes else image).float()
            if axes:
                logits = logits.flip(axes)
            else:
                sums += criterion.sums(logits, split.masks[start : start + batch_size]).double()
            total += to_probabilities(logits)[:, 0]
        found.append(total / len(mirrorings))
    return torch.cat(found), sums


def bins_of(probability: Tensor) -> Tensor:
    """Gives the bins 0..BINS that probabilities lie in; bin k begins at the threshold `threshold_of(k)`."""
    # the ends of probability are infinite logits; rounding may leave more than 1
    return ((probability.clamp(0, 1).logit() + HIGHEST_LOGIT) * STEPS_PER_LOGIT).floor().clamp_(0, BINS).long()


def bin_of(threshold: float) -> int:
    """Gives the bin that begins nearest to a threshold of probability."""
    if not 0 < threshold < 1:
        return BINS if threshold >= 1 else 0
    logit = math.log(threshold / (1 - threshold))
    return min(max(round((logit + HIGHEST_LOGIT) * STEPS_PER_LOGIT), 0), BINS)


def threshold_of(number: int) -> float:
    """Gives the probability that a bin begins at."""
    return 1 / (1 + math.exp(HIGHEST_LOGIT - number / STEPS_PER_LOGIT))


def threshold_counts(probability: Tensor, masks: Tensor) -> Tensor:
    """Counts pixels by the bins' thresholds: (3, BINS + 1) of true positives, false positives, false negatives."""
    bins = bins_of(probability)
    counted = masks != IGNORE_INDEX
    histograms = torch.stack([
        torch.bincount(bins[counted & (masks == label)], minlength=BINS + 1) for label in (1, 0)
    ])  # fmt: skip
    # at threshold k all of bin k and above is predicted
    predicted = histograms.flip(1).cumsum(1).flip(1)
    tp, fp = predicted
    return torch.stack([tp, fp, histograms[0].sum() - tp])


def choose_threshold(probability: Tensor, masks: Tensor, fixed: float | None) -> tuple[float, float]:
    """Gives the threshold, the fixed one or that of the highest IoU, nearest to 0.5 where several are; and its IoU."""
    tp, fp, fn = threshold_counts(probability, masks).double().cpu()
    iou = tp / (tp + fp + fn).clamp(min=1)
    ks = [bin_of(fixed)] if fixed is not None else range(1, BINS)
    best = max(ks, key=lambda k: (iou[k].item(), -abs(k - BINS / 2)))
    return threshold_of(best), iou[best].item()


def predict(probability: Tensor, threshold: float) -> Tensor:
    """Makes labels (N, S, S) uint8 of probabilities, by the bins that the threshold was chosen on."""
    return (bins_of(probability) >= bin_of(threshold)).to(torch.uint8)


def metrics_of(prediction: Tensor, masks: Tensor) -> dict[str, float | None]:
    """Computes a split's metrics, over all its pixels and objects; None where there is nothing to divide by."""
    metrics = SegmentationMetrics(1, IGNORE_INDEX)
    for own, mask in zip(prediction.cpu(), masks.cpu(), strict=True):
        metrics.update(own, mask)
    found = metrics.compute()
    _, fp, tn, fn, _ = metrics.pixels.compute().double().tolist()
    background = tn / max(tn + fp + fn, 1)
    names = ("pixel_accuracy", "precision", "recall", "f1", "object_recall", "false_alarms_per_image")
    values = {"iou": found["iou"], "miou": (found["iou"] + background) / 2} | {name: found[name] for name in names}
    return {name: None if np.isnan(value) else value for name, value in values.items()}


def by_size(prediction: Tensor, masks: Tensor) -> list[dict[str, Any]]:
    """Counts objects (8-connected components) by area: how many are found, more than half of each, and their mean best IoU."""
    objects: list[tuple[int, bool, float]] = []
    for own, mask in zip(prediction.cpu().numpy(), masks.cpu().numpy(), strict=True):
        guess = (own == 1) & (mask != IGNORE_INDEX)
        truth, _ = ndimage.label(mask == 1, EIGHT_NEIGHBOURS)
        guesses, _ = ndimage.label(guess, EIGHT_NEIGHBOURS)
        areas = np.bincount(guesses.ravel())
        for i, window in enumerate(ndimage.find_objects(truth), 1):
            inside = truth[window] == i
            common = np.bincount(guesses[window][inside], minlength=len(areas))
            area, hits = int(inside.sum()), common[1:]
            overlaps = hits / (area + areas[1:] - hits)
            objects.append((area, 2 * int(hits.sum()) > area, float(overlaps.max(initial=0.0))))
    rows = []
    for low, high in zip(SIZES, (*SIZES[1:], None), strict=True):
        own = [o for o in objects if low <= o[0] and (high is None or o[0] < high)]
        iou = sum(o[2] for o in own) / len(own) if own else None
        rows.append({"from": low, "to": high, "objects": len(own), "found": sum(o[1] for o in own), "iou": iou})
    return rows


def image_scores(prediction: Tensor, split: Split) -> list[dict[str, Any]]:
    """Gives each image's key and IoU; 1 where neither mask nor prediction has foreground."""
    guess = prediction == 1
    truth, counted = split.masks == 1, split.masks != IGNORE_INDEX
    common = (guess & truth).sum((1, 2)).tolist()
    union = ((guess | truth) & counted).sum((1, 2)).tolist()
    return [{"key": key, "iou": c / u if u else 1.0} for key, c, u in zip(split.keys, common, union, strict=True)]


def panel(prediction: Tensor, split: Split, scores: list[dict[str, Any]]) -> dict[str, np.ndarray]:
    """Picks the best, median and worst image by IoU among those with objects, as the arrays of a cell's SEED.npz.

    The images themselves are left out: `with_pictures` puts them in.
    """
    full = (split.masks == 1).flatten(1).any(1).tolist()
    ranked = sorted((i for i in range(len(split)) if full[i]), key=lambda i: -scores[i]["iou"])
    chosen = dict(zip(PLACES, (ranked[0], ranked[len(ranked) // 2], ranked[-1]), strict=True))
    arrays = {"keys": np.array([split.keys[i] for i in chosen.values()])}
    for name, i in chosen.items():
        arrays[f"{name}_mask"] = (split.masks[i] == 1).to(torch.uint8).cpu().numpy()
        arrays[f"{name}_prediction"] = (prediction[i] * (split.masks[i] != IGNORE_INDEX)).cpu().numpy()
    return arrays


def with_pictures(panel: dict[str, np.ndarray], split: Split) -> dict[str, np.ndarray]:
    """Adds a panel's images, found by their keys in the test split."""
    numbers = [split.keys.index(key) for key in panel["keys"]]
    return panel | {f"{name}_image": picture(split.raw[i]) for name, i in zip(PLACES, numbers, strict=True)}


def picture(image_HWC: np.ndarray) -> np.ndarray:
    """Makes (H, W, 3) uint8 of an image: grey three times, of a cube three bands from red to blue, stretched."""
    if image_HWC.shape[2] <= 3 and image_HWC.dtype == np.uint8:
        return np.repeat(image_HWC, 3, 2) if image_HWC.shape[2] == 1 else image_HWC
    bands = image_HWC.shape[2]
    shown = image_HWC[..., [bands // 2, bands // 4, 0]].astype(np.float32)
    low, high = np.percentile(shown, (2, 98), axis=(0, 1))
    return (np.clip((shown - low) / np.maximum(high - low, 1e-6), 0, 1) * 255).astype(np.uint8)
