"""Mixup, CutMix and random erasing, on the device, a whole batch at a time.

Each image is mixed with its neighbour in the batch (a roll by one). In a shuffled batch this is a random partner, and
never the image itself. As in MAE's fine-tuning (arXiv 2111.06377, table 9), all images of a batch share one λ.
"""

import functools
import inspect
import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hf_mim.checks import least, share

from .augment import DeviceAugment
from .crop import Box


def mixup(images: Tensor, weight: float) -> Tensor:
    """weight · image + (1 − weight) · its neighbour, [B, C, H, W] (Zhang et al., arXiv 1710.09412)."""
    return torch.lerp(images.roll(1, 0), images, weight)


def cutmix(images: Tensor, box: Box) -> Tensor:
    """The box of each image replaced by its neighbour's, [B, C, H, W] (Yun et al., arXiv 1905.04899)."""
    left, top, right, bottom = box
    mixed = images.clone()
    mixed[..., top:bottom, left:right] = images.roll(1, 0)[..., top:bottom, left:right]
    return mixed


def cutmix_box(height: int, width: int, weight: float) -> Box:
    """A box with 1 − weight of the area and the image's proportions, centred anywhere and cut off at the border."""
    half_height, half_width = (round(side * math.sqrt(1 - weight)) / 2 for side in (height, width))
    y, x = (torch.rand(2) * torch.tensor([height, width])).tolist()
    top, bottom = (min(max(round(y + half), 0), height) for half in (-half_height, half_height))
    left, right = (min(max(round(x + half), 0), width) for half in (-half_width, half_width))
    return left, top, right, bottom


def weight_outside(box: Box, height: int, width: int) -> float:
    """The share of the pixels outside a box: λ after CutMix."""
    left, top, right, bottom = box
    return 1 - (bottom - top) * (right - left) / (height * width)


def random_erase(images: Tensor, probability: float) -> Tensor:
    """Fill a random rectangle of each image, with this probability, by normal(0, 1) noise, pixel by pixel.

    Zhong et al., arXiv 1708.04896, for normalised images [B, C, H, W]. The rectangle's share of the image's area is
    uniform in 0.02..1/3; its height / width is log-uniform in 0.3..1/0.3. The first of ten draws that fits is taken, if
    any.
    """
    batch, _, height, width = images.shape
    draws = torch.rand(5, batch, 10, device=images.device)
    areas = height * width * (0.02 + (1 / 3 - 0.02) * draws[0])
    ratios = (math.log(0.3) + math.log(1 / 0.3 / 0.3) * draws[1]).exp()
    heights, widths = (areas * ratios).sqrt().round(), (areas / ratios).sqrt().round()
    fits = (heights < height) & (widths < width)
    first = fits.int().argmax(dim=1, keepdim=True)
    erased = fits.any(dim=1, keepdim=True) & (draws[4, :, :1] < probability)
    heights, widths, up, along = (x.gather(1, first) for x in (heights, widths, draws[2], draws[3]))
    top, left = (up * (height - heights + 1)).floor(), (along * (width - widths + 1)).floor()
    rows, columns = torch.arange(height, device=images.device), torch.arange(width, device=images.device)
    in_rows, in_columns = (rows >= top) & (rows < top + heights), (columns >= left) & (columns < left + widths)
    mask = (erased & in_rows)[:, None, :, None] & in_columns[:, None, None, :]
    return torch.where(mask, torch.randn_like(images), images)


def soft_targets(labels: Tensor, num_classes: int, smoothing: float = 0.0, weight: float = 1.0) -> Tensor:
    """Labels [B] → target distributions [B, K]: smoothed to 1 − s + s/K and s/K, then mixed with the neighbour's."""
    targets = F.one_hot(labels, num_classes) * (1 - smoothing) + smoothing / num_classes
    return torch.lerp(targets.roll(1, 0), targets, weight)


