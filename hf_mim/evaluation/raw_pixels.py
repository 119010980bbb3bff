"""Raw pixels in the place of an encoder, for comparison."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from hf_mim.data import CenterCrop, DeviceAugment
from hf_mim.evaluation.encoder import FeatureSpec, FrozenEncoder, described
from hf_mim.models.pixels import ValueRange


class RawPixels:
    """No encoder, for comparison: the features are the normalised pixels, averaged down to 32×32 where there are more.

    An extractor takes it as a `FrozenEncoder` with one layer and one patch (the image); every spec gives the pixels.
    """

    name, num_layers, num_prefix_tokens, grid, dtype = "raw pixels", 1, 0, (1, 1), torch.float32
    norm, is_untrained, stamps, modalities = None, False, None, None

    def __init__(
        self,
        mean,
        std,
        image_size: tuple[int, int],
        device="cpu",
        value_range: ValueRange | None = None,
        crop=None,
        channels: list[int] | None = None,
    ):
        self.value_range, self.crop = value_range, CenterCrop() if crop is None else crop
        self.mean, self.std, self.image_size, self.device = list(mean), list(std), image_size, torch.device(device)
        self.patch_size, self.num_channels = image_size, len(self.mean)
        self.side = min(32, image_size[0]), min(32, image_size[1])
        self.channels = list(range(self.num_channels)) if channels is None else channels
        self.width = len(self.channels) * self.side[0] * self.side[1]
        self.normalize = DeviceAugment(self.mean, self.std, nodata=self.has_nodata).eval()

    @classmethod
    def of(cls, encoder: FrozenEncoder) -> "RawPixels":
        """The pixels that an encoder sees, of the modalities that it reads."""
        about = encoder.mean, encoder.std, encoder.image_size, encoder.device, encoder.value_range, encoder.crop
        if encoder.modalities is None:
            return cls(*about)
        config: Any = encoder.model.config
        own, everything = config.channels_of_modalities, range(encoder.num_channels)
        seen = [channel for name in own if name in encoder.modalities for channel in everything[own[name]]]
        return cls(*about, channels=seen)

    def describe(self) -> dict:
        about = {"weights": self.name, "image_size": self.image_size, "mean": self.mean, "std": self.std}
        if len(self.channels) < self.num_channels:
            about["channels"] = self.channels
        return about | described(self.value_range)

    has_nodata = FrozenEncoder.has_nodata
    preprocess = FrozenEncoder.preprocess

    def check(self, spec: FeatureSpec):
        """Nothing to check: every spec gives the pixels."""

    def feature_width(self, spec: FeatureSpec) -> int:
        return self.width

    def extract(self, pixel_values: Tensor, specs: Sequence[FeatureSpec]) -> list[Tensor]:
        pixels = pixel_values[:, self.channels].nan_to_num(nan=0.0)  # NaN: no data; an encoder beside it may be told so
        pixels = F.adaptive_avg_pool2d(pixels, self.side).flatten(1)
        return [pixels[:, None] if spec.pooling == "tokens" else pixels for spec in specs]
