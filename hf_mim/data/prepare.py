"""Large images become files that train fast: tiles of native pixels, or smaller images. Nothing else is changed.

Depth, bands, class folders, splits and labels stay. Files are written by several processes, into a folder that gets its
name when all is done.

What is written:
- An image that need not change (`short_side`, and it is small already): the file itself, byte for byte.
- From a JPEG: a JPEG of quality 95 with full colour resolution. It has lost details already, and PNG would be large.
- From other 8-bit images of 1 to 4 channels (grey, colour, alpha): PNG, without loss.
- From all others (16 bits, floats, other bands): TIFF with deflate, without loss; `.npy` where tifffile is missing.
- From an image with a nodata value: such a TIFF too, with the value in GDAL's tag (see `prepare_files.py`).
"""

import contextlib
import math
import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePath
from typing import Literal

import numpy as np
from datasets import ClassLabel, Dataset
from PIL import Image, JpegImagePlugin
from torch.utils.data import DataLoader

from hf_mim.checks import least
from hf_mim.files import check_destination, new_folder, one_line
from hf_mim.models.nodata import as_text
from hf_mim.models.orientation import exif_orientation, upright
from hf_mim.models.pixels import ImageFormatError
from hf_mim.progress import progress_bar

from .decode import BrokenImage, as_file, decoding, image_name, open_image, stored
from .folders import IMAGE_EXTENSIONS, TABLE_EXTENSIONS, file_type, scan, table_splits, without_masks
from .frames import frames_of
from .nodata import IGNORE_TAGS, check_nodata, holds_tiff, tagged_nodata
from .prepare_files import copied, has_tifffile, narrowed, nodata_of, smaller, write
from .sources import SplitNotFound, load_images
from .workers import leave_signals_to_the_main_process

_SPLITS = ("train", "validation", "test")


@dataclass
class Task:
    """One image: where it comes from, and the folder and name of what is written."""

    value: object
    name: str
    folder: str
    stem: str


@dataclass
class Prepared:
    """What was written.

    Attributes:
        images: how many were read.
        files: extension → how many were written.
        small: images that are smaller than a tile in a side, or need no resize.
        channels: number of channels → images.
        untold: nodata value, as text → images whose files cannot tell it, because they have no tag.
        broken: names of images that cannot be decoded, with the reason.
        left_out: what was not taken → the number of files.
    """

    images: int = 0
    files: Counter = field(default_factory=Counter)
    small: int = 0
    channels: Counter = field(default_factory=Counter)
    untold: Counter = field(default_factory=Counter)
    broken: list[str] = field(default_factory=list)
    left_out: Counter = field(default_factory=Counter)


