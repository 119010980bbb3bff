"""Masks: pictures whose pixels are ids of classes or objects, and images that have a mask each."""

import contextlib
import io
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from datasets import Dataset, Features
from datasets import Image as ImageFeature
from PIL import Image, JpegImagePlugin, UnidentifiedImageError
from torch import Tensor

from hf_mim.models.orientation import exif_orientation, upright
from hf_mim.models.pixels import ImageFormatError

from .columns import FOLDER, NO_LABELS, check_columns, check_holds_images, holds_images, is_encoded
from .decode import BrokenImage, decoding, image_name, open_image, stored
from .folders import IMAGE_EXTENSIONS, find_files
from .images import Images, group_ids, number_groups
from .local import image_files, pick_split
from .mask_folders import divide
from .names import group_folder, split_of_folder
from .sources import load_images, local_folder, open_source, source_name
from .stacks import first_part

IMAGE_FOLDERS = ("images", "image", "imgs", "img")
MASK_FOLDERS = ("masks", "mask", "annotations", "annotation", "segmentations", "segmentation", "labels", "label")
MASK_COLUMNS = (*MASK_FOLDERS, "segmentation_mask", "label_mask", "semantic_segmentation", "semantic_mask")
_ID_MODES = ("1", "L", "P", "I", "I;16", "I;16B", "I;16L", "I;16N")


class MaskedImages(Images):
    """Images with a mask each. A mask does not say what its ids mean, nor which of them is ignored.

    Args:
        images: a dataset with a column `image`, undecoded.
        masks: a dataset of the same length with a column `mask`, undecoded.
        name: what they are, for results.
        groups: the number of each image's group, or None.
        group: where the groups come from, in words.

    Attributes: `images`, a dataset with the one column `image`; `sizes`, the (height, width) of each upright image and
    of its mask.

    Raises:
        ValueError: in one line that names the image: its mask is missing, has colours, or has another size. Only
            headers are read.
    """

    def __init__(self, images: Dataset, masks: Dataset, name: str = "images", groups=None, group: str | None = None):
        if len(images) != len(masks):
            raise ValueError(f"masks must be as many as the {len(images)} images of {name}, not {len(masks)}")
        super().__init__(images.select_columns(["image"]), name)
        self._groups, self.group = groups, group
        self._masks = masks.select_columns(["mask"])
        self.sizes = [self._checked_size(index) for index in range(len(images))]

    def _keep(self, indices: list[int]):
        super()._keep(indices)
        self._masks, self.sizes = self._masks.select(indices), [self.sizes[index] for index in indices]
        self._groups = None if self._groups is None else self._groups[indices]

    def read_groups(self) -> Tensor | None:
        """The number of each image's group `[n]`, int64; None if there are no groups."""
        return self._groups

    def read_mask(self, index: int) -> np.ndarray:
        """The ids `[h, w]` of the pixels of one image, uint8 or int64. Raises ValueError as `read_mask_ids`."""
        return read_mask_ids(self._masks[index]["mask"], f"the mask of {self.image_name(index)}")

    def read_masks(self) -> Iterator[np.ndarray]:
        """All masks in order. Each is decoded when it is needed."""
        return (self.read_mask(index) for index in range(len(self)))

    def _checked_size(self, index: int) -> tuple[int, int]:
        name, mask = self.image_name(index), self._masks[index]["mask"]
        if stored(mask) is None:
            raise ValueError(f"{name} of {self.name} has no mask; add it, or leave the image out")
        size = _upright_size(self.images[index]["image"], name)
        mask_size = _upright_size(mask, f"the mask of {name}", is_mask=True)
        if size != mask_size:
            sizes = f"{size[0]}×{size[1]} (height×width) but its mask {mask_size[0]}×{mask_size[1]}"
            raise ValueError(f"{name} of {self.name} is {sizes}; each mask must have the size of its image")
        return size


