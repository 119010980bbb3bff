"""Losses that more than one method can use."""

from typing import Any

import torch
import torch.nn.functional as F


def standardize(targets: torch.Tensor, valid: torch.Tensor | None = None) -> torch.Tensor:
    """Shift and scale each target `[..., D]` to mean 0 and unbiased variance 1 over D.

    valid: bool `[..., D]`. Mean and variance are then those of the valid values, and the others are meaningless.
    """
    mean, variance = mean_and_variance(targets, valid)
    return (targets - mean) * (variance + 1e-6).rsqrt()


def mean_and_variance(targets: torch.Tensor, valid: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """The mean and the unbiased variance `[..., 1]` of each target `[..., D]`, over its valid values; 0 without any."""
    if valid is None:
        return targets.mean(dim=-1, keepdim=True), targets.var(dim=-1, keepdim=True)
    count = valid.sum(dim=-1, keepdim=True)
    mean = masked_sum(targets, valid, -1, keepdim=True) / count.clamp(min=1)
    return mean, masked_sum((targets - mean).square(), valid, -1, keepdim=True) / (count - 1).clamp(min=1)


def masked_sum(values: torch.Tensor, valid: torch.Tensor, *dims: int, **kwargs: Any) -> torch.Tensor:
    """The sum of the valid values. Others add nothing, and get no gradient, whatever they are."""
    return torch.where(valid, values, 0).sum(*dims, **kwargs)


def mean_over(values: torch.Tensor, valid: torch.Tensor | None) -> torch.Tensor:
    """The mean of the valid values; 0 with gradient 0 if there are none."""
    return values.mean() if valid is None else masked_sum(values, valid) / valid.sum().clamp(min=1)


def mean_squared_error(
    predictions: torch.Tensor, targets: torch.Tensor, valid: torch.Tensor | None = None
) -> torch.Tensor:
    """The mean over the `valid` values, bool of the shape that predictions and targets have."""
    if valid is None:
        return F.mse_loss(predictions, targets)
    return mean_over((predictions - targets).square(), valid)


def smooth_l1(predictions: torch.Tensor, targets: torch.Tensor, valid: torch.Tensor | None = None) -> torch.Tensor:
    """Smooth L1 of predictions and targets `[..., D]`, over the `valid` ones, bool `[...]`."""
    if valid is None:
        return F.smooth_l1_loss(predictions, targets)
    return mean_over(F.smooth_l1_loss(predictions, targets, reduction="none").mean(dim=-1), valid)


def normalized_l2(predictions: torch.Tensor, targets: torch.Tensor, valid: torch.Tensor | None = None) -> torch.Tensor:
    """Mean squared error against the standardised targets, both `[..., D]`, over the `valid` ones, bool `[...]`."""
    if valid is None:
        return F.mse_loss(predictions, standardize(targets))
    return mean_over((predictions - standardize(targets)).square().mean(dim=-1), valid)


def info_nce(
    queries: torch.Tensor,
    keys: torch.Tensor,
    temperature: float,
    first: int = 0,
    valid: torch.Tensor | None = None,
    queries_per_key: int = 1,
) -> torch.Tensor:
    """InfoNCE among images (MoCo v3, arXiv 2104.02057, algorithm 1): which key belongs to a query?

    Queries are `[B, D]`. Keys are `[K, D]`, and those of the queries stand at `first`, `first + 1`, ..., each for
    `queries_per_key` queries that follow each other. The loss is multiplied by 2·temperature, so equal logits give
    `2 · temperature · ln K`. Only `valid [B]` queries count.
    """
    logits = F.normalize(queries, dim=-1) @ F.normalize(keys, dim=-1).T / temperature
    own = first + torch.arange(len(queries), device=queries.device) // queries_per_key
    return 2 * temperature * mean_over(F.cross_entropy(logits, own, reduction="none"), valid)


def patch_discrimination(
    predictions: torch.Tensor, targets: torch.Tensor, temperature: float, valid: torch.Tensor | None = None
) -> torch.Tensor:
    """InfoNCE among the patches of one image (Latent MIM, arXiv 2407.15837): which target belongs to a prediction?

    Predictions and targets are `[B, K, D]`. First, each dimension of the predictions is standardised over the K patches
    of its image. The loss is multiplied by 2·temperature, so equal logits give `2 · temperature · ln K`.

    valid: bool `[B, K]`. All of this is then done with the valid patches alone. A single one in its image gives 0.
    """
    if valid is None:
        mean, std = predictions.mean(dim=1, keepdim=True), predictions.std(dim=1, keepdim=True)
    else:
        mean, variance = mean_and_variance(predictions.mT, valid[:, None])
        mean, std = mean.mT, variance.mT.clamp(min=1e-12).sqrt()  # the gradient of sqrt is infinite at 0
    predictions = F.normalize((predictions - mean) / (std + 1e-4), dim=-1)
    logits = predictions @ F.normalize(targets, dim=-1).transpose(1, 2) / temperature
    own_place = torch.arange(logits.shape[1], device=logits.device).expand(logits.shape[:2])
    if valid is None:
        return 2 * temperature * F.cross_entropy(logits.flatten(0, 1), own_place.flatten())
    logits = logits.masked_fill(~valid[:, None], torch.finfo(logits.dtype).min / 2)
    losses = F.cross_entropy(logits.flatten(0, 1), own_place.flatten(), reduction="none")
    return 2 * temperature * mean_over(losses, valid.flatten())
