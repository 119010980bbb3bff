"""Which images `hf-mim evaluate` gives to a protocol. `NEEDS` has a dataclass of options for each kind of images."""

from dataclasses import dataclass
from typing import ClassVar, Literal

from hf_mim.checks import least
from hf_mim.data import CenterCrop, CenterWindow, WholeImage
from hf_mim.data.crop import window_pixels
from hf_mim.data.sources import fixed_sample, same_source, source_name
from hf_mim.data.stacks import image_parts


@dataclass
class CropArguments:
    """Images of which the encoder sees the central crop.

    Args:
        crop_fraction: side of the central crop / shorter side of the image; .875 in papers at 224 pixels; default: 1,
            or the crop_pixels of the checkpoint
        crop_pixels: side, or height,width, of the central window; default: that of a checkpoint which was pretrained
            with crop_pixels
    """

    crop_fraction: float | None = None
    crop_pixels: int | list[int] | None = None

    def __post_init__(self):
        self.crop()
        self.parts()

    def parts(self):
        """The `image_column` for `load_images`."""
        return image_parts(self.image_column, self.missing_modality)

    def crop(self):
        """How an image is cropped to the encoder's size; None: as the checkpoint says."""
        if self.crop_pixels is not None:
            if self.crop_fraction is not None:
                raise ValueError("crop_pixels cannot be given together with crop_fraction; give one of them")
            return CenterWindow(window_pixels(self.crop_pixels))
        if self.crop_fraction is None:
            return None
        try:
            return CenterCrop(self.crop_fraction)
        except ValueError as error:
            raise ValueError(f"crop_{error}") from None


class WholeArguments:
    """Images that the encoder sees whole."""

    def crop(self):
        """How an image is resized to the encoder's size."""
        return WholeImage()


@dataclass
class LabelledArguments(CropArguments):
    """Labelled images to learn from and to test on.

    Args:
        dataset: images with labels, as for hf-mim pretrain
        test: where the test images are; default: the test or validation split of dataset, or a fifth of it
        train_split: the split of dataset to train on
        test_split: the split of test, or of dataset if test is not given; default: test or validation
        image_column: the images, or their parts such as rgb,ir; default: found by its type
        missing_modality: what an image is that lacks a part: error, or zero, the part is masked as a whole there
        labels: the column of the classes; folder: class folders; none: no labels; default: what declares itself
        group: the column of patients, scenes or the like, or folder: each stays on one side of a split made here
        train_images, test_images: at most so many, drawn at random with a fixed seed; default: all
        folds: test every image of train_split once, in so many folds, or leave_one_out (up to 200 images)
        beside: measure untrained weights and raw pixels too, to compare
    """

    dataset: str | None = None
    test: str | None = None
    train_split: str = "train"
    test_split: str | None = None
    image_column: str | None = None
    missing_modality: Literal["error", "zero"] = "error"
    labels: str | None = None
    group: str | None = None
    train_images: int | None = None
    test_images: int | None = None
    folds: int | Literal["leave_one_out"] | None = None
    beside: bool = True

    def __post_init__(self):
        super().__post_init__()
        least(2, folds=self.folds if isinstance(self.folds, int) else None)
        if self.folds is not None:
            for name in ("test", "test_split", "test_images"):
                if getattr(self, name) is not None:
                    raise ValueError(f"{name} cannot be given together with folds, which test images of train_split")

    def load(self) -> tuple:
        """(train, test), or (images,) for folds."""
        from hf_mim.data.labelled import check_classes, load_all_labelled, load_labelled

        if self.folds is not None:
            least(1, train_images=self.train_images)
            about = self.parts(), self.labels, self.group
            images = load_all_labelled(self.dataset, self.train_split, *about)
            check_classes(images, images)
            return (images if self.train_images is None else fixed_sample(images, self.train_images, in_order=True),)
        splits = self.train_split, self.test_split
        train, test = load_labelled(self.dataset, self.test, *splits, self.parts(), self.labels, self.group)
        train, test = fixed_parts(self, train, test)
        check_classes(train, test)
        return train, test


