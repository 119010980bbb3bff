"""The results of a run: its features' health, and their k-NN accuracy beside an untrained encoder's."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, IterableDataset
from transformers import PreTrainedConfig

from hf_mim.data import CenterCrop, CenterWindow, ImageDataset
from hf_mim.data.account import Account
from hf_mim.data.crop import window_pixels
from hf_mim.data.images import Images, group_ids
from hf_mim.data.labelled import (
    HELD_OUT,
    LabelledImages,
    labelled_only,
    match_names,
    warn_of_shared_groups,
)
from hf_mim.data.sources import SplitNotFound, first_split, fixed_sample, load_described, same_source, source_name
from hf_mim.data.splits import stratified_split
from hf_mim.data.stacks import image_parts
from hf_mim.evaluation.decoded import KeptCrops, SharedExtractor
from hf_mim.evaluation.encoder import FrozenEncoder
from hf_mim.evaluation.features import FeatureExtractor
from hf_mim.evaluation.health import Health
from hf_mim.evaluation.knn import KNN
from hf_mim.evaluation.measure import measure
from hf_mim.evaluation.raw_pixels import RawPixels
from hf_mim.evaluation.result import Result
from hf_mim.models.pixels import EIGHT_BITS, ValueRange
from hf_mim.pretraining.arguments import MIMTrainingArguments
from hf_mim.pretraining.recipe import RunArguments
from hf_mim.pretraining.telling import features_hint
from hf_mim.run_folder import (
    AT_START,
    HEALTH_RESULT,
    KNN_RESULT,
    START_HEALTH_RESULT,
    START_KNN_RESULT,
    result_path,
)

HEALTH_IMAGES = 512
VIEWS = {"num_view_images": 64, "views": 4}  # for LiDAR


Tell = Callable[[str], Any] | None  # see `load_images`


def load_split(
    run: RunArguments, argument: str, split: str, tell: Tell = None
) -> tuple[Dataset | IterableDataset, Account]:
    """A split of the run's `dataset` or `test_dataset`, and an account of it; its images are not decoded yet.

    Messages name the argument.
    """

    def named(message) -> str:
        return re.sub("^source|(?<= in )source", argument, str(message))

    columns = image_parts(run.image_column, run.missing_modality), run.labels
    try:
        images, account = load_described(
            getattr(run, argument), split, run.streaming, *columns, tell and (lambda line: tell(named(line))), run.group
        )
    except ValueError as error:
        kind = SplitNotFound if isinstance(error, SplitNotFound) else ValueError
        raise kind(named(error)) from error
    if argument == "dataset" and account.absent:
        raise ValueError(
            f"dataset must have images in each folder that image_column names, to learn from, and split {split} has "
            f"none in {' and '.join(account.absent)}"
        )
    if account.revision is not None:
        setattr(run, f"{argument}_fingerprint", f"commit {account.revision}")
    return images, account


def labelled_sample(images: Dataset | IterableDataset, count: int, start: int = 0) -> Dataset:
    """As `fixed_sample`, but only images with a label. A stream gives those among its `count` images."""
    if isinstance(images, Dataset):
        return fixed_sample(labelled_only(images), count, start)
    return labelled_only(fixed_sample(images, count, start))


def central_crop(run: RunArguments, config: PreTrainedConfig, size=None) -> CenterCrop | CenterWindow:
    """The part of an image that is measured and drawn, for an input of `size`: by default that of the encoder.

    After a training on native windows it is the central window that gives `size` the scale of the training.
    """
    if run.crop_pixels is None:
        return CenterCrop()
    size = size or config.image_height_width
    return CenterWindow.for_size(window_pixels(run.crop_pixels), size, config.training_size)


def fixed_view(
    images, config: PreTrainedConfig, count: int, run: RunArguments, value_range: ValueRange | None, size=None
) -> ImageDataset:
    """Central crops of a fixed sample, in their own depth. `size` is by default the one that the encoder sees."""
    about = dict(value_range=value_range or EIGHT_BITS, own_depth=True)
    crop, size = central_crop(run, config, size), size or config.image_height_width
    return ImageDataset(fixed_sample(images, count), size, config.num_channels, crop, **about)


@dataclass
class Readout:
    """Labelled images for the k-NN test: those that vote, and those that are classified.

    start: the shuffled training images from here on vote.
    most: the most images that vote, and that are classified.
    data: which images they are, for the result.
    origins: where labels and groups come from, of the two sets of images.
    run: says which part of an image is seen.
    """

    train_images: Dataset | IterableDataset
    test_images: Dataset | IterableDataset
    start: int
    most: tuple[int, int]
    data: dict
    origins: tuple[tuple, tuple]
    run: RunArguments

    @classmethod
    def find(cls, images, account: Account, run: RunArguments, tell: Tell = None) -> "Readout | None":
        """The training split votes and a test split is classified. None if there are no labels.

        Without a test split, at most a fifth of the training images is classified and does not vote. The model has seen
        them, without their labels. With groups, whole groups are classified. A stream, or fewer than 5 labelled images,
        then give None.
        """
        if not _has_labels(images):
            return None
        tested, split, tested_account = find_test_split(run, labelled=True, tell=tell)
        own, start, num_tested = tested is not None, 0, run.knn_test_images
        if isinstance(tested, Dataset) and isinstance(images, Dataset):
            tested = match_names(labelled_only(tested), images)
            warn_of_shared_groups(images, tested)
        if not own:
            if not isinstance(images, Dataset) or len(labelled := labelled_only(images)) < 5:
                return None
            tested, split, tested_account = labelled, run.train_split, account
            if run.group is not None:
                kept, held = stratified_split(torch.tensor(labelled["label"][:]), HELD_OUT, 0, group_ids(labelled))
                images, tested = labelled.select(kept), labelled.select(held)
            else:
                start = num_tested = min(num_tested, len(labelled) // 5)
        data = {
            "train": f"{source_name(run.dataset)}, split {run.train_split}",
            "test": f"{source_name(run.test_dataset or run.dataset)}, split {split}",
            "test_images_seen_in_pretraining": not own,
        }
        origins = tuple((about.labels, about.group) for about in (account, tested_account))
        return cls(images, tested, start, (run.knn_train_images, num_tested), data, origins, run)

    def sample(self, train: int, test: int) -> tuple[LabelledImages, LabelledImages]:
        """At most `train` labelled images to vote and `test` to be classified, and no more than `most`."""
        voting = labelled_sample(self.train_images, min(train, self.most[0]), self.start)
        classified = labelled_sample(self.test_images, min(test, self.most[1]))
        parts = (voting, self.data["train"], self.origins[0]), (classified, self.data["test"], self.origins[1])
        return tuple(LabelledImages(images, name, *origin) for images, name, origin in parts)

    def measure(
        self, model, untrained, augment, batch_size: int, folder: Path, kept: KeptCrops | None = None
    ) -> Result:
        """Measure the trained encoder, the untrained one and raw pixels. Prints and saves the result.

        If the run has started from weights, their result (`measure_start`) stands beside these. An image is decoded
        once for all encoders; `kept` has those that were decoded already.
        """
        train, test = self.sample(*self.most)
        encoder = frozen(model, augment, self.run, str(folder))
        encoders = [encoder, frozen(untrained, augment, self.run, "untrained"), RawPixels.of(encoder)]
        about = dict(batch_size=batch_size, progress="k-NN accuracy", kept=kept)
        extract, *others = SharedExtractor.of(encoders, **about)
        result, protocol = self._measure(extract, train, test, folder)
        names = "untrained", "raw pixels"
        result.scores = {
            name: protocol.run(other, train, test).value for name, other in zip(names, others, strict=True)
        }
        if (start := result_path(folder, START_KNN_RESULT)).is_file():
            result.scores = {AT_START: Result.load(start).value} | result.scores
        result.save(result_path(folder, KNN_RESULT))
        seen = ", seen in pretraining without their labels" if self.data["test_images_seen_in_pretraining"] else ""
        print(f"\n{protocol.k}-NN accuracy on {len(test):,} images of {self.data['test']}{seen};")
        print(f"{len(train):,} of {self.data['train']} vote; labels by {train.labels}; mean of the patch tokens:\n")
        for name, value in {"trained": result.value, **result.scores}.items():
            print(f"    {name:<12}{100 * value:5.1f} %")
        if hint := features_hint(result, test):
            print(f"\n{hint}")
        return result

    def measure_start(self, model, augment, batch_size: int, folder: Path):
        """Measure and save what the weights of the start give."""
        encoder = frozen(model, augment, self.run, str(folder))
        extract = FeatureExtractor(encoder, batch_size, progress="k-NN accuracy at the start")
        result, _ = self._measure(extract, *self.sample(*self.most), folder)
        result.settings[AT_START] = True
        result.save(result_path(folder, START_KNN_RESULT))

    def _measure(self, extract: FeatureExtractor, train, test, folder: Path) -> tuple[Result, KNN]:
        protocol = KNN(k=min(20, len(train)))
        result = measure(protocol, extract, (train, test), folder)
        result.data["test"]["seen_in_pretraining"] = self.data["test_images_seen_in_pretraining"]
        return result, protocol


def frozen(model, augment, run: RunArguments, name: str) -> FrozenEncoder:
    """The encoder of a run's model, which sees images as they are measured."""
    sees = dict(value_range=augment.value_range, crop=central_crop(run, model.config))
    return FrozenEncoder(model.base_model, *augment.statistics(), name=name, **sees)