class MixAugment(nn.Module):
    """What fine-tuning does to a batch on the device, and its loss, for a plain `Trainer`:

        augment = MixAugment(mean, std)
        augment.attach(model)
        Trainer(model, ..., compute_loss_func=augment.loss)

    In training, uint8 [B, C, H, W] is flipped, normalised, erased and mixed, in this order; in `eval()` mode it is only
    normalised. This happens in a hook before the model's forward, not in the collator. So uint8 travels to the device,
    the workers only decode, a resumed run draws the same numbers, and the labels stay class ids, which Trainer counts
    to average over an accumulated batch. The random numbers come from torch's default generators.

    Args:
        mean, std: one value for each channel, for pixels scaled to [0, 1].
        mixup, cutmix: α of Beta(α, α), from which λ is drawn; 0: never. With both, a coin toss decides for each batch.
        label_smoothing: s in [0, 1).
        random_erase: probability of erasing a part of an image.
        flip: probability of a left-right flip.
        nodata: whether pixels without data may come, as NaN; they become 0, and a model whose encoder takes
            `valid_pixels` is told where images have data. A mixture has data where one of its images has.
    """

    def __init__(
        self, mean, std, mixup=0.8, cutmix=1.0, label_smoothing=0.1, random_erase=0.25, flip=0.5, nodata=False
    ):
        super().__init__()
        least(0, mixup=mixup, cutmix=cutmix)
        share("[0, 1)", label_smoothing=label_smoothing)
        share(random_erase=random_erase)
        self.normalize = DeviceAugment(mean, std, flip_probability=flip, nodata=nodata)
        self.mixup, self.cutmix, self.label_smoothing, self.erase = mixup, cutmix, label_smoothing, random_erase
        self.weight = 1.0  # λ of the last batch, for `loss`

    def forward(self, pixel_values: Tensor) -> Tensor:
        return self.with_valid(pixel_values)[0]

    @torch.no_grad()
    def with_valid(self, pixel_values: Tensor) -> tuple[Tensor, Tensor | None]:
        """(what `forward` gives; where there are data, bool [B, C, H, W], or None for images without such pixels)."""
        (images, valid), self.weight = self.normalize.with_valid(pixel_values), 1.0
        if not self.training:
            return images, valid
        if self.erase:
            images = random_erase(images, self.erase)
        if not (self.mixup or self.cutmix):
            return images, valid
        mix = self._draw_mixing(*images.shape[2:])
        return mix(images), None if valid is None else mix(valid.float()) > 0

    def _draw_mixing(self, height: int, width: int) -> Callable[[Tensor], Tensor]:
        # Drawn on the CPU, so that reading the numbers does not wait for the device.
        use_cutmix = torch.rand(()).item() < 0.5 if self.mixup and self.cutmix else bool(self.cutmix)
        alpha = self.cutmix if use_cutmix else self.mixup
        self.weight = torch.distributions.Beta(alpha, alpha).sample().item()
        if not use_cutmix:
            return functools.partial(mixup, weight=self.weight)
        box = cutmix_box(height, width, self.weight)
        self.weight = weight_outside(box, height, width)
        return functools.partial(cutmix, box=box)

    def attach(self, model: nn.Module, **options):
        """Apply this before each forward of the model. Returns a handle; its `remove()` undoes this.

        options: further arguments of the model's forward.
        """

        encoder = getattr(model, "base_model", model)
        is_told = "valid_pixels" in inspect.signature(encoder.forward).parameters

        def before_forward(module, args, kwargs):
            self.train(module.training)
            images, valid = self.with_valid(kwargs["pixel_values"])
            own = options if valid is None or not is_told else options | {"valid_pixels": valid}
            return args, kwargs | own | {"pixel_values": images}

        return model.register_forward_pre_hook(before_forward, with_kwargs=True)

    def loss(self, outputs, labels: Tensor, num_items_in_batch=None) -> Tensor:
        """Cross-entropy [] of the last batch against its soft targets; plain cross-entropy in `eval()` mode.

        It is a mean: over the accumulated batch if Trainer tells its number of images, otherwise over this batch.
        """
        logits = outputs["logits"].float()
        smoothing = self.label_smoothing if self.training else 0.0
        targets = soft_targets(labels, logits.shape[-1], smoothing, self.weight)
        total = F.cross_entropy(logits, targets, reduction="sum")
        return total / (len(labels) if num_items_in_batch is None else num_items_in_batch)
