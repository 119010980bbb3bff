"""One image file as training sees it, for a user who gives it to the image processor."""

import os

import numpy as np
from PIL import Image, ImageOps

from hf_mim.models.orientation import exif_orientation

from . import decode


def open_image(path: str | os.PathLike, num_channels: int = 3) -> Image.Image | np.ndarray:
    """Open an image file as training does: upright, in its own depth, ready for the image processor.

    Args:
        path: an image, a TIFF of any kind, .npy or .npz, a DICOM file (its first frame) or a frame ("scan.dcm/0003").
        num_channels: those of the model. A TIFF of so many pages is one image with a band for each page.

    Returns:
        A PIL image, or where PIL cannot hold the values an array: [height, width], [height, width, bands], or as a .npy
        file has it.

    Raises:
        OSError: the file cannot be opened.
        ImageFormatError: a ValueError: the file is intact, but of a kind that is not read; the message says what helps.
        BrokenImage: the file is damaged, or no image.
    """
    path = os.fspath(path)
    with decode.as_file(path):
        pass  # a file that is not there is no broken image
    with decode.decoding(path):
        image = decode.open_image(path, num_channels)
        # A JPEG that is upright stays undecoded, as in training: the processor may decode a large one at half its size.
        if isinstance(image, Image.Image) and any(exif_orientation(image)):
            return ImageOps.exif_transpose(image)
        return image