@dataclass
class Prepare:
    """Writes the images of a source to a new folder. Raises ValueError, in one line, before anything is written.

    Args:
        source: as for `load_images`, or one image file.
        dest: a folder that does not exist yet, or is empty.
        tile: side of square tiles that cover each image. The last of a row and of a column are shifted inwards, so that
            they overlap their neighbours and no pixel is lost or made up. A side shorter than a tile stays as it is.
        short_side: length of the shorter side; smaller images stay as they are.
        num_channels: of the images, where a file can be read in two ways: pages of a TIFF, arrays, alpha.
        nodata: the value of pixels without data; "none": no value, whatever tags say; None: by the tag of each
            file.
        num_workers: processes.
    """

    source: str
    dest: str
    tile: int | None = None
    short_side: int | None = None
    num_channels: int | None = None
    nodata: float | Literal["none"] | None = None
    num_workers: int = 0

    def __post_init__(self):
        if (self.tile is None) == (self.short_side is None):
            both = "both" if self.tile is not None else "none"
            raise ValueError(f"give one of --tile and --short_side, such as --tile 256, not {both}")
        least(1, tile=self.tile, short_side=self.short_side, num_channels=self.num_channels)
        least(0, num_workers=self.num_workers)
        check_nodata(self.nodata)
        check_destination(self.dest)
        source, dest = Path(self.source).expanduser().resolve(), Path(self.dest).resolve()
        if source.exists() and dest.is_relative_to(source):
            raise ValueError(f"DEST must lie outside of SOURCE, and {self.dest} lies in {self.source}")
        self.tasks, self.prepared = [], Prepared()
        self._find()
        if not self.tasks:
            raise ValueError(f"source {self.source!r} holds no images")

    def __call__(self, progress: bool = True) -> Prepared:
        """Write all. Raises ImageFormatError for an image that needs another option; then nothing is written."""
        with new_folder(self.dest) as folder:
            work = _Work(self.tasks, folder, self.tile, self.short_side, self.num_channels, self.nodata)
            loader = DataLoader(
                work,
                batch_size=None,
                num_workers=min(self.num_workers, len(self.tasks)),
                worker_init_fn=leave_signals_to_the_main_process,
            )
            # A bar over the loader would begin to read it before the loop does.
            with progress_bar(progress, "preparing", len(work), " images") as bar:
                for done in loader:
                    self._count(done)
                    bar.update()
            if not self.prepared.files:
                raise ValueError(f"no image of {self.source} can be read: {self.prepared.broken[0]}")
        return self.prepared

    def _count(self, done: dict):
        if "refused" in done:
            raise ImageFormatError(done["refused"])
        if "broken" in done:
            self.prepared.broken.append(done["broken"])
            return
        self.prepared.images += 1
        self.prepared.files[done["extension"]] += done["files"]
        self.prepared.small += done["small"]
        self.prepared.channels[done["channels"]] += 1
        if done["untold"] is not None:
            self.prepared.untold[as_text(done["untold"])] += 1

    def _find(self):
        path, splits = Path(self.source).expanduser(), _SPLITS
        saved = any((path / name).exists() for name in ("dataset_dict.json", "state.json"))
        if path.is_file() and path.suffix.lower() in IMAGE_EXTENSIONS:
            return self._add_files(path.parent, [path.name])
        if path.exists() and not saved:
            files = scan(path, IMAGE_EXTENSIONS | TABLE_EXTENSIONS.keys())[0] if path.is_dir() else [path.name]
            images = [name for name in files if file_type(name) in IMAGE_EXTENSIONS]
            if 2 * len(images) > len(files):  # the rule of `load_images`
                kept, self.prepared.left_out = without_masks(images)
                self.prepared.left_out.update({"tables": len(files) - len(images)} if len(files) > len(images) else {})
                return self._add_files(path, [name for _, name in kept])
            if len(files) == 1 and not (files[0].lower().endswith(".tar") and "train" in table_splits(files)[0]):
                splits = ("train",)  # a single table is training data, whatever its name
        elif (path / "state.json").exists():
            splits = ("train",)
        found = {}
        for split in splits:
            with contextlib.suppress(SplitNotFound):
                found[split] = load_images(self.source, split)
        if not found:
            load_images(self.source)  # raises, and names the splits that there are
        for split, images in found.items():
            self._add_rows(images, split if len(found) > 1 else "")

    def _add_files(self, root: Path, names: list[str]):
        """Image files keep their folders, and so their classes and splits."""
        pure = [PurePath(name) for name in names]
        same = Counter((path.parent, path.stem) for path in pure)
        for path, name in zip(pure, names, strict=True):
            stem = path.stem if same[path.parent, path.stem] == 1 else path.name.replace(".", "_")
            for place in frames_of(whole := str(root / name)):
                frame = place.removeprefix(whole)  # "/0003", or nothing
                self.tasks.append(Task(place, name + frame, str(path.parent), stem + frame.replace("/", "_")))

    def _add_rows(self, images: Dataset, split: str):
        """Rows of a table get a folder for each split, if there are several, and for each class."""
        label = images.features.get("label")
        names = label.names if isinstance(label, ClassLabel) else None
        labels = images["label"][:] if label is not None else [None] * len(images)
        rows = images.select_columns("image")
        for index, number in enumerate(labels):
            known = number is not None and number >= 0
            folder = _safe(names[number] if names else str(number)) if known else ""
            self.tasks.append(Task((rows, index), f"image {index}", os.path.join(split, folder), ""))


def _safe(name: str) -> str:
    """A name as that of one folder or file."""
    return "".join("_" if letter in "/\\:\0" else letter for letter in name).strip().lstrip(".") or "_"


