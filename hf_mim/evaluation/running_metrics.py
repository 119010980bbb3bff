"""Top-k accuracy and mean IoU as `evaluate.Metric`s, which add up batch by batch.

Make a metric by its class, not by `evaluate.load`: `MeanIoU(num_classes=11, ignore_index=255)`. It needs no network.
They stand apart from `metrics.py`, because the library `evaluate` takes long to import.
"""

from collections.abc import Sequence

import datasets
import evaluate
import numpy as np
import torch
from torch import Tensor

from hf_mim.evaluation.metrics import class_iou, confusion_matrix, mean_iou, top_k_accuracy


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
