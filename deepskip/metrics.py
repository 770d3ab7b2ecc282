"""Compute validation metrics: pixels with torchmetrics, objects by connected components."""

import numpy as np
import scipy.ndimage
import torch
from torch import Tensor

from deepskip import exact_sums
from deepskip.kernels import torchvision_ops
from deepskip.size_scores import EIGHT_NEIGHBOURS

# torchmetrics imports torchvision if it is installed, which fails with a torch of another build.
torchvision_ops.declare()

from torchmetrics import Metric  # noqa: E402
from torchmetrics.classification import BinaryStatScores, MulticlassStatScores  # noqa: E402

# A predicted component detects a target if their centroids are less than this many pixels apart.
CENTROID_DISTANCE = 3.0
# The probability thresholds that validation tries for the foreground of a binary task.
THRESHOLDS = tuple(step / 20 for step in range(1, 20))


class ObjectScores(Metric):
    """Count found objects and false alarms by 8-connected components of each foreground class.

    An object of the target is found when more than half of its pixels are predicted as its class. A component of the
    prediction that touches no target pixel of its class is a false alarm.
    """

    full_state_update = False

    def __init__(self) -> None:
        super().__init__()
        for name in ("objects", "found", "false_alarms", "images"):
            self.add_state(name, default=torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, prediction: Tensor, target: Tensor) -> None:
        """Add one image.

        Args:
            prediction: predicted labels (H, W).
            target: true labels (H, W).
        """
        predicted_HW, target_HW = prediction.cpu().numpy(), target.cpu().numpy()
        self.images += 1
        for label in np.union1d(np.unique(predicted_HW), np.unique(target_HW)):
            if label == 0:
                continue
            truth, guess = target_HW == label, predicted_HW == label
            objects, number = scipy.ndimage.label(truth, EIGHT_NEIGHBOURS)
            sizes = np.bincount(objects.ravel(), minlength=number + 1)[1:]
            hits = np.bincount(objects[guess], minlength=number + 1)[1:]
            self.objects += number
            self.found += int((2 * hits > sizes).sum())
            alarms, number = scipy.ndimage.label(guess, EIGHT_NEIGHBOURS)
            touched = np.unique(alarms[truth & guess])
            self.false_alarms += number - len(touched)

    def compute(self) -> dict[str, Tensor]:
        """Return "object_recall", the share of found objects, and "false_alarms_per_image", scalars.

        The recall is nan if there are no objects.
        """
        return {
            "object_recall": self.found / self.objects,
            "false_alarms_per_image": self.false_alarms / self.images,
        }


