"""Which values of the images are black and white: given, or measured once over a sample of them.

No rule looks at the brightest pixel, of one image or of all: what one hot pixel decides is not reproducible.
"""

import itertools
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from hf_mim.models.nodata import as_text
from hf_mim.models.pixel_types import ImageFormatError, channel_types, common_type, joined_types, pixel_type
from hf_mim.models.pixels import EIGHT_BITS, ValueRange

from .augment import sampled
from .decode import BrokenImage, decoding, image_name, open_image
from .nodata import check_possible
from .stacks import fits, is_stack, stack_types

_IMAGES, _PROBES = 1024, 16  # measured where any image is not of 8 bits; opened to see whether one is
_PIXELS = 1024  # of each image and band
_TAIL = 0.001  # share of the values at either end that may lie outside a measured range
_FEW_LEVELS = 64


def find_value_range(
    images,
    given: list[float] | None,
    num_channels: int,
    watch: Callable[[Iterable], Iterable] = iter,
    lacking: bool = False,
) -> tuple[ValueRange | None, str | None, str | None]:
    """(the range, a line that says what was found, how many pixels have no data, in words); Nones for 8-bit images if
    no range is given.

    - uint16: from 0 to the least 2^k - 1 that only a thousandth of the values exceed, the same for all bands.
    - Floats that lie in 0..1, other whole numbers that lie in 0..255, but for a thousandth at either end: these limits.
    - All else: from the lowest to the highest thousandth of the values, for each band.
    - Parts of an image that differ in type (`stacks.py`): each part as if it were the image; 8 bits from 0 to 255.

    Args:
        images: an `ImageDataset`, or an `ImageStream`, of which the first images are taken. If its `value_range` has
            `nodata`, the result has it too, pixels without data do not count, and a second line counts those of the
            whole images.
        given: low, high, or such a pair for each band.
        watch: passes the samples on that are measured, such as with a progress bar.
        lacking: whether images may lack parts.

    Raises:
        ImageFormatError: images of several depths and no range, or nothing but one value.
        ValueError: `given` has a wrong length; no image can hold `nodata`.
    """
    fixed = None if given is None else ValueRange.from_list(given, num_channels)
    found, lines = _types(images), []
    if fixed is None and len(found) > 1:
        raise ImageFormatError(
            f"the images have several depths, {' and '.join(f'{kind} ({name})' for kind, name in found.items())}; "
            "convert them to one, or give the value_range that holds for all"
        )
    kind = next(iter(found)) if len(found) == 1 else None
    nodata = None if images.value_range is None else images.value_range.nodata
    if nodata is not None:
        check_possible(nodata, {common_type(kind): name for kind, name in found.items()})
        if nodata != nodata and not lacking and not any("float32" in kind for kind in found):
            nodata, lines = None, ["nodata: none, because whole numbers are never NaN; the tags of files are ignored"]
    if fixed is None and kind == "uint8" and nodata is None:
        return None, "\n".join(lines) or None, None
    images = images.in_range(None if nodata is None else images.value_range, own_depth=True)
    images = images if nodata is None else images.count_missing()
    values, counts = _values(watch(sampled(images, _IMAGES, seed=0)))
    for channel, own in enumerate(channel_types(kind or "float32", num_channels)):
        if own == "uint8":
            values[channel].clamp_(0, 255)  # a resize overshoots at edges; in an image of 8 bits it ends there
    value_range = fixed or (EIGHT_BITS if kind == "uint8" else _measured_parts(values, kind))
    value_range = ValueRange(value_range.low, value_range.high, kind, nodata)
    lines.insert(0, _line(value_range, kind or "several depths", values, counts.images, fixed is None))
    missing = None if nodata is None else counts.missing_in_words(nodata, images, lacking)
    if missing is not None:
        lines.append(f"nodata: {missing}")
    return value_range, "\n".join(lines), missing


