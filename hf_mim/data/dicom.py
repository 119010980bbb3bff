"""DICOM files (radiology, ultrasound, microscopy) in the units that they give, through the optional pydicom.

- Rescale slope and intercept, or the file's modality table, are applied: CT comes in Hounsfield units.
- A window is never applied, so nothing is cut; `--value_range` is the window of a run.
- MONOCHROME1, where the lowest value is white, is inverted. Colours of every kind become RGB.
- The frames of a file are images of their own: frame 3 of `scan.dcm` is called `scan.dcm/0003`.

Source of the tags and their meaning: DICOM PS3.3, C.7.6.3, C.7.6.16.2.9, C.11.1 and PS3.5, section 8.
"""

import os
from collections.abc import Callable

import numpy as np
from PIL import Image

from hf_mim.models.pixels import ImageFormatError

from .codestreams import jpeg_size
from .dicom_header import PREAMBLE, SEGMENTED, Header, read_header, reading

_MONOCHROME = ("MONOCHROME1", "MONOCHROME2")
_COLOURS = ("RGB", "YBR_FULL", "YBR_FULL_422", "YBR_ICT", "YBR_RCT")
_RLE, _LOSSY_12_BITS = "1.2.840.10008.1.2.5", "1.2.840.10008.1.2.4.51"
# The decoder that is taken where pydicom knows several.
_DECODERS = {
    "1.2.840.10008.1.2.4.50": "pillow",  # JPEG
    _LOSSY_12_BITS: "pillow",  # it may have 8 bits
    "1.2.840.10008.1.2.4.90": "pylibjpeg",  # JPEG 2000
    "1.2.840.10008.1.2.4.91": "pylibjpeg",
}
_ELEMENT_HEADER = 12  # bytes before the pixels


def is_dicom(data: bytes) -> bool:
    """Whether the bytes are a DICOM file (PS3.10, 7.1): `DICM` after 128 bytes."""
    return data[PREAMBLE : PREAMBLE + 4] == b"DICM"


def split_frame(path: str) -> tuple[str, int | None]:
    """(`scan.dcm`, 2) of `scan.dcm/0003`; (path, None) if it is no frame of a file."""
    file, name = os.path.split(path)
    return (file, int(name) - 1) if name.isdecimal() and os.path.isfile(file) else (path, None)


def read_dicom(
    file, frame: int, check_size: Callable[[int, int], None], as_ids: bool = False
) -> Image.Image | np.ndarray:
    """A frame, counted from 0, in the units of the file: a PIL image of 8 bits, or an array [h, w] or [h, w, 3].

    - uint8 and uint16: all values that the file can store are within that type after the rescale.
    - int16: others that are whole numbers, and int32 where int16 does not hold them.
    - float32: a slope or an intercept with a fraction; pixels that are floats.

    file: open, or its bytes in a `BytesIO`. as_ids: the values as they are stored.

    Raises:
        ImageFormatError: pydicom is missing; too many pixels; a compression or colours that are not read.
        ValueError: the file is damaged or holds no image.
    """
    with reading():
        header = read_header(file)
        check_size(header.columns, header.rows)
        if not 0 <= frame < header.frames:
            raise ValueError(f"it has {header.frames} frames, and no frame {frame + 1}")
        stored = _decode(file, header, frame)
        if stored.shape[:2] != (header.rows, header.columns):
            raise ValueError(f"its pixels are {list(stored.shape)}, and its header says otherwise")
        if not as_ids:
            stored = _in_units(stored, header, frame)
    return Image.fromarray(stored) if stored.dtype == np.uint8 else stored


def dicom_size(file) -> tuple[int, int]:
    """(width, height). Raises as `read_dicom`."""
    with reading():
        header = read_header(file)
    return header.columns, header.rows


def padding_value(file, frame: int = 0) -> float | None:
    """The value of PixelPaddingValue after the rescale; None without one, or if no pixel can have it.

    Raises as `read_dicom`.
    """
    with reading():
        header = read_header(file)
        if header.padding is None or header.photometric not in _MONOCHROME or header.bits is None:
            return None
        if not header.low <= header.padding[0] <= header.high:
            return None
        value = np.asarray(_in_units(np.full((1, 1), header.padding[0], np.int64), header, frame))
    return float(value.item())


def _decode(file, header: Header, frame: int) -> np.ndarray:
    """The stored values of a frame, [h, w] or [h, w, 3]; colours are RGB."""
    import pydicom

    if header.samples != (3 if header.photometric in _COLOURS else 1):
        raise ValueError(f"a DICOM file of {header.samples} samples in {header.photometric}")
    if header.photometric not in (*_MONOCHROME, *_COLOURS, "PALETTE COLOR"):
        raise ImageFormatError(f"a DICOM file in {header.photometric}, which is not read; save it as RGB")
    syntax = pydicom.uid.UID(header.syntax)
    plugin = ""
    if syntax.is_encapsulated:
        plugin = _decoder(syntax, header)
        _check_stream(file, header, frame)
    return pydicom.pixels.pixel_array(file, index=frame, decoding_plugin=plugin)


