"""Where the decoded images of a run are kept: in the user's cache folder, or where `hf-mim cache` has put them."""

import shutil
from collections.abc import Callable
from pathlib import Path

from filelock import FileLock

from hf_mim.data import ImageDataset, ImageStream
from hf_mim.data.cached import CachedImages, cache_key, load_cache, make_cache
from hf_mim.evaluation.cache import default_cache, image_digests
from hf_mim.files import check_writable

FOLDER = "decoded_images"  # in the user's cache folder


def cached_images(images: ImageDataset | ImageStream, given: bool | str, tell: Callable[[str], None]) -> CachedImages:
    """The images with a cache, which is made if it is not there yet.

    given: True, or the folder of a cache, which must hold these images.

    Raises:
        ValueError: a stream, images of more than 8 bits, pixels without data, no room, or a cache of other images.
    """
    if isinstance(images, ImageStream):
        raise ValueError("cache_images must be false with streaming: a stream is never whole")
    if images.value_range is not None and images.value_range.nodata is not None:
        raise ValueError("cache_images must be false for images with nodata: a cache has no place for such pixels")
    place = default_cache()
    key = cache_key(images, image_digests(images.images, place))
    if given is not True:
        cache = load_cache(Path(given), key)
        if cache is None:
            raise ValueError(
                f"cache_images must be true, or a cache of the images of dataset in {images.num_channels} channels, "
                f"and {given} holds none; `hf-mim cache SOURCE {given}` makes it in a new folder"
            )
        return CachedImages(images, cache)
    if place is None:
        return CachedImages(images, make_cache(images, None, key, tell))
    folder = place / FOLDER / key
    check_writable(folder.parent, "HF_MIM_CACHE")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.with_name(f"{key}.lock")):  # of several runs that begin at once, the first decodes for all
        cache = load_cache(folder, key)
        if cache is None:
            shutil.rmtree(folder, ignore_errors=True)  # it is damaged
            cache = make_cache(images, folder, key, tell)
    return CachedImages(images, cache)


def write_cache(images: ImageDataset, dest: Path, tell: Callable[[str], None]):
    """Make the cache of these images in a new folder. Raises ValueError as `make_cache`."""
    make_cache(images, dest, cache_key(images, image_digests(images.images, default_cache())), tell)
