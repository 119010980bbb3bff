"""Images that several measurements read are decoded once: crops that are kept, and encoders that share a pass."""

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import JpegImagePlugin
from torch import Tensor

from hf_mim.data.crop import CenterCrop, CenterWindow, crop_rng
from hf_mim.data.decode import open_image, stored
from hf_mim.evaluation.encoder import FeatureSpec, FrozenEncoder
from hf_mim.evaluation.features import FeatureExtractor
from hf_mim.evaluation.raw_pixels import RawPixels
from hf_mim.models.pixels import crop_image, draft_reduction

ROOM = 2**29  # bytes of images and crops that are kept at once


class KeptCrops:
    """Crops of images for whoever asks again, and a few whole images for other crops of them, up to `room` bytes.

    A large JPEG is not kept whole: each of its crops is decoded at a scale of its own.

    Args:
        whole: how many images are kept whole, the first ones.
    """

    def __init__(self, whole: int = 0, room: int = ROOM):
        self.whole, self.room = whole, room
        self.crops: dict[tuple, Tensor] = {}
        self.images: dict = {}

    def load(self, value, crop, size, num_channels: int, row: int, value_range) -> Tensor:
        """As `load_crop`, with the randomness of a row."""
        name = _name(value)
        key = name, crop, size, None if isinstance(crop, CenterCrop | CenterWindow) else row
        if key not in self.crops:
            kept = self.images.get(name)
            image = self._open(name, value, size, num_channels, value_range) if kept is None else kept
            pixels = crop_image(image, crop, size, num_channels, crop_rng(0, 0, row), value_range=value_range)
            if pixels.nbytes > self.room:
                return pixels
            self.room, self.crops[key] = self.room - pixels.nbytes, pixels
        return self.crops[key]

    def keep_no_more(self):
        """From now on nothing is added, and whole images are let go."""
        self.room, self.images = 0, {}

    def _open(self, name, value, size, num_channels: int, value_range):
        image = open_image(value, num_channels, pixel_type=value_range and value_range.pixel_type)
        nbytes = image.nbytes if isinstance(image, np.ndarray) else image.width * image.height * 4
        if len(self.images) < self.whole and nbytes <= self.room and not _is_drafted(image, size):
            self.room, self.images[name] = self.room - nbytes, image
        return image


def _name(value) -> str | bytes:
    """What tells an image from others: its path, or a hash of what it holds."""
    held = stored(value)
    if isinstance(held, tuple):
        return b"/".join(b"" if part is None else os.fsencode(_name(part)) for part in held)
    if isinstance(held, str):
        return held
    return hashlib.sha256(held if isinstance(held, bytes) else np.asarray(held).tobytes()).digest()


def _is_drafted(image, size: tuple[int, int]) -> bool:
    """Whether a crop of the image may be decoded at a fraction of its size."""
    if not isinstance(image, JpegImagePlugin.JpegImageFile):
        return False
    sides = image.size, image.size[::-1]
    return any(draft_reduction((0, 0, *side), size) > 1 for side in sides)


class _Together:
    """Several encoders that see the same pixels, as one: their features stand side by side."""

    def __init__(self, encoders: Sequence[FrozenEncoder | RawPixels]):
        self.encoders, first = encoders, encoders[0]
        for name in ("name", "dtype", "device", "crop", "image_size", "num_channels", "value_range", "grid"):
            setattr(self, name, getattr(first, name))
        self.preprocess = first.preprocess

    def check(self, spec: FeatureSpec):
        for encoder in self.encoders:
            encoder.check(spec)

    def widths(self, spec: FeatureSpec) -> list[int]:
        return [encoder.feature_width(spec) for encoder in self.encoders]

    def feature_width(self, spec: FeatureSpec) -> int:
        return sum(self.widths(spec))

    def extract(self, pixel_values: Tensor, specs: Sequence[FeatureSpec]) -> list[Tensor]:
        parts = [encoder.extract(pixel_values, specs) for encoder in self.encoders]
        return [torch.cat(features, dim=-1) for features in zip(*parts, strict=True)]


@dataclass
class SharedExtractor(FeatureExtractor):
    """The extractor of one of several encoders: the first that is asked decodes the images for all of them.

    Args:
        number: which of `encoders` this is.
        found: what all of them know already.
    """

    encoders: Sequence[FrozenEncoder | RawPixels] = ()
    number: int = 0
    found: dict | None = None

    @classmethod
    def of(cls, encoders: Sequence[FrozenEncoder | RawPixels], **about) -> "list[SharedExtractor]":
        """One for each encoder. They have one normalisation, crop and size, and pooled features.

        about: arguments of `FeatureExtractor`.
        """
        found: dict = {}
        return [
            cls(encoder, **about, encoders=encoders, number=number, found=found)
            for number, encoder in enumerate(encoders)
        ]

    def __call__(self, split, specs: Sequence[FeatureSpec | str]) -> list[Tensor]:
        specs = [FeatureSpec.parse(spec) for spec in specs]
        key = id(split), tuple(specs)
        if key not in self.found:
            together = _Together(self.encoders)
            names = ("batch_size", "num_workers", "crop", "progress", "kept")
            features = FeatureExtractor(together, **{name: getattr(self, name) for name in names})(split, specs)
            parts = [both.split(together.widths(spec), -1) for both, spec in zip(features, specs, strict=True)]
            self.found[key] = split, parts  # the split too, so that no other one gets its id
        return [part[self.number] for part in self.found[key][1]]
