"""What shows in a batch whether features and targets tell images apart; the collapse alarm judges it in the log."""

import torch
import torch.nn.functional as F


def spread(tokens: torch.Tensor) -> torch.Tensor:
    """How much the images of a batch differ, from `[B, tokens, D]`: the standard deviation over images of their mean
    token, averaged over dimensions; a detached scalar. It goes to 0 when the features collapse."""
    return tokens.detach().float().mean(dim=1).std(dim=0, correction=0).mean()


@torch.no_grad()
def target_signals(targets: torch.Tensor, ids: torch.Tensor | None = None, num_places: int = 0) -> dict:
    """What collapse shows in targets `[B, K, D]` at the places `ids [B, K]` of a grid of `num_places` patches (default:
    all patches in raster order): detached scalars, or nothing for a batch of one image, which shows none of it.

    - `target_std`: the standard deviation over images of the targets at one place, over the targets' root mean square,
      so that neither a scale nor the layer norm on the targets hides it. 1: nothing in common. It goes to 0 in both of
      the degenerate states: targets that are constant, and targets that depend on the place alone.
    - `target_position_share`: of the variance of all targets, what the place explains. It tells the two apart: it goes
      to 1 in the second.
    - `target_cosine`: the mean cosine between the mean targets of two different images; 1 when all images are alike.
    """
    images, count, width = targets.shape
    if images < 2:
        return {}
    targets, number = targets.float(), images * count
    size = targets.square().sum()
    if ids is None:
        num_seen, by_place = count, targets.mean(dim=0).square().sum() * images
    else:
        ids = ids.flatten()
        counts = targets.new_zeros(num_places).index_add_(0, ids, targets.new_ones(number))  # bincount would wait
        sums = targets.new_zeros(num_places, width).index_add_(0, ids, targets.flatten(0, 1))
        num_seen, by_place = (counts > 0).sum(), (sums.square().sum(dim=1) / counts.clamp(min=1)).sum()
    varying = size - targets.mean(dim=(0, 1)).square().sum() * number
    # Each place's own mean takes up one of its observations: divided by what is left, a small batch is not biased.
    within = (size - by_place) / (number - num_seen) * number
    tiny = torch.finfo(size.dtype).tiny
    means = F.normalize(targets.mean(dim=1), dim=-1)
    return {
        "target_std": (within / size.clamp(min=tiny)).clamp(min=0).sqrt(),
        "target_position_share": (1 - within / varying.clamp(min=tiny)).clamp(0, 1),
        # |Σ u|² holds every pair, and each vector with itself.
        "target_cosine": (means.sum(dim=0).square().sum() - images) / (images * (images - 1)),
    }


def error_over_constant(predictions: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Squared error of predictions `[..., D]` over that of the best constant, the mean of all targets: 1 - R², a
    detached scalar. Below 1 the predictor knows something of its targets."""
    predictions, targets = predictions.detach().float().flatten(0, -2), targets.detach().float().flatten(0, -2)
    constant = (targets - targets.mean(dim=0)).square().sum()
    return (predictions - targets).square().sum() / constant.clamp(min=torch.finfo(constant.dtype).tiny)
