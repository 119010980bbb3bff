"""What every set of images for evaluation can do: count, select, name its images, leave out those that are broken."""

import copy
from collections.abc import Sequence

import torch
from datasets import Dataset, Image
from torch import Tensor

from .decode import image_name


class Images:
    """Images, undecoded, and their name in results.

    Args:
        images: a `datasets.Dataset` with a column `image` (see `load_images`).
        name: what results call them.
    """

    def __init__(self, images: Dataset, name: str = "images"):
        feature = images.features["image"]
        if getattr(feature, "decode", False):
            images = images.cast_column("image", Image(mode=feature.mode, decode=False))
        self.images, self.name, self.num_broken = images, name, 0

    def __len__(self) -> int:
        return len(self.images)

    def select(self, indices: Sequence[int]):
        """The images of these indices, in this order."""
        part = copy.copy(self)
        part.num_broken = 0
        part._keep([int(index) for index in indices])
        return part

    def leave_out(self, indices: Sequence[int]):
        """Drop images that cannot be decoded, and count them."""
        dropped = set(indices)
        self.num_broken += len(dropped)
        self._keep([index for index in range(len(self)) if index not in dropped])

    def _keep(self, indices: list[int]):
        """Keep only these images. A subclass does the same with what it has for each image."""
        self.images = self.images.select(indices)

    def describe(self) -> dict:
        """What a result says about the images."""
        about = {"source": self.name, "images": len(self)}
        return about | ({"broken_images_left_out": self.num_broken} if self.num_broken else {})

    def image_name(self, index: int) -> str:
        """The file name of an image, or "image 12" if the source gives no names."""
        return image_name(self.images[index]["image"], f"image {index}")


def group_ids(images: Dataset) -> Tensor | None:
    """The number of each image's group `[n]`, int64; None without a column `group`."""
    return number_groups(images["group"][:]) if "group" in images.column_names else None


def number_groups(names: Sequence[str | None]) -> Tensor:
    """A number for each name `[n]`, int64: equal for equal names. None is a group of its own each time."""
    ids: dict = {}
    keys = (row if name is None else name for row, name in enumerate(names))
    return torch.tensor([ids.setdefault(key, len(ids)) for key in keys], dtype=torch.int64)
