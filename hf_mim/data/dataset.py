"""Torch datasets over image columns. The worker decodes and crops each image once, to `[C, h, w]`.

A crop depends on (seed, epoch, image) alone, not on what was drawn before: a resumed run, or one with another number of
workers, sees the same crops. In the same way, augmentation on the device depends on the `augment_key` of an image. An
image that cannot be decoded is skipped. Shared memory counts and remembers such images, for the main process to read.
"""

import copy
import logging
import zlib
from collections.abc import Iterator

import numpy as np
import torch
from datasets import Dataset, IterableDataset
from datasets.distributed import split_dataset_by_node
from torch import Tensor
from torch.utils.data import get_worker_info
from transformers import default_data_collator

from hf_mim.checks import least
from hf_mim.models.nodata import EmptyImage, as_text
from hf_mim.models.pixels import ImageFormatError, ValueRange, scale_pixels, type_name

from .columns import typed
from .crop import RandomCrop, crop_rng, load_crop
from .damage import rows_of
from .decode import BrokenImage, decoding, image_name, open_image, stored
from .nodata import check_tag, count_missing

logger = logging.getLogger(__name__)

MAX_BROKEN = 0.01  # a run stops if a larger share of images is broken
_MAX_REPLACEMENTS = 64  # broken images in a row
_MAX_EMPTY = 1024  # images without data in a row
_BROKEN, _EMPTY = 1, 2
_MAX_WORKERS = 256
_NAMES_BYTES = 4096  # for each worker of a stream
MIN_STREAMED = 1000  # after fewer images than this, one broken image would look like a large share


class BrokenImagesError(ValueError):
    """Too many images of the data cannot be decoded."""


class _Images:
    """What the map-style and the streamed dataset share."""

    def __init__(
        self,
        images,
        size,
        num_channels=3,
        crop=None,
        labels=False,
        seed=0,
        value_range: ValueRange | None = None,
        own_depth=False,
        keep_empty=False,
    ):
        self.size = (size, size) if isinstance(size, int) else tuple(size)
        if len(self.size) != 2 or min(self.size) < 1:
            raise ValueError(f"size must be a positive int or (height, width), not {size!r}")
        least(1, num_channels=num_channels)
        columns = images.column_names
        if columns is not None:
            for column in ["image"] + ["label"] * labels:
                if column not in columns:
                    known = ", ".join(columns)
                    raise ValueError(f"images has no column {column!r} but {known}; load_images finds and names it")
        self.images, self.num_channels, self.labels, self.seed = images, num_channels, labels, seed
        self.crop = RandomCrop() if crop is None else crop
        self.value_range, self.own_depth, self.keep_empty = value_range, own_depth, keep_empty
        self.identified = self.checks_tags = self.counts_missing = False
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()
        self._begin(images)

    def set_epoch(self, epoch: int):
        """From now on, give the crops of this epoch. Running workers follow."""
        self._epoch.fill_(int(epoch))

    def in_range(self, value_range: ValueRange | None, own_depth: bool = False):
        """A view of the same images with another `value_range` and `own_depth`."""
        return self._view(value_range=value_range, own_depth=own_depth)

    def identify(self):
        """A view of the same images. Its samples also have a `name`, and an `augment_key` for `DeviceAugment`."""
        return self._view(identified=True)

    def count_missing(self):
        """A view of the same images. Its samples also have the numbers of `count_missing`, of the whole image."""
        return self._view(counts_missing=True)

    def check_tags(self):
        """A view of the same images. A TIFF is refused if GDAL's tag has another nodata value than `value_range`."""
        return self._view(checks_tags=True)

    def _view(self, **settings):
        images = copy.copy(self)
        vars(images).update(settings)
        return images

    def _sample(self, value, label, epoch: int, key: int, name: str) -> dict:
        rng, value_range = crop_rng(self.seed, epoch, key), self.value_range
        nodata = None if value_range is None else value_range.nodata
        with decoding(name):
            if self.checks_tags:
                check_tag(value, nodata)
            missing = None
            if self.counts_missing:
                value = open_image(value, self.num_channels, pixel_type=value_range.pixel_type)  # once, for both
                missing = count_missing(value, self.num_channels, value_range)
            pixels = load_crop(value, self.crop, self.size, self.num_channels, rng, value_range, self.keep_empty)
            if not self.own_depth:
                pixels = scale_pixels(pixels, value_range)
            elif value_range is not None and nodata is None:
                value_range.check(type_name(pixels))
            sample = {"pixel_values": pixels} | ({} if missing is None else {"missing": missing})
        if self.identified:
            sample |= {"augment_key": rng.getrandbits(63), "name": name}
        if self.labels:
            sample["labels"] = -1 if label is None else int(label)
        return sample


