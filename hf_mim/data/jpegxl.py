"""JPEG XL pictures, through the optional imagecodecs."""

from collections.abc import Callable

import numpy as np
from PIL import Image

from .deep import imagecodecs_for, without_alpha

_STREAM = b"\xff\x0a"
_CONTAINER = b"\0\0\0\x0cJXL \r\n\x87\n"
_MOST_SIZE_BYTES = 16  # of a stream, in which its size lies
# Numerator and denominator of width / height, by the field `ratio` (ISO 18181-1, SizeHeader).
_RATIOS = {1: (1, 1), 2: (12, 10), 3: (4, 3), 4: (3, 2), 5: (16, 9), 6: (5, 4), 7: (2, 1)}
_LENGTHS = (9, 13, 18, 30)  # bits of a side


def is_jpegxl(data: bytes) -> bool:
    """Whether the bytes are a JPEG XL stream or file."""
    return data.startswith((_STREAM, _CONTAINER))


def read_jpegxl(
    data: bytes, num_channels: int | None, check_size: Callable[[int, int], None]
) -> Image.Image | np.ndarray:
    """The first picture, upright: a PIL image of 8 bits, or an array [h, w] or [h, w, C] of uint16 or floats.

    num_channels: alpha of more than 8 bits is left out, but where all channels together are so many.

    Raises:
        ImageFormatError: imagecodecs is missing, or too many pixels.
        ValueError, RuntimeError and the like: the file is damaged.
    """
    codecs = imagecodecs_for("a JPEG XL file")
    check_size(*_size(data))
    pixels = codecs.jpegxl_decode(data, index=0)
    return Image.fromarray(pixels) if pixels.dtype == np.uint8 else without_alpha(pixels, num_channels)


def _size(data: bytes) -> tuple[int, int]:
    """(width, height) as stored. Raises ValueError if the file holds no picture."""
    stream = data if data.startswith(_STREAM) else b"".join(_parts(data))
    if not stream.startswith(_STREAM):
        raise ValueError("a JPEG XL file without a picture")
    bits, at = int.from_bytes(stream[2:_MOST_SIZE_BYTES], "little"), 0

    def read(count: int) -> int:
        nonlocal at
        at += count
        return bits >> at - count & (1 << count) - 1

    def side() -> int:
        return 8 * (read(5) + 1) if is_small else read(_LENGTHS[read(2)]) + 1

    is_small = read(1)
    height, ratio = side(), read(3)
    if ratio == 0:
        return side(), height
    numerator, denominator = _RATIOS[ratio]
    return height * numerator // denominator, height


def _parts(data: bytes):
    """The beginnings of the parts of the stream in a file of boxes."""
    at = 0
    while at + 8 <= len(data):
        size, kind, start = int.from_bytes(data[at : at + 4], "big"), data[at + 4 : at + 8], at + 8
        if size == 1:
            size, start = int.from_bytes(data[at + 8 : at + 16], "big"), at + 16
        if kind in (b"jxlc", b"jxlp"):
            start += 4 if kind == b"jxlp" else 0  # the number of the part
            end = at + size if size else len(data)
            yield data[start : min(end, start + _MOST_SIZE_BYTES)]
        if size < 8:
            return
        at += size
