"""Losses that more than one method can use."""

import torch
import torch.nn.functional as F


def standardize(targets: torch.Tensor) -> torch.Tensor:
    """Shift and scale each target `[..., D]` to mean 0 and unbiased variance 1 over D."""
    mean, variance = targets.mean(dim=-1, keepdim=True), targets.var(dim=-1, keepdim=True)
    return (targets - mean) * (variance + 1e-6).rsqrt()


def normalized_l2(predictions: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Mean squared error against the standardised targets, both `[..., D]`."""
    return F.mse_loss(predictions, standardize(targets))


def patch_discrimination(predictions: torch.Tensor, targets: torch.Tensor, temperature: float) -> torch.Tensor:
    """InfoNCE among the patches of one image (Latent MIM, arXiv 2407.15837): which target belongs to a prediction?

    Predictions and targets are `[B, K, D]`. First, each dimension of the predictions is standardised over the K patches
    of its image. The loss is multiplied by 2·temperature, so equal logits give `2 · temperature · ln K`.
    """
    mean, std = predictions.mean(dim=1, keepdim=True), predictions.std(dim=1, keepdim=True)
    predictions = F.normalize((predictions - mean) / (std + 1e-4), dim=-1)
    logits = predictions @ F.normalize(targets, dim=-1).transpose(1, 2) / temperature
    own_place = torch.arange(logits.shape[1], device=logits.device).expand(logits.shape[:2])
    return 2 * temperature * F.cross_entropy(logits.flatten(0, 1), own_place.flatten())
