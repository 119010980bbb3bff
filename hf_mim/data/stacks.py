"""Images of several parts, such as RGB and infrared: from columns or folders, stacked as the channels of one image.

`image_column="rgb,ir"` names the parts, in the order of their channels; "rgb:3,ir:1" also says how many channels each
has. A value of the image column is then `{"rgb:3": value, "ir:1": value}`.
"""

import re
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import PurePath

import numpy as np
from PIL import Image

from hf_mim.models.orientation import exif_orientation, upright
from hf_mim.models.pixels import ImageFormatError, as_pixels, to_channels

_PART = re.compile(r"([^,:]+)(?::(\d+))?")


def parts_of(image_column: str | None) -> dict[str, int | None]:
    """Name → number of channels, or None, of the parts of an image; {} if images are one column.

    Raises ValueError for a text that names no two parts.
    """
    if image_column is None or not re.search("[,:]", image_column):
        return {}
    found = [_PART.fullmatch(part.strip()) for part in image_column.split(",")]
    names = [part[1] for part in found if part]
    if len(set(names)) < len(found) or len(names) < 2 or any(part[2] == "0" for part in found):
        raise ValueError(
            "image_column must be a column, or the parts of an image with a comma between, such as rgb,ir or "
            f"rgb:3,ir:1, not {image_column!r}"
        )
    return {part[1]: int(part[2]) if part[2] else None for part in found}


def is_stack(value) -> bool:
    """Whether a value of an image column has several parts."""
    return isinstance(value, dict) and all(":" in key for key in value)


def open_stack(stack: dict, num_channels: int | None, open_image: Callable) -> np.ndarray:
    """The parts of an image, opened by `open_image`, as one array [h, w, C].

    Raises ImageFormatError if they differ in size or depth, or if they do not have `num_channels` channels together.
    """
    parts = {}
    for key, value in stack.items():
        name, _, count = key.partition(":")
        if all(held is None for held in (value.values() if isinstance(value, dict) else [value])):
            raise ImageFormatError(f"the row holds no {name}; leave such rows out")
        parts[name] = _whole(open_image(value, int(count) if count else None), int(count) if count else None)
    for what, told in (
        ("size", {name: f"{part.shape[1]}×{part.shape[0]}" for name, part in parts.items()}),
        ("depth", {name: str(part.dtype) for name, part in parts.items()}),
    ):
        if len(set(told.values())) > 1:
            listed = " and ".join(f"{name} is {value}" for name, value in told.items())
            raise ImageFormatError(f"{listed}: the parts of an image must have one {what}")
    stacked = np.concatenate([*parts.values()], axis=2)
    if num_channels is not None and stacked.shape[2] != num_channels:
        listed = " + ".join(f"{name} {part.shape[2]}" for name, part in parts.items())
        raise ImageFormatError(
            f"num_channels={num_channels}, but the image has {listed} = {stacked.shape[2]} channels; image_column can "
            "say how many each part is to have, such as rgb:3,ir:1"
        )
    return stacked


def _whole(image: Image.Image | np.ndarray, num_channels: int | None) -> np.ndarray:
    """An opened image upright, [h, w, C]; without `num_channels` it has those of its file, colour as RGB."""
    if num_channels is None:
        if isinstance(image, Image.Image):
            num_channels = 1 if image.mode[0] in "1LIF" else 3
        else:
            num_channels = 1 if image.ndim == 2 else min(image.shape[0], image.shape[-1])
    turned = exif_orientation(image) if isinstance(image, Image.Image) else (False, False, False)
    pixels = np.asarray(to_channels(image, num_channels))
    return upright(as_pixels(pixels if pixels.ndim == 3 else pixels[..., None]), *turned)


def files_of_parts(paths: Iterable[str], names: Iterable[str]) -> tuple[dict[str, dict[str, str]], Counter]:
    """(image → part → its file, what is left out → how many), for a folder for each part: `train/ir/0001.png`.

    The files of an image have one name, but for the extension. An image is called as its files are, without the folder
    of the part. Without any such folder, the first is {}.

    Raises ValueError for an image of which a part is missing or there twice.
    """
    names, images, keys, left_out = list(names), {}, {}, Counter()
    for path in paths:
        parts = PurePath(path).parts
        places = [place for place, part in enumerate(parts[:-1]) if part in names]
        if len(places) != 1:
            left_out[f"outside of the folders {', '.join(names)}"] += 1
            continue
        name, rest = parts[places[0]], PurePath(*parts[: places[0]], *parts[places[0] + 1 :])
        key = rest.with_suffix("").as_posix()
        files = images.setdefault(keys.setdefault(key, rest.as_posix()), {})
        if name in files:
            raise ValueError(f"{files[name]} and {path} are two files of one image; keep one of them")
        files[name] = path
    lacking = {image: [name for name in names if name not in files] for image, files in images.items()}
    lacking = {image: missing for image, missing in lacking.items() if missing}
    if lacking:
        image, missing = next(iter(lacking.items()))
        raise ValueError(
            f"{next(iter(images[image].values()))} has no file of the same name in a folder {missing[0]}; "
            f"{len(lacking):,} of {len(images):,} images lack a part"
        )
    return {image: {name: files[name] for name in names} for image, files in images.items()}, left_out
