"""Labelled images for the protocols. Labels are checked on loading, then read only when a protocol asks for them."""

import logging
import os

import pyarrow.compute
import torch
from datasets import ClassLabel, Dataset, Image, IterableDataset
from torch import Tensor

from hf_mim.files import listed

from .images import Images, group_ids
from .metadata import UNREAD
from .sources import SplitNotFound, first_split, load_described, same_source, source_name
from .splits import stratified_split

logger = logging.getLogger(__name__)

HELD_OUT = 0.2  # of the training images, where a source has no test images


class LabelledImages(Images):
    """Images with class labels: `images` has a column `label` too (ids), and maybe `group` (see `load_images`).

    labels, group: where they come from, in words, for results.

    A protocol calls `read_labels` of its test images once, after all predictions and choices are made. There is no
    other way to get the labels.
    """

    def __init__(self, images: Dataset, name: str = "images", labels: str = "column label", group: str | None = None):
        super().__init__(images, name)
        self.labels, self.group = labels, group

    @property
    def class_names(self) -> list[str] | None:
        """The names in the order of the ids, or None if the source has no names."""
        feature = self.images.features["label"]
        return list(feature.names) if isinstance(feature, ClassLabel) else None

    def read_labels(self) -> Tensor:
        """Class ids `[n]`, int64."""
        return torch.tensor(self.images["label"][:], dtype=torch.int64)

    def read_groups(self) -> Tensor | None:
        """The number of each image's group `[n]`, int64; None if there are no groups."""
        return group_ids(self.images)


def load_labelled(
    source,
    test_source=None,
    train_split: str = "train",
    test_split: str | None = None,
    image_column: str | None = None,
    labels: str | None = None,
    group: str | None = None,
) -> tuple[LabelledImages, LabelledImages]:
    """(train, test) images. A label means the same in both; images without a label are left out.

    The test images come from `test_source`, or from the source's test or validation split. Without these, a fifth of
    each class of the training images is held out for the test. Classes of two sources are matched by name.

    labels, group: as in `load_images`. The held-out fifth has whole groups.

    Raises:
        ValueError: in one line: there are no labels, or only one class; a test class is not among the training images;
            or the test images are the training images.
    """

    def load(source, split):
        images, account = load_described(source, split, image_column=image_column, labels=labels, group=group)
        return labelled_only(images, source, split, account.notes), account

    train, about = load(source, train_split)
    test_from, name = source if test_source is None else test_source, f"{source_name(source)}, split {train_split}"
    found, split = load_test(load, test_from, test_split, train_split if same_source(test_from, source) else None)
    if found is not None:
        test, test_about = found
        test_name = f"{source_name(test_from)}, split {split}"
        check_apart(train, test)
        test = match_names(test, train)
        warn_of_shared_groups(train, test)
    else:
        ids = torch.tensor(train["label"][:])
        kept, held = stratified_split(ids, HELD_OUT, 0, group_ids(train))
        train, test, test_name, test_about = (
            train.select(kept),
            train.select(held),
            f"a held-out fifth of {name}",
            about,
        )
    splits = (
        LabelledImages(train, name, about.labels, about.group),
        LabelledImages(test, test_name, test_about.labels, test_about.group),
    )
    check_classes(*splits)
    return splits


def load_all_labelled(
    source,
    split: str = "train",
    image_column: str | None = None,
    labels: str | None = None,
    group: str | None = None,
) -> LabelledImages:
    """The labelled images of one split. The arguments are those of `load_labelled`."""
    images, about = load_described(source, split, image_column=image_column, labels=labels, group=group)
    images = labelled_only(images, source, split, about.notes)
    return LabelledImages(images, f"{source_name(source)}, split {split}", about.labels, about.group)


def load_test(load, source, split: str | None, taken: str | None):
    """(what `load` gives, the split), or (None, None) if the source has no split but `taken`, which trains."""
    if split is not None and split == taken:
        raise ValueError(f"test_split must be another split than {taken}, which trains: of {source} or of another test")
    if taken is not None and isinstance(source, Dataset):  # it has no splits: any name would give the training images
        return None, None
    splits = [split] if split else [name for name in ("test", "validation", "train") if name != taken]
    try:
        return first_split(splits, lambda name: load(source, name))
    except SplitNotFound:
        if split or taken is None:
            raise
        return None, None


def labelled_only(images: Dataset | IterableDataset, source="source", split: str = "train", notes=()) -> Dataset:
    """The images that have a label. Raises ValueError if none has; `notes` may say why."""
    if isinstance(images, IterableDataset):
        raise ValueError(f"dataset {source} must be loaded whole to be evaluated, not streamed")
    known = []
    if "label" in images.column_names:
        known = [index for index, label in enumerate(images["label"]) if label is not None and label >= 0]
    if not known:
        advice = "give --labels COLUMN, or put the images of each class into a folder"
        reasons = (note for note in notes if "--labels" in note or "no classes" in note or note.endswith(UNREAD))
        reason = next(reasons, advice)
        raise ValueError(f"dataset {source} has no labels in split {split}; {reason}")
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
    return test.remove_columns("label").add_column("label", labels, feature=features[1])


def warn_of_shared_groups(train: Dataset, test: Dataset):
    """Warn if images of one group are in two splits that the user has made."""
    if "group" not in train.column_names or "group" not in test.column_names:
        return
    if shared := sorted(set(train.unique("group")) & set(test.unique("group")) - {None}):
        logger.warning(
            "%d groups are both in the training and in the test images: %s; the splits of the source are kept",
            len(shared),
            listed(shared, 3),
        )


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
