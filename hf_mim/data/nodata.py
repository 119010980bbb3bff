"""The value of pixels without data: what TIFF and DICOM files say by a tag, and whether it fits the run."""

import contextlib
import math
import struct

import numpy as np
from datasets import Dataset

from hf_mim.models.nodata import as_text, impossible, is_possible
from hf_mim.models.orientation import exif_orientation
from hf_mim.models.pixels import ImageFormatError, ValueRange, crop_image, to_channels

from .augment import sampled
from .crop import WholeImage
from .decode import BrokenImage, as_file, decoding, image_name, stored
from .dicom import is_dicom, padding_value, split_frame
from .dicom_header import count_frames
from .folders import DICOM_EXTENSIONS, file_type
from .stacks import is_stack, present
from .tiff import is_tiff, unused_pages

IGNORE_TAGS = "none"  # as the option nodata: there is no such value, whatever tags say
GDAL_NODATA = 42113  # the number of the tag
_BITS, _PHOTOMETRIC, _SAMPLE_FORMAT = 258, 262, 339
_PALETTE = 3  # of the tag PhotometricInterpretation
_KINDS = {1: "uint", 2: "int", 3: "float"}  # of the tag SampleFormat
_PROBES, _SAMPLE = 16, 1024  # images that are opened to see whether any may have a tag; those whose tags are read
_HEAD = 132  # bytes that tell a DICOM file


def check_nodata(nodata: float | str | None):
    """Raise ValueError for a nodata value that cannot be."""
    if nodata not in (None, IGNORE_TAGS) and math.isinf(nodata):
        raise ValueError(f"nodata must be a number or nan, which stands for inf too, not {nodata}")


def tagged_nodata(value) -> float | None:
    """The nodata value of an image as `open_image` gives it, from GDAL's tag of a TIFF or PixelPaddingValue of a DICOM
    file. None if it has no such tag, has colours by a palette, or cannot hold the value.

    value: one value of an image column. Only the header of the file is read.

    Raises ImageFormatError if the parts of an image have different tags.
    """
    if is_stack(value):
        return _of_parts({key.partition(":")[0]: tagged_nodata(part) for key, part in present(value).items()})
    value = stored(value)
    if not isinstance(value, str | bytes):
        return None
    with as_file(value) as file:
        head = file.read(_HEAD)
        if is_dicom(head):
            return padding_value(file, 0 if isinstance(value, bytes) else split_frame(value)[1] or 0)
        return _gdal_nodata(_read_tags(file, head)) if is_tiff(head) else None


def _gdal_nodata(tags: dict) -> float | None:
    """By the tags of a TIFF."""
    if GDAL_NODATA not in tags:
        return None
    try:
        nodata = float(tags[GDAL_NODATA].split(b"\0")[0])
    except ValueError:
        return None
    # The tag is about the stored values, and `tiff.py` changes some: colours for a palette's indices, black as 0, and
    # 0..255 for fewer than 8 bits.
    kind, bits = _KINDS.get(tags.get(_SAMPLE_FORMAT, 1), "float"), tags.get(_BITS, 8)
    if tags.get(_PHOTOMETRIC) == _PALETTE:
        return None
    if kind != "float" and bits <= 16:
        low = 0 if kind == "uint" else -(2 ** (bits - 1))
        if not low <= nodata < low + 2**bits or nodata != int(nodata):
            return None
    if kind == "uint" and tags.get(_PHOTOMETRIC) == 0:
        nodata = 2**bits - 1 - nodata
    return nodata * 255 / (2**bits - 1) if bits < 8 else nodata


def _of_parts(tags: dict[str, float | None]) -> float | None:
    """The value that the tags of all parts of an image give."""
    texts = {name: "none" if tag is None else as_text(tag) for name, tag in tags.items()}
    if len(set(texts.values())) > 1:
        listed = ", ".join(f"{name} {text}" for name, text in texts.items())
        some = next(text for text in texts.values() if text != "none")
        raise ImageFormatError(
            f"the parts of an image have different values in their tags of nodata ({listed}); give the one that holds "
            f"for all parts (--nodata {some}), or ignore the tags (--nodata none)"
        )
    return next(iter(tags.values()), None)


def _read_tags(file, head: bytes) -> dict:
    """The tags of the first image in a TIFF or BigTIFF: its photometric, GDAL's text, and bits and format of the first
    sample."""
    order, is_big = "<" if head[:2] == b"II" else ">", head[2:4] in (b"+\0", b"\0+")
    place, number, size = ("Q", "Q", 8) if is_big else ("I", "H", 4)

    def read(form: str, at: int) -> tuple:
        file.seek(at)
        return struct.unpack(order + form, file.read(struct.calcsize(order + form)))

    (start,) = read(place, 8 if is_big else 4)
    (count,) = read(number, start)
    tags = {}
    for entry in range(count):
        at = start + struct.calcsize(number) + entry * (4 + 2 * size)
        tag, _, length = read(f"HH{place}", at)
        if tag not in (_BITS, _PHOTOMETRIC, _SAMPLE_FORMAT, GDAL_NODATA):
            continue
        is_text = tag == GDAL_NODATA
        at += 4 + size
        if length * (1 if is_text else 2) > size:
            (at,) = read(place, at)
        tags[tag] = read(f"{min(length, 64)}s", at)[0] if is_text else read("H", at)[0]
    return tags


