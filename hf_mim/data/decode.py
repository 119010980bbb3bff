"""Decode an image of any kind, and convert it to the channels that the config asks for.

- Palette, CMYK, YCbCr, LAB, HSV and 1-bit images go through PIL's `convert`.
- Alpha is dropped, as `convert("RGB")` and transformers' `load_image` do. It is kept if `num_channels` is 2 or 4.
- Grey becomes 3 channels by replication; colour becomes 1 channel by luminance, .299 R + .587 G + .114 B.
- 16-bit images (I;16, uint16) are divided by 257: 0..65535 becomes 0..255. This is the same for every image, so that
  brightness stays comparable. Data that uses fewer bits comes out dark: rescale it to the full range first.
- 32-bit integers and floats (I, F, numpy) have no fixed range. Their largest value tells it: up to 1 (floats), 255 or
  65535.
- Numpy arrays and TIFFs with other numbers of channels stay as they are: the number must be `num_channels`.
- EXIF orientation is applied.
"""

import contextlib
import io
import struct
import zlib

import numpy as np
from PIL import Image, JpegImagePlugin, UnidentifiedImageError

from hf_mim.files import one_line

from .tiff import is_multiband_tiff, read_multiband_tiff

MODES = {1: "L", 2: "LA", 3: "RGB", 4: "RGBA"}  # what PIL itself can convert to
LUMINANCE = (0.299, 0.587, 0.114)
_EXIF_ORIENTATION = 0x0112
# What decoders raise on damaged bytes. PIL's plugins do not catch ValueError, IndexError and the like.
_DECODE_ERRORS = (OSError, EOFError, SyntaxError, ValueError, TypeError, LookupError, ArithmeticError)
_DECODE_ERRORS += (struct.error, zlib.error, Image.DecompressionBombError)


class ImageFormatError(ValueError):
    """An intact image that cannot become what the config asks for. The user has to fix this, so it is never skipped."""


class BrokenImage(Exception):
    """One image that cannot be decoded."""


@contextlib.contextmanager
def decoding(name: str):
    """Turn everything that a decoder raises into `BrokenImage`; add the image's name to an `ImageFormatError`."""
    try:
        yield
    except ImageFormatError as error:
        raise ImageFormatError(f"{name}: {error}") from None
    except UnidentifiedImageError as error:
        raise BrokenImage(f"{name}: not an image, or of an unknown format") from error
    except _DECODE_ERRORS as error:
        raise BrokenImage(f"{name}: {one_line(error)}") from error


def image_name(value, otherwise: str) -> str:
    """The path in a value of an image column, or `otherwise` if it has none."""
    return (value.get("path") if isinstance(value, dict) else None) or otherwise


def stored(value):
    """What a value of an image column holds: of `{"bytes", "path"}` the bytes or else the path; other values as are."""
    if not isinstance(value, dict):
        return value
    return value["bytes"] if value.get("bytes") is not None else value.get("path")


def open_image(value) -> Image.Image | np.ndarray:
    """Open one value of an image column: `{"bytes", "path"}`, a path, bytes, a PIL image, or an array.

    A JPEG is returned undecoded, so that the caller may still `draft` it; every other image is decoded.
    """
    value = stored(value)
    if value is None:
        raise OSError("the row holds no image")
    if isinstance(value, str):
        with open(value, "rb") as file:
            value = file.read()
    if isinstance(value, bytes):
        return _open_bytes(value)
    if isinstance(value, Image.Image):
        value.load()
        return value
    return np.asarray(value)


def _open_bytes(data: bytes) -> Image.Image | np.ndarray:
    if data.startswith(b"\x93NUMPY"):
        return np.load(io.BytesIO(data), allow_pickle=False)
    if is_multiband_tiff(data):
        return read_multiband_tiff(data)
    image = Image.open(io.BytesIO(data))
    if not isinstance(image, JpegImagePlugin.JpegImageFile):
        image.load()  # EXIF may follow the pixels (PNG), or be applied by load itself (TIFF)
    return image


