"""One contract for every encoder that is evaluated: images in, tokens of any layer out.

It holds for our encoders and for any vision transformer that `AutoModel` loads (ViT, DINOv2, I-JEPA, CLIP's, …). Hooks
read the layers, so that a layer means the same in each: the residual stream after the block, before any final norm.
"""

import contextlib
import hashlib
import inspect
import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hf_mim.data import IMAGENET_MEAN, IMAGENET_STD, DeviceAugment, WholeImage
from hf_mim.data.processor import InputSpec, image_processor, read_processor
from hf_mim.evaluation.checkpoint import blocks_of, image_model, load_encoder
from hf_mim.files import one_line
from hf_mim.models.configuration_vit import pair
from hf_mim.models.image_processing_mim import MIMImageProcessor
from hf_mim.models.pixels import ValueRange
from hf_mim.models.positions import sincos_table

logger = logging.getLogger(__name__)

# Names of the final norm in transformers' vision models; `post_layernorm` is CLIP's and SigLIP's.
NORM_NAMES = ("norm", "layernorm", "post_layernorm", "rms_norm")


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
    """A vision transformer in eval mode, without gradients.

    Args:
        model: a transformers vision model whose blocks stand in one ModuleList and return `[B, prefix + N, D]`.
        mean, std: one value for each channel, for pixels in [0, 1].
        image_size: int or (height, width) to which images are resized; default: the model's.
        name: the checkpoint, for results.
        dtype: float32, or bfloat16 for autocast.
        value_range: what the values of the images are scaled from; default: the whole range of their type.

    Attributes: `image_size`, `patch_size`, `grid` (rows, columns), `num_channels`, `width` (D), `num_layers`,
    `num_prefix_tokens` (CLS, registers), `norm` (the final norm), `device`, `is_untrained` (see `untrained`),
    `trust_remote_code` (as in `load`).

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
    ):
        model = image_model(model)
        self.value_range = value_range
        self.model, self.name, self.dtype, self.is_untrained = model.eval(), name, dtype, False
        self.trust_remote_code = False
        self.mean, self.std = list(mean), list(std)
        config = getattr(model, "config", None)
        if not hasattr(config, "patch_size") or not hasattr(config, "image_size"):
            raise ValueError(f"checkpoint {name} holds {type(model).__name__}, which is no vision transformer")
        self.blocks = blocks_of(model)[1]
        norms = (getattr(model, norm, None) for norm in NORM_NAMES)
        self.norm = next((norm for norm in norms if norm is not None and not isinstance(norm, nn.Identity)), None)
        self.num_layers, self.num_channels = len(self.blocks), getattr(config, "num_channels", 3)
        self.native_size, self.patch_size = pair(config.image_size), pair(config.patch_size)
        self.image_size = self.native_size if image_size is None else pair(image_size)
        if len(self.mean) != self.num_channels or len(self.std) != self.num_channels:
            raise ValueError(f"image_mean and image_std must have {self.num_channels} values, not {mean}, {std}")
        self.normalize = DeviceAugment(self.mean, self.std).eval()
        self._check_size()

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
        model = load_encoder(checkpoint, trust_remote_code)
        channels = getattr(image_model(model).config, "num_channels", 3)
        known = read_processor(checkpoint, channels)
        if mean is None and known is None:
            if channels != 3:
                raise ValueError(f"checkpoint {checkpoint} has no image processor: give image_mean and image_std")
            logger.warning("checkpoint %s has no image processor: ImageNet's mean and std are taken", checkpoint)
        known = known or InputSpec(IMAGENET_MEAN, IMAGENET_STD, None)
        mean, std = (known.mean, known.std) if mean is None else (mean, std)
        device = device or (torch.accelerator.current_accelerator() if torch.accelerator.is_available() else "cpu")
        size = known.size if image_size is None else image_size
        encoder = cls(model.to(device), mean, std, size, checkpoint, dtype, known.value_range)
        encoder.trust_remote_code = trust_remote_code
        return encoder

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    @property
    def grid(self) -> tuple[int, int]:
        return tuple(side // patch for side, patch in zip(self.image_size, self.patch_size, strict=True))

    @property
    def sha256(self) -> str:
        """The hash of the weights as they are now: names, types, shapes and values."""
        digest = hashlib.sha256()
        for name, tensor in sorted(self.model.state_dict().items()):
            digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
            digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
        return digest.hexdigest()

    def untrained(self, seed: int = 0) -> "FrozenEncoder":
        """The same architecture with new random weights. Trained features have to be better than its features."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = type(self.model)(self.model.config)
            if model.config.model_type == "vit_mae":
                table = model.embeddings.position_embeddings.data  # transformers leaves it zero
                side = model.config.image_size // model.config.patch_size
                table.copy_(sincos_table((side, side), table.shape[-1], num_prefix_tokens=1))
        about = self.mean, self.std, self.image_size, self.name, self.dtype, self.value_range
        encoder = FrozenEncoder(model.to(self.device), *about)
        encoder.is_untrained, encoder.trust_remote_code = True, self.trust_remote_code
        return encoder

    def describe(self) -> dict:
        """Everything about the encoder that decides a feature, except its layer and pooling."""
        return {
            "weights": self.sha256,
            "architecture": self.model.config.to_dict(),
            "image_size": self.image_size,
            "mean": self.mean,
            "std": self.std,
            "value_range": None if self.value_range is None else self.value_range.as_list(),
            "dtype": str(self.dtype),
            "device": self.device.type,
        }

    def image_processor(self, crop) -> MIMImageProcessor:
        """One that makes of an image what `preprocess` is given after `crop`, a `CenterCrop` or `WholeImage`."""
        fraction = None if isinstance(crop, WholeImage) else crop.fraction
        return image_processor(self.image_size, self.mean, self.std, self.value_range, fraction)

    def preprocess(self, pixel_values: Tensor) -> Tensor:
        """`[B, C, h, w]`, uint8 or float32 in 0..255 → normalised float32 on the encoder's device."""
        return self.normalize(pixel_values.to(self.device, non_blocking=True))

    def check(self, spec: FeatureSpec):
        """Raise ValueError if the encoder has no such features."""
        if spec.blocks(self.num_layers)[0] < 1 or spec.blocks(self.num_layers)[-1] > self.num_layers:
            raise ValueError(f"features {spec} need a layer that {self.name} has not: it has {self.num_layers}")
        if spec.norm and self.norm is None:
            raise ValueError(f"features {spec} need a final norm, and {self.name} has none: take raw")
        if spec.pooling == "cls" and self.num_prefix_tokens == 0:
            raise ValueError(f"features {spec} need a CLS token, and {self.name} has none: take mean")

    def feature_width(self, spec: FeatureSpec) -> int:
        """D, or 4·D for the last four layers."""
        return self.width * len(spec.blocks(self.num_layers))

    @torch.no_grad()
    def extract(self, pixel_values: Tensor, specs: Sequence[FeatureSpec]) -> list[Tensor]:
        """Normalised images `[B, C, H, W]` → for each spec float32 `[B, D]`, or `[B, N, D]` for tokens ("last4": 4·D).

        The images go through the model once for all specs.
        """
        wanted = {block for spec in specs for block in spec.blocks(self.num_layers)}
        streams = self._streams(pixel_values, wanted)
        features = []
        for spec in specs:
            layers = [streams[block] for block in spec.blocks(self.num_layers)]
            layers = [self.norm(tokens) for tokens in layers] if spec.norm else layers
            features.append(torch.cat([self._pool(tokens, spec.pooling) for tokens in layers], dim=-1))
        assert all(len(feature) == len(pixel_values) for feature in features)
        return features

    def _pool(self, tokens: Tensor, pooling: str) -> Tensor:
        if pooling == "cls":
            return tokens[:, 0].float()
        patches = tokens[:, self.num_prefix_tokens :].float()
        return patches.mean(dim=1) if pooling == "mean" else patches

    def _streams(self, pixel_values: Tensor, wanted: set[int]) -> dict[int, Tensor]:
        """Block number → its output `[B, prefix + N, D]`."""
        streams = {}

        def keep(number, module, args, output):
            streams[number] = output[0] if isinstance(output, tuple) else output

        autocast = torch.autocast(self.device.type, torch.bfloat16, enabled=self.dtype == torch.bfloat16)
        with contextlib.ExitStack() as hooks, self._unmasked(), autocast:
            for number in wanted:
                hooks.enter_context(self.blocks[number - 1].register_forward_hook(partial(keep, number)))
            self.model(pixel_values, **self._options(len(pixel_values), tuple(pixel_values.shape[2:])))
        return streams

    @contextlib.contextmanager
    def _unmasked(self):
        """transformers' ViTMAE masks patches at inference too, unless its mask ratio is 0."""
        config = self.model.config
        if config.model_type != "vit_mae":
            yield
            return
        ratio, config.mask_ratio = config.mask_ratio, 0.0
        try:
            yield
        finally:
            config.mask_ratio = ratio

    def _options(self, batch_size: int, size: tuple[int, int]) -> dict:
        options = {}
        if size != self.native_size and "interpolate_pos_encoding" in inspect.signature(self.model.forward).parameters:
            options["interpolate_pos_encoding"] = True
        if self.model.config.model_type == "vit_mae":  # it sorts the patches by the noise, even if it masks none
            patches = (size[0] // self.patch_size[0]) * (size[1] // self.patch_size[1])
            options["noise"] = torch.arange(patches, device=self.device).float().expand(batch_size, -1)
        return options

    def _check_size(self):
        """Run two images through the model: does it take the size, and how many tokens precede the patches?"""
        height, width = self.image_size
        for side, patch in zip(self.image_size, self.patch_size, strict=True):
            if side < patch or side % patch:
                raise ValueError(
                    f"image_size must be divisible by the patch size {self.patch_size} of {self.name}, not "
                    f"{height},{width}; {max(side // patch, 1) * patch} would be right for {side}"
                )
        blank = torch.zeros(2, self.num_channels, height, width, device=self.device)
        try:
            with torch.no_grad():
                tokens = self._streams(blank, {self.num_layers})[self.num_layers]
        except (ValueError, RuntimeError, TypeError, KeyError, AttributeError) as error:
            reason = one_line(error, 200)
            raise ValueError(f"image_size {height},{width} does not suit {self.name}: {reason}") from error
        patches = self.grid[0] * self.grid[1]
        # CLS, a distillation token and registers may come first. With more tokens, nobody knows which are patches.
        most = 2 + getattr(self.model.config, "num_register_tokens", 0)
        if tokens.ndim != 3 or len(tokens) != 2 or not 0 <= tokens.shape[1] - patches <= most:
            raise ValueError(
                f"{self.name} is no encoder of patches: {list(tokens.shape)} for 2 images of {patches} patches each"
            )
        self.num_prefix_tokens, self.width = tokens.shape[1] - patches, tokens.shape[2]


class RawPixels:
    """No encoder, for comparison: the features are the normalised pixels, averaged down to 32×32 where there are more.

    An extractor takes it as a `FrozenEncoder` with one layer and one patch (the image); every spec gives the pixels.
    """

    name, num_layers, num_prefix_tokens, grid, dtype = "raw pixels", 1, 0, (1, 1), torch.float32

    def __init__(self, mean, std, image_size: tuple[int, int], device="cpu", value_range: ValueRange | None = None):
        self.value_range = value_range
        self.mean, self.std, self.image_size, self.device = list(mean), list(std), image_size, torch.device(device)
        self.patch_size, self.num_channels = image_size, len(self.mean)
        self.side = min(32, image_size[0]), min(32, image_size[1])
        self.width = self.num_channels * self.side[0] * self.side[1]
        self.normalize = DeviceAugment(self.mean, self.std).eval()

    def describe(self) -> dict:
        about = {"weights": self.name, "image_size": self.image_size, "mean": self.mean, "std": self.std}
        return about | {"value_range": None if self.value_range is None else self.value_range.as_list()}

    preprocess = FrozenEncoder.preprocess

    def check(self, spec: FeatureSpec):
        """Nothing to check: every spec gives the pixels."""

    def feature_width(self, spec: FeatureSpec) -> int:
        return self.width

    def extract(self, pixel_values: Tensor, specs: Sequence[FeatureSpec]) -> list[Tensor]:
        pixels = F.adaptive_avg_pool2d(pixel_values, self.side).flatten(1)
        return [pixels[:, None] if spec.pooling == "tokens" else pixels for spec in specs]
