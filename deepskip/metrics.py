"""Compute validation metrics from counts: of pixels, and of objects, which are connected components.

All counts are int64, so that results depend neither on the order of images nor on the number of ranks.
"""

import numpy as np
import scipy.ndimage
import torch
from torch import Tensor

from deepskip import exact_sums
from deepskip.size_scores import EIGHT_NEIGHBOURS

# A predicted component detects a target if their centroids are less than this many pixels apart.
CENTROID_DISTANCE = 3.0
# The probability thresholds that validation tries for the foreground of a binary task.
THRESHOLDS = tuple(step / 20 for step in range(1, 20))


class ObjectScores:
    """Count found objects and false alarms by 8-connected components of each foreground class.

    An object of the target is found when more than half of its pixels are predicted as its class. A component of the
    prediction that touches no target pixel of its class is a false alarm.

    Attributes:
        counts: objects, found objects, false alarms and images, (4,) int64.
    """

    def __init__(self) -> None:
        self.counts = torch.zeros(4, dtype=torch.int64)

    def update(self, prediction: Tensor, target: Tensor) -> None:
        """Add one image.

        Args:
            prediction: predicted labels (H, W).
            target: true labels (H, W).
        """
        predicted_HW, target_HW = prediction.cpu().numpy(), target.cpu().numpy()
        row = np.array([0, 0, 0, 1])
        for label in np.union1d(np.unique(predicted_HW), np.unique(target_HW)):
            if label == 0:
                continue
            truth, guess = target_HW == label, predicted_HW == label
            objects, number = scipy.ndimage.label(truth, EIGHT_NEIGHBOURS)
            sizes = np.bincount(objects.ravel(), minlength=number + 1)[1:]
            hits = np.bincount(objects[guess], minlength=number + 1)[1:]
            alarms, alarm_number = scipy.ndimage.label(guess, EIGHT_NEIGHBOURS)
            touched = np.unique(alarms[truth & guess])
            row[:3] += number, (2 * hits > sizes).sum(), alarm_number - len(touched)
        self.counts += torch.from_numpy(row)

    def compute(self) -> dict[str, Tensor]:
        """Return "object_recall", the share of found objects, and "false_alarms_per_image", scalars.

        The recall is nan if there are no objects.
        """
        objects, found, false_alarms, images = self.counts.double()
        return {"object_recall": found / objects, "false_alarms_per_image": false_alarms / images}


class TargetScores:
    """Count the metrics of infrared small-target detection: Pd, Fa and nIoU, for binary tasks.

    Targets and predictions are 8-connected components. Targets are taken in the order of their first pixels, row by
    row. Each takes the first predicted component, in the same order, that is free and whose centroid is less than
    CENTROID_DISTANCE pixels from its own (PD_FA of DNA-Net, Li et al. 2022, TIP). It need not overlap, nor be nearest.

    Fa counts the pixels of every component that no target took. PD_FA skips one whose area equals that of a matched
    component of the same image, so its Fa can be lower. nIoU is of Dai et al. 2021 (ACM, WACV): the mean of each
    image's IoU. An image without foreground in target and prediction is not counted; ACM counts it as 0.

    Attributes:
        counts: targets, detected targets, false pixels, counted pixels, images with an IoU, and the LIMBS digits of the
            sum of their IoUs, (5 + LIMBS,) int64.
    """

    def __init__(self) -> None:
        self.counts = torch.zeros(5 + exact_sums.LIMBS, dtype=torch.int64)

    def update(self, prediction: Tensor, target: Tensor, counted: Tensor) -> None:
        """Add one image.

        Args:
            prediction: whether a pixel is predicted as foreground, (H, W) bool; false where it is not counted.
            target: whether a pixel is foreground, (H, W) bool; false where it is not counted.
            counted: whether a pixel is counted, (H, W) bool.
        """
        guess, truth = prediction.cpu().numpy(), target.cpu().numpy()
        (_, targets), (areas, guesses) = centroids(truth), centroids(guess)
        is_free = np.ones(len(guesses), bool)
        for place in targets:
            near = is_free & (np.linalg.norm(guesses - place, axis=1) < CENTROID_DISTANCE)
            if near.any():
                is_free[near.argmax()] = False
        detected, false_pixels = int((~is_free).sum()), int(areas[is_free].sum())
        either = int((guess | truth).sum())
        row = torch.tensor([len(targets), detected, false_pixels, int(counted.sum()), int(either > 0)])
        iou = torch.tensor(int((guess & truth).sum()) / max(either, 1), dtype=torch.float64)
        self.counts += torch.cat([row, exact_sums.digits(iou)])

    def compute(self) -> dict[str, Tensor]:
        """Return "niou", "pd", the share of detected targets, and "fa", false pixels over all counted pixels; scalars.

        A ratio of 0 to 0 is nan.
        """
        targets, detected, false_pixels, pixels, images = self.counts[:5].double()
        ious = torch.tensor(exact_sums.total(self.counts[None, 5:])[0], dtype=torch.float64)
        return {"niou": ious / images, "pd": detected / targets, "fa": false_pixels / pixels}


