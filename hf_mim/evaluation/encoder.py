"""One contract for every encoder that is evaluated: images in, tokens of any layer out.

It holds for our encoders and for any vision encoder that `AutoModel` loads: vision transformers (ViT, DINOv2 and 3,
I-JEPA, CLIP's, …), and networks whose maps shrink from stage to stage (Swin, ConvNeXt, ResNet). Hooks read the layers,
so that a layer means the same in each: the residual stream after the block or stage, before any final norm.
"""

import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from hf_mim.data import IMAGENET_MEAN, IMAGENET_STD, CenterCrop, CenterWindow, DeviceAugment, WholeImage
from hf_mim.data.processor import InputSpec, image_processor, read_processor
from hf_mim.evaluation.checkpoint import load_encoder, model_sha256, weight_stamps
from hf_mim.evaluation.inputs import (
    UNKNOWN_SIZE,
    channels_of,
    check_forward,
    forward_arguments,
    image_model,
    native_size,
    reads_nodata,
    unmasked,
)
from hf_mim.evaluation.layers import Layers, find_layers
from hf_mim.files import one_line
from hf_mim.models.configuration_vit import pair
from hf_mim.models.image_processing_mim import MIMImageProcessor
from hf_mim.models.pixels import ValueRange
from hf_mim.models.positions import sincos_table

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class FeatureSpec:
    """Which features of an encoder; `last/mean/norm` as text.

    layer: "last", "last4" (the last four concatenated, as I-JEPA reports), or the number of a block, from 1.
    pooling: "mean" of the patch tokens, "cls", or "tokens" (every patch token, in raster order).
    norm: whether the encoder's final norm is applied ("norm" in text) or not ("raw": the residual stream as it is).
    """

    layer: str = "last"
    pooling: str = "mean"
    norm: bool = True

    @classmethod
    def parse(cls, text: "str | FeatureSpec") -> "FeatureSpec":
        """`layer/pooling/norm` or `layer/pooling/raw`. Raises ValueError for anything else."""
        if isinstance(text, FeatureSpec):
            return text
        match = re.fullmatch("(last|last4|0*[1-9][0-9]*)/(mean|cls|tokens)/(norm|raw)", text)
        if not match:
            raise ValueError(
                f"features must be layer/pooling/norm, such as last/mean/norm, last4/cls/raw, 6/tokens/norm, not {text}"
            )
        return cls(match[1], match[2], match[3] == "norm")

    def __str__(self) -> str:
        return f"{self.layer}/{self.pooling}/{'norm' if self.norm else 'raw'}"

    def blocks(self, num_layers: int) -> list[int]:
        """The numbers of the blocks that are read; the first block is 1."""
        if self.layer == "last4":
            return list(range(num_layers - 3, num_layers + 1))
        return [num_layers if self.layer == "last" else int(self.layer)]


