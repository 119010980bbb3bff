"""Test images that tell when their labels are read, and by how much these labels were moved, for `test_leakage.py`."""

from contextlib import ExitStack
from dataclasses import dataclass, field
from unittest import mock

import numpy as np
import sklearn.linear_model
import sklearn.model_selection  # noqa: F401 (its estimators are to be sealed too)
import torch
from datasets import ClassLabel, Dataset, Features
from datasets import Image as ImageFeature
from PIL import Image
from sklearn.base import BaseEstimator
from torch.utils._python_dispatch import TorchDispatchMode

from hf_mim.data.labelled import LabelledImages
from hf_mim.data.masks import MaskedImages
from hf_mim.data.videos import Videos
from hf_mim.evaluation.features import FeatureExtractor

CLASSES = 3
# What encoders, heads and neighbours are computed by; scores need none of them.
PRODUCTS = {"mm", "addmm", "bmm", "baddbmm", "mv", "addmv", "dot", "convolution"}


class Leak(AssertionError):
    """A test label was read too early."""


class ForbidProducts(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if name in PRODUCTS or "scaled_dot_product" in name:
            raise Leak(f"{name} after the test labels were read")
        return func(*args, **(kwargs or {}))


def subclasses(kind: type) -> set[type]:
    return {kind}.union(*(subclasses(child) for child in kind.__subclasses__()))


@dataclass
class Seal:
    """From the first `open` to the end of the `with` block, nothing may be computed that a label could influence."""

    reads: int = 0
    forbidden: ExitStack = field(default_factory=ExitStack)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.forbidden.close()

    def open(self):
        self.reads += 1
        if self.reads > 1:
            return
        for kind in subclasses(torch.optim.Optimizer):
            self._forbid(kind, "step")
        for kind in subclasses(BaseEstimator):
            for method in ("fit", "predict", "predict_proba", "decision_function", "transform"):
                self._forbid(kind, method)
        self._forbid(torch.nn.Module, "__call__")
        self._forbid(torch.Tensor, "backward")
        self.forbidden.enter_context(ForbidProducts())

    def _forbid(self, kind: type, method: str):
        def leak(*args, **kwargs):
            raise Leak(f"{kind.__name__}.{method} after the test labels were read")

        if method in vars(kind):
            self.forbidden.enter_context(mock.patch.object(kind, method, leak))


@dataclass
class SealedExtractor(FeatureExtractor):
    seal: Seal = None

    def __call__(self, split, specs):
        if self.seal.reads:
            raise Leak("features are extracted after the test labels were read")
        return super().__call__(split, specs)


class SealedLabels(LabelledImages):
    """Their labels are in no column of `images`: `read_labels` is the only way."""

    def __init__(self, images: LabelledImages, seal: Seal, shift: int):
        super().__init__(images.images.select_columns("image"), images.name)
        self.labels, self.names, self.seal = (images.read_labels() + shift) % CLASSES, images.class_names, seal

    @property
    def class_names(self):
        return self.names

    def read_labels(self):
        self.seal.open()
        return self.labels


class SealedMasks(MaskedImages):
    seal: Seal

    def read_mask(self, index):
        self.seal.open()
        return super().read_mask(index)


class SealedVideos(Videos):
    seal: Seal

    def read_masks(self, sequence):
        self.seal.open()
        return super().read_masks(sequence)


def first_digits(images: LabelledImages, count: int) -> LabelledImages:
    """`count` images of the first classes."""
    labels = images.read_labels()
    part = images.images.select((labels < CLASSES).nonzero()[:count, 0].tolist())
    names = Features({"image": part.features["image"], "label": ClassLabel(names=[str(i) for i in range(CLASSES)])})
    return LabelledImages(Dataset.from_dict(part[:], features=names), images.name)


def masked_images(images: np.ndarray, masks: np.ndarray, kind=MaskedImages) -> MaskedImages:
    feature = ImageFeature()
    columns = [
        Dataset.from_dict({name: [Image.fromarray(x) for x in values]}, Features({name: feature})).cast_column(
            name, ImageFeature(decode=False)
        )
        for name, values in (("image", images), ("mask", masks))
    ]
    return kind(*columns)


def labelled(seal: Seal, shift: int, digits_splits, monkeypatch):
    train, test = (first_digits(split, count) for split, count in zip(digits_splits, (60, 45), strict=True))
    return train, SealedLabels(test, seal, shift)


def scenes_with_masks(seal: Seal, shift: int, digits_splits, monkeypatch):
    """Blocks of a patch each, whose grey tells their class, more or less."""
    rng, splits = np.random.RandomState(0), []
    for count, kind, by in ((8, MaskedImages, 0), (4, SealedMasks, shift)):
        masks = rng.randint(0, CLASSES, (count, 4, 4)).repeat(8, axis=1).repeat(8, axis=2)
        images = (80 * masks + rng.randint(0, 90, masks.shape)).astype(np.uint8)
        splits.append(masked_images(images, ((masks + by) % CLASSES).astype(np.uint8), kind))
    splits[1].seal = seal
    return splits


def video(seal: Seal, shift: int, digits_splits, monkeypatch):
    """A square that moves; after the first frame its mask moves otherwise, by `shift`."""
    images, masks = np.zeros((2, 5, 32, 32), np.uint8)
    for i in range(5):
        images[i, 8:24, 2 * i : 2 * i + 12] = 200
        start = 2 * i + (shift * i)
        masks[i, 8:24, start : start + 12] = 1
    videos = SealedVideos(masked_images(images, masks), ["square"] * 5)
    videos.seal = seal
    return [videos]


def drawn_scenes(seal: Seal, shift: int, digits_splits, monkeypatch):
    """The protocol draws its own; their answers are moved from scene to scene."""
    from hf_mim.evaluation.local import Scenes

    read = Scenes.read_labels

    def read_labels(scenes):
        if not scenes.name.endswith("split test"):
            return read(scenes)
        seal.open()
        return {task: values.roll(shift) for task, values in read(scenes).items()}

    monkeypatch.setattr(Scenes, "read_labels", read_labels)
    return []
