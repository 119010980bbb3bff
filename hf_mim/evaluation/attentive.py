"""Attentive probing: one cross-attention with a learned query pools frozen patch tokens, a linear layer classifies.

No loss of masked image modeling asks the mean of the tokens for anything, so later works of the field probe by
attention: AIM (arXiv 2401.08541), V-JEPA (arXiv 2404.08471), CAPI (arXiv 2502.08769).
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
from hf_mim.evaluation.encoder import FeatureSpec
from hf_mim.evaluation.features import FeatureExtractor
from hf_mim.evaluation.probe_training import (
    SearchGrid,
    check_probe_options,
    choose_and_test,
    fetch,
    mean_and_scale,
    pieces,
    train_together,
)
from hf_mim.evaluation.result import Result

BETAS, EPS = (0.9, 0.999), 1e-8  # of AdamW
WARMUP = 0.1  # share of the steps


class AttentiveProbes:
    """H attentive probes on one kind of tokens, each with its own learning rate and weight decay, trained by AdamW.

    Of standardised tokens `x` (see `mean_and_scale`), for each attention head m of width d = D/M:
    `softmax_n(q_m · K_m x_n / √d)` weighs `V_m x_n`; a linear layer follows. As in AIM, keys and values have no bias
    and the pooled values go to the classifier directly. Since both maps are linear, they are moved to where they cost
    least: `q_m · K_m x_n = (K_mᵀ q_m) · x_n`, and the mean of `V_m x_n` is `V_m` of the mean. The same probe then
    takes M products a token instead of 2·D, and no keys or values are held.

    Args:
        mean, scale: `[D]`, what standardises the tokens.
        grid: for each probe (learning rate, weight decay). All start from the same weights.
        attention_heads: M; divides D.
    """

    def __init__(
        self, mean: Tensor, scale: Tensor, grid: SearchGrid, num_classes: int, attention_heads: int, seed: int, device
    ):
        self.device, self.mean, self.scale = device, mean.to(device), scale.to(device)
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
        rates = torch.tensor(grid, dtype=torch.float32, device=device)
        self.learning_rates, self.weight_decays = rates[:, 0], rates[:, 1]  # [H]
        self.moments = [(torch.zeros_like(p), torch.zeros_like(p)) for p in self.decayed + self.free]
        self.steps = 0

    def logits(self, tokens: Tensor) -> Tensor:
        """`[B, N, D]` → `[B, H, C]`."""
        x = (tokens - self.mean) * self.scale
        probes, heads, narrow, width = self.key.shape
        scorers = torch.einsum("hmd,hmdw->hmw", self.query, self.key) / math.sqrt(narrow)
        attention = (x @ scorers.view(-1, width).T).mT.softmax(dim=-1)  # [B, H·M, N]
        pooled = (attention @ x).view(len(x), probes, heads, width)
        values = torch.einsum("bhmw,hmdw->bhmd", pooled, self.value).flatten(2)
        return torch.einsum("bhw,hcw->bhc", values, self.weight) + self.bias

    def step(self, features: Tensor, labels: Tensor, rate: float):
        """One step of AdamW on each probe's mean cross-entropy, at `rate` times its learning rate."""
        logits = self.logits(features)
        # The sum over probes: none has a part in another's loss, so each gets its own gradient.
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

    @torch.no_grad()
    def predict(self, features: Tensor, ids: Tensor, k: int = 1) -> Tensor:
        """The k likeliest classes `[n, H, k]` of the rows `ids` of `features`, likeliest first, on the CPU."""
        row = max(features[0].numel(), self.bias.numel(), self.query[:, :, 0].numel() * features.shape[2])
        found = [self.logits(fetch(features, piece, self.device)).topk(k, dim=-1).indices for piece in pieces(ids, row)]
        return torch.cat(found).cpu()


@dataclass
class Attentive:
    """Top-1 accuracy of an attentive probe on frozen patch tokens.

    Where a linear probe on the mean asks what all tokens say together, this one also finds what single tokens say. A
    small grid (learning rate × weight decay) is trained together on a part of the training images; the best on the
    held-out part is trained again on all of them and tested.

    Source: AIM (arXiv 2401.08541), whose pooling it is; V-JEPA (arXiv 2404.08471) adds a block of its own
    after the pooling.

    Args:
        features: layer/tokens/norm
        attention_heads: of the pooling; divides the width
        learning_rates: peaks for a batch of 256, compared on held-out images
        weight_decays: compared on held-out images
        epochs: passes over the training images
        batch_size: images of a step
        held_out: share of the training images that chooses the probe
        seed: of the held-out images, the first weights and the order
    """

    name: ClassVar[str] = "attentive"
    needs: ClassVar[str] = "labels"

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
        if FeatureSpec.parse(self.features).pooling != "tokens":
            raise ValueError(f"features of {self.name} must be tokens, such as last/tokens/norm, not {self.features}")
        least(1, attention_heads=self.attention_heads)

    def run(self, extract: FeatureExtractor, train: LabelledImages, test: LabelledImages) -> Result:
        spec, encoder = FeatureSpec.parse(self.features), extract.encoder
        width = encoder.feature_width(spec)
        if width % self.attention_heads:
            raise ValueError(f"attention_heads must divide the width {width} of {spec}, not {self.attention_heads}")

        def fit(features, labels, ids, grids, num_classes):
            statistics = mean_and_scale(features[0], ids, str(spec))
            probes = AttentiveProbes(
                *statistics, grids[0], num_classes, self.attention_heads, self.seed, encoder.device
            )
            options = self.epochs, self.batch_size, self.seed, WARMUP, extract.progress
            train_together([probes], features, labels, ids, *options)
            return [probes]

        optimizer = f"AdamW, betas {BETAS}, warm-up {WARMUP} of the steps, cosine to 0"
        return choose_and_test(self, fit, extract, train, test, [spec], optimizer=optimizer)
