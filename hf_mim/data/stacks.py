"""Images of several parts, such as RGB and infrared: from columns or folders, stacked as the channels of one image.

`image_column="rgb,ir"` names the parts, in the order of their channels; "rgb:3,ir:1" also says how many channels each
has. A value of the image column is then `{"rgb:3": value, "ir:1": value}`, and `{"rgb:3:zero": ...}` if an image may
lack a part, whose value is None.

The parts of an image may differ in type. The array then has the least type that holds all of their values, and its
type in full is that of the channels: "3 uint8 + 1 uint16".
"""

import re
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import PurePath

import numpy as np
from PIL import Image

from hf_mim.checks import one_of
from hf_mim.files import listed
from hf_mim.models.orientation import exif_orientation, upright
from hf_mim.models.pixel_types import ImageFormatError, as_pixels, channel_types, common_type, joined_types
from hf_mim.models.pixels import to_channels

_PART = re.compile(r"([^,:]+)(?::(\d+))?")
ERROR, ZERO = MISSING = ("error", "zero")  # what `missing_modality` may be
_NAMED = 3  # files that a message lists


@dataclass(frozen=True)
class Incomplete:
    """An `image_column` whose images may lack parts."""

    text: str


def check_parts(image_column: str | list[str] | None, missing_modality: str, cached: bool | str = False) -> str | None:
    """The `image_column` as text, also of a list of parts.

    Raises ValueError for missing parts without parts, or with a cache of the decoded images (`cached`).
    """
    image_column = ",".join(image_column) if isinstance(image_column, list) else image_column
    image_parts(image_column, missing_modality)
    if missing_modality == ZERO and cached:
        raise ValueError(
            f"cache_images must be false with missing_modality {ZERO}: a cache has no place for such parts"
        )
    return image_column


def image_parts(image_column: str | None, missing_modality: str) -> str | Incomplete | None:
    """The `image_column` for `load_images`, by what is to happen to an image that lacks a part.

    Raises ValueError for "zero" without parts.
    """
    one_of(MISSING, missing_modality=missing_modality)
    if missing_modality == ERROR:
        return image_column
    if not parts_of(image_column):
        raise ValueError(
            f"missing_modality {ZERO} needs the parts of an image as image_column, such as rgb,ir, not "
            f"{image_column or 'nothing'}"
        )
    return Incomplete(image_column)


def parts_of(image_column: str | Incomplete | None) -> dict[str, int | None]:
    """Name → number of channels, or None, of the parts of an image; {} if images are one column.

    Raises ValueError for a text that names no two parts.
    """
    text = image_column.text if isinstance(image_column, Incomplete) else image_column
    if text is None or not re.search("[,:]", text):
        return {}
    found = [_PART.fullmatch(part.strip()) for part in text.split(",")]
    names = [part[1] for part in found if part]
    if len(set(names)) < len(found) or len(names) < 2 or any(part[2] == "0" for part in found):
        raise ValueError(
            "image_column must be a column, or the parts of an image with a comma between, such as rgb,ir or "
            f"rgb:3,ir:1, not {text!r}"
        )
    return {part[1]: int(part[2]) if part[2] else None for part in found}


def keys_of(image_column: str | Incomplete) -> list[str]:
    """The keys of a stack of these parts."""
    end = f":{ZERO}" if isinstance(image_column, Incomplete) else ""
    return [f"{name}:{count or ''}{end}" for name, count in parts_of(image_column).items()]


def is_stack(value) -> bool:
    """Whether a value of an image column has several parts."""
    return isinstance(value, dict) and all(":" in key for key in value)


def present(stack: dict) -> dict:
    """The parts of a stack that the image has."""

    def is_empty(value) -> bool:
        return all(held is None for held in (value.values() if isinstance(value, dict) else [value]))

    return {key: value for key, value in stack.items() if not is_empty(value)}


def first_part(value):
    """The first part that the image has, if the value is a stack; None for no part. Other values stay as they are."""
    return next(iter(present(value).values()), None) if is_stack(value) else value


def open_stack(
    stack: dict, num_channels: int | None, open_image: Callable, pixel_type: str | None = None
) -> np.ndarray:
    """The parts of an image, opened by `open_image`, as one array [h, w, C]. It is masked where a part is missing.

    pixel_type: the type that the image has to have, in full.

    Raises ImageFormatError for parts of several sizes or another type, for a missing part unless the keys allow it, and
    if the parts do not have `num_channels` channels together.
    """
    parts, types = _opened(stack, num_channels, open_image)
    if pixel_type is not None and not fits(types, pixel_type):
        raise ImageFormatError(
            f"the image is {joined_types(types)}, and the value range was measured on {pixel_type}; convert the image"
        )
    kind = common_type(pixel_type or joined_types([found for found in types if found]))
    found = np.concatenate([part for part, _ in parts.values() if part is not None], axis=2).astype(kind, copy=False)
    if (count := types.count(None)) == 0:
        return found
    lacking = np.array([found is None for found in types])
    whole = np.zeros((*found.shape[:2], found.shape[2] + count), kind)
    whole[..., ~lacking] = found
    return np.ma.array(whole, mask=np.broadcast_to(lacking, whole.shape))


