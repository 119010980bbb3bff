"""Augmentation on the device, a whole batch at a time: no loop over images, no wait for the device."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice

import torch
from torch import Tensor, nn

from hf_mim.checks import share
from hf_mim.models.pixels import LUMINANCE, ValueRange, scale, scale_and_shift

from .damage import rows_of

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


class DeviceAugment(nn.Module):
    """Pixels [B, C, h, w] on the device -> turned, flipped, jittered, greyed, blurred, normalised float32 [B, C, h, w].

    Pixels are uint8, or float32 in 0..255. With a `value_range` they come in their own depth, and it scales them first.
    Pixels without data come as NaN. They reach no other pixel, and become 0, the mean of their channel.

    Flip alone is the recipe of MAE and Latent MIM; StoP (arXiv 2308.00566) adds grayscale and blur. If keys are given,
    int64 [B], the key of an image decides what is done to it, whatever else is in the batch. Without keys, torch's
    default generator of the device decides. In `eval()` mode images are only normalised.

    Args:
        mean, std: one value for each channel, for pixels scaled to [0, 1].
        flip_probability: of a left-right flip.
        grayscale_probability: of replacing the three channels by their luminance (.299, .587, .114).
        blur_probability: of a Gaussian blur whose standard deviation, in pixels, is drawn uniformly from `blur_sigma`.
        value_range: what the values of the images are scaled from; values beyond it are clipped.
        vertical_flip_probability: of an upside-down flip.
        rotate90: turn each image by 0, 90, 180 or 270 degrees, each as likely; the images must be square.
        color_jitter: S in [0, 1]. For each image and channel, a gain g is drawn uniformly from 1 - S..1 + S and an
            offset o from -S..S. With x scaled to 0..1 and m the channel's `mean`, x becomes m + g (x - m) + o, clipped
            to 0..1.
        nodata: whether there may be pixels without data; default: whether the value_range says so.

    Images are turned first, then flipped upside down, then left to right.
    """

    def __init__(
        self,
        mean: Sequence[float] = IMAGENET_MEAN,
        std: Sequence[float] = IMAGENET_STD,
        flip_probability: float = 0.5,
        grayscale_probability: float = 0.0,
        blur_probability: float = 0.0,
        blur_sigma: tuple[float, float] = (0.1, 2.0),
        value_range: ValueRange | None = None,
        vertical_flip_probability: float = 0.0,
        rotate90: bool = False,
        color_jitter: float = 0.0,
        nodata: bool = False,
    ):
        super().__init__()
        if not mean or len(mean) != len(std):
            raise ValueError(f"mean and std need one value for each channel, not {len(mean)} and {len(std)} values")
        if min(std) <= 0:
            raise ValueError(f"std must be positive, not {list(std)}")
        share(flip_probability=flip_probability, grayscale_probability=grayscale_probability)
        share(blur_probability=blur_probability, vertical_flip_probability=vertical_flip_probability)
        share(color_jitter=color_jitter)
        if grayscale_probability and len(mean) not in (1, 3):
            raise ValueError(f"grayscale_probability must be 0 for images of {len(mean)} channels, not 3 or 1")
        if not 0 < blur_sigma[0] <= blur_sigma[1]:
            raise ValueError(f"blur_sigma must be two positive numbers, the smaller first, not {blur_sigma!r}")
        self.flip_probability = flip_probability
        self.grayscale_probability = grayscale_probability if len(mean) == 3 else 0.0  # one channel is grey already
        self.blur_probability = blur_probability
        self.blur_sigma = tuple(blur_sigma)
        self.vertical_flip_probability, self.rotate90 = vertical_flip_probability, rotate90
        self.color_jitter = color_jitter
        scale, shift = scale_and_shift(mean, std)
        self.register_buffer("scale", scale[None], persistent=False)
        self.register_buffer("shift", shift[None], persistent=False)
        self.value_range = value_range
        self.nodata = nodata or (value_range is not None and value_range.nodata is not None)
        if value_range is not None:
            offset, factor = value_range.offset_and_factor()
            self.register_buffer("offset", offset, persistent=False)
            self.register_buffer("factor", factor, persistent=False)
        self.register_buffer(
            "centre", 255 * torch.tensor(mean, dtype=torch.float32).view(1, -1, 1, 1), persistent=False
        )
        self.register_buffer("luminance", torch.tensor(LUMINANCE).view(1, -1, 1, 1), persistent=False)

    def forward(self, pixel_values: Tensor, keys: Tensor | None = None) -> Tensor:
        return self.with_valid(pixel_values, keys)[0]

    def with_valid(self, pixel_values: Tensor, keys: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """(what `forward` gives; where there are data, bool [B, C, h, w], or None for images without such pixels)."""
        images = self._augmented(pixel_values, keys)
        return self._normalize(images), ~images.isnan() if self.nodata else None

    def _augmented(self, pixel_values: Tensor, keys: Tensor | None) -> Tensor:
        def uniform(stream: int) -> Tensor:
            if keys is None:
                return torch.rand(len(pixel_values), device=pixel_values.device)
            return keyed_uniform(keys, stream)

        def chosen_of(stream: int, probability: float) -> Tensor:
            return (uniform(stream) < probability).view(-1, 1, 1, 1)

        pixel_values = self._scaled(pixel_values)
        if not self.training:
            return pixel_values
        pixel_values = self._turned(pixel_values, uniform)
        if not (self.grayscale_probability or self.blur_probability or self.color_jitter):
            return pixel_values
        images = pixel_values.float()
        if self.color_jitter:
            images = self._jittered(images, keys)
        if self.grayscale_probability:
            grey = (images * self.luminance.to(images.device)).sum(1, keepdim=True)
            images = torch.where(chosen_of(1, self.grayscale_probability), grey, images)
        if self.blur_probability:
            low, high = self.blur_sigma
            blur = blur_valid if self.nodata else gaussian_blur
            blurred = blur(images, low + (high - low) * uniform(2))
            images = torch.where(chosen_of(3, self.blur_probability), blurred, images)
        return images

    def _turned(self, images: Tensor, uniform: Callable[[int], Tensor]) -> Tensor:
        """Rotations and flips of each image: its pixels in other places, so that they stay exact."""
        across, upside_down = None, None  # which images are flipped
        if self.flip_probability:
            across = uniform(0) < self.flip_probability
        if self.vertical_flip_probability:
            upside_down = uniform(5) < self.vertical_flip_probability
        if self.rotate90:
            if images.shape[-1] != images.shape[-2]:
                raise ValueError(f"rotate90 needs square images, not {images.shape[-2]} x {images.shape[-1]}")
            # k quarter turns to the left: a transposition if k is odd, then up-down if k is 1 or 2, across if 2 or 3.
            quarters = (uniform(4) * 4).floor()
            images = _chosen(quarters % 2 == 1, images.mT.clone(memory_format=torch.contiguous_format), images)
            turned_up, turned_across = (quarters == 1) | (quarters == 2), quarters >= 2
            upside_down = turned_up if upside_down is None else turned_up ^ upside_down
            across = turned_across if across is None else turned_across ^ across
        if upside_down is not None:
            images = _chosen(upside_down, images.flip(-2), images)
        return images if across is None else _chosen(across, images.flip(-1), images)

    def _jittered(self, images: Tensor, keys: Tensor | None) -> Tensor:
        """Random contrast and brightness of each channel: see `color_jitter`. float, in 0..255."""
        batch, channels = images.shape[:2]
        if keys is None:
            gain, offset = torch.rand(2, batch, channels, device=images.device)
        else:
            streams = 2 * torch.arange(channels, device=images.device)
            gain, offset = (keyed_uniform(keys[:, None], first + streams) for first in (8, 9))
        gain, offset = ((2 * x[..., None, None] - 1) * self.color_jitter for x in (gain, offset))
        centre = self.centre.to(images.device)
        return (centre + (1 + gain) * (images - centre) + 255 * offset).clamp_(0, 255)

    def normalize(self, pixel_values: Tensor) -> Tensor:
        """(x / 255 - mean) / std, for x in 0..255 or scaled to it from `value_range`, [B, C, h, w], as float32."""
        return self._normalize(self._scaled(pixel_values))

    def _scaled(self, pixel_values: Tensor) -> Tensor:
        if self.value_range is None:
            return pixel_values
        if self.offset.device != pixel_values.device:
            self.to(pixel_values.device)
        return scale(pixel_values, self.offset, self.factor)

    def _normalize(self, pixel_values: Tensor) -> Tensor:
        if pixel_values.shape[-3] != self.scale.shape[1]:
            channels = self.scale.shape[1]
            raise ValueError(f"mean and std are for {channels} channels, but pixel_values has {pixel_values.shape[-3]}")
        if self.scale.device != pixel_values.device:
            self.to(pixel_values.device)
        # In place: on a CPU, fresh memory costs more than the arithmetic.
        images = pixel_values.to(torch.float32, copy=True).mul_(self.scale).add_(self.shift)
        return images.nan_to_num_(nan=0.0) if self.nodata else images

    def denormalize(self, pixel_values: Tensor) -> Tensor:
        """The inverse of `normalize`: float32 in 0..255, not rounded: a dark image of 16 bits would have few levels."""
        images = (pixel_values.float() - self.shift.to(pixel_values.device)) / self.scale.to(pixel_values.device)
        return images.clamp(0, 255)

    def statistics(self) -> tuple[list[float], list[float]]:
        """The mean and std of each channel that `normalize` uses."""
        scale, shift = self.scale.double().flatten(), self.shift.double().flatten()
        std = 1 / (255 * scale)
        return (-shift * std).tolist(), std.tolist()


def _chosen(chosen: Tensor, changed: Tensor, images: Tensor) -> Tensor:
    """For each image [B, ...] the changed one, a copy, where it is chosen, bool [B]."""
    chosen = chosen.view(-1, 1, 1, 1)
    if images.dtype == torch.uint8:
        # x + chosen * (changed - x): exact in uint8, modulo 256, and on a CPU 7 times as fast as torch.where
        return changed.sub_(images).mul_(chosen.to(torch.uint8)).add_(images)
    return torch.where(chosen, changed, images)


def keyed_uniform(keys: Tensor, stream: int | Tensor) -> Tensor:
    """A number in [0, 1) for each key, int64 [B] -> float32 [B]: the same on every device and in every batch.

    With several streams, int64 [C], and keys [B, 1], float32 [B, C]. Streams are independent. Keys are mixed by
    SplitMix64's finaliser (Steele, Lea, Flood: "Fast splittable pseudorandom number generators", OOPSLA 2014), on
    integers that wrap around.
    """

    def shifted(x: Tensor, bits: int) -> Tensor:
        return (x >> bits) & ((1 << (64 - bits)) - 1)  # the shift of an int64 alone would copy the sign bit

    gamma = 0x9E3779B97F4A7C15
    x = keys + (_signed(gamma * (stream + 1)) if isinstance(stream, int) else _signed(gamma) * (stream + 1))
    x = (x ^ shifted(x, 30)) * _signed(0xBF58476D1CE4E5B9)
    x = (x ^ shifted(x, 27)) * _signed(0x94D049BB133111EB)
    return shifted(x ^ shifted(x, 31), 40).float() / (1 << 24)


def _signed(number: int) -> int:
    """The low 64 bits as an int64."""
    return (number + (1 << 63)) % (1 << 64) - (1 << 63)


def gaussian_blur(images: Tensor, sigma: Tensor) -> Tensor:
    """Blur each image with its own sigma, in pixels: float [B, C, h, w], [B] -> float [B, C, h, w].

    The kernel is as wide as the image, and is renormalised at the border. A blur along one axis is a product with a
    square matrix for each image, so that two batched matrix products blur the batch.
    """
    with torch.autocast(images.device.type, enabled=False):
        rows = _blur_matrix(images.shape[-2], sigma)[:, None]
        columns = _blur_matrix(images.shape[-1], sigma)[:, None]
        return rows @ images.float() @ columns.mT


def blur_valid(images: Tensor, sigma: Tensor) -> Tensor:
    """As `gaussian_blur`, but each pixel is the weighted mean of the valid pixels around it. NaN stays where it is."""
    valid = ~images.isnan()
    sums, weights = (gaussian_blur(x, sigma) for x in (torch.where(valid, images, 0), valid.float()))
    return torch.where(valid, sums / weights, torch.nan)


def _blur_matrix(side: int, sigma: Tensor) -> Tensor:
    """[B, side, side]; row i holds the weights of a Gaussian centred on pixel i. The softmax normalises them."""
    places = torch.arange(side, device=sigma.device, dtype=torch.float32)
    distance = places[:, None] - places
    return torch.softmax(-(distance**2) / (2 * sigma.float()[:, None, None] ** 2), dim=-1)


def channel_statistics(
    images: Iterable[dict], num_images: int = 1024, seed: int = 0, watch: Callable[[Iterable], Iterable] = iter
) -> tuple[list[float], list[float]]:
    """(mean, std) of each channel for pixels scaled to [0, 1], over all pixels of a random sample of an `ImageDataset`.

    The sample of an `ImageStream` is its first `num_images` images. `watch` passes the samples on, such as with a
    progress bar.
    """
    total = square = count = 0
    for sample in watch(sampled(images, num_images, seed)):
        pixels = sample["pixel_values"].to(torch.float64).flatten(1) / 255
        valid, pixels = ~pixels.isnan(), pixels.nan_to_num_(nan=0.0)  # NaN: pixels without data
        total, square, count = total + pixels.sum(1), square + pixels.square().sum(1), count + valid.sum(1)
    if isinstance(count, int):
        raise ValueError("images has no image to take the channels' mean and std from")
    count = count.clamp(min=1)
    mean = total / count
    # At least 1 / 255, because normalising divides by it and a channel may be constant.
    std = (square / count - mean.square()).clamp(min=0).sqrt().clamp(min=1 / 255)
    return mean.tolist(), std.tolist()


def sampled(images, num_images: int, seed: int) -> Iterator[dict]:
    """So many samples of an `ImageDataset` or rows of a `Dataset`, drawn at random; of a stream, the first."""
    if not hasattr(images, "__len__"):
        return islice(rows_of(images), num_images)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
    return (images[index] for index in order[:num_images].tolist())
