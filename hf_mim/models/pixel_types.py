"""The types in which pixels are kept, of an image or of each of its channels."""

import itertools
from collections.abc import Sequence

import numpy as np


class ImageFormatError(ValueError):
    """An intact image that cannot become what the config asks for. The user has to fix this, so it is never skipped."""


def pixel_type(dtype: np.dtype) -> str:
    """The type in which numbers of any type are kept: "uint8", "uint16", "int16", "int32" or "float32".

    Raises ImageFormatError for complex numbers and for what is no number.
    """
    if dtype.kind not in "biuf":
        raise ImageFormatError(f"an array image must be numeric, not {dtype}")
    if dtype.kind in "bf":
        return "uint8" if dtype.kind == "b" else "float32"
    if dtype.itemsize < 4:
        return "int16" if dtype == np.int8 else dtype.name
    return "int32"


def as_pixels(array: np.ndarray) -> np.ndarray:
    """A numeric array in its `pixel_type`, in native byte order; False and True are 0 and 255.

    Raises:
        ImageFormatError: complex or non-numeric values, or whole numbers beyond 32 bits.
    """
    kind = pixel_type(array.dtype)
    if array.dtype.kind == "b":
        return array.astype(np.uint8) * 255
    if kind == "int32" and array.dtype != np.int32:
        limits = np.iinfo(np.int32)
        for value, beyond in ((array.max(), array.max() > limits.max), (array.min(), array.min() < limits.min)):
            if beyond:
                side = f"above {limits.max}" if value > 0 else f"below {limits.min}"
                raise ImageFormatError(
                    f"the image has values {side} ({value}), which do not fit int32; if {value} stands for pixels "
                    f"without data, give --nodata {value}"
                )
    return array.astype(kind, copy=False)


def joined_types(types: Sequence[str | None]) -> str:
    """The type of an image whose channels have these: "uint8" if it is one, else "3 uint8 + 1 uint16". None: any."""
    if len({kind for kind in types if kind is not None}) == 1:
        return next(kind for kind in types if kind is not None)
    return " + ".join(f"{len([*run])} {kind or 'missing'}" for kind, run in itertools.groupby(types))


def channel_types(image_type: str, num_channels: int) -> list[str]:
    """The type of each channel of an image of this type: the inverse of `joined_types`."""
    runs = [run.split() for run in image_type.split(" + ")]
    return runs[0] * num_channels if len(runs[0]) == 1 else [kind for count, kind in runs for _ in range(int(count))]


def common_type(image_type: str) -> str:
    """The least type of array that holds all channels of an image of this type."""
    return pixel_type(np.result_type(*[run.split()[-1] for run in image_type.split(" + ")]))
