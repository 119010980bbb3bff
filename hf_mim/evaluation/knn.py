"""Weighted k-nearest-neighbour classification of frozen features (Wu et al., CVPR 2018, arXiv 1805.01978, section 3.4).

The protocol of DINO and its successors: cosine similarity, the k nearest training images vote for their class with
weight exp(similarity / .07). Nothing is learned, so a change of the result is a change of the features.
"""

import json
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

LARGEST_TABLE = 2**26  # similarities that are held at once: 256 MB


@dataclass
class KNNResult:
    """What was measured, with the protocol in full. Accuracies are shares of the test images, top-1."""

    accuracy: float
    features: str
    k: int
    temperature: float
    num_classes: int
    train_images: int
    test_images: int
    similarity: str = "cosine"
    data: dict = field(default_factory=dict)
    baselines: dict[str, float] = field(default_factory=dict)
    checkpoint_sha256: str | None = None
    versions: dict = field(default_factory=lambda: {name: version(name) for name in ("torch", "transformers")})

    def save(self, path: str | Path):
        """Write as JSON."""
        Path(path).write_text(json.dumps(asdict(self), indent=2) + "\n")


def knn_predict(
    train_features: Tensor,
    train_labels: Tensor,
    test_features: Tensor,
    k: int = 20,
    temperature: float = 0.07,
    num_classes: int | None = None,
) -> Tensor:
    """The predicted class `[m]` of each test feature `[m, D]`, from training features `[n, D]` and labels `[n]`.

    Exact: every distance is computed, in chunks of the test features.

    Raises:
        ValueError: k is not in 1..n, or the temperature is not positive.
    """
    if not 1 <= k <= len(train_features):
        raise ValueError(f"k must be between 1 and the {len(train_features)} training images, not {k}")
    if temperature <= 0:
        raise ValueError(f"temperature must be above 0, not {temperature}")
    num_classes = int(train_labels.max()) + 1 if num_classes is None else num_classes
    train = F.normalize(train_features.float(), dim=1)
    predictions = []
    for chunk in test_features.split(max(1, LARGEST_TABLE // len(train))):
        similarity, nearest = (F.normalize(chunk.float(), dim=1) @ train.T).topk(k, dim=1)
        votes = torch.zeros(len(chunk), num_classes, device=chunk.device)
        votes.scatter_add_(1, train_labels[nearest], ((similarity - 1) / temperature).exp())  # -1: no overflow
        predictions.append(votes.argmax(dim=1))
    return torch.cat(predictions)


def evaluate_knn(
    train: tuple[Tensor, Tensor],
    test: tuple[Tensor, Tensor],
    features: str,
    k: int = 20,
    temperature: float = 0.07,
    **about,
) -> KNNResult:
    """Classify test (features, labels) by those of training; `features` says what they are, `about` fills the result.

    With fewer than k training images, all of them vote.
    """
    k = min(k, len(train[0]))
    num_classes = int(max(train[1].max(), test[1].max())) + 1
    predictions = knn_predict(*train, test[0], k, temperature, num_classes)
    return KNNResult(
        accuracy=(predictions == test[1]).double().mean().item(),
        features=features,
        k=k,
        temperature=temperature,
        num_classes=num_classes,
        train_images=len(train[0]),
        test_images=len(test[0]),
        **about,
    )