def exif_orientation(image: Image.Image) -> tuple[bool, bool, bool]:
    """(flip x, flip y, swap axes): whether to do each of these, in this order, to make the stored image upright."""
    if not image.info.keys() & {"exif", "xmp", "XML:com.adobe.xmp", "Raw profile type exif"}:
        return False, False, False
    try:
        orientation = image.getexif().get(_EXIF_ORIENTATION, 1)
    except (SyntaxError, ValueError, struct.error):  # the picture may be intact though its EXIF block is damaged
        orientation = 1
    return orientation in (2, 3, 7, 8), orientation in (3, 4, 6, 7), orientation in (5, 6, 7, 8)


def to_channels(image: Image.Image | np.ndarray, num_channels: int) -> Image.Image | np.ndarray:
    """The image with 8 bits and `num_channels` channels: a PIL image of mode L, LA, RGB or RGBA, or uint8 [h, w, C].

    Raises:
        ImageFormatError: the image cannot be converted to `num_channels`.
    """
    if isinstance(image, np.ndarray):
        return _array_to_channels(image, num_channels)
    if num_channels not in MODES:
        raise ImageFormatError(f"num_channels={num_channels}, but the image has {len(image.getbands())} ({image.mode})")
    mode = MODES[num_channels]
    if image.mode.startswith("I") or image.mode == "F":
        image = Image.fromarray(to_uint8(np.asarray(image)))
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")
    return image if image.mode == mode else image.convert(mode)


def _array_to_channels(array: np.ndarray, num_channels: int) -> np.ndarray:
    """[h, w], [h, w, C] or [C, h, w] of any numeric type -> uint8 [h, w, num_channels]."""
    if array.ndim == 2:
        array = array[..., None]
    if array.ndim != 3 or array.size == 0:
        raise ImageFormatError(f"an array image must be [h, w], [h, w, C] or [C, h, w], not {list(array.shape)}")
    # Which axis holds the channels? The one of length `num_channels`; otherwise the one short enough to be channels.
    first, last = array.shape[0], array.shape[2]
    if last != num_channels and (first == num_channels or (first < last and last not in MODES)):
        array = array.transpose(1, 2, 0)
    array = to_uint8(array)
    found = array.shape[2]
    if found == num_channels:
        return array
    if found == 1 and num_channels == 3:
        return array.repeat(3, axis=2)
    if found == 3 and num_channels == 1:
        return (array @ np.asarray(LUMINANCE) + 0.5).astype(np.uint8)[..., None]
    raise ImageFormatError(f"num_channels={num_channels}, but the image has {found}")


def to_uint8(array: np.ndarray) -> np.ndarray:
    """Scale any numeric array to uint8 by the rules at the top of this file.

    Raises:
        ImageFormatError: complex or non-numeric values, negative ones, or more than 65535.
        ValueError: values that are not finite; such an image is damaged.
    """
    if array.dtype == np.uint8:
        return array
    if array.dtype == np.bool_:
        return array.astype(np.uint8) * 255
    if array.dtype.kind not in "iuf":
        raise ImageFormatError(f"an array image must be numeric, not {array.dtype}")
    low, high = array.min(), array.max()
    if not (np.isfinite(low) and np.isfinite(high)):
        raise ValueError("has values that are not finite")
    if low < 0 or high > 65535:
        raise ImageFormatError(f"image values must lie in 0..1, 0..255 or 0..65535, not in {low:g}..{high:g}")
    if (array.dtype.kind == "u" and array.dtype.itemsize == 2) or high > 255:  # of either byte order
        scale = 1 / 257
    else:
        scale = 255.0 if array.dtype.kind == "f" and high <= 1 else 1.0
    return (array * np.float32(scale) + np.float32(0.5)).astype(np.uint8)