def centroids(foreground_HW: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the areas (K,) int64 and centroids (K, 2), row and column, of K 8-connected components.

    They are in the order of their first pixels, row by row.

    Args:
        foreground_HW: whether a pixel is foreground, (H, W) bool.
    """
    labels, number = scipy.ndimage.label(foreground_HW, EIGHT_NEIGHBOURS)
    rows, columns = np.nonzero(labels)
    found = labels[rows, columns] - 1
    areas = np.bincount(found, minlength=number)
    sums = [np.bincount(found, weights=places, minlength=number) for places in (rows, columns)]
    return areas, np.stack(sums, axis=1) / areas[:, None]


class ThresholdScores:
    """Count the pixels of a binary task by the number of THRESHOLDS that their probability is above.

    Args:
        ignore_index: true label of pixels that are not counted.
        device: where the pixels are.

    Attributes:
        counts: by true label and number of thresholds, (2, T + 1) int64.
    """

    def __init__(self, ignore_index: int, device: torch.device | str = "cpu") -> None:
        self.ignore_index = ignore_index
        self.counts = torch.zeros(2, len(THRESHOLDS) + 1, dtype=torch.int64, device=device)
        # The logit of 0.5 is 0, so that the IoU at 0.5 is that of SegmentationMetrics.
        self.edges = torch.tensor(THRESHOLDS, dtype=torch.float64).logit().float().to(device)

    def update(self, logits: Tensor, target: Tensor) -> None:
        """Add one image.

        Args:
            logits: logits of foreground, (H, W).
            target: true labels (H, W); ignored pixels are not counted.
        """
        counted = target != self.ignore_index
        # The number of edges below each logit.
        places = torch.bucketize(logits[counted].float(), self.edges)
        places += (len(THRESHOLDS) + 1) * (target[counted] != 0)
        self.counts += torch.bincount(places, minlength=self.counts.numel()).view_as(self.counts)

    def compute(self) -> dict[str, Tensor]:
        """Return "best_threshold", whose IoU over all images is highest, and "iou_best_threshold", that IoU; scalars.

        Of equal thresholds the nearest to 0.5 is returned. Without foreground they are 0.5 and nan.
        """
        counts = self.counts.cpu().double()
        foreground = counts[1].sum()
        # Pixels above each threshold.
        fp, tp = counts.flip(1).cumsum(1).flip(1)[:, 1:]
        iou = tp / (foreground + fp) if foreground else torch.full_like(tp, torch.nan)
        thresholds = torch.tensor(THRESHOLDS, dtype=torch.float64)
        is_best = iou.isnan() | (iou == iou.max())
        best = torch.where(is_best, (thresholds - 0.5).abs(), torch.inf).argmin()
        return {"best_threshold": thresholds[best], "iou_best_threshold": iou[best]}


class SegmentationMetrics:
    """Accumulate the metrics of a validation split over all images.

    IoU, Dice, precision, recall and F1 are of the foreground over the whole split. With several classes they are the
    mean over the foreground classes that occur in target or prediction, where precision or recall of 0 to 0 is 0. Other
    ratios of 0 to 0 are nan.

    Args:
        num_classes: 1 for binary, else exclusive classes with background 0.
        ignore_index: true label of pixels that are not counted.
        device: where the pixels are.

    Attributes:
        confusion: pixels by true and then by predicted label, (V, V) int64; V is 2 for a binary task.
        objects: scores of objects.
        targets: scores of small targets; None with several classes.
    """

    def __init__(self, num_classes: int, ignore_index: int, device: torch.device | str = "cpu") -> None:
        self.num_classes, self.ignore_index = num_classes, ignore_index
        labels = max(2, num_classes)
        self.confusion = torch.zeros(labels, labels, dtype=torch.int64, device=device)
        self.objects = ObjectScores()
        self.targets = TargetScores() if num_classes == 1 else None

    def counts(self) -> list[Tensor]:
        """Return all counts; the metrics over several ranks are those of their sums, which are written into these."""
        return [self.confusion, self.objects.counts, *([self.targets.counts] if self.targets else [])]

    def update(self, prediction_HW: Tensor, target_HW: Tensor) -> None:
        """Add one image.

        Args:
            prediction_HW: predicted labels (H, W).
            target_HW: true labels (H, W); ignored pixels are not counted.
        """
        counted = target_HW != self.ignore_index
        pairs = target_HW[counted].long() * len(self.confusion) + prediction_HW[counted]
        self.confusion += torch.bincount(pairs, minlength=self.confusion.numel()).view_as(self.confusion)
        prediction_HW, target_HW = (torch.where(counted, labels, 0) for labels in (prediction_HW, target_HW))
        self.objects.update(prediction_HW, target_HW)
        if self.targets is not None:
            self.targets.update(prediction_HW != 0, target_HW != 0, counted)

    def compute(self) -> dict[str, float]:
        """Return the metrics.

        Returns:
            "iou", "dice", "pixel_accuracy", "precision", "recall", "f1", "object_recall" and "false_alarms_per_image".
            For a binary task also "niou", "pd" and "fa", see `TargetScores`.
        """
        counts = self.confusion.double().cpu()
        right = counts.diag()
        tp, fp, fn = right[1:], (counts.sum(0) - right)[1:], (counts.sum(1) - right)[1:]
        precision, recall = tp / (tp + fp), tp / (tp + fn)
        if self.num_classes > 1:
            # A class that is never predicted, or that is nowhere in the target, counts as 0; without it the mean is higher.
            occurs = tp + fp + fn > 0
            precision, recall = (torch.where(occurs, ratio.nan_to_num(0), ratio) for ratio in (precision, recall))
        dice = (2 * tp / (2 * tp + fp + fn)).nanmean().item()
        result = {
            "iou": (tp / (tp + fp + fn)).nanmean().item(),
            "dice": dice,
            "pixel_accuracy": (right.sum() / counts.sum()).item(),
            "precision": precision.nanmean().item(),
            "recall": recall.nanmean().item(),
            # For pixels, F1 and Dice are the same number.
            "f1": dice,
        }
        scores = self.objects.compute() | (self.targets.compute() if self.targets else {})
        return result | {name: value.item() for name, value in scores.items()}