def tag_nodata(images) -> float | None:
    """The nodata value that the tags of a random sample of the files give; None if no file has one.

    images: a `datasets.Dataset` of undecoded images, or an `IterableDataset`, of which the first images are read.

    Raises:
        ImageFormatError: the files, or the parts of an image, have several values.
    """
    found, tags = {}, set()
    for row in _rows(images):
        name = image_name(row["image"], "an image")
        try:
            with decoding(name):
                nodata = tagged_nodata(row["image"])
        except BrokenImage:
            continue  # it is counted when it is read
        if nodata is not None:
            found.setdefault(as_text(nodata), (nodata, name))
            tags.add(f"{_tag_of(row['image'])}s")
    if len(found) > 1:
        listed = " and ".join(f"{text} ({name})" for text, (_, name) in found.items())
        raise ImageFormatError(
            f"the files have several values in their {' and '.join(sorted(tags))}, {listed}; convert them to one, or "
            f"give the one that holds for all: --nodata {next(iter(found))}"
        )
    return next((nodata for nodata, _ in found.values()), None)


def _rows(images):
    """The rows in which tags are looked for: a few, and many more if there is a file among them that may have one."""
    tagged = False
    for number, row in enumerate(sampled(images, _SAMPLE if isinstance(images, Dataset) else _PROBES, seed=0)):
        if number >= _PROBES and not tagged:
            return
        tagged = tagged or holds_tiff(row["image"]) or _holds_dicom(row["image"])
        yield row


def pages_line(images, num_channels: int) -> str | None:
    """Lines that say how many pages of TIFF files, and frames of DICOM files, are not used, in a small sample; None if
    all are.

    images, num_channels: as of `tag_nodata`; those of the model.
    """
    pages, frames = [], []
    for row in sampled(images, _PROBES, seed=0):
        value = stored(row["image"])
        with contextlib.suppress(BrokenImage), decoding("an image"):
            if holds_tiff(value):
                with as_file(value) as file:
                    pages.append(unused_pages(file, num_channels))
            elif _holds_dicom(value) and (isinstance(value, bytes) or split_frame(value)[1] is None):
                with as_file(value) as file:
                    frames.append(count_frames(file))
    lines = [
        f"pages: the first of {_most(pages, 'pages')} TIFF files of the sample; grey pages become the bands of one "
        "image if --num_channels is their number"
        if max(pages, default=1) > 1
        else None,
        f"frames: the first of {_most(frames, 'frames')} DICOM files of the sample; each frame of a file in a folder "
        "is an image"
        if max(frames, default=1) > 1
        else None,
    ]
    return "\n".join(filter(None, lines)) or None


def _most(counts: list[int], unit: str) -> str:
    """In which files with more than one page or frame the first is taken."""
    several = [count for count in counts if count > 1]
    ends = str(min(several)) if min(several) == max(several) else f"{min(several)} to {max(several)}"
    return f"{ends} {unit} is the image, in {len(several)} of {len(counts)}"


def holds_tiff(value) -> bool:
    """Whether a value of an image column, or a part of it, is a TIFF, by the name of its file or by its first bytes."""
    if is_stack(value):
        return any(map(holds_tiff, value.values()))
    value = stored(value)
    if isinstance(value, str):
        return value.lower().endswith((".tif", ".tiff"))
    return isinstance(value, bytes) and is_tiff(value)


def _tag_of(value) -> str:
    return "PixelPaddingValue" if _holds_dicom(value) else "GDAL_NODATA tag"


def _holds_dicom(value) -> bool:
    """As `holds_tiff`, for DICOM files."""
    if is_stack(value):
        return any(map(_holds_dicom, value.values()))
    value = stored(value)
    if isinstance(value, str):
        return file_type(split_frame(value)[0]) in DICOM_EXTENSIONS
    return isinstance(value, bytes) and is_dicom(value)


def check_tag(value, nodata: float | None):
    """Raise ImageFormatError if an image's tag has another nodata value than the run, which has begun without the
    option."""
    tag = tagged_nodata(value)
    if tag is None:
        return
    text, began = as_text(tag), "none" if nodata is None else as_text(nodata)
    if text != began:
        raise ImageFormatError(
            f"its {_tag_of(value)} is {text}, and the run has begun with {began}; give --nodata {text} if it holds "
            "for all images, or --nodata none to ignore the tags"
        )


def count_missing(image, num_channels: int, value_range: ValueRange) -> tuple[int, int]:
    """(values without data, all values) of a whole opened image at its full size. `value_range` has `nodata`."""
    if isinstance(image, np.ndarray):
        missing = np.isnan(to_channels(image, num_channels, value_range=value_range))
    else:
        size = image.size if exif_orientation(image)[2] else image.size[::-1]
        missing = crop_image(image, WholeImage(), size, num_channels, value_range=value_range).isnan().numpy()
    return int(missing.sum()), missing.size


def check_possible(nodata: float, kinds: dict[str, str]):
    """Raise ValueError if images of none of these types (type → the name of an image) can hold the number."""
    if nodata == nodata and not any(is_possible(nodata, kind) for kind in kinds):
        kind, name = next(iter(kinds.items()))
        raise ValueError(impossible(nodata, kind, f"images of {kind} ({name})"))
