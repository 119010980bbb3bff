"""Masks: images whose pixels are ids (classes, or objects), and images that have one each."""

import numpy as np
from PIL import Image, JpegImagePlugin

from .decode import BrokenImage, ImageFormatError, decoding, exif_orientation, image_name, open_image

_ID_MODES = ("1", "L", "P", "I", "I;16", "I;16B", "I;16L", "I;16N")


def read_mask_ids(value, name: str = "the mask") -> np.ndarray:
    """One value of a mask column as ids `[h, w]`, uint8 where the file has 8 bits and int64 otherwise.

    A palette (PNG mode P) gives its indices, not its colours; grey of 1, 8, 16 or 32 bits gives its values as they are.
    EXIF orientation is honoured, as for images.

    Args:
        value: `{"bytes", "path"}`, a path, encoded bytes, a PIL image, or an integer array.
        name: the mask's name in errors, where the value carries no path.

    Raises:
        ValueError: one line that names the mask: it cannot be decoded, has colours or fractions where ids belong, or is
            a JPEG, which does not keep ids.
    """
    try:
        with decoding(image_name(value, name)):
            return _ids(open_image(value))
    except BrokenImage as error:
        raise ValueError(str(error)) from error


def _ids(mask: Image.Image | np.ndarray) -> np.ndarray:
    if isinstance(mask, np.ndarray):
        ids = mask[..., 0] if mask.ndim == 3 and mask.shape[2] == 1 else mask
        if ids.ndim != 2 or ids.dtype.kind not in "biu":
            raise ImageFormatError(f"a mask must be integers [h, w], not {mask.dtype} {list(mask.shape)}")
    else:
        if isinstance(mask, JpegImagePlugin.JpegImageFile):
            raise ImageFormatError("a mask must not be a JPEG, which changes ids; save ids as PNG, mode L or P")
        if mask.mode not in _ID_MODES:
            raise ImageFormatError(
                f"a mask must hold one id for each pixel, not {mask.mode} colours; save ids as PNG, mode L or P"
            )
        ids = np.asarray(mask)
        flip_x, flip_y, swap = exif_orientation(mask)
        ids = ids[:: -1 if flip_y else 1, :: -1 if flip_x else 1]
        ids = ids.T if swap else ids
    return np.ascontiguousarray(ids, np.uint8 if ids.dtype.itemsize == 1 and ids.dtype.kind != "i" else np.int64)
