"""Encoded bytes, files and arrays become images; what is damaged is told from what is only of another kind."""

import contextlib
import functools
import io
import os
import struct
import zipfile
import zlib

import numpy as np
from PIL import Image, JpegImagePlugin, UnidentifiedImageError

from hf_mim.files import listed, one_line
from hf_mim.models.orientation import exif_orientation, upright
from hf_mim.models.pixels import ImageFormatError

from .deep import read_deep
from .dicom import dicom_size, is_dicom, read_dicom, split_frame
from .heif import heif_size, is_heif, read_heif
from .jpegxl import is_jpegxl, read_jpegxl
from .stacks import first_part, is_stack, open_stack
from .tiff import is_plain_tiff, is_tiff, read_tiff

# What PIL may open. EPS is not among them: PIL would run Ghostscript on it, whatever the file is called.
_FORMATS = "PNG JPEG MPO WEBP BMP GIF TIFF PPM JPEG2000 AVIF ICO TGA PCX DDS QOI SGI XBM".split()
# Images of more pixels are refused. The default is PIL's own limit, about 13,377 × 13,377. It is a variable of the
# environment, so that workers and evaluations of the same run have it too.
MAX_PIXELS_VARIABLE, MAX_PIXELS = "HF_MIM_MAX_IMAGE_PIXELS", 178_956_970
_HEAD = 132  # bytes that tell a DICOM or HEIC file
# What decoders raise on damaged bytes. PIL's plugins do not catch ValueError, IndexError and the like.
_DECODE_ERRORS = (OSError, EOFError, SyntaxError, ValueError, TypeError, LookupError, ArithmeticError)
_DECODE_ERRORS += (struct.error, zlib.error, zipfile.BadZipFile, RuntimeError, MemoryError)


class BrokenImage(Exception):
    """One image that cannot be decoded."""


@contextlib.contextmanager
def decoding(name: str):
    """Turn everything that a decoder raises into `BrokenImage`; add the image's name to an `ImageFormatError`."""
    try:
        yield
    except ImageFormatError as error:
        raise ImageFormatError(f"{name}: {error}") from None
    except UnidentifiedImageError as error:
        raise BrokenImage(f"{name}: not an image, or of an unknown format") from error
    except FileNotFoundError as error:
        raise BrokenImage(f"{name}: there is no such file") from error
    except _DECODE_ERRORS as error:
        raise BrokenImage(f"{name}: {one_line(error)}") from error


def image_name(value, otherwise: str) -> str:
    """The path in a value of an image column, or `otherwise` if it has none. A stack has the path of its first part."""
    value = first_part(value)
    return (value.get("path") if isinstance(value, dict) else None) or otherwise


def stored(value):
    """What a value of an image column holds: of `{"bytes", "path"}` the bytes or else the path; other values as are.

    A stack holds a tuple: what each of its parts holds.
    """
    if is_stack(value):
        return tuple(map(stored, value.values()))
    if not isinstance(value, dict):
        return value
    return value["bytes"] if value.get("bytes") is not None else value.get("path")


def as_stored(value) -> dict:
    """`{"bytes", "path"}` of a file's path, or of any value of an image column: an array becomes a .npy file."""
    if isinstance(value, dict):
        return value
    if isinstance(value, str | os.PathLike):
        return {"bytes": None, "path": str(value)}
    file = io.BytesIO()
    np.save(file, np.asarray(value))
    return {"bytes": file.getvalue(), "path": None}


def as_file(value: str | bytes):
    """A path or the bytes of a file, to read from; of the path of a frame, the file that holds it.

    A path in a table may name a device, which would never end.
    """
    if isinstance(value, bytes):
        return io.BytesIO(value)
    value, _ = split_frame(value)
    if os.path.exists(value) and not os.path.isfile(value):
        raise OSError(f"{value} is no file")
    return open(value, "rb")


def open_image(
    value, num_channels: int | None = None, as_ids: bool = False, pixel_type: str | None = None
) -> Image.Image | np.ndarray:
    """Open one value of an image column: `{"bytes", "path"}`, a path, bytes, a PIL image, an array, or a stack of such.

    A JPEG is returned undecoded, so that the caller may still `draft` it; every other image is decoded.

    num_channels: as many as there will be; with it, files that can be read in two ways are read in the right one.
    as_ids: for masks: what PIL would scale, and the indices of palettes, stay as they are stored.
    pixel_type: the type that a stack has to have (`stacks.open_stack`).

    Raises:
        ImageFormatError: too many pixels, or a format, depth or compression that needs an extra of hf-mim.
    """
    if is_stack(value):
        return open_stack(value, num_channels, open_image, pixel_type)
    value = stored(value)
    if value is None:
        raise OSError("the row holds no image")
    if isinstance(value, str):
        frame = split_frame(value)[1]
        with as_file(value) as file:
            if frame is not None:
                return read_dicom(file, frame, check_pixels, as_ids)
            value = file.read()
    if isinstance(value, bytes):
        return _open_bytes(value, num_channels, as_ids)
    if isinstance(value, Image.Image):
        value.load()
        return value
    value = np.asarray(value)
    if value.ndim == 1 and value.dtype == np.uint8:  # the bytes of a file, as a column of numbers
        return _open_bytes(value.tobytes(), num_channels, as_ids)
    return value