@dataclass
class MaskedArguments(WholeArguments):
    """Images with masks to learn from and to test on.

    Args:
        dataset: images with a mask each: Parquet, a folder of images/ and masks/, the Hub
        test: where the test images are; default: the test or validation split of dataset, or a fifth of it
        train_split: the split of dataset to train on
        test_split: the split of test, or of dataset if test is not given; default: test or validation
        image_column: the images, or their parts such as rgb,ir; default: found by its type
        missing_modality: what an image is that lacks a part: error, or zero, the part is masked as a whole there
        mask_column: default: found by its name; or the folder, where images have masks in several
        group: the column of scenes, patients or the like, or folder: each stays on one side of a split made here
        train_images, test_images: at most so many, drawn at random with a fixed seed; default: all
    """

    dataset: str | None = None
    test: str | None = None
    train_split: str = "train"
    test_split: str | None = None
    image_column: str | None = None
    missing_modality: Literal["error", "zero"] = "error"
    mask_column: str | None = None
    group: str | None = None
    train_images: int | None = None
    test_images: int | None = None

    def load(self) -> tuple:
        """(train, test)."""
        from hf_mim.data.labelled import HELD_OUT, load_test
        from hf_mim.data.masks import load_masks
        from hf_mim.data.splits import random_split

        column = image_parts(self.image_column, self.missing_modality)

        def load(source, split):
            return load_masks(source, split, column, self.mask_column, self.group)

        source = self.dataset if self.test is None else self.test
        taken = self.train_split if same_source(source, self.dataset) else None
        if taken is not None and taken == self.test_split:
            raise ValueError(f"test_split must be another split than {taken}, which trains, or give test")
        train = load(self.dataset, self.train_split)
        test, _ = load_test(load, source, self.test_split, taken)
        if test is None:
            if len(train) < 3:
                raise ValueError(f"{train.name} must hold 3 images or more, as a fifth is held out; or give test")
            name, parts = train.name, random_split(len(train), HELD_OUT, 0, groups=train.read_groups())
            train, test = (train.select(part.sort().values) for part in parts)
            test.name = f"a held-out fifth of {name}"
        return fixed_parts(self, train, test)


@dataclass
class VideoArguments(WholeArguments):
    """Videos with masks.

    Args:
        dataset: a folder in DAVIS' layout, or rows of image, mask, sequence (label), frame
        split: the split of dataset; default: the list val of a DAVIS folder; test, validation or train elsewhere
        image_column: default: found by its type
        mask_column: default: found by its name
        sequence_column: default: sequence, video, clip or label
    """

    dataset: str | None = None
    split: str | None = None
    image_column: str | None = None
    mask_column: str | None = None
    sequence_column: str | None = None

    def load(self) -> tuple:
        """(videos,)."""
        from hf_mim.data.videos import load_videos

        return (load_videos(self.dataset, self.split, self.image_column, self.mask_column, self.sequence_column),)


@dataclass
class ImageArguments(CropArguments):
    """Images without labels.

    Args:
        dataset: images, as for hf-mim pretrain
        split: the split of dataset
        image_column: the images, or their parts such as rgb,ir; default: found by its type
        missing_modality: what an image is that lacks a part: error, or zero, the part is masked as a whole there
    """

    dataset: str | None = None
    split: str = "train"
    image_column: str | None = None
    missing_modality: Literal["error", "zero"] = "error"

    def load(self) -> tuple:
        """(images,)."""
        from hf_mim.data import load_images
        from hf_mim.data.images import Images

        images = load_images(self.dataset, self.split, image_column=self.parts())
        return (Images(images.select_columns("image"), f"{source_name(self.dataset)}, split {self.split}"),)


@dataclass
class NoArguments(WholeArguments):
    """The protocol draws its own images."""

    dataset: ClassVar[str | None] = None

    def load(self) -> tuple:
        """()."""
        return ()


NEEDS = {
    "labels": LabelledArguments,
    "masks": MaskedArguments,
    "videos": VideoArguments,
    "images": ImageArguments,
    "nothing": NoArguments,
}


def fixed_parts(arguments: LabelledArguments | MaskedArguments, train, test) -> tuple:
    """The same `train_images` and `test_images` each time, or all."""
    least(1, train_images=arguments.train_images, test_images=arguments.test_images)
    counts = (train, arguments.train_images), (test, arguments.test_images)
    return tuple(x if count is None else fixed_sample(x, count, in_order=True) for x, count in counts)
