"""What a run says of its features in the end: k-NN accuracy, beside that of no training and of no encoder at all."""

import hashlib
import re
from dataclasses import dataclass
from pathlib import Path

import torch
from datasets import Dataset, IterableDataset
from transformers import PreTrainedConfig

from hf_mim.cli.recipe import RunArguments
from hf_mim.data import CenterCrop, ImageDataset, ImageStream, load_images
from hf_mim.evaluation.features import extract_features, mean_patch_token, raw_pixels
from hf_mim.evaluation.knn import KNNResult, evaluate_knn


def load_split(run: RunArguments, argument: str, split: str) -> Dataset | IterableDataset:
    """A split of the run's `dataset` or `test_dataset`, not decoded. Errors name the argument."""
    try:
        return load_images(getattr(run, argument), split, run.streaming, run.image_column, run.label_column)
    except ValueError as error:
        raise ValueError(re.sub("^source|(?<= in )source", argument, str(error))) from error


def fixed_view(
    images, config: PreTrainedConfig, count: int, start: int = 0, labels: bool = False, size=None
) -> ImageDataset | ImageStream:
    """`count` images or fewer, always the same: those from `start` on in a shuffled order (a stream has its own).

    Centred crops, of `size` or that which the encoder sees.
    """
    size, channels = size or config.image_height_width, config.num_channels
    if isinstance(images, Dataset):
        order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
        chosen = images.select(order[start : start + count].tolist())
        return ImageDataset(chosen, size, channels, CenterCrop(), labels)
    return ImageStream(images.skip(start).take(count), size, channels, CenterCrop(), labels)


@dataclass
class Readout:
    """Labelled images to vote and to be classified. `data` says which they are, for the result."""

    train: ImageDataset | ImageStream
    test: ImageDataset | ImageStream
    data: dict

    @classmethod
    def find(cls, images, run: RunArguments, config: PreTrainedConfig) -> "Readout | None":
        """The training split votes, a test split is classified. None where there are no labels.

        Without a test split, a fifth of the training images at most is classified and does not vote: the model has seen
        them, without their labels. Of a stream, or of fewer than 5 images, there is None.
        """
        if not _has_labels(images):
            return None
        tested, split = find_test_split(run, labelled=True)
        own, num_tested = tested is not None, run.knn_test_images
        if not own:
            if not isinstance(images, Dataset) or len(images) < 5:
                return None
            tested, split, num_tested = images, run.train_split, min(num_tested, len(images) // 5)
        data = {
            "train": f"{run.dataset}, split {run.train_split}",
            "test": f"{run.test_dataset or run.dataset}, split {split}",
            "test_images_seen_in_pretraining": not own,
        }
        train = fixed_view(images, config, run.knn_train_images, start=0 if own else num_tested, labels=True)
        return cls(train, fixed_view(tested, config, num_tested, labels=True), data)

    def measure(self, model, untrained, augment, args, folder: Path) -> KNNResult:
        """The trained encoder, with the untrained one and the raw pixels as baselines: printed, and in knn.json."""
        augment.eval()
        encoders = {
            "trained": mean_patch_token(model.base_model),
            "untrained": mean_patch_token(untrained.base_model),
            "raw pixels": raw_pixels,
        }
        results = {name: self._measure_one(encode, augment, model.device, args) for name, encode in encoders.items()}
        result = results["trained"]
        result.baselines = {name: results[name].accuracy for name in ("untrained", "raw pixels")}
        result.checkpoint_sha256 = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
        result.save(folder / "knn.json")
        seen = ", seen in pretraining without their labels" if self.data["test_images_seen_in_pretraining"] else ""
        print(f"\n{result.k}-NN accuracy on {result.test_images:,} images of {self.data['test']}{seen};")
        print(f"{result.train_images:,} of {self.data['train']} vote; mean of the patch tokens:\n")
        for name, value in results.items():
            print(f"    {name:<12}{100 * value.accuracy:5.1f} %")
        return result

    def _measure_one(self, encode, augment, device, args) -> KNNResult:
        train, test = (
            extract_features(encode, images, augment, device, args.per_device_eval_batch_size)
            for images in (self.train, self.test)
        )
        return evaluate_knn(train, test, features="mean of the patch tokens after the final norm", data=self.data)


def find_test_split(run: RunArguments, labelled: bool = False) -> tuple[Dataset | IterableDataset | None, str | None]:
    """The test images and their split; (None, None) where the recipe names none and the dataset has none.

    Raises ValueError if it names one that is not there, or has no labels when they are asked for.
    """
    argument = "dataset" if run.test_dataset is None else "test_dataset"
    named = run.test_dataset or run.test_split
    splits = [run.test_split] if run.test_split else ["validation", "test", "train"]
    if argument == "dataset":
        splits = [split for split in splits if split != run.train_split]
    for split in splits:
        try:
            images = load_split(run, argument, split)
        except ValueError:
            if named and split == splits[-1]:
                raise
            continue
        if not labelled or _has_labels(images):
            return images, split
        if named:
            raise ValueError(f"{argument} must have labels, and split {split} of {getattr(run, argument)} has none")
    return None, None


def _has_labels(images: Dataset | IterableDataset) -> bool:
    """Whether there is a label that is known (-1 is not). Of a stream only whether there is the column."""
    if "label" not in images.column_names:
        return False
    return not isinstance(images, Dataset) or any(label is not None and label >= 0 for label in images["label"])
