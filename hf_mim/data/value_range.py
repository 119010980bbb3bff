"""Which values of the images are black and white: given, or measured once over a sample of them.

No rule looks at the brightest pixel, of one image or of all: what one hot pixel decides is not reproducible.
"""

import torch
from torch import Tensor

from hf_mim.models.pixels import ImageFormatError, ValueRange, type_name

from .augment import sampled

_IMAGES, _PROBES = 1024, 16  # measured where any image is not of 8 bits; opened to see whether one is
_PIXELS = 1024  # of each image and band
_TAIL = 0.001  # share of the values at either end that may lie outside a measured range
_FEW_LEVELS = 64


def find_value_range(images, given: list[float] | None, num_channels: int) -> tuple[ValueRange | None, str | None]:
    """(the range, a line that says what was found); (None, None) for 8-bit images if no range is given.

    - uint16: from 0 to the least 2^k - 1 that only a thousandth of the values exceed, the same for all bands.
    - Floats that lie in 0..1, other whole numbers that lie in 0..255, but for a thousandth at either end: these limits.
    - All else: from the lowest to the highest thousandth of the values, for each band.

    Args:
        images: an `ImageDataset`, or an `ImageStream`, of which the first images are taken.
        given: low, high, or such a pair for each band.

    Raises:
        ImageFormatError: images of several depths and no range, or nothing but one value.
        ValueError: `given` has a wrong length.
    """
    fixed = None if given is None else ValueRange.from_list(given, num_channels)
    images = images.in_range(None, own_depth=True)
    found = _types(sampled(images.identify(), _PROBES, seed=0))
    if fixed is None and len(found) > 1:
        raise ImageFormatError(
            f"the images have several depths, {' and '.join(f'{kind} ({name})' for kind, name in found.items())}; "
            "convert them to one, or give the value_range that holds for all"
        )
    kind = next(iter(found))
    if fixed is None and kind == "uint8":
        return None, None
    values, count = _values(sampled(images, _IMAGES, seed=0))
    value_range = fixed or _measured(values, kind)
    if len(found) == 1:
        value_range = ValueRange(value_range.low, value_range.high, kind)
    return value_range, _line(value_range, kind if len(found) == 1 else "several depths", values, count, fixed is None)


def _types(samples) -> dict[str, str]:
    """Type → the name of an image that has it."""
    found = {}
    for sample in samples:
        found.setdefault(type_name(sample["pixel_values"]), sample["name"])
    return found


def _values(samples) -> tuple[Tensor, int]:
    """(values [C, n] of some pixels of each image, sorted; the number of images)."""
    parts = []
    for sample in samples:
        pixels = sample["pixel_values"].flatten(1).float()
        parts.append(pixels[:, :: max(1, pixels.shape[1] // _PIXELS)])
    return torch.cat(parts, dim=1).sort(dim=1).values, len(parts)


def _measured(values: Tensor, kind: str) -> ValueRange:
    tail = int(values.shape[1] * _TAIL)
    low, high = values[:, tail], values[:, -1 - tail]
    if (low == high).all():
        raise ImageFormatError(f"the images hold one value, {low[0].item():g}; give value_range if that is right")
    least, most = low.min().item(), high.max().item()
    if kind == "uint16":
        return ValueRange((0.0,), (float(2 ** max(8, int(most).bit_length()) - 1),))
    limit = 1 if kind == "float32" else 255
    if 0 <= least and most <= limit:
        return ValueRange((0.0,), (float(limit),))
    equal = low == high  # a band that never varies: any range of it is right
    return ValueRange(tuple(low.tolist()), tuple((high + equal).tolist()))


def _line(value_range: ValueRange, kind: str, values: Tensor, count: int, measured: bool) -> str:
    low, high = torch.tensor(value_range.low)[:, None], torch.tensor(value_range.high)[:, None]
    used = value_range.as_list()
    scaled = f"{used[0]:,}..{used[1]:,}" if len(used) == 2 else "a range of each band"
    listed = ",".join(f"{value:.6g}" for value in used)
    line = (
        f"pixels: {kind}, {values.min().item():,.6g}..{values.max().item():,.6g} over {count:,} images → scaled from "
    )
    line += f"{scaled}; change it with --value_range {listed}" if measured else f"{scaled}, as given"
    if outside := ((values < low) | (values > high)).float().mean().item():
        line += f"; {outside:.2%} of the values lie outside and are clipped"
    if (levels := len(values.clamp(low, high).unique())) < _FEW_LEVELS:
        line += f"; WARNING: only {levels} levels of the data are used"
    return line