def load_masks(
    source: str | os.PathLike | Dataset,
    split: str = "train",
    image_column: str | None = None,
    mask_column: str | None = None,
    group: str | None = None,
) -> MaskedImages:
    """Load images and their masks, not yet decoded.

    Args:
        source: a local folder of images and masks, in one of the layouts that `mask_folders.divide` knows: folders
            `images` and `masks` (or `annotations`, `labels`, ...), `train` and `train_masks`, files `1.png` and
            `1_mask.png`. An image and its mask have the same name, except for the extension. Folders of splits may lie
            above or below (`train/images` or `images/train`). Or a source of `load_images` that has a column of masks
            too.
        split: as in `load_images`.
        image_column: default: found as in `load_images`.
        group: as in `load_images`.
        mask_column: default: a column called mask, annotation, segmentation or label that holds images; or, where an
            image has masks in several folders, the folder.

    Raises:
        ValueError: in one line: there are no masks; a mask is missing, has colours or another size than its image
            (only headers are read); there is no such split or column.
    """
    name = f"{source_name(source)}, split {split}"
    folder = local_folder(source)
    if folder is not None and (splits := _image_and_mask_folders(folder, mask_column)):
        images, masks = pick_split(splits, split, source)
        masks = [masks.get(key) for key in images]  # for a missing mask, MaskedImages raises with the image's name
        groups = None
        if group is not None:
            if group != FOLDER:
                raise ValueError(f"group of a folder of masks must be {FOLDER!r}, not {group!r}")
            names = [group_folder(os.path.relpath(path, folder)) for path in images.values()]
            groups, group = number_groups(names), "column folder"
        return MaskedImages(image_files(list(images.values())), image_files(masks, "mask"), name, groups, group)
    data = open_source(source, split)
    mask_column = _find_mask(data.features, mask_column, name)
    masks = data.select_columns([mask_column])
    masks = masks if mask_column == "mask" else masks.rename_column(mask_column, "mask")
    if is_encoded(masks.features["mask"]):
        masks = masks.cast_column("mask", ImageFeature(decode=False))
    data = data.remove_columns([mask_column])
    images = load_images(data, image_column=image_column, labels=NO_LABELS, group=group)
    return MaskedImages(images, masks, name, group_ids(images), group and f"column {group}")


def read_mask_ids(value, name: str = "the mask") -> np.ndarray:
    """One value of a mask column as ids `[h, w]`: uint8 if the file has 8 bits, int64 otherwise.

    A palette (PNG mode P) gives its indices, not its colours; grey of 1, 8, 16 or 32 bits gives its values as they are.
    EXIF orientation is applied, as for images.

    Args:
        value: `{"bytes", "path"}`, a path, encoded bytes, a PIL image, or an integer array.
        name: the mask's name in errors, if the value has no path.

    Raises:
        ValueError: in one line that names the mask: it cannot be decoded, has colours or fractions instead of ids, or
            is a JPEG, which does not keep ids.
    """
    with _naming_the_mask(value, name):
        mask = open_image(value, as_ids=True)
        if isinstance(mask, np.ndarray):
            ids = mask[..., 0] if mask.ndim == 3 and mask.shape[2] == 1 else mask
            if ids.ndim != 2 or ids.dtype.kind not in "biu":
                raise ImageFormatError(f"a mask must be integers [h, w], not {mask.dtype} {list(mask.shape)}")
        else:
            _check_holds_ids(mask)
            ids = upright(np.asarray(mask), *exif_orientation(mask))
    return np.ascontiguousarray(ids, np.uint8 if ids.dtype.kind in "bu" and ids.dtype.itemsize == 1 else np.int64)


def _check_holds_ids(mask: Image.Image):
    if isinstance(mask, JpegImagePlugin.JpegImageFile):
        raise ImageFormatError("a mask must not be a JPEG, which changes ids; save ids as PNG, mode L or P")
    if mask.mode not in _ID_MODES:
        raise ImageFormatError(f"a mask must hold ids, not colours ({mask.mode}); save ids as PNG, mode L or P")


