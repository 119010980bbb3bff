"""Images that are decoded once, to uint8. Only boxes are drawn for each batch; the device cuts and resizes the crops.

This is for small images, which take longer to decode than to train on. A cache is a folder: `pixels.npy` holds all
images, each upright and in its own size, at the top left of a canvas as large as the largest; `about.json` says whose
pixels they are. The boxes and augmentation keys are those of `ImageDataset`, so a run sees the same crops with a cache
as without, up to rounding.
"""

import functools
import json
import math
import random
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from hf_mim.files import free_space, new_folder
from hf_mim.models.pixels import ImageFormatError, type_name

from .contents import short_hash
from .crop import WholeImage, crop_rng, image_size, load_crop
from .dataset import _BROKEN, ImageDataset, check_broken
from .decode import BrokenImage, decoding

FORMAT = 1  # it is raised when older caches may be wrong
_PIXELS, _ABOUT = "pixels.npy", "about.json"
_ROWS = 1000  # that are decoded at once
_TABLE_BYTES = 1 << 25
_DEVICE_SHARE = 0.5  # of the free memory of a GPU, which a cache may take


@dataclass
class ImageCache:
    """The decoded images of a dataset.

    pixels: uint8 [n, H, C, W]; rows first, because the crops of a batch are then two products of large matrices.
    sizes: (height, width) of each image, int64 [n, 2]; (0, 0) for a broken one.
    names: of the images, for messages.
    """

    pixels: Tensor
    sizes: Tensor
    names: list[str]


class CachedImages(ImageDataset):
    """The samples of an `ImageDataset`, from a cache. A batch comes whole, and `crops` gives its pixels on the device.

    A batch is `{"pixel_values": uint8 [B, H, C, W], "boxes": int64 [B, 4], "augment_key": int64 [B], "name": [...]}`;
    after `move_to` a GPU it has `rows` instead of `pixel_values`, and the pixels never leave the device.
    """

    def __init__(self, images: ImageDataset, cache: ImageCache):
        assert not images.labels and len(images) == len(cache.sizes)
        vars(self).update(vars(images))
        self.cache, self.device_pixels = cache, None
        self._broken[(cache.sizes == 0).any(1)] = _BROKEN
        self._sizes = cache.sizes.tolist()

    def move_to(self, device: torch.device):
        """Keep the pixels on this device, if it is a GPU with room for them."""
        if device.type != "cuda":
            return
        free, _ = torch.cuda.mem_get_info(device)
        if self.cache.pixels.nbytes <= _DEVICE_SHARE * free:
            self.device_pixels = self.cache.pixels.to(device)

    def __getitem__(self, index: int) -> dict:
        return {name: values[0] for name, values in self.__getitems__([index]).items()}

    def __getitems__(self, indices: list[int]) -> dict:  # type: ignore[override]  # its `collate` takes a batch
        """A batch: the whole images or their rows, and where to crop them."""
        epoch, rows, boxes, keys = int(self._epoch), torch.as_tensor(indices), [], []
        if self._broken[rows].any():
            rows = torch.tensor([self._whole(index, epoch) for index in indices])
        rng = random.Random()
        for row in rows.tolist():
            rng, (height, width) = crop_rng(self.seed, epoch, row, rng), self._sizes[row]
            boxes.append(self.crop.box(width, height, self.size, rng))
            keys.append(rng.getrandbits(63))
        if self.device_pixels is None:
            batch = {"pixel_values": self.cache.pixels.index_select(0, rows)}
        else:
            batch = {"rows": rows}
        names = [self.cache.names[row] for row in rows.tolist()]
        boxes, keys = (torch.from_numpy(np.array(numbers)) for numbers in (boxes, keys))
        return batch | {"boxes": boxes, "augment_key": keys, "name": names}

    def crops(self, batch: dict) -> Tensor:
        """uint8 [B, C, h, w] of a batch, on its device. Takes `rows` and `boxes` out of the batch."""
        rows, boxes = batch.pop("rows", None), batch.pop("boxes")
        return crop_boxes(batch["pixel_values"] if rows is None else self.device_pixels[rows], boxes, self.size)

    def _whole(self, index: int, epoch: int) -> int:
        """The image, or the one that takes the place of a broken one, as `ImageDataset` replaces it."""
        rng = crop_rng(self.seed, epoch, -1 - index)
        while self._broken[index]:
            index = int(rng.random() * len(self))
        return index