def _decoder(syntax, header: Header) -> str:
    """The name of the decoder, "" for the only one. Raises ImageFormatError if there is none."""
    import pydicom

    try:
        found = pydicom.pixels.get_decoder(syntax).available_plugins
    except NotImplementedError as error:  # what pydicom raises for a syntax that it does not know
        raise ImageFormatError(f"a DICOM file of {syntax.name}, which is not read; save it uncompressed") from error
    if header.syntax == _LOSSY_12_BITS and header.bits != 8 and "pylibjpeg" not in found:
        raise ImageFormatError("a DICOM file of lossy JPEG with 12 bits needs pip install pylibjpeg-libjpeg (GPL)")
    if not found:
        raise ImageFormatError(f"a DICOM file of {syntax.name} needs pip install hf-mim[dicom]")
    wanted = _DECODERS.get(header.syntax, "") if header.bits == 8 or header.syntax != _LOSSY_12_BITS else "pylibjpeg"
    return wanted if wanted in found else ""


def _check_stream(file, header: Header, frame: int):
    """Raise ValueError unless the compressed frame has the size that the header says, before it is decoded."""
    import pydicom

    file.seek(0)
    head = pydicom.dcmread(
        file, stop_before_pixels=True, specific_tags=["ExtendedOffsetTable", "ExtendedOffsetTableLengths"]
    )
    file.seek(_ELEMENT_HEADER, os.SEEK_CUR)
    offsets = (head.ExtendedOffsetTable, head.ExtendedOffsetTableLengths) if "ExtendedOffsetTable" in head else None
    data = pydicom.encaps.get_frame(file, frame, number_of_frames=header.frames, extended_offsets=offsets)
    pixels = header.rows * header.columns * header.samples
    if header.syntax == _RLE:  # a byte of it gives 64 at most, and what does not repeat grows by 1 in 128
        if len(data) > 64 + 16 * pixels:
            raise ValueError("its compressed pixels are longer than its pixels")
    elif jpeg_size(data) != (header.columns, header.rows, header.samples):
        raise ValueError(f"its compressed pixels have the size {jpeg_size(data)}, and its header says otherwise")


def _in_units(stored: np.ndarray, header: Header, frame: int) -> np.ndarray:
    """Stored values as RGB, or in units, in the types of `read_dicom`."""
    import pydicom

    if header.photometric == "PALETTE COLOR":
        if SEGMENTED in header.tables:  # a few bytes of it may hold gigabytes
            raise ImageFormatError("a DICOM file with a segmented palette, which is not read; save it as RGB")
        colours = pydicom.pixels.apply_color_lut(stored, header.tables)
        return (colours >> 8 if colours.dtype == np.uint16 else colours).astype(np.uint8)
    if header.bits is None:
        if header.photometric == "MONOCHROME1":
            raise ImageFormatError("a DICOM file of floats in MONOCHROME1, which is not read; save it as MONOCHROME2")
        slope, intercept = header.rescale_of(frame)
        return (stored * slope + intercept).astype(np.float32)
    if header.padding is not None and header.photometric in _MONOCHROME:
        value, ends = header.padding[0], sorted(header.padding)
        stored = np.where((stored >= ends[0]) & (stored <= ends[1]), value, stored) if ends[0] < ends[1] else stored
    ends = header.low, header.high
    slope, intercept = header.rescale_of(frame)
    if header.tables is not None and "ModalityLUTSequence" in header.tables:
        table = header.tables.ModalityLUTSequence[0]
        stored = pydicom.pixels.apply_modality_lut(stored, header.tables)
        ends, slope, intercept = (0, 2 ** table.LUTDescriptor[2] - 1), 1.0, 0.0
    if stored.min() < ends[0] or stored.max() > ends[1]:
        raise ValueError(f"it has values in {stored.min()}..{stored.max()}, and its header says {ends[0]}..{ends[1]}")
    if header.photometric == "MONOCHROME1":
        stored = ends[0] + ends[1] - stored.astype(np.int64)
    return _rescaled(stored, slope, intercept, ends)


def _rescaled(stored: np.ndarray, slope: float, intercept: float, ends: tuple[int, int]) -> np.ndarray:
    """Stored values, which lie within `ends`, times the slope and plus the intercept, in the types of `read_dicom`."""
    if not (slope.is_integer() and intercept.is_integer()):
        return (stored * slope + intercept).astype(np.float32)
    if (slope, intercept) != (1, 0):
        stored = stored.astype(np.int64) * int(slope) + int(intercept)
    least, most = sorted(end * int(slope) + int(intercept) for end in ends)
    if (slope, intercept) == (1, 0) and least == 0 and most < 255:  # as other images of fewer than 8 bits
        return np.rint(stored * (255 / most)).astype(np.uint8)
    for kind in (np.uint8, np.uint16):
        if 0 <= least and most <= np.iinfo(kind).max:
            return stored.astype(kind)
    limits = np.iinfo(np.int16)
    return stored.astype(np.int16) if limits.min <= stored.min() and stored.max() <= limits.max else stored