def header_size(value) -> tuple[int, int] | None:
    """(width, height) of an encoded image, upright, from its header; None if it does not tell it.

    Raises what decoders raise on damaged files.
    """
    value = stored(first_part(value))
    if not isinstance(value, str | bytes):
        return None
    with as_file(value) as file:
        head = file.read(_HEAD)
        file.seek(0)
        if is_dicom(head) or is_heif(head):
            return dicom_size(file) if is_dicom(head) else heif_size(file)
        if is_tiff(head) and not is_plain_tiff(file.read()):  # PIL would complain of it on stderr
            return None
    with contextlib.suppress(UnidentifiedImageError, Image.DecompressionBombError):
        with Image.open(value if isinstance(value, str) else io.BytesIO(value), formats=_pil_formats()) as image:
            return image.size[::-1] if exif_orientation(image)[2] else image.size
    return None


def check_pixels(width: int, height: int):
    """Raise ImageFormatError for an image that is too large to be decoded at once."""
    if width * height > _max_pixels():
        raise ImageFormatError(
            f"{width} x {height} pixels are more than max_image_pixels={_max_pixels()}; set --max_image_pixels "
            f"{width * height} (or {MAX_PIXELS_VARIABLE}), or cut the image into tiles"
        )


def _max_pixels() -> int:
    return int(os.environ.get(MAX_PIXELS_VARIABLE, MAX_PIXELS))


def _open_bytes(data: bytes, num_channels: int | None, as_ids: bool) -> Image.Image | np.ndarray:
    if data.startswith(b"\x93NUMPY"):
        return _read_npy(data)
    if data.startswith(b"PK\x03\x04"):
        return _read_npz(data, num_channels)
    if is_dicom(data):
        return read_dicom(io.BytesIO(data), 0, check_pixels, as_ids)
    if is_heif(data):
        return read_heif(data, num_channels, check_pixels)
    if is_jpegxl(data):
        return read_jpegxl(data, num_channels, check_pixels)
    if is_tiff(data) and not is_plain_tiff(data, as_ids):
        return read_tiff(data, num_channels, check_pixels, as_ids)
    if _max_pixels() > MAX_PIXELS:
        Image.MAX_IMAGE_PIXELS = _max_pixels()  # PIL's own limit is one for the whole process
    try:
        image = Image.open(io.BytesIO(data), formats=_pil_formats())
    except Image.DecompressionBombError as error:
        raise ImageFormatError(
            f"{one_line(error)}; raise it by --max_image_pixels, or cut the image into tiles"
        ) from None
    check_pixels(*image.size)
    deep = read_deep(image, data, num_channels)
    if deep is not None:
        return upright(deep, *exif_orientation(image))
    if not isinstance(image, JpegImagePlugin.JpegImageFile):
        image.load()  # EXIF may follow the pixels (PNG), or be applied by load itself (TIFF)
    return image


@functools.cache
def _pil_formats() -> list[str]:
    """Those that this PIL was built with."""
    Image.init()
    return [name for name in _FORMATS if name in Image.OPEN]


def _read_npy(data: bytes) -> np.ndarray:
    _read_header(io.BytesIO(data), len(data))
    return np.load(io.BytesIO(data), allow_pickle=False)


def _read_header(file, size: int) -> tuple[int, ...]:
    """The shape in the header of a .npy file of `size` bytes. Raises ValueError if the array would be longer."""
    version = np.lib.format.read_magic(file)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, _, dtype = read(file)
    if int(np.prod(shape, dtype=object)) * dtype.itemsize > size - file.tell():
        raise ValueError(f"its header says {list(shape)} of {dtype}, and the file ends before")
    return shape


def _read_npz(data: bytes, num_channels: int | None) -> np.ndarray:
    """The only array of the archive, or the one that is called `image` or `arr_0`.

    Raises ImageFormatError for several arrays without such a name, and for more values than an image may have: a few
    bytes can hold gigabytes of zeros.
    """
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        members = {name.removesuffix(".npy"): name for name in archive.namelist() if name.endswith(".npy")}
        chosen = next((name for name in ("image", "arr_0", *members) if name in members), None)
        if chosen is None:
            raise ValueError("the .npz file holds no array")
        if len(members) > 1 and chosen not in ("image", "arr_0"):
            raise ImageFormatError(
                f"the .npz file holds several arrays, {listed(list(members))}; call the one that is the image `image`"
            )
        about = archive.getinfo(members[chosen])
        if about.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise ValueError("the .npz file has a compression that numpy does not write")
        with archive.open(about) as file:
            shape = _read_header(file, about.file_size)
        sides = sorted(shape)
        check_pixels(*([1, 1] + sides)[-2:])
        if int(np.prod(shape, dtype=object)) > _max_pixels() * max(4, num_channels or 4):
            raise ImageFormatError(f"an array image must be [h, w], [h, w, C] or [C, h, w], not {list(shape)}")
        with archive.open(about) as file:
            return np.lib.format.read_array(file, allow_pickle=False)