def _types(images) -> dict[str, str]:
    """Type → the name of an image that has it, of a few images. They are read as they are, NaN and all.

    Images that lack a part are only asked whether they fit the type of one that lacks none.
    """
    found, read, incomplete = {}, 0, []
    for row in sampled(images.images, _IMAGES, seed=0):
        name = image_name(row["image"], "an image")
        try:
            with decoding(name):
                types = _types_of(row["image"], images.num_channels)
        except BrokenImage:
            continue  # it is counted when the images are sampled
        if None in types:
            incomplete.append((types, name))
            continue
        found.setdefault(joined_types(types), name)
        if (read := read + 1) == _PROBES:
            break
    if incomplete and not found:
        raise ImageFormatError(
            "missing_modality zero needs some images that have all parts, and each of the "
            f"{len(incomplete):,} images that were looked at lacks one; of a stream, shuffle the files or raise "
            "shuffle_buffer"
        )
    for types, name in incomplete:
        if not any(fits(types, kind) for kind in found):
            found[joined_types(types)] = name
    return found


def _types_of(value, num_channels: int) -> list[str | None]:
    """The type of each channel of an image, None for those that it lacks; one for all if it has no parts."""
    if is_stack(value):
        return stack_types(value, num_channels, open_image)
    return [_type_of(open_image(value, num_channels))]


def _type_of(image) -> str:
    is_deep = isinstance(image, np.ndarray) or image.mode.startswith("I") or image.mode == "F"
    return pixel_type(np.asarray(image).dtype) if is_deep else "uint8"


@dataclass
class _Counts:
    """Images that were measured; those with pixels without data; values without data, and all, of whole images."""

    images: int = 0
    touched: int = 0
    missing: int = 0
    pixels: int = 0

    def missing_in_words(self, nodata: float, images, lacking: bool) -> str:
        share = 100 * self.missing / self.pixels
        words = f"{share:.{1 if share >= 0.1 or not share else 4}f} % of the pixels, in {self.touched:,} of "
        what = f"{as_text(nodata)}{', by the tags of the files' if images.checks_tags else ''}"
        what = ("missing parts" if nodata != nodata else f"missing parts; {what}") if lacking else what
        words += f"{self.images:,} images ({what})"
        if empty := images.num_empty():
            words += f"; {empty:,} images hold no data at all and are left out"
        return words


def _values(samples) -> tuple[Tensor, _Counts]:
    """(values [C, n] of some pixels of each image, sorted, NaN last; how many have no data)."""
    parts, counts = [], _Counts()
    for sample in samples:
        pixels = sample["pixel_values"].flatten(1).float()
        missing, total = sample.get("missing", (0, 0))
        counts.images += 1
        counts.touched += missing > 0
        counts.missing += missing
        counts.pixels += total
        parts.append(pixels[:, :: max(1, pixels.shape[1] // _PIXELS)])
    if not parts:
        raise ImageFormatError("no image of the dataset holds data")
    return torch.cat(parts, dim=1).sort(dim=1).values, counts


def _measured_parts(values: Tensor, kind: str) -> ValueRange:
    """The range of images of a type, measured for each run of channels of one type by itself."""
    types = channel_types(kind, len(values))
    if len(set(types)) == 1:
        return _measured(values, kind)
    low, high = [], []
    for one, run in itertools.groupby(range(len(types)), key=types.__getitem__):
        channels = [*run]
        part = EIGHT_BITS if one == "uint8" else _measured(values[channels], one)
        for ends, own in ((low, part.low), (high, part.high)):
            ends += own if len(own) == len(channels) else own * len(channels)
    return ValueRange(tuple(low), tuple(high))


def _measured(values: Tensor, kind: str) -> ValueRange:
    count = (~values.isnan()).sum(dim=1)
    if not count.all():
        raise ImageFormatError(f"band {int(count.argmin()) + 1} holds no data in any image; give value_range")
    tail = (count * _TAIL).long()
    low, high = (values.gather(1, place[:, None])[:, 0] for place in (tail, count - 1 - tail))
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
    used, valid = value_range.as_list(), ~values.isnan()
    data = values[valid]
    scaled = f"{used[0]:,}..{used[1]:,}" if len(used) == 2 else "a range of each band"
    listed = ",".join(f"{value:.6g}" for value in used)
    line = f"pixels: {kind}, {data.min().item():,.6g}..{data.max().item():,.6g} over {count:,} images → scaled from "
    line += f"{scaled}; change it with --value_range {listed}" if measured else f"{scaled}, as given"
    if outside := ((values < low) | (values > high))[valid].float().mean().item():
        line += f"; {outside:.2%} of the values lie outside and are clipped"
    if (levels := len(values.clamp(low, high)[valid].unique())) < _FEW_LEVELS:
        line += f"; WARNING: only {levels} levels of the data are used"
    return line