class _Work:
    """Task number → what was done, for DataLoader. Each process writes the files of its tasks."""

    def __init__(self, tasks: list[Task], folder: Path, tile, short_side, num_channels, nodata):
        self.tasks, self.folder, self.num_channels, self.nodata = tasks, folder, num_channels, nodata
        self.is_tiled, self.side = bool(tile), tile or short_side

    def __len__(self) -> int:
        return len(self.tasks)

    def __getitem__(self, number: int) -> dict:
        task = self.tasks[number]
        value, stem = task.value, task.stem
        if isinstance(value, tuple):
            value = value[0][value[1]]["image"]
            given = PurePath(image_name(value, "")).stem
            stem = f"{number:06d}_{_safe(given)}" if given else f"{number:06d}"
        try:
            with decoding(task.name):
                tag = tagged_nodata(value)
                nodata = None if self.nodata == IGNORE_TAGS else tag if self.nodata is None else self.nodata
                image, form = _opened(value, self.num_channels, nodata)
                image, nodata, is_told = nodata_of(image, nodata, is_given=self.nodata is not None)
                parts = list(self._tiles(image) if self.is_tiled else self._smaller(image, nodata))
        except BrokenImage as error:
            return {"broken": str(error)}
        except ImageFormatError as error:
            return {"refused": one_line(error)}
        folder = self.folder / task.folder
        folder.mkdir(parents=True, exist_ok=True)
        small = len(parts) == 1 and parts[0][1] is None
        written = nodata if is_told else None  # what the tags of the files will say
        unchanged = small and not self.is_tiled and repr(tag) == repr(written)
        if unchanged and (extension := copied(value, folder / stem)):
            untold = nodata if written is None else None
            about = {"channels": image.shape[2], "untold": untold}
            return {"files": 1, "extension": extension, "small": True} | about
        for suffix, part in parts:
            extension = write(folder / f"{stem}{suffix}", image if part is None else part, form, written)
        small |= self.is_tiled and min(image.shape[:2]) < self.side
        about = {
            "channels": image.shape[2] - (form == "alpha" and extension == ".tif"),
            "untold": None if is_told and extension == ".tif" else nodata,
        }
        return {"files": len(parts), "extension": extension, "small": small} | about

    def _tiles(self, image: np.ndarray) -> Iterator[tuple[str, np.ndarray]]:
        """(end of the name, part) of each tile."""
        tops, lefts = (starts(side, self.side) for side in image.shape[:2])
        for row, top in enumerate(tops):
            for column, left in enumerate(lefts):
                yield f"_r{row:03d}_c{column:03d}", image[top : top + self.side, left : left + self.side]

    def _smaller(self, image: np.ndarray, nodata: float | None) -> Iterator[tuple[str, np.ndarray | None]]:
        """The image with its shorter side as asked; None if it is not longer."""
        height, width = image.shape[:2]
        if (shorter := min(height, width)) <= self.side:
            yield "", None
            return
        yield "", smaller(image, (round(height * self.side / shorter), round(width * self.side / shorter)), nodata)


def starts(side: int, tile: int) -> list[int]:
    """Where the tiles begin along a side: one after the other, the last shifted inwards to end with the image."""
    return [max(0, min(number * tile, side - tile)) for number in range(math.ceil(side / tile))]


def _opened(value, num_channels: int | None, nodata: float | None) -> tuple[np.ndarray, str]:
    """(the whole image upright, [h, w, C] in its own depth; "JPEG", "alpha" or "", as `write` takes it).

    nodata: the value that may stand for pixels without data.
    """
    _check_pages(stored(value), num_channels)
    image = open_image(value, num_channels)
    if not isinstance(image, Image.Image):
        with np.errstate(over="ignore"):  # the lowest float64, a usual nodata value, becomes -inf
            return narrowed(_bands_last(np.asarray(image), num_channels), nodata), ""
    is_jpeg, turned = isinstance(image, JpegImagePlugin.JpegImageFile), exif_orientation(image)
    if not (image.mode.startswith("I") or image.mode in ("F", "L", "LA", "RGB", "RGBA")):
        clear = image.mode == "P" and "transparency" in image.info or image.mode.lower().endswith("a")
        grey = image.mode == "1"
        image = image.convert("RGBA" if clear and image.mode != "LAB" else "L" if grey else "RGB")
    array = upright(np.array(image), *turned)
    form = "JPEG" if is_jpeg else "alpha" if image.mode in ("LA", "RGBA") else ""
    return narrowed(array if array.ndim == 3 else array[..., None], nodata), form


def _bands_last(array: np.ndarray, num_channels: int | None) -> np.ndarray:
    """[h, w], [h, w, C] or [C, h, w] → [h, w, C]. Without `num_channels`, the bands are the shorter of both ends."""
    array = array[..., None] if array.ndim == 2 else array
    if array.ndim != 3 or array.size == 0:
        raise ImageFormatError(f"an array image must be [h, w], [h, w, C] or [C, h, w], not {list(array.shape)}")
    first, last = array.shape[0], array.shape[2]
    if first == last or num_channels not in (None, first, last):
        raise ImageFormatError(f"which side of the array {list(array.shape)} are its bands? give --num_channels")
    is_first = first == num_channels or num_channels is None and first < last
    return np.ascontiguousarray(np.moveaxis(array, 0, -1) if is_first else array)


def _check_pages(value, num_channels: int | None):
    """Refuse a TIFF of several pages of one band, which may be its bands, unless `num_channels` decides."""
    if num_channels is not None or not holds_tiff(value) or not has_tifffile():
        return
    import tifffile

    with as_file(value) as opened, tifffile.TiffFile(opened) as file:
        page, count = file.pages[0], len(file.pages)
        alike = sum((other.shape, other.dtype) == (page.shape, page.dtype) for other in file.pages) if count > 1 else 1
    if page.samplesperpixel == 1 and alike > 1:
        raise ImageFormatError(
            f"a TIFF of {alike} pages: give --num_channels {alike} if they are bands, or 1 for its first page"
        )
