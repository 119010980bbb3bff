"""TIFF files of more bands than PIL opens (satellite and microscopy images): strips, raw or deflated, 8 to 32 bits."""

import io
import zlib

import numpy as np
from PIL import TiffImagePlugin

_WIDTH, _HEIGHT, _BITS, _COMPRESSION = 256, 257, 258, 259
_STRIP_OFFSETS, _BANDS, _STRIP_SIZES, _PLANAR, _PREDICTOR = 273, 277, 279, 284, 317
_SAMPLE_FORMAT = 339
_KINDS = {1: "u", 2: "i", 3: "f"}
_MAX_PIL_BANDS = 4


def _tags(data: bytes) -> TiffImagePlugin.ImageFileDirectory_v2:
    file = io.BytesIO(data)
    tags = TiffImagePlugin.ImageFileDirectory_v2(file.read(8))
    file.seek(tags.next)
    tags.load(file)
    return tags


def is_multiband_tiff(data: bytes) -> bool:
    """Whether PIL would not open this file, or would silently drop bands of it."""
    return data[:4] in (b"II*\0", b"MM\0*") and _tags(data).get(_BANDS, 1) > _MAX_PIL_BANDS


def read_multiband_tiff(data: bytes) -> np.ndarray:
    """The first page as [h, w, bands], in the file's own number type.

    Raises:
        OSError: tiles, or a compression other than none and deflate. Save such files as .npy.
    """
    tags = _tags(data)
    width, height, bands = tags[_WIDTH], tags[_HEIGHT], tags[_BANDS]
    compression, bits = tags.get(_COMPRESSION, 1), tags[_BITS][0]
    if _STRIP_OFFSETS not in tags or compression not in (1, 8, 32946) or bits not in (8, 16, 32):
        raise OSError(
            f"a TIFF of {bands} bands must be in strips, raw or deflated, of 8, 16 or 32 bits; or save it as .npy"
        )
    offsets, sizes = tags[_STRIP_OFFSETS], tags[_STRIP_SIZES]
    strips = [data[offset : offset + size] for offset, size in zip(offsets, sizes, strict=True)]
    if compression != 1:
        strips = [zlib.decompress(strip) for strip in strips]
    order = "<" if data[:2] == b"II" else ">"
    dtype = np.dtype(f"{order}{_KINDS[tags.get(_SAMPLE_FORMAT, (1,))[0]]}{bits // 8}")
    pixels = np.frombuffer(b"".join(strips), dtype, count=width * height * bands)
    planar = tags.get(_PLANAR, 1) == 2
    image = pixels.reshape(bands, height, width).transpose(1, 2, 0) if planar else pixels.reshape(height, width, bands)
    if tags.get(_PREDICTOR, 1) == 2:  # each row holds differences to the pixel on the left
        image = np.cumsum(image, axis=1, dtype=dtype)
    return image.astype(dtype.newbyteorder("="), copy=False)
