"""Weights of an encoder for other channels, another patch size and another grid than they were trained with."""

import torch
import torch.nn.functional as F
from torch import Tensor

from hf_mim.models.configuration_vit import MIMConfig
from hf_mim.models.positions import resize_table


def fit_channels(filters: Tensor, channels: int) -> Tensor:
    """Patch filters `[D, C, ph, pw]` → `[D, channels, ph, pw]`: each is the mean of the old ones, times C / channels.

    So an image whose channels are all alike gives the same tokens as before, and the expected activation is kept.
    """
    old = filters.shape[1]
    if old == channels:
        return filters
    return (filters.mean(1, keepdim=True) * (old / channels)).expand(-1, channels, -1, -1)


def fit_patch(filters: Tensor, patch: tuple[int, int]) -> Tensor:
    """Patch filters `[D, C, ph, pw]` → `[D, C, *patch]`, by the pseudo-inverse of resizing: FlexiViT (Beyer et al.,
    CVPR 2023, arXiv 2212.08013, section 3.4).

    The new filters answer to a resized patch as the old ones do to the patch itself: exactly to a patch that was made
    larger, and with the least squared error, over patches of white noise, to one that was made smaller. A smaller
    filter then gets a constant, which FlexiViT does not have: so its answer to a constant patch is exact too.
    """
    sums = filters.double().sum((2, 3), keepdim=True)
    for axis, (old, new) in enumerate(zip(filters.shape[2:], patch, strict=True), start=2):
        if old != new:
            inverse = torch.linalg.pinv(_resizing(old, new).T)  # [new, old]
            filters = torch.movedim(torch.movedim(filters.double(), axis, -1) @ inverse.T, -1, axis)
    return filters + (sums - filters.sum((2, 3), keepdim=True)) / (patch[0] * patch[1])


def _resizing(old: int, new: int) -> Tensor:
    """The matrix `[new, old]` (float64) of linear, antialiased resizing along one side."""
    image = torch.eye(old, dtype=torch.float64)[None, None]  # each of its columns is resized by itself
    return F.interpolate(image, size=(new, old), mode="bilinear", antialias=True)[0, 0]


def fit_tensor(name: str, tensor: Tensor, theirs: MIMConfig, ours: MIMConfig) -> Tensor:
    """A tensor of a model with the config `theirs`, for one with the config `ours`, if it depends on channels, patch
    size or grid; any other tensor as it is."""
    if name.endswith("position_embeddings.table") and theirs.grid_size != ours.grid_size:
        return resize_table(tensor, theirs.grid_size, ours.grid_size, int(theirs.use_cls_token))
    if name.endswith("embeddings.projection.weight") and _patch(theirs) != _patch(ours):
        filters = tensor.unflatten(1, _patch(theirs)).permute(0, 3, 1, 2)  # ours are by row, column, channel
        if theirs.patch_height_width != ours.patch_height_width:
            filters = fit_patch(filters, ours.patch_height_width)
        filters = fit_channels(filters, ours.num_channels)
        return filters.permute(0, 2, 3, 1).flatten(1).to(tensor.dtype)
    return tensor


def _patch(config: MIMConfig) -> tuple[int, int, int]:
    return *config.patch_height_width, config.num_channels
