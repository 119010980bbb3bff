"""Labelled images for the protocols. Labels are checked on loading, then read only when a protocol asks for them."""

import os

import pyarrow.compute
import torch
from datasets import ClassLabel, Dataset, Features, Image, IterableDataset
from torch import Tensor

from hf_mim.files import listed

from .images import Images
from .sources import SplitNotFound, first_split, load_images, open_source, same_source, source_name
from .splits import stratified_split

HELD_OUT = 0.2  # of the training images, where a source has no test images


class LabelledImages(Images):
    """Images with class labels: `images` has a column `label` too (ids; see `load_images`).

    A protocol calls `read_labels` of its test images once, after all predictions and choices are made. There is no
    other way to get the labels.
    """

    @property
    def class_names(self) -> list[str] | None:
        """The names in the order of the ids, or None if the source has no names."""
        feature = self.images.features["label"]
        return list(feature.names) if isinstance(feature, ClassLabel) else None

    def read_labels(self) -> Tensor:
        """Class ids `[n]`, int64."""
        return torch.tensor(self.images["label"][:], dtype=torch.int64)


def load_labelled(
    source,
    test_source=None,
    train_split: str = "train",
    test_split: str | None = None,
    image_column: str | None = None,
    label_column: str | None = None,
) -> tuple[LabelledImages, LabelledImages]:
    """(train, test) images. A label means the same in both; images without a label are left out.

    The test images come from `test_source`, or from the source's test or validation split. Without these, a fifth of
    each class of the training images is held out for the test. Classes of two sources are matched by name.

    Raises:
        ValueError: in one line: there are no labels, or only one class; a test class is not among the training images;
            or the test images are the training images.
    """

    def load(dataset, source, split):
        images = load_images(dataset, split, image_column=image_column, label_column=label_column)
        return labelled_only(images, source, split)

    train = load(source, source, train_split)
    test_from, name = source if test_source is None else test_source, f"{source_name(source)}, split {train_split}"
    test, split = _open_test(test_from, test_split, train_split if same_source(test_from, source) else None)
    if test is not None:
        test, test_name = load(test, test_from, split), f"{source_name(test_from)}, split {split}"
        check_apart(train, test)
        test = match_names(test, train)
    else:
        kept, held = stratified_split(torch.tensor(train["label"][:]), HELD_OUT, seed=0)
        train, test, test_name = train.select(kept), train.select(held), f"a held-out fifth of {name}"
    splits = LabelledImages(train, name), LabelledImages(test, test_name)
    check_classes(*splits)
    return splits


def _open_test(source, split: str | None, taken: str | None):
    """(test dataset, its split), or (None, None) if the source has no split but `taken`, which trains."""
    if split is not None and split == taken:
        raise ValueError(f"test_split must be another split than {taken}, which trains: of {source} or of another test")
    if taken is not None and isinstance(source, Dataset):  # it has no splits: any name would give the training images
        return None, None
    splits = [split] if split else [name for name in ("test", "validation", "train") if name != taken]
    try:
        return first_split(splits, lambda name: open_source(source, name))
    except SplitNotFound:
        if split or taken is None:
            raise
        return None, None


def labelled_only(images: Dataset | IterableDataset, source="source", split: str = "train") -> Dataset:
    """The images that have a label. Raises ValueError if none has."""
    if isinstance(images, IterableDataset):
        raise ValueError(f"dataset {source} must be loaded whole to be evaluated, not streamed")
    known = []
    if "label" in images.column_names:
        known = [index for index, label in enumerate(images["label"]) if label is not None and label >= 0]
    if not known:
        raise ValueError(
            f"dataset {source} has no labels in split {split}; set label_column to their column, or put the images of "
            "each class into a folder"
        )
    return images if len(known) == len(images) else images.select(known)


def check_apart(train: Dataset, test: Dataset):
    """Raise ValueError if files are among both, for example because one folder lies in the other."""
    if common := sorted(_files(train) & _files(test)):
        raise ValueError(
            f"{len(common)} of the {len(test)} test images are training images too ({listed(common, 1)}); give other "
            "images as test, or leave test out: then some are held out"
        )


def _files(images: Dataset) -> set[str]:
    """The real paths of images that are files of their own."""
    if isinstance(images.features["image"], Image) and images[0]["image"]["bytes"] is None:
        column = images.select_columns("image").with_format("arrow")[:]["image"]
        paths = [path for path in pyarrow.compute.struct_field(column, "path").to_pylist() if path]
        folders = {folder: os.path.realpath(folder) for folder in set(map(os.path.dirname, paths))}
        return {os.path.join(folders[os.path.dirname(path)], os.path.basename(path)) for path in paths}
    return set()


def match_names(test: Dataset, train: Dataset) -> Dataset:
    """The test images with the ids that train gives to classes of the same name, if both have names."""
    features = test.features["label"], train.features["label"]
    if not all(isinstance(feature, ClassLabel) for feature in features) or features[0].names == features[1].names:
        return test
    theirs, ours = (feature.names for feature in features)
    used = {theirs[label] for label in set(test["label"])}
    if unknown := sorted(used - set(ours)):
        raise ValueError(_missing_classes(unknown))
    labels = [ours.index(theirs[label]) for label in test["label"]]
    features = Features({"image": test.features["image"], "label": features[1]})
    return test.remove_columns("label").add_column("label", labels).cast(features)


def check_classes(train: LabelledImages, test: LabelledImages):
    """Raise ValueError for a single class, or for test classes that train lacks. Only the set of classes is read."""
    for split in (train, test):
        if len(split) == 0:
            raise ValueError(f"{split.name} holds no images")
    known = set(train.read_labels().tolist())
    if len(known) < 2:
        raise ValueError(f"labels of {train.name} must be of two classes at least, not of {len(known)}")
    names = train.class_names
    if unknown := sorted(set(test.read_labels().tolist()) - known):
        raise ValueError(_missing_classes([names[i] if names and i < len(names) else str(i) for i in unknown]))


def _missing_classes(names: list[str]) -> str:
    names = listed(names, 5)
    return f"the test images have classes that the training images lack: {names}; add images of them or remove them"
