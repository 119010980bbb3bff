"""The few checks that arguments share.

Each check takes arguments by name and raises a ValueError of one line: the name, what would be right, what was given.
None passes: it stands for a default that is chosen elsewhere.
"""

import math
import operator
import re
from collections.abc import Callable, Collection, Sequence
from typing import Any


def _each(arguments: dict[str, Any], fits: Callable[[Any], bool], wanted: str):
    for name, value in arguments.items():
        if value is not None and not fits(value):
            raise ValueError(f"{name} must {wanted}, not {value!r}")


def least(bound: float, **arguments):
    """Each must be `bound` or more."""
    _each(arguments, lambda value: value >= bound, f"be at least {bound}")


def positive(**arguments):
    """Each must be above 0."""
    _each(arguments, lambda value: value > 0, "be above 0")


def share(interval: str = "[0, 1]", **arguments):
    """Each must lie in the interval, written as in mathematics: a round bracket leaves out its end."""
    low, high = map(float, interval[1:-1].split(","))
    above = operator.ge if interval[0] == "[" else operator.gt
    below = operator.le if interval[-1] == "]" else operator.lt
    _each(arguments, lambda value: above(value, low) and below(value, high), f"lie in {interval}")


def one_of(allowed: Collection[str], **arguments):
    """Each must be one of the words."""
    words = list(allowed)  # a list, because the value may be of a type that cannot be hashed
    _each(arguments, lambda value: value in words, f"be one of {', '.join(words)}")


def numbers(or_zero: bool = False, **arguments):
    """Each must be a list of at least one finite number, all above 0 (or 0 too, with `or_zero`)."""
    wanted = "0 or more" if or_zero else "above 0"

    def fits(values) -> bool:
        return bool(values) and all(math.isfinite(x) and (x > 0 or or_zero and x == 0) for x in values)

    _each(arguments, fits, f"be numbers {wanted}, at least one")


def check_statistics(image_mean, image_std, options: str = "--image_mean {} --image_std {}"):
    """Raise ValueError unless both are None, or of as many channels and for pixels in [0, 1].

    options: how a user gives them to the command.
    """
    if (image_mean is None) != (image_std is None):
        raise ValueError("image_mean and image_std must be given together")
    if image_mean is None:
        return
    if len(image_mean) != len(image_std):
        raise ValueError(f"image_mean and image_std must be of as many channels, not {image_mean} and {image_std}")
    if not all(0 <= mean <= 1 for mean in image_mean) or not all(0 < std <= 1 for std in image_std):
        hint = ""
        if max(image_std) > 1:
            mean, std = (",".join(f"{value / 255:.4g}" for value in values) for values in (image_mean, image_std))
            hint = f"; for values in 0..255 they are {options.format(mean, std)}"
        raise ValueError(
            f"image_mean must lie in [0, 1] and image_std in (0, 1], for pixels in [0, 1], not {image_mean} and "
            f"{image_std}{hint}"
        )


def check_license(license: str | None) -> str | None:
    """The license itself. Raises ValueError unless it is None or has the form of the Hub's short names."""
    if license is not None and not (isinstance(license, str) and re.fullmatch(r"[a-z0-9][a-z0-9.-]*", license)):
        raise ValueError(f"license must be an identifier of the Hub such as apache-2.0 or cc-by-nc-4.0, not {license}")
    return license


def check_bands(bands: Sequence[int] | None, num_channels: int | None = None):
    """Raise ValueError unless these are one or three numbers of bands, from 1."""
    if bands is None:
        return
    if len(bands) not in (1, 3):
        raise ValueError(f"bands must be one number or three, such as 3,2,1, not {','.join(map(str, bands))}")
    least(1, bands=min(bands))
    if num_channels is not None and max(bands) > num_channels:
        raise ValueError(f"bands must lie in 1..{num_channels}, the channels of the images, not {max(bands)}")
