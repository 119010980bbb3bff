"""A model with everything that its images have to go through, and images as the model and a screen see them."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from hf_mim.checks import check_bands
from hf_mim.data import CenterWindow
from hf_mim.data.crop import load_crop
from hf_mim.data.decode import BrokenImage, decoding, image_name
from hf_mim.evaluation.checkpoint import load_whole
from hf_mim.evaluation.encoder import FeatureSpec, FrozenEncoder
from hf_mim.models.configuration_vit import MIMConfig
from hf_mim.models.pixels import scale_pixels
from hf_mim.trainer_utils import seeded
from hf_mim.visualize.display import Display

NO_DATA_NOTE = " Violet: no data."


@dataclass
class View:
    """Images `[B, C, h, w]` in the range 0..255 (float32; NaN: no data), and how each of them is shown.

    stretched: whether black and white are taken from the values of an image, see `Display.of`.
    """

    pixels: Tensor
    displays: list[Display]
    stretched: list[bool]

    @classmethod
    def of(cls, pixels: Tensor, stretched: list[bool], bands: Sequence[int] | None) -> "View":
        """bands: those that are shown, from 1; default: as `Display.of`."""
        pairs = zip(pixels, stretched, strict=True)
        return cls(pixels, [Display.of(image, bands, stretch) for image, stretch in pairs], stretched)

    def of_bands(self, bands: Sequence[int]) -> "View":
        """The same images, of which other bands are shown."""
        return View.of(self.pixels, self.stretched, bands)

    def __len__(self) -> int:
        return len(self.pixels)

    @property
    def size(self) -> tuple[int, int]:
        return tuple(self.pixels.shape[2:])

    def shown(self, pixels: Tensor | None = None) -> list[np.ndarray]:
        """RGB `[h, w, 3]` of the images, or of other `pixels` as if they were these images."""
        pixels = self.pixels if pixels is None else pixels
        return [display(image) for display, image in zip(self.displays, pixels, strict=True)]

    @property
    def note(self) -> str:
        return self._bands + (NO_DATA_NOTE if self.lacks_data() else "")

    def lacks_data(self) -> bool:
        """Whether a pixel without data is shown."""
        pairs = zip(self.displays, self.pixels, strict=True)
        return any(image[list(display.bands)].isnan().any() for display, image in pairs)

    @property
    def _bands(self) -> str:
        """Which bands are shown, where it does not go without saying."""
        channels, bands = self.pixels.shape[1], self.displays[0].bands
        if bands == tuple(range(channels)):
            return ""
        named = ", ".join(str(band + 1) for band in bands)
        if len(bands) == 1:
            return f" Shown in grey: band {named} of {channels}."
        return f" Red, green and blue of an image are its bands {named} of {channels}."


class Viewer:
    """What a picture needs of a model.

    Args:
        encoder: makes the features, and says what an image has to go through.
        pretraining: the model with its decoder or predictor; None: pictures of features alone can be made.
        bands: which bands of an image are shown as red, green and blue (or one as grey), from 1; default: the first
            three.
    """

    def __init__(
        self, encoder: FrozenEncoder, pretraining: nn.Module | None = None, bands: Sequence[int] | None = None
    ):
        check_bands(bands, encoder.num_channels)
        self.encoder, self.bands = encoder, bands
        self.pretraining = None if pretraining is None else pretraining.eval()

    @classmethod
    def load(cls, checkpoint: str | Path, image_size=None, device=None, bands: Sequence[int] | None = None) -> "Viewer":
        """From a folder or a name on the Hub: a pretraining checkpoint, or any encoder that `AutoModel` loads.

        Raises ValueError, in one line, for a checkpoint that cannot be loaded.
        """
        from transformers import AutoModelForPreTraining

        encoder = FrozenEncoder.load(checkpoint, image_size, device)
        config, pretraining = encoder.model.config, None
        if isinstance(config, MIMConfig) and any("ForPreTraining" in name for name in config.architectures or ()):
            pretraining = load_whole(AutoModelForPreTraining, str(checkpoint), "model").to(encoder.device)
        return cls(encoder, pretraining, bands)

    @classmethod
    def of(cls, model) -> "Viewer":
        """The viewer itself, or that of a checkpoint."""
        return model if isinstance(model, Viewer) else cls.load(model)

    @property
    def name(self) -> str:
        return Path(str(self.encoder.name)).name

    def read(self, images: Iterable, size: tuple[int, int] | None = None) -> View:
        """Images as evaluation takes them: the central crop, in the encoder's size or another.

        images: files, PIL images, arrays, or rows of a dataset with an `image`.

        Raises:
            BrokenImage: one cannot be decoded.
            ValueError: one is of another kind than the model takes, or there is none.
        """
        encoder, size = self.encoder, size or self.encoder.image_size
        crop = encoder.crop
        if isinstance(crop, CenterWindow):
            crop = CenterWindow.for_size(crop.pixels, size, encoder.image_size)
        pixels, stretched = [], []
        for number, image in enumerate(images, start=1):
            image = image["image"] if isinstance(image, dict) and "image" in image else image
            image = str(image) if isinstance(image, Path) else image
            with decoding(image if isinstance(image, str) else image_name(image, f"image {number}")):
                stored = load_crop(image, crop, size, encoder.num_channels, None, encoder.value_range)
                scaled = scale_pixels(stored, encoder.value_range).float()
            deep = stored.dtype != torch.uint8 and getattr(encoder.value_range, "pixel_type", None) != "uint8"
            pixels.append(scaled)
            stretched.append(deep)
        if not pixels:
            raise ValueError("images must be at least one")
        return View.of(torch.stack(pixels), stretched, self.bands)

    def readable(self, images: Iterable, count: int) -> list:
        """The first `count` of the images that can be decoded."""
        found = []
        for image in images:
            try:
                self.read([image])
            except BrokenImage:
                continue
            found.append(image)
            if len(found) == count:
                break
        return found

    def tokens(self, view: View) -> Tensor:
        """The features of the patches of each image, `[B, N, D]` on the CPU, in raster order."""
        self.encoder.check(spec := FeatureSpec(pooling="tokens", norm=self.encoder.norm is not None))
        tokens = torch.cat([self.encoder.extract(self.encoder.preprocess(x[None]), [spec])[0] for x in view.pixels])
        check_finite(tokens, self.name)
        return tokens.cpu()

    @property
    def grid(self) -> tuple[int, int]:
        return self.encoder.grid

    @property
    def num_patches(self) -> int:
        return self.grid[0] * self.grid[1]

    @property
    def predicts_pixels(self) -> bool:
        return hasattr(self.pretraining, "reconstruct")

    def draw_masks(self, count: int, seed: int = 0, **given) -> dict[str, Tensor]:
        """The masks (ids, noise, offsets) of one pass over `count` images, the same for every device."""
        with seeded(seed, self.encoder.device):
            masks = self.pretraining.draw_masks(count, self.grid, "cpu", **given)
        return {name: value.to(self.encoder.device) for name, value in masks.items()}


def check_finite(values: Tensor, name: str):
    """Raise ValueError for what a broken checkpoint gives."""
    if not values.isfinite().all():
        raise ValueError(f"the features of {name} hold numbers that are not finite, and cannot be shown")
