"""Files of more than 8 bits a channel that PIL would cut to 8 bits, or rescale: they are read as stored, or refused."""

import re

import numpy as np
from PIL import Image

from hf_mim.models.pixels import ImageFormatError

# "P6 640 480 65535" and one white space; a comment runs from # to the end of its line. (netpbm's ppm(5))
_GAP = rb"(?:\s|#[^\r\n]*[\r\n])+"
_PNM = re.compile(rb"P([2356])" + _GAP + rb"(\d+)" + _GAP + rb"(\d+)" + _GAP + rb"(\d+)\s")
_BC6H = (94, 95, 96)  # floats, in the numbers of DXGI_FORMAT
_RGB_MASKS = 0x40  # a flag of DDS_PIXELFORMAT: the channels are given by masks


def read_deep(image: Image.Image, data: bytes, num_channels: int | None) -> np.ndarray | None:
    """The stored values as [h, w] or [h, w, C]; None if PIL reads the file in full. Not turned upright.

    image: what PIL has opened of `data`, not yet decoded.
    num_channels: alpha is left out, but where all channels together are so many.

    Raises:
        ImageFormatError: the file needs the extra hf-mim[tiff], or can be read by nothing that is used here.
    """
    read = _READERS.get(image.format)
    return None if read is None else read(image, data, num_channels)


def _png(image, data: bytes, num_channels: int | None) -> np.ndarray | None:
    if data[24] != 16 or data[25] not in (2, 4, 6):  # bits of a channel; colour, or with alpha
        return None
    return without_alpha(imagecodecs_for("a PNG of 16-bit colour").png_decode(data), num_channels)


def _avif(image, data: bytes, num_channels: int | None) -> np.ndarray | None:
    start = data.find(b"av1C")  # AV1CodecConfigurationRecord; the second bit of its third byte is high_bitdepth
    if start < 0 or not data[start + 6] & 0x40:
        return None
    return without_alpha(imagecodecs_for("an AVIF of 10 or 12 bits").avif_decode(data, index=0), num_channels)


def imagecodecs_for(what: str):
    """The module. Raises ImageFormatError, which names `what`, if it is not installed."""
    try:
        import imagecodecs
    except ImportError:
        raise ImageFormatError(f"{what} needs imagecodecs: pip install hf-mim[tiff]") from None
    return imagecodecs


def without_alpha(image: np.ndarray, num_channels: int | None) -> np.ndarray:
    """[h, w] or [h, w, C] without the last of 2 or 4 channels, unless all are `num_channels`."""
    has_alpha = image.ndim == 3 and image.shape[-1] in (2, 4)
    return image[..., :-1] if has_alpha and image.shape[-1] != num_channels else image


def _pnm(image, data: bytes, num_channels: int | None) -> np.ndarray | None:
    header = _PNM.match(data)
    if header is None or int(header[4]) < 256:
        return None
    kind, width, height = (int(header[group]) for group in (1, 2, 3))
    shape = (height, width, 3) if kind in (3, 6) else (height, width)
    if kind > 3:
        return np.frombuffer(data, ">u2", int(np.prod(shape)), header.end()).reshape(shape).astype(np.uint16)
    values = np.array(re.sub(rb"#[^\r\n]*", b"", data[header.end() :]).split()[: int(np.prod(shape))], dtype=np.int64)
    if values.min() < 0 or values.max() > int(header[4]):
        raise ValueError(f"a value is not in 0..{int(header[4])}")
    return values.reshape(shape).astype(np.uint16)


def _jpeg2000(image, data: bytes, num_channels: int | None) -> np.ndarray | None:
    start = data.find(b"\xff\x4f\xff\x51")  # the marker SIZ (ISO 15444-1, A.5.1)
    if start < 0:
        return None
    depths = data[start + 42 : start + 42 + 3 * int.from_bytes(data[start + 40 : start + 42], "big") : 3]
    bits = max((depth & 0x7F) + 1 for depth in depths)
    if bits <= 8:
        return None
    if len(depths) > 1 or bits > 16 or depths[0] & 0x80:
        raise ImageFormatError(
            "a JPEG 2000 image of more than 8 bits must have one channel of at most 16 unsigned bits; save it as TIFF"
        )
    return np.asarray(image) >> (16 - bits)  # PIL has moved the values up to fill 16 bits


def _sgi(image, data: bytes, num_channels: int | None) -> None:
    if data[3] == 2:  # bytes of a channel
        raise ImageFormatError("an SGI image of 16 bits, which Pillow would cut to 8; save it as TIFF or PNG")


def _dds(image, data: bytes, num_channels: int | None) -> None:
    number = [int.from_bytes(data[start : start + 4], "little") for start in range(80, 132, 4)]
    is_float = data[84:88] == b"DX10" and number[12] in _BC6H
    if is_float or number[0] & _RGB_MASKS and any(mask.bit_count() > 8 for mask in number[3:7]):
        raise ImageFormatError("a DDS image of more than 8 bits, which Pillow would cut to 8; save it as TIFF")


_READERS = {"PNG": _png, "AVIF": _avif, "PPM": _pnm, "JPEG2000": _jpeg2000, "SGI": _sgi, "DDS": _dds}
