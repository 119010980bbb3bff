"""Attentive probing: one cross-attention with a learned query pools frozen patch tokens, a linear layer classifies.

No loss of masked image modeling trains the mean of the tokens. So later works pool by attention instead: AIM (arXiv
2401.08541), V-JEPA (arXiv 2404.08471), CAPI (arXiv 2502.08769).
"""

import math
from dataclasses import dataclass, field
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from hf_mim.checks import least
from hf_mim.data.labelled import LabelledImages
from hf_mim.data.splits import generator
from hf_mim.evaluation.features import FeatureExtractor
from hf_mim.evaluation.probe_training import (
    Probes,
    SearchGrid,
    check_probe_options,
    choose_and_test,
    mean_and_scale,
    parse_features,
    train_together,
)
from hf_mim.evaluation.result import Result

BETAS, EPS = (0.9, 0.999), 1e-8  # of AdamW
WARMUP = 0.1  # share of the steps


class AttentiveProbes(Probes):
    """H attentive probes on one kind of tokens (see `Probes`), trained by AdamW. All start from the same weights.

    Let x be the standardised tokens of an image. In each attention head m of width d = D/M, the weights
    `softmax_n(q_m · K_m x_n / √d)` average the values `V_m x_n`; a linear layer follows. As in AIM, keys and values
    have no bias, and the pooled values go to the classifier directly. Both maps are linear, so they are applied where
    they cost least: `q_m · K_m x_n = (K_mᵀ q_m) · x_n`, and the mean of all `V_m x_n` is `V_m` times the mean of all
    `x_n`. The same probe then takes M products a token instead of 2·D, and holds no keys or values in memory.

    Args:
        attention_heads: M; divides D.
    """

    def __init__(
        self, mean: Tensor, scale: Tensor, grid: SearchGrid, num_classes: int, attention_heads: int, seed: int, device
    ):
        super().__init__(mean, scale, grid, device)
        random, width, heads = generator(seed, 2), len(mean), attention_heads

        def parameter(*shape, std: float) -> Tensor:
            start = torch.randn(1, *shape, generator=random).mul(std).repeat(len(grid), *[1] * len(shape))
            return start.to(device).requires_grad_()

        self.query = parameter(heads, width // heads, std=0.02)
        self.key = parameter(heads, width // heads, width, std=width**-0.5)
        self.value = parameter(heads, width // heads, width, std=width**-0.5)
        self.weight = parameter(num_classes, width, std=0.01)
        self.bias = parameter(num_classes, std=0.0)
        self.decayed, self.free = [self.key, self.value, self.weight], [self.query, self.bias]
        self.moments = [(torch.zeros_like(p), torch.zeros_like(p)) for p in self.decayed + self.free]
        self.steps = 0
        self.row_size = len(grid) * max(num_classes, heads * width)

    def logits(self, standardised: Tensor) -> Tensor:
        """`[B, N, D]` → `[B, H, C]`."""
        probes, heads, narrow, width = self.key.shape
        scorers = torch.einsum("hmd,hmdw->hmw", self.query, self.key) / math.sqrt(narrow)
        attention = (standardised @ scorers.view(-1, width).T).mT.softmax(dim=-1)  # [B, H·M, N]
        pooled = (attention @ standardised).view(-1, probes, heads, width)
        values = torch.einsum("bhmw,hmdw->bhmd", pooled, self.value).flatten(2)
        return torch.einsum("bhw,hcw->bhc", values, self.weight) + self.bias

    def step(self, features: Tensor, labels: Tensor, rate: float):
        """One step of AdamW on each probe's mean cross-entropy, at `rate` times its learning rate."""
        logits = self.logits(self.standardise(features))
        # The losses of all probes are summed: they share no weights, so each probe gets the gradient of its own loss.
        loss = F.cross_entropy(logits.flatten(0, 1), labels.repeat_interleave(logits.shape[1]), reduction="sum")
        parameters = self.decayed + self.free
        gradients = torch.autograd.grad(loss / len(labels), parameters)
        self.steps += 1
        with torch.no_grad():
            for parameter, gradient, moments in zip(parameters, gradients, self.moments, strict=True):
                self._descend(parameter, gradient, *moments, rate)

    def _descend(self, parameter: Tensor, gradient: Tensor, first: Tensor, second: Tensor, rate: float):
        """AdamW (arXiv 1711.05101) with a learning rate and a decay for each slice of the first dimension."""
        alone = [-1] + [1] * (parameter.ndim - 1)
        rates = (rate * self.learning_rates).view(alone)
        if any(parameter is decayed for decayed in self.decayed):
            parameter.mul_(1 - rates * self.weight_decays.view(alone))
        first.lerp_(gradient, 1 - BETAS[0])
        second.lerp_(gradient.square(), 1 - BETAS[1])
        denominator = (second / (1 - BETAS[1] ** self.steps)).sqrt_().add_(EPS)
        parameter.sub_(rates / (1 - BETAS[0] ** self.steps) * first / denominator)


@dataclass
class Attentive:
    """Top-1 accuracy of an attentive probe on frozen patch tokens.

    A linear probe on the mean sees only what the tokens have in common; this one also finds what single tokens hold. A
    small grid (learning rate × weight decay) is trained together on a part of the training images. The best on the
    held-out part is trained again on all of them and then tested.

    Source: AIM (arXiv 2401.08541) for the pooling. V-JEPA (arXiv 2404.08471) adds a block after it, which is not here.

    Args:
        features: layer/tokens/norm
        attention_heads: of the pooling; divides the width
        learning_rates: peaks for a batch of 256, compared on held-out images
        weight_decays: compared on held-out images
        epochs: passes over the training images
        batch_size: images of a step
        held_out: share of the training images that chooses the probe
        seed: for the choice of held-out images, the first weights and the order
    """

    name: ClassVar[str] = "attentive"
    needs: ClassVar[str] = "labels"
    unused: ClassVar[tuple[str, ...]] = ("pixels",)  # pixels are no tokens

    features: str = "last/tokens/norm"
    attention_heads: int = 8
    learning_rates: list[float] = field(default_factory=lambda: [0.001, 0.005, 0.02])
    weight_decays: list[float] = field(default_factory=lambda: [0.01, 0.1])
    epochs: int = 30
    batch_size: int = 256
    held_out: float = 0.1
    seed: int = 0

    def __post_init__(self):
        check_probe_options(self)
        parse_features(self.features, self.name, tokens=True)
        least(1, attention_heads=self.attention_heads)

    def run(self, extract: FeatureExtractor, train: LabelledImages, test: LabelledImages) -> Result:
        spec, encoder = parse_features(self.features, self.name, tokens=True), extract.encoder
        width = encoder.feature_width(spec)
        if width % self.attention_heads:
            raise ValueError(f"attention_heads must divide the width {width} of {spec}, not {self.attention_heads}")

        def fit(features, labels, ids, grids, num_classes):
            statistics = mean_and_scale(features[0], ids, str(spec))
            sizes = num_classes, self.attention_heads
            probes = AttentiveProbes(*statistics, grids[0], *sizes, self.seed, encoder.device)
            options = self.epochs, self.batch_size, self.seed, WARMUP, extract.progress
            train_together([probes], features, labels, ids, *options)
            return [probes]

        optimizer = f"AdamW, betas {BETAS}, warm-up {WARMUP} of the steps, cosine to 0"
        return choose_and_test(self, fit, extract, train, test, [spec], optimizer=optimizer)
