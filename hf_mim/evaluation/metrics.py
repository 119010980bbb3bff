"""Accuracy, mean IoU and DAVIS's J and F as functions; accuracy and mean IoU also as `evaluate.Metric`s.

Make a metric by its class, not by `evaluate.load`: `MeanIoU(num_classes=11, ignore_index=255)`. It needs no network.
`compute_metrics` can be given to `Trainer` as it is.
"""

from collections.abc import Sequence

import datasets
import evaluate
import numpy as np
import torch
from scipy.spatial import cKDTree
from torch import Tensor
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


class _RunningMetric(evaluate.Metric):
    """An `evaluate.Metric` that adds up batch by batch.

    The library itself writes each prediction to a file in the user's cache, and reads all of them back as Python
    numbers. For logits and masks this takes minutes and gigabytes. Here only sums are kept, no file or folder is made,
    and instances are independent. A subclass adds `_info`, `_reset`, `_update` and `_result`.
    """

    def __init__(self):
        super().__init__(keep_in_memory=True)
        self._start()

    def _build_data_dir(self) -> str:
        return ""  # the library would make a folder here

    def _start(self):
        self._count = 0
        self._reset()

    def __len__(self) -> int:
        return self._count

    def add(self, *, prediction=None, reference=None):
        """Add one prediction and its reference."""
        self.add_batch(predictions=[prediction], references=[reference])

    def add_batch(self, *, predictions=None, references=None):
        """Add a batch of predictions and references."""
        if predictions is None or references is None or len(predictions) != len(references):
            lengths = [0 if batch is None else len(batch) for batch in (predictions, references)]
            raise ValueError(f"predictions and references must be as many, not {lengths[0]} and {lengths[1]}")
        if len(references):
            self._update(predictions, references)
            self._count += len(references)

    def compute(self, *, predictions=None, references=None) -> dict:
        """The metric over all that was added and the batch given here. Then it starts again from nothing."""
        if predictions is not None or references is not None:
            self.add_batch(predictions=predictions, references=references)
        if not self._count:
            raise ValueError(f"{self.name} has nothing to compute: add predictions and references first")
        result = self._result()
        self._start()
        return result


class TopKAccuracy(_RunningMetric):
    """Top-k accuracies: `top_k_accuracy` over all batches together."""

    def __init__(self, ks: Sequence[int] = (1, 5)):
        self.ks = tuple(ks)
        super().__init__()

    def _info(self):
        return evaluate.MetricInfo(
            description="The share of samples whose class is among the k that score highest.",
            citation="",
            inputs_description="Scores [n, classes] and class ids [n]. Returns top1_accuracy and so on, in 0..1.",
            features=datasets.Features(
                predictions=datasets.Sequence(datasets.Value("float32")), references=datasets.Value("int64")
            ),
        )

    def _reset(self):
        self._hits = dict.fromkeys((f"top{k}_accuracy" for k in self.ks), 0.0)

    def _update(self, predictions, references):
        for name, share in top_k_accuracy(predictions, references, self.ks).items():
            self._hits[name] += share * len(references)

    def _result(self) -> dict[str, float]:
        return {name: hits / self._count for name, hits in self._hits.items()}


class MeanIoU(_RunningMetric):
    """Mean IoU over the classes of all pixels of all batches: `mean_iou`, pixel accuracy and `class_iou`."""

    def __init__(self, num_classes: int, ignore_index: int | None = None):
        self.num_classes, self.ignore_index = num_classes, ignore_index
        super().__init__()

    def _info(self):
        maps = datasets.Sequence(datasets.Sequence(datasets.Value("int64")))
        return evaluate.MetricInfo(
            description="Intersection over union of the pixels of each class, averaged over the classes that occur.",
            citation="Everingham et al., The PASCAL Visual Object Classes challenge, IJCV 2010, section 4.4",
            inputs_description="Class ids [n, h, w], or lists of n maps [h, w] whose sizes may differ. Returns "
            "mean_iou, pixel_accuracy and class_iou: NaN for a class that is neither predicted nor there.",
            features=datasets.Features(predictions=maps, references=maps),
        )

    def _reset(self):
        self._confusion = torch.zeros(self.num_classes, self.num_classes, dtype=torch.int64)

    def _update(self, predictions, references):
        whole = all(isinstance(batch, Tensor | np.ndarray) for batch in (predictions, references))
        pairs = [(predictions, references)] if whole else zip(predictions, references, strict=True)
        counts = [confusion_matrix(*pair, self.num_classes, self.ignore_index) for pair in pairs]
        self._confusion += sum(counts).cpu()

    def _result(self) -> dict:
        return {
            "mean_iou": mean_iou(self._confusion),
            "pixel_accuracy": (self._confusion.trace() / self._confusion.sum()).item(),
            "class_iou": class_iou(self._confusion).tolist(),
        }


def compute_metrics(eval_prediction: EvalPrediction) -> dict[str, float]:
    """Top-1 accuracy of a classifier, and top-5 if it has more than five classes; for `Trainer(compute_metrics=…)`."""
    logits = eval_prediction.predictions
    logits = logits[0] if isinstance(logits, tuple) else logits  # hidden states may follow
    ks = [k for k in (1, 5) if k == 1 or k < logits.shape[-1]]
    return TopKAccuracy(ks).compute(predictions=logits, references=eval_prediction.label_ids)


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