class TargetScores(Metric):
    """Count the metrics of infrared small-target detection: Pd, Fa and nIoU, for binary tasks.

    Targets and predictions are 8-connected components. Targets are taken in the order of their first pixels, row by
    row. Each takes the first predicted component, in the same order, that is free and whose centroid is less than
    CENTROID_DISTANCE pixels from its own (PD_FA of DNA-Net, Li et al. 2022, TIP). It need not overlap, nor be nearest.

    Fa counts the pixels of every component that no target took. PD_FA skips one whose area equals that of a matched
    component of the same image, so its Fa can be lower. nIoU is of Dai et al. 2021 (ACM, WACV): the mean of each
    image's IoU. An image without foreground in target and prediction is not counted; ACM counts it as 0.
    """

    full_state_update = False

    def __init__(self) -> None:
        super().__init__()
        for name in ("targets", "detected", "false_pixels", "pixels", "images"):
            self.add_state(name, default=torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")
        # The images' IoUs are added up as digits, so that the order of images and ranks does not matter.
        self.add_state("iou_digits", default=torch.zeros(exact_sums.LIMBS, dtype=torch.int64), dist_reduce_fx="sum")

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
        self.targets += len(targets)
        self.detected += int((~is_free).sum())
        self.false_pixels += int(areas[is_free].sum())
        self.pixels += counted.sum()
        if either := int((guess | truth).sum()):
            self.images += 1
            iou = torch.tensor(int((guess & truth).sum()) / either, dtype=torch.float64)
            self.iou_digits += exact_sums.digits(iou).to(self.iou_digits.device)

    def compute(self) -> dict[str, Tensor]:
        """Return "niou", "pd", the share of detected targets, and "fa", false pixels over all counted pixels; scalars.

        A ratio of 0 to 0 is nan.
        """
        return {
            "niou": torch.tensor(exact_sums.total(self.iou_digits[None])[0], dtype=torch.float64) / self.images.cpu(),
            "pd": self.detected.double() / self.targets,
            "fa": self.false_pixels.double() / self.pixels,
        }


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


class ThresholdScores(Metric):
    """Count the pixels of a binary task by the number of THRESHOLDS that their probability is above.

    Args:
        ignore_index: true label of pixels that are not counted.
    """

    full_state_update = False

    def __init__(self, ignore_index: int) -> None:
        super().__init__()
        self.ignore_index = ignore_index
        # By true label. The logit of 0.5 is 0, so that the IoU at 0.5 is that of SegmentationMetrics.
        self.add_state("counts", default=torch.zeros(2, len(THRESHOLDS) + 1, dtype=torch.int64), dist_reduce_fx="sum")
        self.register_buffer("edges", torch.tensor(THRESHOLDS, dtype=torch.float64).logit().float(), persistent=False)

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


def confusion_counts(
    prediction_HW: np.ndarray, target_HW: np.ndarray, num_classes: int, ignore_index: int
) -> np.ndarray:
    """Count pixels by true and predicted label.

    Args:
        prediction_HW: predicted labels (H, W).
        target_HW: true labels (H, W).
        num_classes: 1 for binary, else exclusive classes with background 0.
        ignore_index: true label of pixels that are not counted.

    Returns:
        Counts (V, V) int64, by true and then by predicted label; V is 2 for a binary task.
    """
    labels = max(2, num_classes)
    counted = target_HW != ignore_index
    pairs = target_HW[counted].astype(np.int64) * labels + prediction_HW[counted]
    return np.bincount(pairs, minlength=labels**2).reshape(labels, labels)


class SegmentationMetrics:
    """Accumulate the metrics of a validation split over all images and all ranks.

    IoU, Dice, precision, recall and F1 are of the foreground over the whole split. With several classes they are the
    mean over the foreground classes that occur in target or prediction, where precision or recall of 0 to 0 is 0. Other
    ratios of 0 to 0 are nan.

    Args:
        num_classes: 1 for binary, else exclusive classes with background 0.
        ignore_index: true label of pixels that are not counted.
        device: where the counts are summed.
    """

    def __init__(self, num_classes: int, ignore_index: int, device: torch.device | str = "cpu") -> None:
        self.num_classes, self.ignore_index = num_classes, ignore_index
        # Torchmetrics' check of the labels takes longer than all else. They are checked where they are read.
        unchecked = {"validate_args": False}
        self.pixels: Metric = (
            BinaryStatScores(**unchecked)
            if num_classes == 1
            else MulticlassStatScores(num_classes, average="none", **unchecked)
        ).to(device)
        self.objects = ObjectScores().to(device)
        self.targets = TargetScores().to(device) if num_classes == 1 else None

    def update(self, prediction_HW: Tensor, target_HW: Tensor) -> None:
        """Add one image.

        Args:
            prediction_HW: predicted labels (H, W).
            target_HW: true labels (H, W); ignored pixels are not counted.
        """
        counted = target_HW != self.ignore_index
        # Torchmetrics does not take an image without pixels.
        if counted.any():
            self.pixels.update(prediction_HW[counted].long(), target_HW[counted].long())
        prediction_HW, target_HW = (torch.where(counted, labels, 0) for labels in (prediction_HW, target_HW))
        self.objects.update(prediction_HW, target_HW)
        if self.targets is not None:
            self.targets.update(prediction_HW != 0, target_HW != 0, counted)

    def compute(self) -> dict[str, float]:
        """Return the metrics, summed over all ranks of the process group; every rank must call this method.

        Returns:
            "iou", "dice", "pixel_accuracy", "precision", "recall", "f1", "object_recall" and "false_alarms_per_image".
            For a binary task also "niou", "pd" and "fa", see `TargetScores`.
        """
        scores = self.pixels.compute().double().cpu().view(-1, 5)
        tp, fp, tn, fn, _ = scores.T
        if self.num_classes == 1:
            accuracy = (tp + tn) / (tp + fp + tn + fn)
        else:
            accuracy = tp.sum() / (tp + fn).sum()
            tp, fp, fn = tp[1:], fp[1:], fn[1:]
        precision, recall = tp / (tp + fp), tp / (tp + fn)
        if self.num_classes > 1:
            # A class that is never predicted, or that is nowhere in the target, counts as 0; without it the mean is higher.
            occurs = tp + fp + fn > 0
            precision, recall = (torch.where(occurs, ratio.nan_to_num(0), ratio) for ratio in (precision, recall))
        dice = (2 * tp / (2 * tp + fp + fn)).nanmean().item()
        result = {
            "iou": (tp / (tp + fp + fn)).nanmean().item(),
            "dice": dice,
            "pixel_accuracy": accuracy.mean().item(),
            "precision": precision.nanmean().item(),
            "recall": recall.nanmean().item(),
            # For pixels, F1 and Dice are the same number.
            "f1": dice,
        }
        for metric in filter(None, (self.objects, self.targets)):
            result |= {name: value.item() for name, value in metric.compute().items()}
        return result
