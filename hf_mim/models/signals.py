"""Numbers that show, for one batch, whether features and targets tell images apart. The collapse alarm reads them."""

import torch
import torch.nn.functional as F

from .losses import masked_sum


def spread(tokens: torch.Tensor) -> torch.Tensor:
    """How much the images of a batch differ, from tokens `[B, K, D]`; a detached scalar, 0 for collapsed features.

    It is the standard deviation over images of their mean token, averaged over dimensions.
    """
    return tokens.detach().float().mean(dim=1).std(dim=0, correction=0).mean()


@torch.no_grad()
def target_signals(
    targets: torch.Tensor, ids: torch.Tensor | None = None, num_places: int = 0, valid: torch.Tensor | None = None
) -> dict:
    """Signs of collapse in targets `[B, K, D]` at the places `ids [B, K]` of a grid of `num_places` patches (default:
    all patches in raster order). Only the `valid [B, K]` ones count. Detached scalars; {} for a batch of one image,
    which cannot show collapse.

    - `target_std`: the standard deviation over images of the targets at one place, divided by the root mean square of
      all targets, so that neither their scale nor a layer norm hides a collapse. 1: images have nothing in common. It
      goes to 0 in both degenerate states: constant targets, and targets that depend on the place alone.
    - `target_position_share`: the share of the variance of all targets that the place explains. It tells the two states
      apart: it goes to 1 in the second.
    - `target_cosine`: the mean cosine between the mean targets of two different images; 1 when all images are alike.
    """
    images, count, width = targets.shape
    if images < 2:
        return {}
    targets, total = targets.float(), images * count
    number, ones = total, targets.new_ones(total)
    if valid is not None:
        targets, number, ones = torch.where(valid[..., None], targets, 0), valid.sum(), valid.flatten().float()
        images = valid.any(dim=1).sum()
        if ids is None:
            ids, num_places = torch.arange(count, device=targets.device).expand(valid.shape), count
    size = targets.square().sum()
    if ids is None:
        num_seen, by_place = count, targets.mean(dim=0).square().sum() * images
    else:
        ids = ids.flatten()
        counts = targets.new_zeros(num_places).index_add_(0, ids, ones)  # bincount would make the host wait
        sums = targets.new_zeros(num_places, width).index_add_(0, ids, targets.flatten(0, 1))
        num_seen, by_place = (counts > 0).sum(), (sums.square().sum(dim=1) / counts.clamp(min=1)).sum()
        by_place = torch.where(num_seen < number, by_place, torch.nan)  # no place has two images
    varying = size - (targets.mean(dim=(0, 1)) * (total / number)).square().sum() * number
    # The mean of each place uses up one degree of freedom. Without the correction, small batches would be biased.
    within = (size - by_place) / (number - num_seen) * number
    tiny = torch.finfo(size.dtype).tiny
    means = F.normalize(targets.mean(dim=1), dim=-1)  # zeros in place of invalid targets keep its direction
    return {
        "target_std": (within / size.clamp(min=tiny)).clamp(min=0).sqrt(),
        "target_position_share": (1 - within / varying.clamp(min=tiny)).clamp(0, 1),
        # |Σ u|² sums all pairs of unit vectors, also each vector with itself: those `images` ones are taken off.
        "target_cosine": (means.sum(dim=0).square().sum() - images) / (images * (images - 1)),
    }


def error_over_constant(
    predictions: torch.Tensor, targets: torch.Tensor, valid: torch.Tensor | None = None
) -> torch.Tensor:
    """Squared error of predictions `[..., D]` over that of the best constant, which is the mean of all targets: 1 - R²,
    a detached scalar. Below 1 the predictor knows something about its targets. Only the `valid [...]` ones count."""
    predictions, targets = predictions.detach().float().flatten(0, -2), targets.detach().float().flatten(0, -2)
    mean = targets.mean(dim=0)
    if valid is not None:
        valid = valid.flatten()[:, None]
        mean = masked_sum(targets, valid, 0) / valid.sum()
        predictions, targets = (torch.where(valid, x, mean) for x in (predictions, targets))
    constant = (targets - mean).square().sum()
    return (predictions - targets).square().sum() / constant.clamp(min=torch.finfo(constant.dtype).tiny)
