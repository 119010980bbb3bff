"""k-nearest-neighbour classification of frozen features. Nothing is learned, so the result changes only if the features
do.

- `KNN`: weighted votes under cosine similarity (Wu et al., CVPR 2018, arXiv 1805.01978, section 3.4), the protocol of
  DINO and its successors.
- `LeaveOneOut`: Latent MIM's nearest-neighbour accuracy (arXiv 2407.15837): 1-NN by Euclidean distance inside one set.
"""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from hf_mim.checks import least, positive
from hf_mim.data.labelled import LabelledImages
from hf_mim.evaluation.features import LARGEST_TABLE, FeatureExtractor
from hf_mim.evaluation.probe_training import parse_features
from hf_mim.evaluation.result import Result

# float32 similarities of unit vectors are within 1e-6 of the truth; closer ones are compared in float64.
ROUNDING = 4e-6
DIGITS = 13  # float64 similarities that agree in so many digits count as equal
GROUP = 32  # columns


def nearest_neighbours(train: Tensor, queries: Tensor, k: int) -> Iterator[tuple[Tensor, Tensor]]:
    """For chunks of the queries `[m, D]`: cosine (float64) and index of the k nearest of `train` `[n, D]`.

    The result is exact. A matrix product in float32 compares every pair; pairs that it cannot tell apart are compared
    in float64. Among equal neighbours, the first counts as nearer.
    """
    if not 1 <= k <= len(train):
        raise ValueError(f"k must be between 1 and the {len(train)} training images, not {k}")
    candidates = min(k + 1, len(train))
    units, queries = unit_vectors(train), queries.float()
    chunk = max(1, LARGEST_TABLE // max(len(train), candidates * GROUP))
    table = torch.empty(min(chunk, len(queries)), len(train), device=train.device)  # on a CPU new memory is slow
    for part in queries.split(chunk):
        rough, nearest = largest(torch.mm(unit_vectors(part), units.T, out=table[: len(part)]), candidates)
        nearest = nearest.sort(dim=1).values  # so that the stable sort below keeps equal ones in this order
        pairs = zip(part.split(64), nearest.split(64), strict=True)
        exact = torch.cat([exact_cosine(x, train[ids]) for x, ids in pairs])
        exact, order = exact.sort(dim=1, descending=True, stable=True)
        exact, nearest = exact[:, :k], nearest.gather(1, order)[:, :k]
        if candidates > k:
            for query in (rough[:, k - 1] - rough[:, k] <= ROUNDING).nonzero().flatten().tolist():  # rare
                near = (table[query] >= rough[query, k - 1] - ROUNDING).nonzero().flatten()
                similarity = exact_cosine(part[query][None], train[near][None])[0]
                similarity, order = similarity.sort(descending=True, stable=True)
                exact[query], nearest[query] = similarity[:k], near[order[:k]]
        yield exact, nearest


def largest(table: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """`table.topk(k)` of `[m, n]`, twice as fast if there are many columns.

    The k largest lie in the k groups of columns with the largest maxima, so only these groups are sorted.
    """
    grouped = table.shape[1] // GROUP * GROUP
    if grouped <= 4 * k * GROUP:
        return table.topk(k, dim=1)
    groups = table[:, :grouped].unflatten(1, (-1, GROUP))
    best = groups.amax(dim=2).topk(k, dim=1).indices
    values = groups.gather(1, best[..., None].expand(-1, -1, GROUP)).flatten(1)
    ids = (best[..., None] * GROUP + torch.arange(GROUP, device=table.device)).flatten(1)
    rest = torch.arange(grouped, table.shape[1], device=table.device).expand(len(table), -1)
    values, ids = torch.cat([values, table[:, grouped:]], dim=1), torch.cat([ids, rest], dim=1)
    values, order = values.topk(k, dim=1)
    return values, ids.gather(1, order)


def exact_cosine(queries: Tensor, neighbours: Tensor) -> Tensor:
    """Cosines in float64 of `[q, D]` with `[q, k, D]`. Cosines that differ by rounding alone become equal."""
    queries, neighbours = queries.double(), neighbours.double()
    lengths = queries.norm(dim=1)[:, None] * neighbours.norm(dim=2)
    exact = torch.einsum("qd,qkd->qk", queries, neighbours) / lengths.clamp(min=torch.finfo(torch.float64).tiny)
    return (exact * 10**DIGITS).round() / 10**DIGITS


def vote(similarity: Tensor, labels: Tensor, temperature: float, num_classes: int) -> Tensor:
    """Similarities and labels `[m, k]` of neighbours → the class `[m]` with the largest weight.

    A neighbour weighs exp(similarity / temperature). Among classes of equal weight, the first wins.
    """
    votes = torch.zeros(len(labels), num_classes, dtype=torch.float64, device=labels.device)
    votes.scatter_add_(1, labels, ((similarity - 1) / temperature).exp())  # -1: no overflow
    top = votes.max(dim=1, keepdim=True).values
    return (votes >= top * (1 - 1e-9)).int().argmax(dim=1)


def knn_predict(
    train_features: Tensor, train_labels: Tensor, test_features: Tensor, k: int = 20, temperature: float = 0.07
) -> Tensor:
    """The predicted class `[m]` of each test feature `[m, D]`, from training features `[n, D]` and labels `[n]`.

    The search is exact. Test features are taken in chunks, to bound the memory.

    Raises:
        ValueError: k is not in 1..n, or the temperature is not positive.
    """
    return knn_sweep(train_features, train_labels, test_features, [k], [temperature])[k, temperature]


def knn_sweep(
    train_features: Tensor,
    train_labels: Tensor,
    test_features: Tensor,
    ks: Sequence[int],
    temperatures: Sequence[float],
) -> dict[tuple[int, float], Tensor]:
    """`knn_predict` for each (k, temperature), by a single search for the largest k."""
    for temperature in temperatures:
        positive(temperature=temperature)
    classes, train_labels = train_labels.unique(return_inverse=True)
    predictions: dict[tuple[int, float], list[Tensor]] = {(k, t): [] for k in ks for t in temperatures}
    for similarity, nearest in nearest_neighbours(train_features.detach(), test_features.detach(), max(ks)):
        labels = train_labels[nearest]
        for (k, temperature), parts in predictions.items():
            parts.append(classes[vote(similarity[:, :k], labels[:, :k], temperature, len(classes))])
    return {setting: torch.cat(parts) for setting, parts in predictions.items()}


def unit_vectors(features: Tensor) -> Tensor:
    """Rows of length 1, float32. First each row is divided by its largest number: no square overflows or vanishes."""
    features = features.float()
    largest_number = features.abs().amax(dim=1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
    return F.normalize(features / largest_number, dim=1)


def exact_device(device: torch.device) -> torch.device:
    """The device, or the CPU if the device has no float64."""
    return torch.device("cpu") if device.type == "mps" else device


@dataclass
class KNN:
    """Weighted k-nearest-neighbour accuracy (Wu et al. 2018; DINO: k 20, temperature .07).

    The k training images with the highest cosine similarity vote, with weight exp(similarity / temperature). The
    headline is the accuracy at `k` and `temperature`, which are fixed beforehand; the table has others for comparison.

    Args:
        features: layer/pooling/norm
        k: neighbours that vote
        temperature: a vote weighs exp(similarity / temperature)
        ks: further k in the table
        temperatures: further temperatures in the table
    """

    name: ClassVar[str] = "knn"
    needs: ClassVar[str] = "labels"

    features: str = "last/mean/norm"
    k: int = 20
    temperature: float = 0.07
    ks: list[int] = field(default_factory=lambda: [1, 5, 10, 20, 50, 100])
    temperatures: list[float] = field(default_factory=lambda: [0.04, 0.07, 0.2])

    def __post_init__(self) -> None:
        parse_features(self.features, self.name)
        least(1, k=self.k, ks=min(self.ks, default=None))
        positive(temperature=self.temperature)
        for temperature in self.temperatures:
            positive(temperatures=temperature)

    def run(self, extract: FeatureExtractor, train: LabelledImages, test: LabelledImages) -> Result:
        """Raises ValueError for fewer training images than k."""
        if len(train) < self.k:
            raise ValueError(f"k must be at most the {len(train)} training images, not {self.k}")
        (train_features,), (test_features,) = extract(train, [self.features]), extract(test, [self.features])
        device = exact_device(extract.encoder.device)
        train_labels = train.read_labels().to(device)
        ks = sorted({self.k, *(k for k in self.ks if k <= len(train))})
        temperatures = sorted({self.temperature, *self.temperatures})
        predictions = knn_sweep(train_features.to(device), train_labels, test_features.to(device), ks, temperatures)
        labels = test.read_labels().to(device)
        accuracy = {setting: (p == labels).double().mean().item() for setting, p in predictions.items()}
        result = Result(
            self.name,
            "accuracy",
            accuracy[self.k, self.temperature],
            settings=asdict(self) | {"similarity": "cosine", "num_classes": len(train_labels.unique())},
            data={"train": train.describe(), "test": test.describe()},
            table=[{"k": k} | {f"T {t:g}": accuracy[k, t] for t in temperatures} for k in ks],
        )
        result.predicted = predictions[self.k, self.temperature].cpu()
        return result


@dataclass
class LeaveOneOut:
    """Latent MIM's nearest-neighbour accuracy: each test image gets the class of the test image nearest to it.

    As in the released code of arXiv 2407.15837, the distance is Euclidean, between means of the patch tokens of the
    residual stream, before the final norm, inside the validation set. With groups, the nearest image of another group
    counts: all of the image's own group is left out.

    Args:
        features: layer/pooling/norm
    """

    name: ClassVar[str] = "leave_one_out"
    needs: ClassVar[str] = "labels"
    unused: ClassVar[tuple[str, ...]] = ("folds",)

    features: str = "last/mean/raw"

    def __post_init__(self) -> None:
        parse_features(self.features, self.name)

    def run(self, extract: FeatureExtractor, train: LabelledImages, test: LabelledImages) -> Result:
        """Only the test images are used. Raises ValueError for fewer than two, or for a single group."""
        if len(test) < 2:
            raise ValueError(f"test must have at least 2 images, not {len(test)}")
        (features,), groups = extract(test, [self.features]), test.read_groups()
        if groups is not None and len(groups.unique()) < 2:
            raise ValueError("group must tell two groups at least in the test images, and all of them are of one")
        nearest = nearest_other(features.to(exact_device(extract.encoder.device)), groups).cpu()
        labels = test.read_labels()
        result = Result(
            self.name,
            "accuracy",
            (labels[nearest] == labels).double().mean().item(),
            settings=asdict(self) | {"similarity": "negative Euclidean distance", "k": 1},
            data={"test": test.describe()},
        )
        result.predicted = labels[nearest]
        return result


def nearest_other(features: Tensor, groups: Tensor | None = None) -> Tensor:
    """The index `[n]` of each feature's nearest other, `[n, D]`, by Euclidean distance; the first among equal ones.

    groups: `[n]`; the nearest feature of another group is taken.
    """
    groups = None if groups is None else groups.to(features.device)
    features = features.double() - features.double().mean(dim=0)  # distances stay the same, but lose fewer digits
    squares = features.square().sum(dim=1)
    nearest = []
    for start in range(0, len(features), step := max(1, LARGEST_TABLE // (2 * len(features)))):
        chunk = features[start : start + step]
        both = squares[start : start + step, None] + squares
        distance = both - 2 * chunk @ features.T
        if groups is None:
            rows = torch.arange(len(chunk), device=features.device)
            distance[rows, start + rows] = torch.inf
        else:
            distance.masked_fill_(groups[start : start + step, None] == groups, torch.inf)
        lowest = distance.min(dim=1, keepdim=True).values
        nearest.append((distance <= lowest + 1e-13 * both).int().argmax(dim=1))  # the first, up to rounding
    return torch.cat(nearest)