def crop_boxes(pixels: Tensor, boxes: Tensor, size: tuple[int, int]) -> Tensor:
    """Cut a box (left, top, right, bottom) out of each image, and resize it: uint8 [B, H, C, W] -> uint8 [B, C, h, w].

    It is the bicubic filter with antialiasing (Catmull-Rom, as in PIL) of `crop_image`: a product with a matrix for
    each axis, which is rounded after each.
    """
    batch, height, channels, width = pixels.shape
    left, top, right, bottom = boxes.unbind(1)
    columns = _resampling(left, right - left, width, size[1])
    rows = _resampling(top, bottom - top, height, size[0])
    with torch.autocast(pixels.device.type, enabled=False):
        crops = pixels.reshape(batch, height * channels, width).float() @ columns.mT
        crops = rows @ crops.round_().clamp_(0, 255).view(batch, height, channels * size[1])
    crops = crops.round_().clamp_(0, 255).to(torch.int32).to(torch.uint8)  # twice as fast as at once, on a CPU
    return crops.view(batch, size[0], channels, size[1]).transpose(1, 2).contiguous()


def _resampling(start: Tensor, length: Tensor, side: int, size: int) -> Tensor:
    """The matrices [B, size, side] that cut parts of such a start and length, int64 [B], out of lines, and resize them.

    For short lines they are looked up, because making them takes as long as the products.
    """
    if 4 * side**3 * size > _TABLE_BYTES:
        return _weights(start, length, side, size)
    return _table(side, size, start.device).index_select(0, start * side + length - 1)


@functools.lru_cache(maxsize=4)
def _table(side: int, size: int, device: torch.device) -> Tensor:
    """[side ** 2, size, side]: `_weights` of all starts and lengths; what ends beyond the line is never read."""
    places = torch.arange(side, device=device)
    start, length = places.repeat_interleave(side), places.repeat(side) + 1
    return _weights(start, length, side, size)


def _weights(start: Tensor, length: Tensor, side: int, size: int) -> Tensor:
    """[B, size, side]: row i holds the weights of the pixels of a line for pixel i of the resized part of it."""
    step = length / size  # in pixels of the line, from one pixel of the crop to the next
    centres = start[:, None] + step[:, None] * (torch.arange(size, device=start.device) + 0.5)
    places = torch.arange(side, device=start.device) + 0.5
    d = ((places - centres[..., None]) / step.clamp(min=1)[:, None, None]).abs_()
    # The cubic of |d| < 2, and what is added to it for |d| < 1.
    near, far = (1 - d).clamp_(min=0), (2 - d).clamp_(min=0)
    weights = near.square() * (2 * d - 1) + far.square() * (0.5 - 0.5 * d)
    inside = (places > start[:, None]) & (places < (start + length)[:, None])
    weights *= inside[:, None]
    return weights / weights.sum(-1, keepdim=True)


def cache_key(images: ImageDataset, found: np.ndarray) -> str:
    """Whose pixels a cache holds: a hash of the images' digests, and how they are decoded."""
    return f"{short_hash(found)}_{len(images)}x{images.num_channels}_v{FORMAT}"


def load_cache(folder: Path, key: str) -> ImageCache | None:
    """The cache in a folder; None if there is none, or it is damaged, or it is of other images."""
    try:
        about = json.loads((folder / _ABOUT).read_text())
        pixels = np.load(folder / _PIXELS, mmap_mode="c")  # changes would stay in memory
    except (OSError, ValueError, EOFError):
        return None
    if about.get("key") != key or about.get("crc32") != zlib.crc32(pixels):
        return None
    return ImageCache(torch.from_numpy(pixels), torch.tensor(about["sizes"]), about["names"])


