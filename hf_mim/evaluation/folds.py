"""Cross-validation, for small labelled sets: every image is tested once, by a classifier that has not seen it."""

import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from hf_mim.data.labelled import LabelledImages
from hf_mim.data.splits import check_labels, generator
from hf_mim.evaluation.features import FeatureExtractor
from hf_mim.evaluation.result import Result

LEAVE_ONE_OUT = "leave_one_out"
MOST_FOLDS = 200  # images, or groups, that may be left out one by one


def fold_numbers(labels: Tensor, folds: int | str, groups: Tensor | None = None, seed: int = 0) -> Tensor:
    """The fold of each image `[n]`, from 0. Folds have equally many images of each class; a group is in one fold.

    Raises:
        ValueError: there are not enough images or groups of a class, or too many to be left out one by one.
    """
    units = torch.arange(len(labels)) if groups is None else groups.unique(return_inverse=True)[1]
    what, number = ("images" if groups is None else "groups"), int(units.max()) + 1
    if folds == LEAVE_ONE_OUT:
        if number > MOST_FOLDS:
            raise ValueError(f"folds leave_one_out is for {MOST_FOLDS} {what} at most, not {number:,}; give folds 5")
        found = units
    elif not 2 <= folds <= number:
        raise ValueError(f"folds must be between 2 and the {number} {what}, or leave_one_out, not {folds}")
    elif groups is None:
        order = torch.randperm(len(labels), generator=generator(seed, 2))
        order = order[labels[order].argsort(stable=True)]
        found = torch.empty_like(labels)
        found[order] = torch.arange(len(labels)) % folds
    else:
        from sklearn.model_selection import StratifiedGroupKFold  # slow to import, so only when asked for

        found = torch.empty_like(labels)
        parts = StratifiedGroupKFold(folds, shuffle=True, random_state=seed).split(labels, labels, groups)
        for fold, (_, held) in enumerate(parts):
            found[torch.from_numpy(held)] = fold
    for fold in found.unique():
        missing = set(labels[found == fold].tolist()) - set(labels[found != fold].tolist())
        if missing:
            raise ValueError(
                f"folds {folds} leave no other {what} of class {min(missing)} to learn from; each class needs two, and "
                "more where they are in few groups"
            )
    return found


class Kept:
    """Takes the place of a `FeatureExtractor`: the features of all images are there, and parts of them are given."""

    progress = False

    def __init__(self, extract: FeatureExtractor, images: LabelledImages, specs: Sequence):
        self.encoder, self.crop, self.num_workers = extract.encoder, extract.crop, extract.num_workers
        self.features = {str(x): y for x, y in zip(specs, extract(images, specs), strict=True)}

    def __call__(self, part: Any, specs: Sequence) -> list[Tensor]:
        return [self.features[str(spec)][part.rows] for spec in specs]


@dataclass
class CrossValidation:
    """A protocol on one labelled set, in folds. Its result has the mean over all images."""

    protocol: Any
    folds: int | str

    def run(self, extract: FeatureExtractor, images: LabelledImages) -> Result:
        labels = images.read_labels()
        check_labels(labels)
        fold_numbers(labels, self.folds, images.read_groups())  # raises before the work
        kept = Kept(extract, images, self._specs(extract.encoder))  # leaves out what cannot be decoded
        labels = images.read_labels()
        numbers = fold_numbers(labels, self.folds, images.read_groups())
        results, predicted = [], None
        for fold in numbers.unique().tolist():
            result = self.protocol.run(kept, *(_part(images, numbers != fold), _part(images, numbers == fold)))
            if predicted is None:
                predicted = result.predicted.new_empty(*result.predicted.shape[:-1], len(labels))
            predicted[..., numbers == fold] = result.predicted
            results.append(result)
        return self._result(results, predicted, numbers, labels, images)

    def _specs(self, encoder) -> list[str]:
        from hf_mim.evaluation.linear import default_features

        features = self.protocol.features
        return [features] if isinstance(features, str) else features or default_features(encoder)

    def _result(self, results: list[Result], predicted: Tensor, numbers: Tensor, labels: Tensor, images) -> Result:
        counts = numbers.bincount().tolist()
        names = [x for x in results[0].scores if all(x in result.scores for result in results) and "deviation" not in x]
        weighted = {
            name: sum(n * result.scores[name] for n, result in zip(counts, results, strict=True)) / len(labels)
            for name in names
        }
        values = [result.value for result in results]
        table = []
        if self.folds != LEAVE_ONE_OUT:
            weighted["standard deviation over folds"] = statistics.stdev(values)
            table = [{"fold": k, "images": counts[k], "accuracy": value} for k, value in enumerate(values)]
        accuracy = (predicted.view(-1, len(labels)) == labels).double().mean().item()
        settings = results[0].settings | asdict(self.protocol) | {"cross_validation": self.folds}
        result = Result(self.protocol.name, results[0].metric, accuracy, settings, images.describe(), weighted, table)
        others = "all others" if self.folds == LEAVE_ONE_OUT else "the other folds"
        result.notes.append(f"Each image was tested once, by a classifier that learned from {others}.")
        result.predicted, result.fold_numbers = predicted, numbers
        return result


def _part(images: LabelledImages, chosen: Tensor) -> LabelledImages:
    part: Any = images.select(rows := chosen.nonzero()[:, 0])
    part.rows = rows
    return part
