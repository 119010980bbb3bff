"""Linear probing: how well a linear map tells the classes from frozen features (MAE, arXiv 2111.06377, appendix A.1).

Papers report the best of many probes: layers, poolings, learning rates. Here all of them are trained together: each
batch is read once, and the heads on one kind of features are a single matrix product, forward and backward.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from hf_mim.data.labelled import LabelledImages
from hf_mim.evaluation.encoder import FeatureSpec, FrozenEncoder
from hf_mim.evaluation.features import FeatureExtractor
from hf_mim.evaluation.probe_training import (
    LARGEST_PIECE,
    Probes,
    SearchGrid,
    check_probe_options,
    choose_and_test,
    mean_and_scale,
    parse_features,
    train_together,
)
from hf_mim.evaluation.raw_pixels import RawPixels
from hf_mim.evaluation.result import Result

MOMENTUM = 0.9


class LinearHeads(Probes):
    """H linear classifiers on one kind of features, see `Probes`.

    The features are standardised first: without this, accuracy is far too low, by 14 points for MAE's ViT-B. The
    classifiers start at zero: their loss is convex, so any start leads to the same minimum.
    """

    def __init__(self, mean: Tensor, scale: Tensor, grid: SearchGrid, num_classes: int, device: torch.device):
        super().__init__(mean, scale, grid, device)
        self.weight = torch.zeros(len(mean), len(grid), num_classes, device=device)
        self.bias = torch.zeros(len(grid), num_classes, device=device)
        self.moments = torch.zeros_like(self.weight), torch.zeros_like(self.bias)
        self.row_size = self.bias.numel()

    def logits(self, standardised: Tensor) -> Tensor:
        """`[B, D]` → `[B, H, C]`."""
        return torch.addmm(self.bias.flatten(), standardised, self.weight.flatten(1)).view(-1, *self.bias.shape)

    @torch.no_grad()
    def step(self, features: Tensor, labels: Tensor, rate: float):
        """One step of SGD with momentum on each head's mean cross-entropy, at `rate` times its learning rate.

        The gradient of the logits is `softmax - one hot`. A batch is split if its logits would take too much memory.
        """
        weight_gradient, bias_gradient = self.weight * self.weight_decays[:, None], torch.zeros_like(self.bias)
        rows = max(1, LARGEST_PIECE // self.row_size)
        for x, y in zip(self.standardise(features).split(rows), labels.split(rows), strict=True):
            gradient = self.logits(x).softmax(dim=-1)
            gradient[torch.arange(len(y), device=y.device), :, y] -= 1
            weight_gradient.flatten(1).addmm_(x.T, gradient.flatten(1), alpha=1 / len(features))
            bias_gradient.add_(gradient.sum(dim=0), alpha=1 / len(features))
        for parameter, gradient, moment in zip(
            (self.weight, self.bias), (weight_gradient, bias_gradient), self.moments, strict=True
        ):
            moment.mul_(MOMENTUM).add_(gradient)
            parameter.addcmul_(moment, self.learning_rates[:, None], value=-rate)


def train_heads(
    features: Sequence[Tensor],
    labels: Tensor,
    ids: Tensor,
    grids: Sequence[SearchGrid],
    num_classes: int,
    epochs: int = 100,
    batch_size: int = 256,
    seed: int = 0,
    device: torch.device | str = "cpu",
    names: Sequence[str] | None = None,
    progress: bool = False,
) -> list[LinearHeads]:
    """Train heads on each of `features`, `[n, D]` in the CPU's memory or on its disk.

    Args:
        labels: `[n]`, int64, on the CPU.
        ids: the rows to train on.
        grids: the heads on each of `features`: (learning rate for a batch of 256, weight decay).
        names: of the features, for errors.
        progress: show a bar.

    Raises:
        ValueError: a feature is not finite.
    """
    names = names or [f"number {i}" for i in range(len(features))]
    heads = [
        LinearHeads(*mean_and_scale(x, ids, name), grid, num_classes, torch.device(device))
        for x, grid, name in zip(features, grids, names, strict=True)
    ]
    train_together(heads, features, labels, ids, epochs, batch_size, seed, progress=progress)
    return heads


@dataclass
class Linear:
    """Top-1 accuracy of a linear classifier on standardised frozen features.

    Every head (features × learning rate × weight decay) is trained by SGD with momentum .9 on a part of the training
    images. The best on the held-out part is trained again on all of them, as a paper's probe is, and then tested. For
    each kind of features, the result of its best head is reported.

    Sources: MAE (arXiv 2111.06377, appendix A.1) for BatchNorm without affine before the classifier; I-JEPA (arXiv
    2301.08243) for the last layer and the last four; DINOv2 (arXiv 2304.07193) for a grid trained in one pass.

    Args:
        features: layer/pooling/norm; default: last/mean/norm, last/cls/norm and last4/mean/norm where they exist
        learning_rates: peaks for a batch of 256, compared on held-out images
        weight_decays: compared on held-out images
        epochs: passes over the training images
        batch_size: images of a step
        held_out: share of the training images that chooses the head
        seed: for the choice of held-out images and for the order
    """

    name: ClassVar[str] = "linear"
    needs: ClassVar[str] = "labels"

    features: list[str] | None = None
    learning_rates: list[float] = field(default_factory=lambda: [0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0])
    weight_decays: list[float] = field(default_factory=lambda: [0.0, 0.001])
    epochs: int = 100
    batch_size: int = 256
    held_out: float = 0.1
    seed: int = 0

    def __post_init__(self):
        check_probe_options(self)
        for features in self.features or []:
            parse_features(features, self.name)

    def run(self, extract: FeatureExtractor, train: LabelledImages, test: LabelledImages) -> Result:
        specs = [FeatureSpec.parse(text) for text in self.features or default_features(extract.encoder)]
        names = [str(spec) for spec in specs]

        def fit(features, labels, ids, grids, num_classes):
            options = self.epochs, self.batch_size, self.seed, extract.encoder.device, names, extract.progress
            return train_heads(features, labels, ids, grids, num_classes, *options)

        optimizer = f"SGD, momentum {MOMENTUM}, cosine to 0"
        return choose_and_test(self, fit, extract, train, test, specs, features=names, optimizer=optimizer)


def default_features(encoder: FrozenEncoder | RawPixels) -> list[str]:
    """The kinds of features that papers report, if the encoder has them."""
    norm = "raw" if encoder.norm is None else "norm"
    features = [f"last/mean/{norm}"]
    features += [f"last/cls/{norm}"] if encoder.num_prefix_tokens else []
    if encoder.num_layers >= 4:
        widths = {stream.width for stream in encoder.layers.streams[-4:]}
        features.append(f"last4/mean/{norm if len(widths) == 1 else 'raw'}")
    return features
