"""An image of any kind becomes pixels of the channels and the size that a model takes, in the image's own depth.

Training, evaluation and the image processor all call `crop_image`, so that they see the same pixels.

- 8-bit images stay uint8. 16-bit ones stay uint16 or int16, floats float32; wider integers become int32.
- Palette, CMYK, YCbCr, LAB, HSV and 1-bit images go through PIL's `convert`; boolean arrays become 0 and 255.
- Alpha is dropped, as `convert("RGB")` and transformers' `load_image` do. It is kept if `num_channels` is 2 or 4,
  and a picture without alpha is refused then.
- Grey becomes 3 channels by replication; colour becomes 1 channel by luminance, .299 R + .587 G + .114 B.
- Any other number of channels must be `num_channels`.
- EXIF orientation is applied.
- If a value stands for pixels without data, the image becomes float32, with NaN there (`nodata.py`).

The resize is bicubic with antialiasing, as PIL's. There are two ways:
- At full resolution the box has whole pixels. It is sliced, then resized by torch's kernel. For uint8 this equals PIL's
  result up to rounding, and is three times as fast on a machine with AVX2.
- A JPEG whose crop is at least three times the target is decoded at 1/2, 1/4 or 1/8 (`draft`). Then the box may lie
  between pixels, so PIL resizes it: `resize(box=..., reducing_gap=2)`.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, JpegImagePlugin
from torch import Tensor

from .crops import Box
from .nodata import EmptyImage, blanked, is_possible, resize_valid
from .orientation import exif_orientation, upright
from .pixel_types import ImageFormatError, as_pixels, common_type, pixel_type

MODES = {1: "L", 2: "LA", 3: "RGB", 4: "RGBA"}  # what PIL itself can convert to
LUMINANCE = (0.299, 0.587, 0.114)
# The decoder's shrinking filters less well than the resize. With a margin of 1, some crops differ by 6 grey levels on
# average; with 1.5, the worst of 1000 differs by 3.6.
DRAFT_MARGIN = 1.5
# The types of pixels, and the values that each is taken to have if no range is given. For int16, one must be given.
TYPE_RANGES = {"uint8": (0, 255), "uint16": (0, 65535), "int16": None, "int32": (0, 255), "float32": (0, 1)}


@dataclass(frozen=True)
class ValueRange:
    """The values of the images that become 0 and 1, for all bands together or for each band.

    low, high: one value, or one for each band.
    pixel_type: the type of the images for which it was measured: "uint16", or of channels that differ in it
        "3 uint8 + 1 uint16"; images of other types are refused.
    nodata: the value of pixels without data, in the images' own depth; NaN: only those that are not finite.
    """

    low: tuple[float, ...]
    high: tuple[float, ...]
    pixel_type: str | None = None
    nodata: float | None = None

    def __post_init__(self) -> None:
        pairs = list(zip(self.low, self.high, strict=True))
        if not pairs or not all(low < high < float("inf") for low, high in pairs):
            raise ValueError(f"value_range must be pairs of numbers, the smaller first, not {self.as_list()}")

    @classmethod
    def from_list(
        cls, values: Sequence[float], num_channels: int, pixel_type: str | None = None, nodata: float | None = None
    ) -> "ValueRange":
        """From [low, high], or from [low, high, low, high, ...] with a pair for each band."""
        if len(values) not in (2, 2 * num_channels):
            raise ValueError(
                f"value_range must be low,high, or such a pair for each of the {num_channels} channels "
                f"({2 * num_channels} numbers), not {len(values)} numbers"
            )
        return cls(tuple(map(float, values[::2])), tuple(map(float, values[1::2])), pixel_type, nodata)

    def as_list(self) -> list[float]:
        """[low, high], or such a pair for each band one after the other. Whole numbers are ints."""
        values = [value for pair in zip(self.low, self.high, strict=False) for value in pair]
        return [int(value) if value == int(value) else value for value in values]

    def offset_and_factor(self) -> tuple[Tensor, Tensor]:
        """float32 [1 or C, 1, 1] each: (value - offset) * factor lies in 0..255."""
        low, high = (torch.tensor(values, dtype=torch.float64).view(-1, 1, 1) for values in (self.low, self.high))
        return low.float(), (255 / (high - low)).float()

    def check(self, found: str) -> None:
        """Raise ImageFormatError for an image in another type of array than those on which the range was measured."""
        if self.pixel_type is not None and common_type(self.pixel_type) != found:
            raise ImageFormatError(
                f"the image is {found}, and the value range {self.as_list()} was measured on {self.pixel_type}; "
                "convert the image, or give a value_range that holds for both"
            )


EIGHT_BITS = ValueRange((0.0,), (255.0,), "uint8")


def type_name(pixels: Tensor) -> str:
    """ "uint8" for torch.uint8."""
    return str(pixels.dtype).removeprefix("torch.")


def scale_and_shift(mean: Sequence[float], std: Sequence[float]) -> tuple[Tensor, Tensor]:
    """float32 [C, 1, 1] each: x * scale + shift = (x / 255 - mean) / std, for pixels x in 0..255."""
    mean, std = (torch.tensor(values, dtype=torch.float64).view(-1, 1, 1) for values in (mean, std))
    return (1 / (255 * std)).float(), (-mean / std).float()


def scale(pixels: Tensor, offset: Tensor, factor: Tensor) -> Tensor:
    """[..., C, h, w] of any depth -> float32 in 0..255; values beyond the range are clipped, and NaN stays."""
    # In place: on a CPU, fresh memory costs more than the arithmetic.
    return pixels.to(torch.float32, copy=True).sub_(offset).mul_(factor).clamp_(0, 255)


def scale_pixels(pixels: Tensor, value_range: ValueRange | None) -> Tensor:
    """[..., C, h, w] of any depth -> uint8, or float32 in 0..255: by the range, or else by that of the type.

    Raises:
        ImageFormatError: the image has another type than the range; or there is no range, and values lie outside of
            the one that `TYPE_RANGES` has for the type.
    """
    name = type_name(pixels)
    if value_range is not None:
        if value_range.nodata is None:  # else `crop_image` has checked it, and it is float32 now
            value_range.check(name)
        return scale(pixels, *value_range.offset_and_factor())
    if name == "uint8":
        return pixels
    known = TYPE_RANGES[name]
    low, high = (value.item() for value in pixels.to(torch.float32).aminmax())
    if known is None or not known[0] <= low <= high <= known[1]:
        where = "has no range of its own" if known is None else f"is taken to have values in {known[0]}..{known[1]}"
        raise ImageFormatError(
            f"the image has values in {low:g}..{high:g}, and {name} {where}; give value_range, such as "
            f"{low:.4g},{high:.4g}"
        )
    return scale(pixels, *ValueRange(known[:1], known[1:]).offset_and_factor())


def to_channels(
    image: Image.Image | np.ndarray,
    num_channels: int,
    channels_last: bool = False,
    value_range: ValueRange | None = None,
) -> Image.Image | np.ndarray:
    """The image with `num_channels` channels: PIL of mode L, LA, RGB or RGBA, or an array [h, w, C] in its own depth.

    channels_last: an array is [h, w, C], whatever its shape says.
    value_range: if it has `nodata`, an array becomes float32, with NaN there, and where it is masked.

    Raises:
        ImageFormatError: the channels of the image cannot become `num_channels`; it is masked, and there is no
            `nodata`.
    """
    if isinstance(image, Image.Image) and (image.mode.startswith("I") or image.mode == "F"):
        image = np.asarray(image)
    if isinstance(image, np.ndarray):
        return _array_to_channels(image, num_channels, channels_last, value_range)
    lacks_alpha = num_channels in (2, 4) and not image.has_transparency_data  # PIL would add an opaque one
    if num_channels not in MODES or lacks_alpha:
        advice = " and no alpha; save it with alpha, or as an array of its bands" if lacks_alpha else ""
        found = f"{len(image.getbands())} ({image.mode})"
        raise ImageFormatError(f"num_channels={num_channels}, but the image has {found}{advice}")
    mode = MODES[num_channels]
    if image.mode == "P" and image.has_transparency_data:
        image = image.convert("RGBA")
    return image if image.mode == mode else image.convert(mode)


def _array_to_channels(
    array: np.ndarray, num_channels: int, channels_last: bool, value_range: ValueRange | None
) -> np.ndarray:
    """[h, w], [h, w, C] or [C, h, w] of any numeric type -> [h, w, num_channels]."""
    wide = pixel_type(array.dtype) == "int32"
    if array.ndim == 2:
        array = array[..., None]
    if array.ndim != 3 or array.size == 0:
        raise ImageFormatError(f"an array image must be [h, w], [h, w, C] or [C, h, w], not {list(array.shape)}")
    array = array if channels_last else _channels_last(array, num_channels)
    lacking = np.ma.getmask(array)  # where a part of the image is missing
    array = np.ma.getdata(array)
    if value_range is None or value_range.nodata is None:
        if lacking is not np.ma.nomask:
            raise ImageFormatError(
                "a part of the image is missing, and only a model that was pretrained with missing_modality zero, or "
                "nodata, takes such images"
            )
        array = as_pixels(array)
    else:  # before bands are mixed
        value_range.check(pixel_type(array.dtype))
        missing = wide and is_possible(value_range.nodata, "int32") and array == int(value_range.nodata)
        # uint32 and int64 may have a value there that int32 cannot hold.
        array = blanked(as_pixels(np.where(missing, 0, array) if wide else array), value_range.nodata)
        array = np.where(missing, np.float32("nan"), array) if wide else array
        array[lacking] = np.float32("nan")
    found = array.shape[2]
    if found == num_channels:
        return array
    if found == 1 and num_channels == 3:
        return array.repeat(3, axis=2)
    if found == 3 and num_channels == 1:
        grey = (array @ np.asarray(LUMINANCE))[..., None]
        return (grey if array.dtype.kind == "f" else np.rint(grey)).astype(array.dtype)
    raise ImageFormatError(f"num_channels={num_channels}, but the image has {found}")


def _channels_last(array: np.ndarray, num_channels: int) -> np.ndarray:
    """[h, w, C] or [C, h, w] -> [h, w, C]. The channels are the side of length `num_channels`.

    If there is none and `num_channels` is 3 or 1, they are the side of length 1 or 3, which can be converted.
    """
    first, last = array.shape[0], array.shape[2]
    counts = (num_channels,) if num_channels in (first, last) else {1: (3,), 3: (1,)}.get(num_channels, ())
    sides = [side in counts for side in (first, last)]
    if all(sides) and array.shape[1] != 1 and first != 1:
        raise ImageFormatError(
            f"the array {list(array.shape)} can be [h, w, C] or [C, h, w] with num_channels={num_channels}; save it "
            "with sides that differ from the number of channels"
        )
    if not any(sides):
        found = first if first < last else last
        raise ImageFormatError(f"num_channels={num_channels}, but the image has {found}: an array {list(array.shape)}")
    return array if sides[1] else array.transpose(1, 2, 0)


def crop_image(
    image: Image.Image | np.ndarray,
    crop: Any,
    size: tuple[int, int],
    num_channels: int,
    rng: random.Random | None = None,
    channels_last: bool = False,
    value_range: ValueRange | None = None,
    keep_empty: bool = True,
) -> torch.Tensor:
    """The image upright and cropped, in its own depth: [num_channels, h, w]. A JPEG may come undecoded.

    crop: `RandomCrop`, `NativeCrop`, `CenterCrop`, `CenterWindow` or `WholeImage`, or anything with `box` and `exact`.
    channels_last: an array is [h, w, C], whatever its shape says.
    value_range: see `to_channels`.
    keep_empty: False raises `EmptyImage` for an image without any data.
    """
    has_nodata = value_range is not None and value_range.nodata is not None
    if has_nodata and isinstance(image, Image.Image):
        image, channels_last = _unmixed(image, num_channels), True
    if isinstance(image, np.ndarray):
        pixels = _array_to_channels(image, num_channels, channels_last, value_range)
        if has_nodata and not keep_empty and np.isnan(pixels).all():
            raise EmptyImage
        left, top, right, bottom = crop.box(pixels.shape[1], pixels.shape[0], size, rng)
        return _resize(pixels[top:bottom, left:right], size, has_nodata)
    flip_x, flip_y, swap = exif_orientation(image)
    width, height = image.size
    # The box is chosen on the upright picture and moved to the stored one, because turning the small crop is cheap.
    left, top, right, bottom = crop.box(*((height, width) if swap else (width, height)), size, rng)
    if swap:
        left, top, right, bottom, size = top, left, bottom, right, size[::-1]
    if flip_x:
        left, right = width - right, width - left
    if flip_y:
        top, bottom = height - bottom, height - top
    pixels = _crop_stored(image, (left, top, right, bottom), size, num_channels, exact=crop.exact)
    if not (flip_x or flip_y or swap):
        return pixels.contiguous()
    turned = upright(pixels.permute(1, 2, 0).numpy(), flip_x, flip_y, swap)  # by numpy: torch flips no uint16
    return _to_tensor(turned).contiguous()


def _unmixed(image: Image.Image, num_channels: int) -> np.ndarray:
    """A PIL image upright, [h, w] or [h, w, C], before colour becomes grey: a single band may be without data."""
    turned = exif_orientation(image)
    if num_channels in (1, 3):
        num_channels = 1 if image.mode in ("1", "L", "LA") else 3
    is_deep = image.mode.startswith("I") or image.mode == "F"
    return upright(np.array(image if is_deep else to_channels(image, num_channels)), *turned)


def draft_reduction(box: Box, size: tuple[int, int]) -> int:
    """The factor (8, 4, 2, 1) by which the decoder may shrink a JPEG so that the crop keeps `DRAFT_MARGIN` × `size`."""
    room = min((box[2] - box[0]) / size[1], (box[3] - box[1]) / size[0]) / DRAFT_MARGIN
    return next((reduction for reduction in (8, 4, 2) if room >= reduction), 1)


def _crop_stored(image: Image.Image, box: Box, size: tuple[int, int], num_channels: int, exact: bool) -> torch.Tensor:
    reduction = 1
    if isinstance(image, JpegImagePlugin.JpegImageFile):
        reduction = 1 if exact else draft_reduction(box, size)
        # Mode L decodes the luminance alone; None keeps the mode.
        image.draft("L" if num_channels == 1 else None, (image.width // reduction, image.height // reduction))
    if reduction == 1:
        return _resize(np.array(to_channels(image.crop(box), num_channels), copy=True), size)
    image = cast(Image.Image, to_channels(image, num_channels))
    left, top, right, bottom = (min(side / reduction, most) for side, most in zip(box, image.size * 2, strict=True))
    image = image.resize(size[::-1], Image.Resampling.BICUBIC, box=(left, top, right, bottom), reducing_gap=2)
    return _to_tensor(np.array(image))


def _to_tensor(pixels: np.ndarray) -> torch.Tensor:
    """[h, w] or [h, w, C] -> [C, h, w], a view."""
    return torch.from_numpy(pixels if pixels.ndim == 3 else pixels[..., None]).permute(2, 0, 1)


def _resize(pixels: np.ndarray, size: tuple[int, int], has_nodata: bool = False) -> torch.Tensor:
    """[h, w, C] in `size`, within the values of its pixels; whole numbers are rounded. NaN needs `has_nodata`."""
    part = _to_tensor(np.require(pixels, requirements="W"))  # torch warns of read-only memory
    if part.dtype.is_floating_point and not part.isfinite().all():
        if not has_nodata:
            raise ImageFormatError(
                "has values that are not finite; pretrain with --nodata nan if they are pixels without data"
            )
        return resize_valid(part, size)
    if part.shape[1:] == tuple(size):
        return part.contiguous()
    if part.dtype == torch.uint8:
        return F.interpolate(part[None], size, mode="bicubic", antialias=True)[0].contiguous()
    source = part[None].to(torch.float64 if part.dtype == torch.int32 else torch.float32)
    resized = F.interpolate(source, size, mode="bicubic", antialias=True)[0]
    resized = resized.clamp_(*source.aminmax())  # bicubic overshoots at edges, which 8 bits clip too
    return (resized if part.dtype.is_floating_point else resized.round()).to(part.dtype).contiguous()