class ImageDataset(_Images, torch.utils.data.Dataset):
    """Map-style: `dataset[i]` is `{"pixel_values": [C, h, w]}`, with `labels: int` when asked for.

    Args:
        images: a `datasets.Dataset` from `load_images`.
        size: of the crops, an int or (height, width).
        num_channels: images of other modes are converted, see `decode.py`.
        crop: `RandomCrop` (default), `NativeCrop`, `CenterCrop`, `CenterWindow` or `WholeImage`.
        labels: whether samples have the `label` of the column too.
        seed: of the crops; see `set_epoch`.
        value_range: what the values of the images are scaled from, to float32 in 0..255. Without, 8-bit pixels are
            uint8, and others are scaled from the whole range of their type (see `TYPE_RANGES`).
        own_depth: leave the scaling to `DeviceAugment`, on the device: pixels come in the images' own depth. If the
            range has `nodata`, they are float32, and NaN where there are no data.
        keep_empty: take images without any data too. By default, another image takes their place.

    Raises:
        ValueError: at once, if columns are missing or the first image cannot be converted to `num_channels`.
    """

    def _begin(self, images: Dataset):
        if len(images) == 0:
            raise ValueError("images is empty")
        feature = images.features["image"]
        if getattr(feature, "decode", False):
            self.images = images.cast_column("image", type(feature)(mode=feature.mode, decode=False))
        self._broken = torch.zeros(len(images), dtype=torch.uint8).share_memory_()
        self[0]  # so that a wrong num_channels raises here, not in a worker an hour later

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> dict:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: list[int]) -> list[dict]:
        """A batch, for DataLoader: all rows are read from the Arrow table at once."""
        rows = self.images[[int(index) for index in indices]]
        labels = rows["label"] if self.labels else [None] * len(indices)
        return [
            self._sample_or_other(index, value, label)
            for index, value, label in zip(indices, rows["image"], labels, strict=True)
        ]

    def _sample_or_other(self, index: int, value, label) -> dict:
        """The sample of this image. A broken or empty image is replaced by another, which its index and the epoch
        determine."""
        first, rng, broken = index, None, 0
        for _ in range(_MAX_EMPTY):
            if not self._broken[index]:
                try:
                    return self._sample(value, label, int(self._epoch), index, self.name(index, value))
                except BrokenImage as error:
                    self._broken[index] = _BROKEN
                    logger.warning("Skipped a broken image: %s", error)
                except EmptyImage:
                    self._broken[index] = _EMPTY
            broken += int(self._broken[index] == _BROKEN)
            if broken == _MAX_REPLACEMENTS:
                raise BrokenImagesError(_broken_message(self.num_broken(), len(self), self.broken(limit=5)))
            rng = rng or crop_rng(self.seed, int(self._epoch), -1 - first)
            index = int(rng.random() * len(self))
            row = self.images[index]
            value, label = row["image"], row["label"] if self.labels else None
        raise ImageFormatError(_empty_message(self.num_empty(), self.value_range))

    def name(self, index: int, value=None) -> str:
        """The file name of an image, or "image 12" if the source gives no names."""
        value = self.images[index]["image"] if value is None else value
        return image_name(value, f"image {index}")

    def num_images(self) -> int:
        """The number of images from which the share of broken ones is taken."""
        return len(self)

    def num_broken(self) -> int:
        """How many images have been found broken so far, by all workers."""
        return int((self._broken == _BROKEN).sum())

    def num_empty(self) -> int:
        """How many images without any data have been found so far, by all workers. Each was replaced by another."""
        return int((self._broken == _EMPTY).sum())

    def broken_indices(self) -> list[int]:
        """Which images have been found broken so far. Each was replaced by another."""
        return (self._broken == _BROKEN).nonzero().flatten().tolist()

    def broken(self, limit: int | None = None) -> list[str]:
        """The names of the first `limit` broken images."""
        return [self.name(index) for index in self.broken_indices()[:limit]]


