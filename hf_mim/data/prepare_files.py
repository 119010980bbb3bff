"""The files that `prepare` writes, and what becomes of pixels without data in them.

The nodata value of an image stays: in its pixels, and in GDAL's tag, so that a run on the files finds it. For that, the
image is written as TIFF, also if it has 8 bits. Where tifffile is missing, no file can tell the value; then the run
needs `--nodata`.
"""

import os
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from PIL import Image

from hf_mim.models.nodata import as_text, impossible, is_possible
from hf_mim.models.pixels import ImageFormatError, ValueRange, as_pixels, crop_image, pixel_type

from .crop import WholeImage
from .decode import image_name, stored
from .folders import IMAGE_EXTENSIONS
from .nodata import GDAL_NODATA

JPEG_QUALITY = 95
_TIFF_ALPHA = 2  # unassociated


def has_tifffile() -> bool:
    return find_spec("tifffile") is not None


def narrowed(image: np.ndarray, nodata: float | None) -> np.ndarray:
    """The image as `as_pixels` gives it; but whole numbers stay as wide as they are if int32 cannot hold `nodata`.

    Raises ImageFormatError if int32 cannot hold the other values.
    """
    limits = np.iinfo(np.int32)
    wide = pixel_type(image.dtype) == "int32" and nodata is not None and is_possible(nodata, "int32")
    if not wide or limits.min <= nodata <= limits.max:
        return as_pixels(image)
    as_pixels(np.where(image == int(nodata), 0, image))
    return image


def nodata_of(image: np.ndarray, nodata: float | None, is_given: bool) -> tuple[np.ndarray, float | None, bool]:
    """(the image, its nodata value, whether files have to tell it). The value is given by the user, or the tag's.

    Floats that are not finite never have data, so NaN is their value if there is no other; that is not told, because
    the image did not tell it. A value that float32 cannot hold (the lowest float64) becomes NaN, in the pixels too.

    Raises ImageFormatError if the type of the image cannot hold the given value.
    """
    kind = pixel_type(image.dtype)
    if kind == "float32":
        with np.errstate(over="ignore"):
            fits = nodata is None or nodata != nodata or np.isfinite(np.float32(nodata))
        finite = np.isfinite(image)
        if not fits:
            return np.where(finite, image, np.float32("nan")), float("nan"), True
        return (image, float("nan"), False) if nodata is None and not finite.all() else (image, nodata, True)
    if nodata is None or nodata != nodata:  # whole numbers are never NaN
        return image, None, True
    if not is_possible(nodata, kind):
        if not is_given:
            return image, None, True
        raise ImageFormatError(impossible(nodata, kind, f"an image of {kind}"))
    return image, nodata, True


def smaller(image: np.ndarray, size: tuple[int, int], nodata: float | None) -> np.ndarray:
    """[h, w, C] resized as training does it, in its own depth; pixels without data have the nodata value again."""
    value_range = None if nodata is None else ValueRange((0.0,), (1.0,), nodata=nodata)
    channels = image.shape[2]
    resized = crop_image(image, WholeImage(), size, channels, channels_last=True, value_range=value_range)
    resized = resized.permute(1, 2, 0).numpy()
    return resized if nodata is None else _restored(resized, image.dtype, nodata)


def _restored(pixels: np.ndarray, dtype: np.dtype, nodata: float) -> np.ndarray:
    """Float32 pixels in the depth of the image, with `nodata` in the place of NaN and nowhere else."""
    missing = np.isnan(pixels)
    if dtype.kind == "f":
        return np.where(missing, np.float32(nodata), pixels)
    rounded = np.rint(pixels.astype(np.float64))
    limits = np.iinfo(dtype)
    beside = nodata + np.where(pixels >= nodata, 1, -1)  # a pixel with data must not get the value by rounding
    rounded = np.where(rounded == nodata, beside, rounded).clip(limits.min, limits.max)
    return np.where(missing, nodata, rounded).astype(dtype)


def copied(value, path: Path) -> str | None:
    """Write an encoded image as it is, and return its extension; None if it is an array, or has no known extension."""
    name, data = image_name(value, value if isinstance(value, str) else ""), stored(value)
    extension = os.path.splitext(name)[1].lower()
    if extension not in IMAGE_EXTENSIONS or not isinstance(data, str | bytes):
        return None
    with open(f"{path}{extension}", "xb") as file:
        file.write(Path(data).read_bytes() if isinstance(data, str) else data)
    return extension


def write(path: Path, array: np.ndarray, form: str, nodata: float | None = None) -> str:
    """Write [h, w, C] in the form that `prepare.py` describes; the extension. A file of this name is never replaced.

    form: "JPEG" (it was one), "alpha" (the last channel is alpha) or "".
    nodata: the value that a tag has to tell.
    """
    channels, is_picture = array.shape[2], array.dtype == np.uint8 and array.shape[2] <= 4
    if is_picture and not (nodata is not None and has_tifffile()):
        is_jpeg = form == "JPEG" and nodata is None
        extension, about = (".jpg", dict(quality=JPEG_QUALITY, subsampling=0)) if is_jpeg else (".png", {})
        picture = Image.fromarray(np.ascontiguousarray(array[..., 0] if channels == 1 else array))
        with open(f"{path}{extension}", "xb") as file:
            picture.save(file, "JPEG" if is_jpeg else "PNG", **about)
        return extension
    extension = ".tif" if has_tifffile() else ".npy"
    with open(f"{path}{extension}", "xb") as file:
        if extension == ".npy":
            np.save(file, array)
            return extension
        import tifffile

        bands = dict(planarconfig="contig") if channels > 1 else {}
        if form == "alpha":
            bands["extrasamples"] = [_TIFF_ALPHA]
        is_colour = is_picture and channels - (form == "alpha") == 3
        tifffile.imwrite(
            file,
            np.ascontiguousarray(array if channels > 1 else array[..., 0]),
            photometric="rgb" if is_colour else "minisblack",
            compression="zlib",
            metadata=None,
            extratags=[] if nodata is None else [(GDAL_NODATA, "s", 0, as_text(nodata), True)],
            **bands,
        )
    return extension
