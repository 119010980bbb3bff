"""HEIC and HEIF pictures, as phones write them, through the optional pillow-heif. AVIF is Pillow's."""

import io
from collections.abc import Callable

import numpy as np
from PIL import Image

from hf_mim.models.pixels import ImageFormatError

from .deep import without_alpha

_HEAD = 64  # bytes that tell the kind
_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx")
_ANY_CODEC = (b"mif1", b"msf1")  # the compatible brands tell it (ISO 23008-12, 10)


def is_heif(data: bytes) -> bool:
    """Whether the bytes are a HEIF file with HEVC pictures, by the first 64 of them."""
    if data[4:8] != b"ftyp":
        return False
    end = min(int.from_bytes(data[:4], "big"), _HEAD)
    brands = [data[8:12], *(data[at : at + 4] for at in range(16, end - 3, 4))]
    return brands[0] in _BRANDS or brands[0] in _ANY_CODEC and any(brand in _BRANDS for brand in brands)


def read_heif(
    data: bytes, num_channels: int | None, check_size: Callable[[int, int], None]
) -> Image.Image | np.ndarray:
    """The main picture, upright: a PIL image of 8 bits, or an array of uint16 with the numbers of the file.

    num_channels: alpha of 10 and 12 bits is left out, but where all channels together are so many.

    Raises:
        ImageFormatError: pillow-heif is missing, or too many pixels.
        ValueError, RuntimeError and the like: the file is damaged.
    """
    picture = _opened(io.BytesIO(data))
    check_size(*picture.size)
    if ";" not in picture.mode:
        image = picture.to_pillow()
        return image.convert("RGBA") if image.mode == "RGBa" else image
    return without_alpha(np.array(picture, np.uint16), num_channels)


def heif_size(file) -> tuple[int, int]:
    """(width, height) of the main picture, upright. Nothing is decoded. Raises as `read_heif`."""
    return _opened(file).size


def _opened(file):
    try:
        import pillow_heif
    except ImportError:
        raise ImageFormatError("a HEIC file needs pillow-heif: pip install hf-mim[heif]") from None
    opened = pillow_heif.open_heif(file, convert_hdr_to_8bit=False, hdr_to_16bit=False)
    return opened[opened.primary_index]
