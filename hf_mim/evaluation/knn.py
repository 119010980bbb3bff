"""k-nearest-neighbour classification of frozen features. Nothing is learned, so a change of the result is a change of
the features.

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

from hf_mim.evaluation.encoder import FeatureSpec
from hf_mim.evaluation.features import FeatureExtractor
from hf_mim.evaluation.images import LabelledImages
from hf_mim.evaluation.result import Result

LARGEST_TABLE = 2**26  # similarities that are held at once: 256 MB
# float32 similarities of unit vectors are within 1e-6 of the truth; what lies closer is compared in float64.
ROUNDING = 4e-6
DIGITS = 12  # to which float64 similarities are equal


def nearest_neighbours(train: Tensor, queries: Tensor, k: int) -> Iterator[tuple[Tensor, Tensor]]:
    """For chunks of the queries `[m, D]`: the similarity (float64) and index of the k nearest of `train` `[n, D]`.

    Both are unit vectors; similarity is their inner product. Exact: every pair is compared, by a matrix product in
    float32; where that cannot tell the k-th from the next, in float64. Of equals the first counts as nearer.
    """
    if not 1 <= k <= len(train):
        raise ValueError(f"k must be between 1 and the {len(train)} training images, not {k}")
    candidates = min(k + 1, len(train))
    row = max(len(train), 3 * candidates * train.shape[1])  # what a query takes: its similarities, its neighbours
    for chunk in queries.split(max(1, LARGEST_TABLE // row)):
        rough, nearest = (chunk @ train.T).topk(candidates, dim=1)
        exact = torch.einsum("qd,qkd->qk", chunk.double(), train[nearest].double())
        exact = (exact * 10**DIGITS).round() / 10**DIGITS
        exact, order = exact.sort(dim=1, descending=True, stable=True)
        exact, nearest = exact[:, :k], nearest.gather(1, order)[:, :k]
        if candidates > k:
            for query in (rough[:, k - 1] - rough[:, k] <= ROUNDING).nonzero().flatten().tolist():  # rare
                exact[query], nearest[query] = _nearest_of_one(train, chunk[query], k)
        yield exact, nearest


def _nearest_of_one(train: Tensor, query: Tensor, k: int) -> tuple[Tensor, Tensor]:
    similarity = torch.cat([part.double() @ query.double() for part in train.split(2**16)])
    similarity = (similarity * 10**DIGITS).round() / 10**DIGITS
    similarity, order = similarity.sort(descending=True, stable=True)
    return similarity[:k], order[:k]


def vote(similarity: Tensor, labels: Tensor, temperature: float, num_classes: int) -> Tensor:
    """Similarities and labels `[m, k]` of neighbours → the class `[m]` with most weight, exp(similarity / temperature).

    Of classes with equal weight the first.
    """
    votes = torch.zeros(len(labels), num_classes, dtype=torch.float64, device=labels.device)
    votes.scatter_add_(1, labels, ((similarity - 1) / temperature).exp())  # -1: no overflow
    top = votes.max(dim=1, keepdim=True).values
    return (votes >= top * (1 - 1e-9)).int().argmax(dim=1)


def knn_predict(
    train_features: Tensor,
    train_labels: Tensor,
    test_features: Tensor,
    k: int = 20,
    temperature: float = 0.07,
    num_classes: int | None = None,
) -> Tensor:
    """The predicted class `[m]` of each test feature `[m, D]`, from training features `[n, D]` and labels `[n]`.

    Exact, in chunks of the test features.

    Raises:
        ValueError: k is not in 1..n, or the temperature is not positive.
    """
    num_classes = int(train_labels.max()) + 1 if num_classes is None else num_classes
    grid = knn_sweep(train_features, train_labels, test_features, [k], [temperature], num_classes)
    return grid[k, temperature]


def knn_sweep(
    train_features: Tensor,
    train_labels: Tensor,
    test_features: Tensor,
    ks: Sequence[int],
    temperatures: Sequence[float],
    num_classes: int,
) -> dict[tuple[int, float], Tensor]:
    """As `knn_predict`, for each (k, temperature), with one search for the largest k."""
    for temperature in temperatures:
        if temperature <= 0:
            raise ValueError(f"temperature must be above 0, not {temperature}")
    train, queries = (F.normalize(x.float(), dim=1) for x in (train_features, test_features))
    predictions: dict[tuple[int, float], list[Tensor]] = {(k, t): [] for k in ks for t in temperatures}
    for similarity, nearest in nearest_neighbours(train, queries, max(ks)):
        labels = train_labels[nearest]
        for (k, temperature), parts in predictions.items():
            parts.append(vote(similarity[:, :k], labels[:, :k], temperature, num_classes))
    return {setting: torch.cat(parts) for setting, parts in predictions.items()}


@dataclass
class KNN:
    """Weighted k-nearest-neighbour accuracy (Wu et al. 2018; DINO: k 20, temperature .07).

    Cosine similarity; the k nearest training images vote with weight exp(similarity / temperature). The headline is the
    accuracy at `k` and `temperature`, which are fixed beforehand; the table has the others for comparison.
    """

    name: ClassVar[str] = "knn"
    needs: ClassVar[str] = "labels"

    features: str = field(default="last/mean/norm", metadata={"help": "layer/pooling/norm"})
    k: int = field(default=20, metadata={"help": "neighbours that vote"})
    temperature: float = field(default=0.07, metadata={"help": "of the votes' weights"})
    ks: list[int] = field(default_factory=lambda: [1, 5, 10, 20, 50, 100], metadata={"help": "for the table"})
    temperatures: list[float] = field(default_factory=lambda: [0.04, 0.07, 0.2], metadata={"help": "for the table"})

    def __post_init__(self):
        FeatureSpec.parse(self.features)
        for name, values in (("k", [self.k]), ("ks", self.ks)):
            if min(values, default=1) < 1:
                raise ValueError(f"{name} must be at least 1, not {min(values)}")
        for name, values in (("temperature", [self.temperature]), ("temperatures", self.temperatures)):
            if min(values, default=1) <= 0:
                raise ValueError(f"{name} must be above 0, not {min(values)}")

    def run(self, extract: FeatureExtractor, train: LabelledImages, test: LabelledImages) -> Result:
        """Raises ValueError for fewer training images than k."""
        if len(train) < self.k:
            raise ValueError(f"k must be at most the {len(train)} training images, not {self.k}")
        (train_features,), (test_features,) = extract(train, [self.features]), extract(test, [self.features])
        device = extract.encoder.device
        train_labels = train.read_labels().to(device)
        ks = sorted({self.k, *(k for k in self.ks if k <= len(train))})
        temperatures = sorted({self.temperature, *self.temperatures})
        num_classes = int(train_labels.max()) + 1
        predictions = knn_sweep(
            train_features.to(device), train_labels, test_features.to(device), ks, temperatures, num_classes
        )
        labels = test.read_labels().to(device)
        accuracy = {setting: (p == labels).double().mean().item() for setting, p in predictions.items()}
        return Result(
            self.name,
            "accuracy",
            accuracy[self.k, self.temperature],
            settings=asdict(self) | {"similarity": "cosine", "num_classes": num_classes},
            data={"train": train.describe(), "test": test.describe()},
            table=[{"k": k} | {f"T {t:g}": accuracy[k, t] for t in temperatures} for k in ks],
        )


@dataclass
class LeaveOneOut:
    """Latent MIM's nearest-neighbour accuracy: each test image takes the class of its nearest other test image.

    As in the released code of arXiv 2407.15837: Euclidean distance between means of the patch tokens of the residual
    stream, before the final norm, inside the validation set.
    """

    name: ClassVar[str] = "leave_one_out"
    needs: ClassVar[str] = "labels"

    features: str = field(default="last/mean/raw", metadata={"help": "layer/pooling/norm"})

    def __post_init__(self):
        FeatureSpec.parse(self.features)

    def run(self, extract: FeatureExtractor, train: LabelledImages, test: LabelledImages) -> Result:
        """Only the test images are used. Raises ValueError for fewer than two."""
        if len(test) < 2:
            raise ValueError(f"test must have at least 2 images, not {len(test)}")
        (features,) = extract(test, [self.features])
        nearest = nearest_other(features.to(extract.encoder.device)).cpu()
        labels = test.read_labels()
        return Result(
            self.name,
            "accuracy",
            (labels[nearest] == labels).double().mean().item(),
            settings=asdict(self) | {"similarity": "negative Euclidean distance", "k": 1},
            data={"test": test.describe()},
        )


def nearest_other(features: Tensor) -> Tensor:
    """For each of `[n, D]` the index `[n]` of the nearest other one by Euclidean distance; of equals the first."""
    features = features.double() - features.double().mean(dim=0)  # distances do not change, and lose fewer digits
    squares = features.square().sum(dim=1)
    nearest = []
    for start in range(0, len(features), step := max(1, LARGEST_TABLE // (2 * len(features)))):
        chunk = features[start : start + step]
        distance = squares - 2 * chunk @ features.T  # to which the chunk's own square would add the same
        distance += squares[start : start + step, None]
        rows = torch.arange(len(chunk), device=features.device)
        distance[rows, start + rows] = torch.inf
        lowest = distance.min(dim=1, keepdim=True).values
        nearest.append((distance <= lowest + 1e-9 * squares.mean()).int().argmax(dim=1))
    return torch.cat(nearest)
