"""Features of a frozen encoder, for every protocol that asks for them."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader


@torch.no_grad()
def extract_features(
    encode: Callable[[Tensor], Tensor],
    images,
    augment: Callable[[Tensor], Tensor],
    device: torch.device | str = "cpu",
    batch_size: int = 64,
    num_workers: int = 0,
) -> tuple[Tensor, Tensor]:
    """Features `[n, D]` (float32) and labels `[n]` (int64) of labelled images, both on the CPU.

    Args:
        encode: normalised images `[B, C, H, W]` → features `[B, D]`; see `mean_patch_token` and `raw_pixels`.
        images: a dataset of `{"pixel_values": uint8 [C, H, W], "labels": int}`; samples with label -1 are left out.
        augment: uint8 → normalised float, as `DeviceAugment` in eval mode.
    """
    features, labels = [], []
    for batch in DataLoader(images, batch_size=batch_size, num_workers=num_workers):
        known = batch["labels"] >= 0
        if known.any():
            features.append(encode(augment(batch["pixel_values"][known].to(device))).float().cpu())
            labels.append(batch["labels"][known])
    if not features:
        raise ValueError("images holds no labelled image")
    return torch.cat(features), torch.cat(labels)


def mean_patch_token(encoder: torch.nn.Module) -> Callable[[Tensor], Tensor]:
    """The mean of the patch tokens of the last layer, after the final norm; a CLS token is left out."""

    def encode(pixel_values: Tensor) -> Tensor:
        tokens = encoder(pixel_values).last_hidden_state
        return tokens[:, encoder.config.num_prefix_tokens :].mean(dim=1)

    return encode


def raw_pixels(pixel_values: Tensor) -> Tensor:
    """The normalised pixels, averaged down to 32×32 where there are more: what any features have to be better than."""
    height, width = pixel_values.shape[2:]
    return F.adaptive_avg_pool2d(pixel_values, (min(32, height), min(32, width))).flatten(1)
