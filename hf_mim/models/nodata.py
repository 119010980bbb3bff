"""Pixels without data ("nodata"): beside the swath of a satellite, behind clouds, beyond the border of a scan.

From the file to the normalised batch they are NaN. So they move with the pixels in every crop and flip, and what the
file holds in their place reaches no other pixel.
"""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

# A pixel of a resized image has data if at least this share of its weights falls on pixels with data. The small margin
# is for rounding: exactly half is enough.
LEAST_VALID = 0.5 - 1e-5


class EmptyImage(Exception):
    """No pixel of an image has data."""


def as_text(nodata: float) -> str:
    """As one types it: "-9999", "nan"; every digit of a fraction."""
    return str(int(nodata)) if abs(nodata) < 1e15 and nodata == int(nodata) else repr(nodata)


def is_possible(nodata: float, kind: str) -> bool:
    """Whether images of a type ("uint8") can hold the value. Floats can hold any, and NaN."""
    if kind.startswith("float"):
        return True
    low, high = _limits(kind)
    return bool(low <= nodata <= high) and nodata == int(nodata)


def _limits(kind: str) -> tuple[int, int]:
    """int32 stands for wider types too: their value without data never becomes an int32."""
    return (-(2**63), 2**64 - 1) if kind == "int32" else (np.iinfo(kind).min, np.iinfo(kind).max)


def impossible(nodata: float, kind: str, images: str) -> str:
    """The message about a value that the images, in words, cannot hold."""
    low, high = _limits(kind)
    return f"nodata must be a whole number in {low:,}..{high:,} for {images}, not {as_text(nodata)}"


def blanked(pixels: np.ndarray, nodata: float) -> np.ndarray:
    """The pixels as float32, with NaN where they are `nodata` or not finite."""
    nan = np.float32("nan")
    if pixels.dtype.kind == "f":
        with np.errstate(over="ignore"):  # the lowest float64, a usual value, becomes -inf
            return np.where(np.isfinite(pixels) & (pixels != np.float32(nodata)), pixels, nan)
    if not is_possible(nodata, pixels.dtype.name):
        return pixels.astype(np.float32)
    return np.where(pixels == int(nodata), nan, pixels).astype(np.float32)


def resize_valid(pixels: Tensor, size: tuple[int, int]) -> Tensor:
    """Float32 [C, h, w] in `size`, without a trace of the NaN pixels: a normalised convolution.

    Each pixel of the result is the weighted mean of the valid pixels under the bicubic kernel. It is NaN if less than
    half of the kernel's weight falls on valid pixels.
    """
    if pixels.shape[1:] == tuple(size):
        return pixels.contiguous()
    valid = ~pixels.isnan()
    if not valid.any():
        return pixels.new_full((len(pixels), *size), torch.nan)
    stacked = torch.cat([torch.where(valid, pixels, 0), valid.float()])[None]
    sums, weights = F.interpolate(stacked, size, mode="bicubic", antialias=True)[0].chunk(2)
    resized = (sums / weights).clamp_(*pixels[valid].aminmax())
    return torch.where(weights >= LEAST_VALID, resized, torch.nan)
