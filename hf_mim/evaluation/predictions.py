"""What a protocol predicted for each image, beside its class: an interval, chance, the classes, the confusion."""

import csv
import math
import os
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from hf_mim.data.labelled import LabelledImages
from hf_mim.evaluation.metrics import confusion_matrix
from hf_mim.files import replacing
from hf_mim.scrub import scrubbed

Z = 1.959964  # a normal variable lies within so many standard deviations with probability .95


@dataclass
class Predictions:
    """The predicted classes of the test images of a result.

    predicted: `[n]`, or `[draws, n]` of several classifiers for the same images.
    labels: `[n]`. names: of the images. classes: names of the class ids.
    folds: `[n]`, the fold in which an image was tested. groups: `[n]`, the numbers of patients, scenes or the like.
    """

    predicted: Tensor
    labels: Tensor
    names: list[str]
    classes: list[str]
    folds: Tensor | None = None
    groups: Tensor | None = None

    @classmethod
    def of(cls, predicted: Tensor, images: LabelledImages, folds: Tensor | None = None) -> "Predictions":
        """Reads the test labels, so it comes last."""
        labels = images.read_labels()
        highest = max(int(labels.max()), int(predicted.max()))
        classes = images.class_names or [str(number) for number in range(highest + 1)]
        return cls(predicted, labels, names_of(images), classes, folds, images.read_groups())

    @property
    def hits(self) -> Tensor:
        """How often each image was classified right, `[n]` in 0..1, float64."""
        return (self.predicted.view(-1, len(self.labels)) == self.labels).double().mean(dim=0)

    @property
    def confusion(self) -> Tensor:
        """Images `[C, C]`, float64: rows are classes, columns what they were taken for. Several draws are averaged."""
        rows = self.predicted.view(-1, len(self.labels))
        counts = confusion_matrix(rows, self.labels.expand_as(rows), len(self.classes))
        return counts.double() / len(rows)

    def scores(self) -> dict[str, float]:
        """The 95 % interval of the accuracy, and the accuracy of always answering the commonest class."""
        low, high = interval(self.hits, self.groups)
        chance = self.labels.bincount().max().item() / len(self.labels)
        return {"95 % interval, low": low, "95 % interval, high": high, "chance: the commonest class": chance}

    def by_class(self) -> list[dict]:
        """A row for each class that has test images."""
        rows = []
        for number, counts in enumerate(self.confusion):
            if images := int((self.labels == number).sum()):
                wrong = counts.clone()
                wrong[number] = 0
                taken = self.classes[int(wrong.argmax())] if wrong.any() else ""
                accuracy = counts[number].item() / images
                rows.append({"class": self.classes[number], "images": images, "accuracy": accuracy, "taken for": taken})
        return rows

    def save(self, path: Path):
        """A row for each image: name, class, predicted class (the commonest of several), how often it was right."""
        commonest = self.predicted.view(-1, len(self.labels)).mode(dim=0).values.tolist()
        with replacing(path) as aside, aside.open("w", newline="") as file:
            lines = csv.writer(file)
            lines.writerow(["image", "class", "predicted", "right", *(["fold"] if self.folds is not None else [])])
            for row, (name, label, answer) in enumerate(zip(self.names, self.labels.tolist(), commonest, strict=True)):
                line = [scrubbed(name), self.classes[label], self.classes[answer], f"{self.hits[row].item():g}"]
                lines.writerow(line if self.folds is None else [*line, int(self.folds[row])])

    def save_confusion(self, path: Path):
        """The confusion as a table: a row for each class."""
        with replacing(path) as aside, aside.open("w", newline="") as file:
            lines = csv.writer(file)
            lines.writerow(["class", *self.classes])
            for name, row in zip(self.classes, self.confusion.tolist(), strict=True):
                lines.writerow([name, *(f"{count:g}" for count in row)])


def interval(hits: Tensor, groups: Tensor | None = None) -> tuple[float, float]:
    """The 95 % interval of a mean of hits `[n]` in 0..1: Wilson's (JASA 1927), which stays in [0, 1] for few images.

    With groups, images of one group are not independent, so that fewer images count: as many as would give the variance
    between the groups. It holds for these training images: others would move the accuracy more.
    """
    count, mean = len(hits), hits.mean().item()
    effective = count
    if groups is not None:
        _, units = groups.unique(return_inverse=True)
        number = int(units.max()) + 1
        sums = torch.zeros(number, dtype=torch.float64).index_add_(0, units, hits - mean)
        variance = sums.square().sum().item() / count**2 * number / max(1, number - 1)
        effective = min(count, mean * (1 - mean) / variance) if variance > 0 else number
    middle = (mean + Z**2 / (2 * effective)) / (1 + Z**2 / effective)
    half = Z / (1 + Z**2 / effective) * math.sqrt(mean * (1 - mean) / effective + Z**2 / (4 * effective**2))
    return max(0.0, middle - half), min(1.0, middle + half)


def names_of(images: LabelledImages) -> list[str]:
    """The names of images: the parts of their paths below the folder that all have in common."""
    names = [images.image_name(row) for row in range(len(images))]
    folders = [os.path.dirname(name) for name in names]
    common = os.path.commonpath(folders) if all(folders) and len({os.path.isabs(x) for x in folders}) == 1 else ""
    return [os.path.relpath(name, common) for name in names] if common else names