def make_cache(images: ImageDataset, folder: Path | None, key: str, tell: Callable[[str], None]) -> ImageCache:
    """Decode all images into a new folder, or into memory if there is none.

    Raises:
        ImageFormatError: images of more than 8 bits, or whose number of channels is another.
        BrokenImagesError: too many images cannot be decoded.
        ValueError: the folder exists, or there is no room.
    """
    names, sizes = _names_and_sizes(images)
    height, width = sizes.max(axis=0).tolist()
    shape = len(sizes), height, images.num_channels, width
    check_room(shape, folder)
    where = "in memory" if folder is None else f"in {folder}"
    tell(f"cache: {len(sizes):,} images are decoded once, {math.prod(shape) / 2**20:,.0f} MiB {where}")
    if folder is None:
        _decode(images, names, sizes, pixels := np.zeros(shape, np.uint8))
        return ImageCache(torch.from_numpy(pixels), torch.from_numpy(sizes), names)
    with new_folder(folder, "the cache") as partial:
        pixels = np.lib.format.open_memmap(partial / _PIXELS, "w+", np.uint8, shape)
        _decode(images, names, sizes, pixels)
        pixels.flush()
        about = {"key": key, "crc32": zlib.crc32(pixels), "sizes": sizes.tolist(), "names": names}
        (partial / _ABOUT).write_text(json.dumps(about))
    return load_cache(folder, key)


def check_room(shape: tuple[int, ...], folder: Path | None):
    """Raise ValueError if a cache of this shape has no room on the disk or in memory."""
    if (needed := math.prod(shape)) > (free := free_space(folder)):
        needed, free = (f"{size / 2**30:.1f} GiB" for size in (needed, free))
        raise ValueError(
            f"cache_images must be false: the images take {needed} in full size, and {free} are free in "
            f"{folder or 'memory'}; `hf-mim prepare SOURCE DEST --short_side N` makes smaller ones"
        )


def _names_and_sizes(images: ImageDataset) -> tuple[list[str], np.ndarray]:
    """The name of each image, and its (height, width); (0, 0) for one that is broken."""

    def look(index: int, value) -> tuple[str, tuple[int, int]]:
        name = images.name(index, value)
        try:
            with decoding(name):
                return name, image_size(value, images.num_channels)[::-1]
        except BrokenImage:
            return name, (0, 0)

    found = _for_each(images, look)
    return [name for name, _ in found], np.array([size for _, size in found], np.int64)


def _decode(images: ImageDataset, names: list[str], sizes: np.ndarray, pixels: np.ndarray):
    """Fill `pixels` [n, H, C, W]. The size of an image that turns out to be broken becomes (0, 0)."""

    def decode(index: int, value):
        height, width = size = tuple(sizes[index].tolist())
        if not height:
            return
        try:
            with decoding(names[index]):
                image = load_crop(value, WholeImage(), size, images.num_channels, None)
                if type_name(image) != "uint8":
                    raise ImageFormatError(
                        f"is of {type_name(image)}: a cache holds 8-bit images; leave cache_images away"
                    )
        except BrokenImage:
            sizes[index] = 0
            return
        pixels[index, :height, :, :width] = image.transpose(0, 1).numpy()

    _for_each(images, decode)
    images._broken[torch.from_numpy((sizes == 0).any(1))] = _BROKEN
    check_broken(images)


def _for_each(images: ImageDataset, function: Callable) -> list:
    """function(index, value) of each image, in threads: decoders run without Python's lock."""
    found = []
    with ThreadPoolExecutor() as pool:
        for start in range(0, len(images), _ROWS):
            values = images.images[start : start + _ROWS]["image"]
            found += pool.map(function, range(start, start + len(values)), values)
    return found
