"""TIFF files that PIL does not open, or not as they are (satellite, microscopy), through the optional tifffile."""

import io
from collections.abc import Callable

import numpy as np
from PIL import TiffImagePlugin

from hf_mim.models.orientation import turns, upright
from hf_mim.models.pixels import ImageFormatError

_BITS, _PHOTOMETRIC, _ORIENTATION, _SAMPLES, _EXTRA_SAMPLES, _SAMPLE_FORMAT = 258, 262, 274, 277, 338, 339
_GREY, _RGB, _PALETTE, _CMYK, _YCBCR, _LAB = (0, 1), 2, 3, 5, 6, 8
_ALPHA = (1, 2)  # associated and unassociated


def is_tiff(data: bytes) -> bool:
    """Whether the bytes are a TIFF or BigTIFF, of either byte order."""
    return data[:4] in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")


def is_plain_tiff(data: bytes) -> bool:
    """Whether PIL reads all its values: 8 bits or fewer, grey, colour and alpha; or one band of 16 or 32 bits.

    Pages of one band each may be the bands of one image, which PIL cannot tell.
    """
    if data[2:4] in (b"+\0", b"\0+"):
        return False
    file = io.BytesIO(data)
    tags = TiffImagePlugin.ImageFileDirectory_v2(file.read(8))
    file.seek(tags.next)
    tags.load(file)
    samples, bits = tags.get(_SAMPLES, 1), tags.get(_BITS, (1,))
    if samples == 1 and tags.next:
        return False
    extra, kind = tags.get(_EXTRA_SAMPLES, ()), tags.get(_PHOTOMETRIC, 1)
    extra = extra if isinstance(extra, tuple) else (extra,)
    if samples == 1 and kind in _GREY:
        form = tags.get(_SAMPLE_FORMAT, (1,))[0]
        return bits[0] in (1, 8) and form == 1 or (bits[0], form) in ((16, 1), (32, 3))
    colours = {_RGB: 3, _PALETTE: 1, _CMYK: 4, _YCBCR: 3, _LAB: 3, **dict.fromkeys(_GREY, 1)}.get(kind)
    is_alpha = extra == () or len(extra) == 1 and extra[0] in _ALPHA
    return max(bits) <= 8 and samples - len(extra) == colours and is_alpha


def read_tiff(data: bytes, num_channels: int | None, check_size: Callable[[int, int], None]) -> np.ndarray:
    """The first page, upright, as [h, w, bands] in the file's own number type.

    - What the file calls alpha is left out, but where all samples together are `num_channels`.
    - Pages of one band each (a stack, as microscopes write it) are the bands of one image if they are `num_channels`.

    Raises:
        ImageFormatError: tifffile is not installed, the compression needs imagecodecs, or pages are rows by mistake.
    """
    try:
        import tifffile
    except ImportError:
        raise ImageFormatError("this kind of TIFF needs tifffile: pip install hf-mim[tiff]") from None
    try:
        with tifffile.TiffFile(io.BytesIO(data)) as file:
            page = file.pages[0]
            check_size(page.imagewidth, page.imagelength)
            alike = [p for p in file.pages if (p.shape, p.dtype) == (page.shape, page.dtype)]
            is_stack = page.samplesperpixel == 1 and len(alike) == num_channels
            if page.samplesperpixel == 1 and not is_stack:
                _check_rows(page.imagelength, page.imagewidth, len(alike), num_channels)
            image = np.stack([p.asarray() for p in alike], axis=-1) if is_stack else page.asarray()
            turned = turns(page.tags.valueof(_ORIENTATION, 1))
    except tifffile.TiffFileError as error:
        raise ValueError(str(error)) from error
    except ValueError as error:
        if "imagecodecs" in str(error):
            raise ImageFormatError(f"{error}: pip install hf-mim[tiff]") from None
        raise
    if page.samplesperpixel > 1 and page.planarconfig == tifffile.PLANARCONFIG.SEPARATE:
        image = np.moveaxis(image, 0, -1)
    image = upright(image if image.ndim == 3 else image[..., None], *turned)
    has_alpha = page.extrasamples and page.extrasamples[-1] in _ALPHA
    return image[..., :-1] if has_alpha and image.shape[-1] != num_channels else image


def _check_rows(height: int, width: int, pages: int, num_channels: int | None):
    """Raise ImageFormatError if each page is a row of one image, as `tifffile.imwrite` writes some [h, w, bands]."""
    if width in (2, 3, 4, num_channels) and pages > min(width, 4) and height > width:
        kind = "photometric='rgb'" if width == 3 else "photometric='minisblack', planarconfig='contig'"
        raise ImageFormatError(
            f"the TIFF has {pages} pages of {height} x {width}: each is a row of an image of {pages} x {height} pixels "
            f"and {width} bands; write the array with tifffile.imwrite(path, array, {kind})"
        )