def stack_types(stack: dict, num_channels: int, open_image: Callable) -> list[str | None]:
    """The type of each channel of an image; None for those that it lacks. Raises ImageFormatError as `open_stack`."""
    return _opened(stack, num_channels, open_image)[1]


def fits(types: list[str | None], pixel_type: str) -> bool:
    """Whether channels of these types, None for missing ones, are an image of a type."""
    expected = channel_types(pixel_type, len(types))
    return all(found in (None, right) for found, right in zip(types, expected, strict=True))


def _opened(stack: dict, num_channels: int | None, open_image: Callable) -> tuple[dict, list[str | None]]:
    """(name → the part [h, w, C] or None, and its number of channels; the type of each channel, None if missing)."""
    held, parts = present(stack), {}
    if not held:
        raise OSError("the row holds no image")
    counts = {key: int(key.split(":")[1]) if key.split(":")[1] else None for key in stack}
    for key, value in stack.items():
        name, _, *may_lack = key.split(":")
        if key in held:
            part = _whole(open_image(value, counts[key]), counts[key])
            parts[name] = part, part.shape[2]
        elif may_lack:
            parts[name] = None, counts[key]
        else:
            raise ImageFormatError(
                f"the row holds no {name}; leave such rows out, or give --missing_modality {ZERO}, which masks the "
                "missing part as a whole (a cache cannot hold them)"
            )
    sizes = {name: f"{part.shape[1]}×{part.shape[0]}" for name, (part, _) in parts.items() if part is not None}
    if len(set(sizes.values())) > 1:
        told = " and ".join(f"{name} is {size}" for name, size in sizes.items())
        raise ImageFormatError(f"{told}: the parts of an image must have one size")
    parts = _counted(parts, num_channels)
    types = [None if part is None else str(part.dtype) for part, count in parts.values() for _ in range(count)]
    return parts, types


def _counted(parts: dict, num_channels: int | None) -> dict:
    """The parts, with the number of channels of a missing one. Raises ImageFormatError if they have another sum."""
    unknown = [name for name, (_, count) in parts.items() if count is None]
    known = sum(count for _, count in parts.values() if count is not None)
    if len(unknown) == 1 or num_channels is None:  # without num_channels, nobody wants to know
        rest = max(1, (num_channels or 0) - known)
        parts = {name: (part, rest if count is None else count) for name, (part, count) in parts.items()}
    elif unknown:
        raise ImageFormatError(
            f"the row holds no {' and no '.join(unknown)}; image_column must say how many channels each part has, such "
            "as rgb:3,ir:1"
        )
    total = sum(count for _, count in parts.values())
    if num_channels is not None and total != num_channels:
        told = " + ".join(f"{name} {count}" for name, (_, count) in parts.items())
        raise ImageFormatError(
            f"num_channels={num_channels}, but the image has {told} = {total} channels; image_column can say how many "
            "each part is to have, such as rgb:3,ir:1"
        )
    return parts


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


def files_of_parts(
    paths: Iterable[str], image_column: str | Incomplete
) -> tuple[dict[str, dict[str, str | None]], Counter]:
    """(image → part → its file, what is left out → how many), for a folder for each part: `train/ir/0001.png`.

    The files of an image have one name, but for the extension. An image is called as its files are, without the folder
    of the part. A part that an image may lack is None. Without any such folder, the first is {}.

    Raises ValueError for an image of which a part is missing or there twice, and for a part that no image has, unless
    images may lack parts.
    """
    names, images, keys, left_out = list(parts_of(image_column)), {}, {}, Counter()
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
    lacking = {name: [files for files in images.values() if name not in files] for name in names}
    for name, without in lacking.items():
        if images and len(without) == len(images) and not isinstance(image_column, Incomplete):
            raise ValueError(f"there is no image in a folder {name}, which image_column names")
        if without and not isinstance(image_column, Incomplete):
            first = listed([next(iter(files.values())) for files in without[:_NAMED]])
            some = sum(len(files) < len(names) for files in images.values())
            raise ValueError(
                f"{first} {'have' if len(without) > 1 else 'has'} no file of the same name in a folder {name}; "
                f"{some:,} of {len(images):,} images lack a part; --missing_modality {ZERO} takes them, with that part "
                "masked as a whole (a cache cannot hold them)"
            )
    ordered = sorted(images) if isinstance(image_column, Incomplete) else images  # or those without ir would be last
    return {image: {name: images[image].get(name) for name in names} for image in ordered}, left_out
