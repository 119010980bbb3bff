"""TIFF files of more bands than PIL opens (satellite and microscopy images), through the optional tifffile."""

import io

import numpy as np
from PIL import TiffImagePlugin

_SAMPLES_PER_PIXEL = 277
_MAX_PIL_BANDS = 4


def is_multiband_tiff(data: bytes) -> bool:
    """Whether the file is a TIFF that PIL would not open, or of which it would silently drop bands."""
    if data[:4] not in (b"II*\0", b"MM\0*"):
        return False
    file = io.BytesIO(data)
    tags = TiffImagePlugin.ImageFileDirectory_v2(file.read(8))
    file.seek(tags.next)
    tags.load(file)
    return tags.get(_SAMPLES_PER_PIXEL, 1) > _MAX_PIL_BANDS


def read_multiband_tiff(data: bytes) -> np.ndarray:
    """The first page as [h, w, bands], in the number type of the file.

    Raises:
        ImportError: tifffile is not installed.
    """
    try:
        import tifffile
    except ImportError:
        raise ImportError("TIFF images of more than 4 bands need tifffile: pip install hf-mim[tiff]") from None
    with tifffile.TiffFile(io.BytesIO(data)) as file:
        page = file.pages[0]
        planar = page.planarconfig == tifffile.PLANARCONFIG.SEPARATE
        image = page.asarray()
    return np.moveaxis(image, 0, -1) if planar else image