def _upright_size(value, name: str, is_mask: bool = False) -> tuple[int, int]:
    """(height, width) of one value of an image column when upright, from its header if it has one."""
    with _naming_the_mask(value, name):
        value = stored(first_part(value))
        if isinstance(value, str | bytes):
            try:
                with Image.open(io.BytesIO(value) if isinstance(value, bytes) else value) as image:
                    return _size_of(image, is_mask)
            except UnidentifiedImageError:
                pass  # an array (.npy), a TIFF of many bands, or a broken image: open_image finds out
        return _size_of(open_image(value), is_mask)


def _size_of(image: Image.Image | np.ndarray, is_mask: bool) -> tuple[int, int]:
    if isinstance(image, np.ndarray):
        # Are the channels first, [C, h, w]? As in decode.py, they are the shorter axis.
        shape = image.shape[1:] if image.ndim == 3 and image.shape[0] < image.shape[2] else image.shape[:2]
        return tuple(shape)
    if is_mask:
        _check_holds_ids(image)
    swap = exif_orientation(image)[2]
    return image.size if swap else image.size[::-1]


@contextlib.contextmanager
def _naming_the_mask(value, name: str):
    """Turn what opening an image raises into a ValueError of one line that names the image."""
    try:
        with decoding(image_name(value, name)):
            yield
    except BrokenImage as error:
        raise ValueError(str(error)) from error


def _find_mask(features: Features, mask_column: str | None, name: str) -> str:
    if mask_column is not None:
        check_columns(features, mask_column=mask_column)
        check_holds_images(features, "mask_column", mask_column)
        return mask_column
    for column in MASK_COLUMNS:
        feature = features.get(column)
        if holds_images(feature) and "string" not in getattr(feature, "dtype", ""):  # a string names a class
            return column
    known = ", ".join(features)
    raise ValueError(f"{name} has no masks: give a folder of images/ and masks/, or set mask_column to one of {known}")


def _image_and_mask_folders(folder: Path, mask_column: str | None) -> dict[str, tuple[dict[str, str], dict[str, str]]]:
    """Split -> (images, masks), each a dict: name without extension -> path. Empty if there are no masks."""
    images, kinds, _ = divide(find_files(folder, IMAGE_EXTENSIONS))
    if not kinds:
        return {}
    if mask_column is not None and mask_column not in kinds:
        raise ValueError(f"mask_column={mask_column!r} is no folder of masks in {folder}; there are {', '.join(kinds)}")
    chosen = [mask_column] if mask_column else list(kinds)
    splits: dict[str, tuple[dict, dict]] = {}
    pairs: dict[bool, list[tuple]] = {False: [(None, images)], True: [(kind, kinds[kind]) for kind in chosen]}
    found = {key for _, key, _ in _keys(images)} & {key for kind in chosen for _, key, _ in _keys(kinds[kind])}
    for is_mask, kind, entries in ((is_mask, *pair) for is_mask, parts in pairs.items() for pair in parts):
        for split, key, path in _keys(entries, stripped=not found):
            found = splits.setdefault(split, ({}, {}))[is_mask]
            if key in found:
                raise ValueError(_two_of_one(folder / path, found[key], kind, chosen))
            found[key] = str(folder / path)
    return {split: found for split, found in splits.items() if all(found)}


def _two_of_one(path: Path, other: str, kind: str | None, kinds: list[str]) -> str:
    if kind is None or len(kinds) == 1:
        return f"{path} and {other} differ only in their extension; keep one of them"
    return f"{path} and {other} are masks of one image; choose their folder, such as --mask_column {kinds[0]}"


def _keys(entries: list, stripped: bool = False) -> Iterator[tuple[str, str, str]]:
    """(split, name without extension, path) of images or masks; `stripped`: without the folders that all lie in."""
    found = []
    for parts, path in entries:
        place = next((i for i, part in enumerate(parts[:-1]) if split_of_folder(part)), None)
        split = "train" if place is None else split_of_folder(parts[place])
        found.append((split, [part for i, part in enumerate(parts) if i != place], path))
    shared = len(os.path.commonprefix([parts[:-1] for _, parts, _ in found])) if stripped else 0
    for split, parts, path in found:
        yield split, os.path.splitext("/".join(parts[shared:]))[0], path
