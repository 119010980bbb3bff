"""The few checks that arguments share. Each takes arguments by name, and raises a ValueError of one line that says the
name, what would be right and what was given. None stands for a default that is settled elsewhere, and passes."""

import math
import re
from collections.abc import Collection


def least(bound: float, **arguments):
    """Each must be `bound` or more."""
    for name, value in arguments.items():
        if value is not None and not value >= bound:
            raise ValueError(f"{name} must be at least {bound}, not {value!r}")


def positive(**arguments):
    """Each must be above 0."""
    for name, value in arguments.items():
        if value is not None and not value > 0:
            raise ValueError(f"{name} must be above 0, not {value!r}")


def share(interval: str = "[0, 1]", **arguments):
    """Each must lie in the interval, written as in mathematics: a round bracket leaves its end out."""
    low, high = map(float, interval[1:-1].split(","))
    for name, value in arguments.items():
        ends = [bracket in "[]" for bracket in (interval[0], interval[-1])]
        if value is not None and not (low < value < high or (value == low and ends[0]) or (value == high and ends[1])):
            raise ValueError(f"{name} must lie in {interval}, not {value!r}")


def one_of(allowed: Collection[str], **arguments):
    """Each must be one of the words."""
    for name, value in arguments.items():
        if value is not None and value not in list(allowed):  # a list: the value may be of any type
            raise ValueError(f"{name} must be one of {', '.join(allowed)}, not {value!r}")


def numbers(or_zero: bool = False, **arguments):
    """Each must be a list of finite numbers above 0 (or of 0 too), and at least one of them."""
    for name, values in arguments.items():
        fits = all(math.isfinite(value) and (value > 0 or or_zero and value == 0) for value in values)
        if not values or not fits:
            wanted = "0 or more" if or_zero else "above 0"
            raise ValueError(f"{name} must be numbers {wanted}, at least one, not {values}")


def check_license(license: str | None) -> str | None:
    """The licence itself. Raises ValueError unless it is None or one of the Hub's short names, by its form."""
    if license is not None and not (isinstance(license, str) and re.fullmatch(r"[a-z0-9][a-z0-9.-]*", license)):
        raise ValueError(f"license must be an identifier of the Hub such as apache-2.0 or cc-by-nc-4.0, not {license}")
    return license
