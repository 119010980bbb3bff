"""Accuracy, mean IoU and DAVIS's J and F as functions; `running_metrics.py` has the first two as `evaluate.Metric`s.

`compute_metrics` can be given to `Trainer` as it is.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from scipy.spatial import cKDTree
from torch import Tensor

if TYPE_CHECKING:
    from transformers import EvalPrediction

BOUNDARY_TOLERANCE = 0.008  # of the image's diagonal; DAVIS's


def top_k_accuracy(logits, labels, ks: Sequence[int] = (1, 5)) -> dict[str, float]:
    """The share of rows of `logits [n, C]` whose label `[n]` is among the k largest: `{"top1_accuracy": …}` for each k.

    Among equal logits, the class with the lower id comes first, as in argmax. NaN is never right.

    Raises:
        ValueError: shapes do not fit, a label is no class, or a k is not in 1..C.
    """
    logits, labels = _tensor(logits), _tensor(labels)
    if logits.ndim != 2 or labels.shape != logits.shape[:1]:
        raise ValueError(f"logits must be [n, C] and labels [n], not {list(logits.shape)} and {list(labels.shape)}")
    num_classes = logits.shape[1]
    if not all(1 <= k <= num_classes for k in ks):
        raise ValueError(f"ks must be between 1 and the {num_classes} classes, not {tuple(ks)}")
    labels = labels.to(logits.device, torch.int64)
    _check_ids("labels", labels, num_classes)
    own = logits.gather(1, labels[:, None])
    later = torch.arange(num_classes, device=logits.device) > labels[:, None]
    beaten = ((logits < own) | ((logits == own) & later)).sum(dim=1)  # classes that the label beats; NaN beats none
    beaten = torch.where(own[:, 0].isnan(), -1, beaten)  # with k = C it is enough to beat none, but not for NaN
    return {f"top{k}_accuracy": (beaten >= num_classes - k).double().mean().item() for k in ks}


def confusion_matrix(predictions, targets, num_classes: int, ignore_index: int | None = None) -> Tensor:
    """The number of pixels of each (target, prediction) pair of classes: `[C, C]`, int64; rows are targets.

    Args:
        predictions, targets: class ids, both of the same shape.
        ignore_index: pixels with this target are left out, whatever their prediction.

    Raises:
        ValueError: the shapes differ, or an id is not in 0..num_classes-1.
    """
    predictions, targets = _tensor(predictions), _tensor(targets)
    if predictions.shape != targets.shape:
        raise ValueError(
            f"predictions and targets must have one shape, not {list(predictions.shape)} and {list(targets.shape)}"
        )
    targets = targets.to(predictions.device, torch.int64)
    kept = torch.ones_like(targets, dtype=torch.bool) if ignore_index is None else targets != ignore_index
    predictions, targets = predictions[kept].long(), targets[kept]
    _check_ids("predictions", predictions, num_classes)
    _check_ids("targets", targets, num_classes)
    return torch.bincount(targets * num_classes + predictions, minlength=num_classes**2).view(num_classes, num_classes)


def class_iou(confusion: Tensor) -> Tensor:
    """Intersection over union of each class `[C]`, from `confusion [C, C]`.

    It is NaN for a class that is neither predicted nor there, 0 for a class that is only predicted.
    """
    confusion = confusion.double()
    intersection = confusion.diagonal()
    return intersection / (confusion.sum(0) + confusion.sum(1) - intersection)


def mean_iou(confusion: Tensor) -> float:
    """The mean of `class_iou` over the classes that are predicted or there.

    Raises:
        ValueError: no pixel was counted.
    """
    if not confusion.any():
        raise ValueError("confusion holds no pixel: every target is ignore_index, or there are none")
    return class_iou(confusion).nanmean().item()


def region_similarity(mask, truth) -> float:
    """DAVIS's J (Perazzi et al., CVPR 2016, section 4.1): intersection over union of two masks `[H, W]`.

    1 when both are empty.
    """
    mask, truth = _mask_pair(mask, truth)
    union = np.count_nonzero(mask | truth)
    return np.count_nonzero(mask & truth) / union if union else 1.0


def boundary_f(mask, truth, bound: float = BOUNDARY_TOLERANCE) -> float:
    """DAVIS's F (Perazzi et al., CVPR 2016, section 4.1; Martin et al., PAMI 2004): agreement of two masks' boundaries.

    Precision is the share of the mask's boundary pixels that have a boundary pixel of the truth within the tolerance
    (they lie under the truth's boundary, dilated by a disk). Recall is the same with mask and truth exchanged. F is
    their harmonic mean.

    Args:
        mask, truth: `[H, W]`.
        bound: radius of the disk: below 1 as a share of the diagonal, rounded up to pixels; otherwise in pixels.

    Returns:
        In 0..1. If neither has a boundary 1, if only one has 0.
    """
    mask, truth = _mask_pair(mask, truth)
    radius = bound if bound >= 1 else np.ceil(bound * np.hypot(*mask.shape))
    ours, theirs = (np.argwhere(boundary_map(one)) for one in (mask, truth))
    if not len(ours) or not len(theirs):
        return float(len(ours) == len(theirs))
    precision = np.mean(cKDTree(theirs).query(ours)[0] <= radius)
    recall = np.mean(cKDTree(ours).query(theirs)[0] <= radius)
    return float(2 * precision * recall / (precision + recall)) if precision + recall else 0.0


def boundary_map(mask: np.ndarray) -> np.ndarray:
    """Pixels of a bool mask `[H, W]` that differ from their east, south or south-east neighbour: a line of one pixel.

    The last row and column are repeated outside the image, so the border of the image is no boundary.
    """
    padded = np.pad(mask, ((0, 1), (0, 1)), mode="edge")
    return (mask != padded[:-1, 1:]) | (mask != padded[1:, :-1]) | (mask != padded[1:, 1:])


def object_scores(prediction, truth, ids: Sequence[int], void: int | None = 255) -> np.ndarray:
    """(J, F) of each object id in one frame, `[len(ids), 2]`. Pixels where the truth is `void` do not count."""
    prediction, truth = np.asarray(prediction), np.asarray(truth)
    prediction = prediction if void is None else np.where(truth == void, 0, prediction)
    pairs = [(prediction == number, truth == number) for number in ids]
    return np.array([(region_similarity(*pair), boundary_f(*pair)) for pair in pairs])


def compute_metrics(eval_prediction: "EvalPrediction") -> dict[str, float]:
    """Top-1 accuracy of a classifier, and top-5 if it has more than five classes; for `Trainer(compute_metrics=…)`."""
    logits = eval_prediction.predictions
    logits = logits[0] if isinstance(logits, tuple) else logits  # hidden states may follow
    ks = [k for k in (1, 5) if k == 1 or k < logits.shape[-1]]
    return top_k_accuracy(logits, eval_prediction.label_ids, ks)


def _check_ids(name: str, ids: Tensor, num_classes: int):
    low, high = (int(bound) for bound in ids.aminmax()) if ids.numel() else (0, 0)
    if low < 0 or high >= num_classes:
        raise ValueError(f"{name} must be class ids in 0..{num_classes - 1}, not {low}..{high}")


def _mask_pair(mask, truth) -> tuple[np.ndarray, np.ndarray]:
    mask, truth = (_tensor(values).numpy(force=True).astype(bool) for values in (mask, truth))
    if mask.ndim != 2 or mask.shape != truth.shape:
        raise ValueError(f"mask and truth must be [H, W] of one size, not {list(mask.shape)} and {list(truth.shape)}")
    return mask, truth


def _tensor(values) -> Tensor:
    if isinstance(values, list | tuple) and values and isinstance(values[0], Tensor):
        return torch.stack(list(values))
    return values if isinstance(values, Tensor) else torch.from_numpy(np.array(values))
