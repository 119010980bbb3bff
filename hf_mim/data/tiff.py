"""TIFF files that PIL does not open, or not as they are (satellite, microscopy), through the optional tifffile."""

import io
from collections.abc import Callable
from itertools import islice

import numpy as np
from PIL import TiffImagePlugin

from hf_mim.models.orientation import turns, upright
from hf_mim.models.pixels import ImageFormatError

_WIDTH, _HEIGHT, _BITS, _COMPRESSION, _PHOTOMETRIC, _ORIENTATION, _SAMPLES = 256, 257, 258, 259, 262, 274, 277
_EXTRA_SAMPLES, _SAMPLE_FORMAT = 338, 339
_WHITE_IS_ZERO, _BLACK_IS_ZERO, _RGB, _PALETTE, _CMYK, _YCBCR, _LAB = 0, 1, 2, 3, 5, 6, 8
_GREY = (_WHITE_IS_ZERO, _BLACK_IS_ZERO)
# Photometric → the name of colours that only Pillow converts; the others of these are converted by nothing here.
_CONVERTED = {_CMYK: "CMYK", _YCBCR: "YCbCr", _LAB: "LAB"}
_OTHER_COLOURS = {9: "ICCLAB", 10: "ITULAB", 32844: "LogL", 32845: "LogLuv"}
_JPEG = (6, 7)  # tifffile makes RGB of its YCbCr
_NO_JPEG = (1, 5, 8, 32773, 32946)  # none, LZW, deflate, PackBits, deflate
_ALPHA = (1, 2)  # associated and unassociated
_MOST_PAGES = 10_000  # that are counted


def is_tiff(data: bytes) -> bool:
    """Whether the bytes are a TIFF or BigTIFF, of either byte order."""
    return data[:4] in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")


def is_plain_tiff(data: bytes, as_ids: bool = False) -> bool:
    """Whether PIL reads all its values: 8 bits or fewer, grey, colour and alpha; or one band of 16 or 32 bits.

    Grey pages may be the bands of one image, which PIL cannot tell. PIL gets BigTIFF only in colours that tifffile does
    not convert, because it reads fewer compressions, and no big-endian BigTIFF. With `as_ids`, grey that PIL scales is
    not plain.
    """
    if data[:4] == b"MM\0+":
        return False
    tags = next(_directories(io.BytesIO(data)), None)
    if tags is None:
        raise ValueError("the TIFF has no page")
    samples, bits, kind = tags.get(_SAMPLES, 1), tags.get(_BITS, (1,)), tags.get(_PHOTOMETRIC)
    if data[2:4] == b"+\0" and not (kind in _CONVERTED and tags.get(_COMPRESSION, 1) in _NO_JPEG):
        return False
    extra = tags.get(_EXTRA_SAMPLES, ())
    extra = extra if isinstance(extra, tuple) else (extra,)
    if samples == 1 and kind in _GREY:
        form = tags.get(_SAMPLE_FORMAT, (1,))[0]
        is_deep = kind == _BLACK_IS_ZERO and (bits[0], form) in ((16, 1), (32, 3))
        return not tags.next and (is_deep or bits[0] in ((1, 8) if as_ids else (1, 2, 4, 8)) and form == 1)
    colours = {_RGB: 3, _PALETTE: 1, _CMYK: 4, _YCBCR: 3, _LAB: 3, _BLACK_IS_ZERO: 1}.get(kind)
    is_alpha = extra == () or len(extra) == 1 and extra[0] in _ALPHA
    depths = (1, 2, 4, 8) if kind == _PALETTE else (8,)
    return set(bits) <= set(depths) and samples - len(extra) == colours and is_alpha


def unused_pages(file, num_channels: int) -> int:
    """How many pages of an open TIFF are like the first, if the first alone is the image; else 1.

    Raises OSError, SyntaxError and the like for a damaged file.
    """
    if file.read(4) == b"MM\0+":
        return 1
    file.seek(0)
    pages = islice(_directories(file), _MOST_PAGES)
    kinds = [tuple(tags.get(tag) for tag in (_WIDTH, _HEIGHT, _SAMPLES, _BITS, _PHOTOMETRIC)) for tags in pages]
    alike = kinds.count(kinds[0])
    is_stack = (kinds[0][2] or 1) == 1 and kinds[0][4] != _PALETTE and alike == num_channels
    return 1 if is_stack else alike


