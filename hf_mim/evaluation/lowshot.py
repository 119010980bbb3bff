"""Low-shot classification: logistic regression on frozen features of a few labelled images (I-JEPA, arXiv 2301.08243).

With few labels, the choice of images matters as much as the features. So every number is a mean over several draws,
with its standard deviation.
"""

import re
import statistics
import warnings
from dataclasses import asdict, dataclass, field
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from hf_mim.checks import least, numbers
from hf_mim.data.labelled import LabelledImages
from hf_mim.data.splits import check_labels, random_ranks
from hf_mim.evaluation.features import FeatureExtractor
from hf_mim.evaluation.probe_training import parse_features, standardiser
from hf_mim.evaluation.result import Result
from hf_mim.progress import progress_bar

MAX_ITERATIONS = 2000
FOLDS = 3  # of the cross-validation, at most


def parse_budget(budget: str, argument: str = "budgets") -> tuple[float | None, int | None]:
    """("1%" → 1.0, None), ("5" → None, 5). Raises ValueError, which names the argument, for anything else."""
    match = re.fullmatch(r"(\d+\.?\d*|\.\d+)%|(\d+)", budget.strip())
    if match and match[1] and 0 < float(match[1]) <= 100:
        return float(match[1]), None
    if match and match[2] and int(match[2]) > 0:
        return None, int(match[2])
    raise ValueError(f"{argument} must be percentages such as 1% or images per class such as 5, not {budget}")


def draw_images(labels: Tensor, budget: str, seed: int, draw: int = 0, argument: str = "budgets") -> Tensor:
    """Ids of a seeded draw: the same number of images of each class, and at least one for a percentage.

    If a percentage asks for more images than a small class has, all of them are drawn. Within one draw, a larger budget
    includes the images of a smaller one, so that budgets can be compared.

    Raises:
        ValueError: no such budget, or a class is smaller than the number.
    """
    percent, count = parse_budget(budget, argument)
    ranks, sizes = random_ranks(labels, seed, draw)
    if percent is not None:
        count = max(1, round(len(labels) * percent / 100 / len(labels.unique())))
    elif count > sizes.min():
        label, size = int(labels[sizes.argmin()]), int(sizes.min())
        raise ValueError(f"{argument} {budget} asks for {count} images of each class, and class {label} has {size}")
    return (ranks < count).nonzero()[:, 0]