class FrozenEncoder:
    """A vision encoder in eval mode, without gradients.

    Args:
        model: a vision model of transformers, whose blocks or stages stand in a ModuleList.
        mean, std: one value for each channel, for pixels in [0, 1].
        image_size: int or (height, width) to which images are resized; default: the model's, or 224.
        name: the checkpoint, for results.
        dtype: float32, or bfloat16 for autocast.
        value_range: what the values of the images are scaled from; default: the whole range of their type.
        crop: which part of an image it sees unless one asks for another; default: `CenterCrop()`.

    Attributes: `image_size`; `num_channels`; of the last layer `grid` (rows, columns), `width` (D), `patch_size` (what
    a token sees of the image); `num_layers`; `num_prefix_tokens` (CLS, registers); `norm` (the final
    norm); `device`; `untrained_seed` (see `untrained`); `trust_remote_code` (as in `load`); `stamps` (of the files from
    which it was loaded, see `weight_stamps`).

    Raises:
        ValueError: the model is of another kind, or its positions cannot be resized to image_size.
    """

    def __init__(
        self,
        model: nn.Module,
        mean,
        std,
        image_size=None,
        name: str | None = None,
        dtype=torch.float32,
        value_range: ValueRange | None = None,
        crop=None,
    ):
        model = image_model(model)
        self.value_range, self.crop = value_range, CenterCrop() if crop is None else crop
        self.model, self.name, self.dtype, self.untrained_seed = model.eval(), name, dtype, None
        self.trust_remote_code, self.stamps = False, None
        self.mean, self.std = list(mean), list(std)
        check_forward(model, name)
        self.num_channels = channels_of(model.config)
        size = native_size(model.config) or UNKNOWN_SIZE
        self.image_size = pair(size if image_size is None else image_size)
        if len(self.mean) != self.num_channels or len(self.std) != self.num_channels:
            raise ValueError(f"image_mean and image_std must have {self.num_channels} values, not {mean}, {std}")
        self.normalize = DeviceAugment(self.mean, self.std, nodata=self.has_nodata and not reads_nodata(model)).eval()
        self.layers = self._find_layers()
        last = self.layers.streams[-1]
        self.num_layers, self.norm, self.patch_size = len(self.layers.streams), self.layers.norm, self.layers.stride
        self.num_prefix_tokens, self.width, self.grid = last.num_prefix, last.width, last.grid

    @classmethod
    def load(
        cls,
        checkpoint: str | Path,
        image_size=None,
        device=None,
        dtype=torch.float32,
        mean=None,
        std=None,
        trust_remote_code: bool = False,
    ):
        """From a checkpoint folder or a name on the Hub. Its image processor gives mean, std and size by default.

        Python that the checkpoint brings along runs only with `trust_remote_code`.

        Raises ValueError, in one line, for a checkpoint without an encoder, or with only a part of its weights.
        """
        checkpoint = str(checkpoint)
        stamps = weight_stamps(checkpoint)
        model = cls._read(checkpoint, trust_remote_code)
        check_forward(image_model(model), checkpoint)
        channels = channels_of(image_model(model).config)
        known = read_processor(checkpoint, channels)
        if mean is None and known is None:
            if channels != 3:
                raise ValueError(f"checkpoint {checkpoint} has no image processor: give image_mean and image_std")
            logger.warning("checkpoint %s has no image processor: ImageNet's mean and std are taken", checkpoint)
        known = known or InputSpec(IMAGENET_MEAN, IMAGENET_STD, None)
        mean, std = (known.mean, known.std) if mean is None else (mean, std)
        device = device or (torch.accelerator.current_accelerator() if torch.accelerator.is_available() else "cpu")
        size = known.size if image_size is None else image_size
        crop = cls._crop_of(known)
        if known.crop_pixels is not None:  # at another size, the window follows, so that the scale stays
            crop = CenterWindow.for_size(known.crop_pixels, pair(size), known.size)
        encoder = cls(model.to(device), mean, std, size, checkpoint, dtype, known.value_range, crop)
        encoder.trust_remote_code, encoder.stamps = trust_remote_code, stamps
        return encoder

    @staticmethod
    def _read(checkpoint: str, trust_remote_code: bool) -> nn.Module:
        return image_model(load_encoder(checkpoint, trust_remote_code))

    @staticmethod
    def _crop_of(known: InputSpec) -> CenterCrop | None:
        """The central crop that a checkpoint states; None: the default one."""
        return None  # the protocols of the papers choose it, whatever images were pretrained on

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    @property
    def is_untrained(self) -> bool:
        return self.untrained_seed is not None

    @property
    def has_nodata(self) -> bool:
        """Whether images may have pixels without data."""
        return self.value_range is not None and self.value_range.nodata is not None

    @property
    def sha256(self) -> str:
        """The hash of the weights as they are now."""
        return model_sha256(self.model)

    def untrained(self, seed: int = 0) -> "FrozenEncoder":
        """The same architecture with new random weights. Trained features have to be better than its features."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = type(self.model)(self.model.config)
            if model.config.model_type == "vit_mae":
                table = model.embeddings.position_embeddings.data  # transformers leaves it zero
                side = model.config.image_size // model.config.patch_size
                table.copy_(sincos_table((side, side), table.shape[-1], num_prefix_tokens=1))
        about = self.mean, self.std, self.image_size, self.name, self.dtype, self.value_range, self.crop
        encoder = FrozenEncoder(model.to(self.device), *about)
        encoder.untrained_seed, encoder.trust_remote_code = seed, self.trust_remote_code
        return encoder

    @property
    def modalities(self) -> list[str] | None:
        """The modalities that it reads, if it does not read all channels."""
        return getattr(self.model.config, "modalities_seen", None)

    def read_only(self, modalities: Sequence[str]):
        """Read these modalities alone from now on. Raises ValueError if the encoder has no such modalities."""
        config = self.model.config
        if not hasattr(config, "check_seen"):
            raise ValueError(f"modalities must be left out: the channels of {self.name} are one modality")
        config.check_seen(modalities)
        config.modalities_seen = list(modalities)

    def describe(self) -> dict:
        """Everything about the encoder that decides a feature, except its layer and pooling."""
        return {
            "weights": self.sha256,
            "architecture": self.model.config.to_dict(),
            "image_size": self.image_size,
            "mean": self.mean,
            "std": self.std,
            **described(self.value_range),
            "dtype": str(self.dtype),
            "device": self.device.type,
        }

    def image_processor(self, crop) -> MIMImageProcessor:
        """One that makes of an image what `preprocess` is given after `crop`, as `FeatureExtractor` takes it."""
        part = None if isinstance(crop, WholeImage) else crop.fraction, getattr(crop, "pixels", None)
        return image_processor(self.image_size, self.mean, self.std, self.value_range, *part)

    def preprocess(self, pixel_values: Tensor) -> Tensor:
        """`[B, C, h, w]`, uint8 or float32 in 0..255 (NaN: no data) → normalised float32 on the encoder's device.

        Pixels without data stay NaN for a model that `reads_nodata`, and become 0 for others."""
        return self.normalize(pixel_values.to(self.device, non_blocking=True))

    def check(self, spec: FeatureSpec):
        """Raise ValueError if the encoder has no such features."""
        if spec.blocks(self.num_layers)[0] < 1 or spec.blocks(self.num_layers)[-1] > self.num_layers:
            raise ValueError(f"features {spec} need a layer that {self.name} has not: it has {self.num_layers}")
        streams = [self.layers.streams[number - 1] for number in spec.blocks(self.num_layers)]
        raw = FeatureSpec(spec.layer, spec.pooling, norm=False)
        if spec.norm and self.norm is None:
            raise ValueError(
                f"features {spec} need a final norm, and {self.name} has none: take raw (--features {raw})"
            )
        if spec.norm and any(stream.width != self.width for stream in streams):
            raise ValueError(f"features {spec} need layers of the final norm's width {self.width}: --features {raw}")
        if spec.pooling == "cls" and any(stream.num_prefix == 0 for stream in streams):
            raise ValueError(f"features {spec} need a CLS token, and {self.name} has none: take mean")
        if spec.pooling == "tokens" and any(stream.grid != self.grid for stream in streams):
            raise ValueError(
                f"features {spec} need layers of the last one's grid {self.grid}: take mean, or layer last"
            )
        if spec.pooling == "tokens" and not all(stream.is_raster for stream in streams):
            raise ValueError(f"features {spec} need tokens in raster order, which {self.name} does not tell: take mean")

    def feature_width(self, spec: FeatureSpec) -> int:
        """D; for the last four layers, the sum of their D."""
        return sum(self.layers.streams[number - 1].width for number in spec.blocks(self.num_layers))

    @torch.no_grad()
    def extract(self, pixel_values: Tensor, specs: Sequence[FeatureSpec]) -> list[Tensor]:
        """Normalised images `[B, C, H, W]` → for each spec float32 `[B, D]`, or `[B, N, D]` for tokens ("last4": 4·D).

        The images go through the model once for all specs.
        """
        wanted = {block for spec in specs for block in spec.blocks(self.num_layers)}
        streams = self.layers.run(partial(self._encode, pixel_values), wanted)
        features = []
        for spec in specs:
            layers = [self._pool(streams[number], number, spec) for number in spec.blocks(self.num_layers)]
            features.append(torch.cat(layers, dim=-1))
        assert all(len(feature) == len(pixel_values) for feature in features)
        return features

    def _pool(self, tokens: Tensor, number: int, spec: FeatureSpec) -> Tensor:
        """Tokens `[B, prefix + N, D]` of a layer → `[B, D]`, or `[B, N, D]`."""
        pools_first = self.layers.pools_first and spec.pooling == "mean"
        if spec.norm and not pools_first:
            tokens = self.norm(tokens)
        if spec.pooling == "cls":
            return tokens[:, 0].float()
        patches = tokens[:, self.layers.streams[number - 1].num_prefix :].float()
        if spec.pooling == "tokens":
            return patches
        return self.norm(patches.mean(dim=1)) if spec.norm and pools_first else patches.mean(dim=1)

    def _encode(self, images: Tensor, **options):
        """What the model returns for normalised images, whole and in raster order."""
        autocast = torch.autocast(self.device.type, torch.bfloat16, enabled=self.dtype == torch.bfloat16)
        with unmasked(self.model), autocast:
            return self.model(**forward_arguments(self.model, images), **options)

    @torch.no_grad()
    def _find_layers(self) -> Layers:
        """Run the model on noise: does it take the size, and where are its layers and patches?"""
        height, width = self.image_size
        patch = getattr(self.model.config, "patch_size", None)
        for side, length in zip(self.image_size, pair(1 if patch is None else patch), strict=True):
            if side < length or side % length:
                raise ValueError(
                    f"image_size must be divisible by the patch size {pair(patch)} of {self.name}, not "
                    f"{height},{width}; {max(side // length, 1) * length} would be right for {side}"
                )
        noise = torch.randn(1, self.num_channels, height, width, generator=torch.Generator().manual_seed(0))
        try:
            return find_layers(self.model, self._encode, noise.to(self.device))
        except (ValueError, RuntimeError) as error:  # of a forward that was not made for this size, or of find_layers
            reason = one_line(error, 200)
            raise ValueError(f"image_size {height},{width} does not suit {self.name}: {reason}") from error


def described(value_range: ValueRange | None) -> dict:
    """What decides how an image's values are scaled."""
    about = {"value_range": None if value_range is None else value_range.as_list()}
    return about if value_range is None or value_range.nodata is None else about | {"nodata": str(value_range.nodata)}