def _directories(file):
    """The tags of each page of an open TIFF, by PIL."""
    head, seen = file.read(8), {0}
    head += file.read(8) if head[2] == 43 else b""
    tags = TiffImagePlugin.ImageFileDirectory_v2(head)
    while (place := tags.next) not in seen:
        seen.add(place)
        file.seek(place)
        tags = TiffImagePlugin.ImageFileDirectory_v2(head)
        tags.load(file)
        yield tags


def read_tiff(
    data: bytes, num_channels: int | None, check_size: Callable[[int, int], None], as_ids: bool = False
) -> np.ndarray:
    """The first page, upright, as [h, w, bands] in the file's own number type.

    - What the file calls alpha is left out, but where all samples together are `num_channels`.
    - Pages of one band each (a stack, as microscopes write it) are the bands of one image if they are `num_channels`.
    - A palette becomes colour. Black is 0, whatever the file says. Fewer than 8 bits are scaled to 0..255.
      With `as_ids` all values stay as they are stored.

    Raises:
        ImageFormatError: tifffile is not installed, the compression needs imagecodecs, pages are rows by mistake, or
            the colours cannot be converted.
    """
    try:
        import tifffile
    except ImportError:
        raise ImageFormatError("this kind of TIFF needs tifffile: pip install hf-mim[tiff]") from None
    try:
        with tifffile.TiffFile(io.BytesIO(data)) as file:
            page = file.pages[0]
            check_size(page.imagewidth, page.imagelength)
            if not as_ids:
                _check_colours(page)
            alike = [p for p in file.pages if _form(p) == _form(page)]
            is_grey = page.samplesperpixel == 1 and page.photometric != _PALETTE
            is_stack = is_grey and len(alike) == num_channels
            if is_grey and not is_stack:
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
    image = image if image.ndim == 3 else image[..., None]
    image = upright(image if as_ids else _shown(image, page, is_stack), *turned)
    has_alpha = page.extrasamples and page.extrasamples[-1] in _ALPHA
    return image[..., :-1] if has_alpha and image.shape[-1] != num_channels else image


def _form(page) -> tuple:
    return page.shape, page.dtype, page.photometric


def _check_colours(page):
    """Raise ImageFormatError for colours that would be taken for bands."""
    kind = page.photometric
    name = {**_CONVERTED, **_OTHER_COLOURS}.get(kind)
    if name is not None and not (kind == _YCBCR and page.compression in _JPEG):
        raise ImageFormatError(f"a {name} TIFF of this depth, compression or form is not converted; save it as RGB")
    if page.tags.valueof(_PHOTOMETRIC) == _WHITE_IS_ZERO and page.dtype.kind not in "bu":
        raise ImageFormatError(f"a TIFF of {page.dtype} in which white is 0; save it with black as 0 (BlackIsZero)")


def _shown(image: np.ndarray, page, is_stack: bool) -> np.ndarray:
    """The values [h, w, C] of a page, or of a stack of pages like it, as PIL would give them."""
    bits = page.bitspersample
    if page.photometric == _PALETTE and page.colormap is not None:
        return np.moveaxis(page.colormap[:, image[..., 0]] >> 8, 0, -1).astype(np.uint8)
    if page.tags.valueof(_PHOTOMETRIC) == _WHITE_IS_ZERO:
        grey = slice(None) if is_stack else slice(page.samplesperpixel - len(page.extrasamples or ()))
        white = True if image.dtype == bool else image.dtype.type(2**bits - 1)
        image = image.copy()
        image[..., grey] ^= white  # white has all bits set, so this is white - grey
    if image.dtype == np.uint8 and isinstance(bits, int) and bits < 8:
        return np.rint(image * (255 / (2**bits - 1))).astype(np.uint8)
    return image


def _check_rows(height: int, width: int, pages: int, num_channels: int | None):
    """Raise ImageFormatError if each page is a row of one image, as `tifffile.imwrite` writes some [h, w, bands]."""
    if width in (2, 3, 4, num_channels) and pages > min(width, 4) and height > width:
        kind = "photometric='rgb'" if width == 3 else "photometric='minisblack', planarconfig='contig'"
        raise ImageFormatError(
            f"the TIFF has {pages} pages of {height} x {width}: each is a row of an image of {pages} x {height} pixels "
            f"and {width} bands; write the array with tifffile.imwrite(path, array, {kind})"
        )
