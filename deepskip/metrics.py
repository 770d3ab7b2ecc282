"""Validation metrics: pixels by torchmetrics, objects by connected components."""

import numpy as np
import scipy.ndimage
import torch
from torch import Tensor

from deepskip.kernels import torchvision_ops
from deepskip.size_scores import EIGHT_NEIGHBOURS

# torchmetrics imports torchvision where it is installed, which fails beside a torch of another build
torchvision_ops.declare()

from torchmetrics import Metric  # noqa: E402
from torchmetrics.classification import BinaryStatScores, MulticlassStatScores  # noqa: E402

# probabilities above which validation would take pixels of a binary task for foreground
THRESHOLDS = tuple(step / 20 for step in range(1, 20))


class ObjectScores(Metric):
    """Counts objects found and false alarms by 8-connected components of each foreground class.

    An object of the target is found when more than half of its pixels are predicted as its class. A component of the
    prediction that touches no target pixel of its class is a false alarm. update: labels (H, W) of one image.
    compute: object_recall (share of objects; nan where there is none), false_alarms_per_image.
    """

    full_state_update = False

    def __init__(self) -> None:
        super().__init__()
        for name in ("objects", "found", "false_alarms", "images"):
            self.add_state(name, default=torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, prediction: Tensor, target: Tensor) -> None:
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
        return {
            "object_recall": self.found / self.objects,
            "false_alarms_per_image": self.false_alarms / self.images,
        }


class ThresholdScores(Metric):
    """Counts the pixels of a binary task by how many of THRESHOLDS their probability is above.

    update: logits and true labels (H, W) of one image; ignored pixels count nowhere. compute: best_threshold, whose IoU over
    all images is highest (of equals the nearest to 0.5), and iou_best_threshold, that IoU. Without foreground they are 0.5
    and nan.
    """

    full_state_update = False

    def __init__(self, ignore_index: int) -> None:
        super().__init__()
        self.ignore_index = ignore_index
        # by truth; the logit of 0.5 is 0, so that IoU at 0.5 is that of SegmentationMetrics
        self.add_state("counts", default=torch.zeros(2, len(THRESHOLDS) + 1, dtype=torch.int64), dist_reduce_fx="sum")
        self.register_buffer("edges", torch.tensor(THRESHOLDS, dtype=torch.float64).logit().float(), persistent=False)

    def update(self, logits: Tensor, target: Tensor) -> None:
        counted = target != self.ignore_index
        # how many edges lie below each logit
        places = torch.bucketize(logits[counted].float(), self.edges)
        places += (len(THRESHOLDS) + 1) * (target[counted] != 0)
        self.counts += torch.bincount(places, minlength=self.counts.numel()).view_as(self.counts)

    def compute(self) -> dict[str, Tensor]:
        counts = self.counts.cpu().double()
        foreground = counts[1].sum()
        # above each threshold
        fp, tp = counts.flip(1).cumsum(1).flip(1)[:, 1:]
        iou = tp / (foreground + fp) if foreground else torch.full_like(tp, torch.nan)
        thresholds = torch.tensor(THRESHOLDS, dtype=torch.float64)
        is_best = iou.isnan() | (iou == iou.max())
        best = torch.where(is_best, (thresholds - 0.5).abs(), torch.inf).argmin()
        return {"best_threshold": thresholds[best], "iou_best_threshold": iou[best]}


def confusion_counts(
    prediction_HW: np.ndarray, target_HW: np.ndarray, num_classes: int, ignore_index: int
) -> np.ndarray:
    """Counts pixels by true and predicted label: (V, V) int64, two labels for a binary task; ignored pixels count nowhere."""
    labels = max(2, num_classes)
    counted = target_HW != ignore_index
    pairs = target_HW[counted].astype(np.int64) * labels + prediction_HW[counted]
    return np.bincount(pairs, minlength=labels**2).reshape(labels, labels)


class SegmentationMetrics:
    """Accumulates the metrics of a validation split over all images and all ranks.

    num_classes: 1 for binary, else exclusive classes with background 0. device: where the counts are added up.
    IoU, Dice, precision, recall and F1 are of the foreground over the whole split; with several classes the mean over
    the foreground classes that occur in target or prediction. A ratio of nothing to nothing is nan.
    """

    def __init__(self, num_classes: int, ignore_index: int, device: torch.device | str = "cpu") -> None:
        self.num_classes, self.ignore_index = num_classes, ignore_index
        # its own look at what labels there are takes longer than all else; these are checked where they are read
        unchecked = {"validate_args": False}
        self.pixels: Metric = (
            BinaryStatScores(**unchecked)
            if num_classes == 1
            else MulticlassStatScores(num_classes, average="none", **unchecked)
        ).to(device)
        self.objects = ObjectScores().to(device)

    def update(self, prediction_HW: Tensor, target_HW: Tensor) -> None:
        """Adds one image: predicted and true labels (H, W); ignored pixels count nowhere."""
        counted = target_HW != self.ignore_index
        self.pixels.update(prediction_HW[counted].long(), target_HW[counted].long())
        self.objects.update(torch.where(counted, prediction_HW, 0), torch.where(counted, target_HW, 0))

    def compute(self) -> dict[str, float]:
        """Gives the metrics, added up over all ranks of the process group (so every rank must call)."""
        scores = self.pixels.compute().double().cpu().view(-1, 5)
        tp, fp, tn, fn, _ = scores.T
        if self.num_classes == 1:
            accuracy = (tp + tn) / (tp + fp + tn + fn)
        else:
            accuracy = tp.sum() / (tp + fn).sum()
            tp, fp, fn = tp[1:], fp[1:], fn[1:]
        dice = (2 * tp / (2 * tp + fp + fn)).nanmean().item()
        result = {
            "iou": (tp / (tp + fp + fn)).nanmean().item(),
            "dice": dice,
            "pixel_accuracy": accuracy.mean().item(),
            "precision": (tp / (tp + fp)).nanmean().item(),
            "recall": (tp / (tp + fn)).nanmean().item(),
            # of pixels, F1 and Dice are the same number
            "f1": dice,
        }
        return result | {name: value.item() for name, value in self.objects.compute().items()}