def fit_logistic(features: Tensor, labels: Tensor, c: list[float], seed: int = 0, groups: Tensor | None = None):
    """L2-regularised logistic regression on `[n, D]` and `[n]`. Cross-validation chooses among several C.

    With groups `[n]`, a group is in one fold.

    C is scikit-learn's: it multiplies the loss summed over the images, to which `|w|² / 2` is added. If a class has a
    single image or group, nothing can be held out, and the middle C is taken. If several C are equally good, it is the
    smallest.
    """
    from sklearn.exceptions import ConvergenceWarning  # slow to import, so only when asked for
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import GridSearchCV, StratifiedGroupKFold, StratifiedKFold

    x, y, c = features.double().numpy(), labels.numpy(), sorted(c)
    # Among the pairs of a class and a group, or among the images, each class must be there as often as there are folds.
    units = labels if groups is None else torch.stack([labels, groups]).unique(dim=1)[0]
    folds = min(FOLDS, int(units.bincount()[units].min()))
    model = LogisticRegression(C=c[len(c) // 2], max_iter=MAX_ITERATIONS)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # the caller reads n_iter_
        if len(c) == 1 or folds == 1:
            return model.fit(x, y)
        kind = StratifiedKFold if groups is None else StratifiedGroupKFold
        parts = list(kind(folds, shuffle=True, random_state=seed).split(x, y, groups))
        if any(len(np.unique(y[kept])) < 2 for kept, _ in parts):
            return model.fit(x, y)
        return GridSearchCV(model, {"C": c}, cv=parts).fit(x, y).best_estimator_


@dataclass
class LowShot:
    """Top-1 accuracy of logistic regression on 1 %, 10 %, or k images per class; the value is that of the first budget.

    Each budget is drawn several times, balanced and seeded; the scores are mean and sample standard deviation over the
    draws. The features are standardised by the statistics of all training images, which needs no labels. They are
    divided by √D, so that one C means the same for any width. Only the drawn images choose C, by cross-validation, with
    each group in one fold.

    Sources: MSN (arXiv 2204.07141) and I-JEPA (arXiv 2301.08243, section 5), which report 1 % of ImageNet.

    Args:
        budgets: percentages such as 1%, or numbers of images per class such as 5
        features: layer/pooling/norm; mean or cls
        draws: of each budget
        c: C of the logistic regression; cross-validation chooses among several
        seed: for the draws
    """

    name: ClassVar[str] = "lowshot"
    needs: ClassVar[str] = "labels"

    budgets: list[str] = field(default_factory=lambda: ["1%", "10%", "5"])
    features: str = "last/mean/norm"
    draws: int = 5
    c: list[float] = field(default_factory=lambda: [0.1, 1.0, 10.0, 100.0, 1000.0])
    seed: int = 0

    def __post_init__(self):
        parse_features(self.features, self.name)
        if not self.budgets:
            raise ValueError("budgets must name at least one, such as 1%")
        self.budgets = list(dict.fromkeys(budget.strip() for budget in self.budgets))
        for budget in self.budgets:
            parse_budget(budget)
        least(1, draws=self.draws)
        least(0, seed=self.seed)
        numbers(c=self.c)

    def run(self, extract: FeatureExtractor, train: LabelledImages, test: LabelledImages) -> Result:
        labels = train.read_labels()
        check_labels(labels)
        for budget in self.budgets:
            draw_images(labels, budget, self.seed)
        spec = parse_features(self.features, self.name)
        (features,), labels = extract(train, [spec]), train.read_labels()  # extract has left out what it cannot decode
        groups = train.read_groups()
        standardise = standardiser(features, str(spec))
        (test_features,) = extract(test, [spec])
        test_features = standardise(test_features).numpy()
        rows, predictions, budgets = [], [], self._told_apart(labels)
        drawn = [(budget, draw) for budget in budgets for draw in range(self.draws)]
        with progress_bar(extract.progress, "draws", len(drawn), steps=drawn) as bar:
            for budget, draw in bar:
                ids = draw_images(labels, budget, self.seed, draw)
                of_drawn = None if groups is None else groups[ids]
                model = fit_logistic(standardise(features[ids]), labels[ids], self.c, self.seed, of_drawn)
                predictions.append(torch.from_numpy(model.predict(test_features)))
                converged = int(model.n_iter_.max()) < MAX_ITERATIONS
                row = {"budget": budgets[budget], "draw": draw, "images": len(ids)}
                rows.append(row | {"C": model.C, "converged": converged})
        test_labels = test.read_labels()
        for row, predicted in zip(rows, predictions, strict=True):
            row["accuracy"] = (predicted == test_labels).double().mean().item()
        result = self._result(rows, {"train": train.describe(), "test": test.describe()}, list(budgets.values()))
        result.predicted = torch.stack(predictions[: self.draws])
        return result

    def _told_apart(self, labels: Tensor) -> dict[str, str]:
        """Budget → its name, which has all budgets that come to the same images: "1% = 5" of a small set."""
        names: dict[int, list[str]] = {}
        for budget in self.budgets:
            names.setdefault(len(draw_images(labels, budget, self.seed)), []).append(budget)
        return {same[0]: " = ".join(same) for same in names.values()}

    def _result(self, rows: list[dict], data: dict, budgets: list[str]) -> Result:
        scores, first = {}, budgets[0]
        for budget in budgets:
            drawn = [row["accuracy"] for row in rows if row["budget"] == budget]
            scores[f"top1 {budget}"] = statistics.fmean(drawn)
            if len(drawn) > 1:
                scores[f"top1 {budget} standard deviation"] = statistics.stdev(drawn)
        stopped = sum(not row["converged"] for row in rows)
        return Result(
            protocol=self.name,
            metric=f"accuracy with {first} {'of the images' if '%' in first else 'images per class'}",
            value=scores[f"top1 {first}"],
            scores=scores,
            table=rows,
            settings=asdict(self) | {"folds": FOLDS, "classifier": "scikit-learn LogisticRegression, lbfgs"},
            data=data,
            notes=[f"{stopped} of {len(rows)} fits stopped after {MAX_ITERATIONS} iterations."] if stopped else [],
        )
