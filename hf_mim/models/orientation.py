"""How a stored image is turned to be upright, by EXIF's and TIFF's tag."""

import struct

import numpy as np
from PIL import Image

_EXIF_ORIENTATION = 0x0112


def exif_orientation(image: Image.Image) -> tuple[bool, bool, bool]:
    """(flip x, flip y, swap axes): whether to do each of these, in this order, to make the stored image upright."""
    if not image.info.keys() & {"exif", "xmp", "XML:com.adobe.xmp", "Raw profile type exif"}:
        return False, False, False
    try:
        orientation = image.getexif().get(_EXIF_ORIENTATION, 1)
    except (SyntaxError, ValueError, struct.error):  # the picture may be intact though its EXIF block is damaged
        orientation = 1
    return turns(orientation)


def turns(orientation: int) -> tuple[bool, bool, bool]:
    """As `exif_orientation`, for the value of the tag."""
    return orientation in (2, 3, 7, 8), orientation in (3, 4, 6, 7), orientation in (5, 6, 7, 8)


def upright(array: np.ndarray, flip_x: bool, flip_y: bool, swap: bool) -> np.ndarray:
    """The stored array [h, w, ...], turned."""
    if flip_x or flip_y:  # a copy, because torch takes no array that runs backwards
        array = np.ascontiguousarray(array[:: -1 if flip_y else 1, :: -1 if flip_x else 1])
    return array.swapaxes(0, 1) if swap else array