class ImageStream(_Images, torch.utils.data.IterableDataset):
    """Streamed: the samples of `ImageDataset`, in the order of a `datasets.IterableDataset`, which may be shuffled.

    A crop depends on (seed, epoch, checksum of the image), not on the number of workers that share the stream. Broken
    images are left out. The arguments are those of `ImageDataset`.
    """

    def _begin(self, images: IterableDataset):
        # One row for each worker, so that no two write the same place.
        self._seen = torch.zeros(_MAX_WORKERS, dtype=torch.int64).share_memory_()
        self._broken = torch.zeros(_MAX_WORKERS, dtype=torch.int64).share_memory_()
        self._empty = torch.zeros(_MAX_WORKERS, dtype=torch.int64).share_memory_()
        self._names = torch.zeros(_MAX_WORKERS, _NAMES_BYTES, dtype=torch.uint8).share_memory_()

    @property
    def num_shards(self) -> int:
        """How many ranks and workers can share the stream."""
        return self.images.num_shards

    def split(self, rank: int, world_size: int) -> "ImageStream":
        """The part of the stream that this rank reads. No rank decodes the images of another."""
        part = copy.copy(self)
        part.images = split_dataset_by_node(self.images, rank=rank, world_size=world_size)
        return part

    def __iter__(self) -> Iterator[dict]:
        return (sample for _, sample in self.read(int(self._epoch)))

    def read(self, epoch: int, skip: int = 0) -> Iterator[tuple[int, dict]]:
        """One pass over this worker's part, as pairs: (number of images read so far, broken ones included; sample).

        Args:
            epoch: for the crops and, if the stream is shuffled, for its order.
            skip: number of images at the start that are read, but not decoded.
        """
        info = get_worker_info()
        worker = info.id if info else 0
        images = split_dataset_by_node(self.images, rank=0, world_size=1)  # a copy, whose epoch may be set
        images.set_epoch(epoch)
        empty_in_a_row = 0
        feature = self.images.features["image"] if self.images.features else None
        for position, row in enumerate(rows_of(images), start=1):
            if position <= skip:
                continue
            value = typed(row["image"], feature)
            name = image_name(value, f"image {position - 1} of epoch {epoch}, worker {worker}")
            self._seen[worker] += 1
            try:
                sample = self._sample(value, row.get("label"), epoch, _checksum(value), name)
            except BrokenImage as error:
                logger.warning("Skipped a broken image: %s", error)
                self._remember(worker, name)
                check_broken(self)  # a stream of broken images alone never gives a batch after which to check
                continue
            except EmptyImage:
                self._empty[worker] += 1
                empty_in_a_row += 1
                if empty_in_a_row == _MAX_EMPTY:  # a stream of empty images never gives a batch either
                    raise ImageFormatError(_empty_message(empty_in_a_row, self.value_range)) from None
                continue
            empty_in_a_row = 0
            yield position, sample

    def _remember(self, worker: int, name: str):
        self._broken[worker] += 1
        names = _text(self._names[worker]) + name.encode() + b"\n"
        if len(names) <= _NAMES_BYTES:
            self._names[worker, : len(names)] = torch.frombuffer(bytearray(names), dtype=torch.uint8)

    def num_images(self) -> int:
        """How many images have been seen, at least 1000: with fewer, the share of broken ones means nothing."""
        return max(int(self._seen.sum()), MIN_STREAMED)

    def num_broken(self) -> int:
        """How many images have been found broken so far, by all workers."""
        return int(self._broken.sum())

    def num_empty(self) -> int:
        """How many images without any data have been left out so far, by all workers."""
        return int(self._empty.sum())

    def broken(self, limit: int | None = None) -> list[str]:
        """The names of the first `limit` broken images. If there are many, not all names are kept."""
        return b"".join(_text(names) for names in self._names).decode(errors="replace").splitlines()[:limit]


def check_broken(images: ImageDataset | ImageStream, max_share: float = MAX_BROKEN, read: int | None = None):
    """Check the share of broken images. This is cheap enough for every step.

    read: how many images have been read at most; default: all.

    Raises:
        BrokenImagesError: more than `max_share` of the images are broken; in one line that names the first twenty.
    """
    broken, total = images.num_broken(), min(images.num_images(), read or images.num_images())
    if broken > max_share * total:
        raise BrokenImagesError(_broken_message(broken, total, images.broken(limit=20)))


def collate(samples: list[dict] | dict) -> dict:
    """transformers' `default_data_collator`, which drops texts, plus the images' names as a list.

    `CachedImages` gives a whole batch, which stays as it is.
    """
    if isinstance(samples, dict):
        return samples
    batch = default_data_collator(samples)
    return batch | {"name": [sample["name"] for sample in samples]} if "name" in samples[0] else batch


def _broken_message(broken: int, total: int, names: list[str]) -> str:
    more = f" and {broken - len(names)} more" if broken > len(names) else ""
    return f"{broken} of {total} images cannot be decoded; repair or remove them: {', '.join(names)}{more}"


def _empty_message(count: int, value_range: ValueRange) -> str:
    return (
        f"{count:,} images hold no data: each of their pixels is nodata ({as_text(value_range.nodata)}); give another "
        "nodata, or leave such images out"
    )


def _checksum(value) -> int:
    held, checksum = stored(value), 0
    for part in held if isinstance(held, tuple) else [held]:
        part = part.encode() if isinstance(part, str) else b"" if part is None else part
        checksum = zlib.crc32(part if isinstance(part, bytes) else np.ascontiguousarray(part), checksum)
    return checksum


def _text(names: Tensor) -> bytes:
    return names.numpy().tobytes().rstrip(b"\0")