def check_best(run: RunArguments, args: MIMTrainingArguments, readout: Readout | None):
    """Raise ValueError if `keep_best` cannot work in this run."""
    if run.keep_best is None:
        return
    if run.keep_best == "probe_knn" and readout is None:
        raise ValueError("keep_best probe_knn needs labels, and there are none; probe_rank_me needs none")
    if args.save_strategy == "no":
        raise ValueError("keep_best needs checkpoints: save_strategy must be steps or epoch, not no")
    if args.metric_for_best_model is not None:
        raise ValueError(f"keep_best and metric_for_best_model {args.metric_for_best_model} exclude each other")


def health_crops() -> KeptCrops:
    """What keeps the decoded images of `health_record`: those with several views are kept whole."""
    return KeptCrops(whole=VIEWS["num_view_images"])


def health_record(
    model, augment, images, run: RunArguments, batch_size: int, folder: Path, is_start: bool = False, kept=None
) -> Result:
    """`results/health.json`: health of the features of training images, beside an untrained encoder's. No labels.

    `is_start`: the weights are those that the run starts from. They are measured alone, into a file of their own. What
    they gave then stands in the later table. `kept`, a `KeptCrops`, keeps what is decoded.
    """
    sample = Images(fixed_sample(images, HEALTH_IMAGES), f"{source_name(run.dataset)}, split {run.train_split}")
    about = dict(progress="health", kept=kept or health_crops())
    extract = FeatureExtractor(frozen(model, augment, run, str(folder)), batch_size, **about)
    result = measure(Health(num_images=HEALTH_IMAGES, **VIEWS, compare=not is_start), extract, (sample,), folder)
    path = result_path(folder, START_HEALTH_RESULT)
    if is_start:
        result.settings[AT_START] = True
        result.save(path)
        return result
    if path.is_file():
        before = {row["measure"]: row["value"] for row in Result.load(path).table}
        for row in result.table:
            rest = {name: row.pop(name) for name in list(row)[2:]}
            row |= {AT_START: before.get(row["measure"])} | rest
    result.save(result_path(folder, HEALTH_RESULT))
    print(f"\n{result.headline()}. {result.notes[0]}")
    return result


def find_test_split(
    run: RunArguments, labelled: bool = False, tell: Tell = None
) -> tuple[Dataset | IterableDataset | None, str | None, Account | None]:
    """The test images, their split and an account; Nones if the recipe names none and the dataset has none.

    Raises ValueError if the recipe names one that does not exist, or that has no labels although `labelled` asks for
    them.
    """
    own = run.test_dataset is None or same_source(run.test_dataset, run.dataset)
    argument = "dataset" if own else "test_dataset"
    named = run.test_split or not own
    splits = [run.test_split] if run.test_split else ["validation", "test", "train"]
    if own:
        splits = [split for split in splits if split != run.train_split]
    if not splits:
        raise ValueError(f"test_split must be another split than {run.train_split}, which trains, or give test_dataset")

    def load(split):
        images, account = load_split(run, argument, split, tell)
        if labelled and not _has_labels(images):
            wrong = f"{argument} must have labels, and split {split} of {getattr(run, argument)} has none"
            raise ValueError(wrong) if named else SplitNotFound(wrong)
        return images, account

    try:
        (images, account), split = first_split(splits, load)
    except SplitNotFound:
        if named:
            raise
        return None, None, None
    return images, split, account


def _has_labels(images: Dataset | IterableDataset) -> bool:
    """Whether any label is known (-1 is not). A stream is only asked for the column."""
    if "label" not in images.column_names:
        return False
    return not isinstance(images, Dataset) or any(label is not None and label >= 0 for label in images["label"])
