"""Fine-tuning of the whole model or of its last blocks, by a plain `transformers.Trainer`: MAE's recipe on any vision
classifier.

`training/finetune.py`, the script to copy, uses the same parts as the protocol `Finetune`: the classifier
(`classifier.py`), the arguments and training images (here), augmentation and loss (`hf_mim/data/mix.py`).
"""

import tempfile
from dataclasses import asdict, dataclass, field
from typing import ClassVar

import torch
from transformers import Trainer
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from hf_mim.checks import least, positive, share
from hf_mim.data import ImageDataset, RandomCrop, check_broken
from hf_mim.data.mix import MixAugment
from hf_mim.data.randaugment import LARGEST_MAGNITUDE, RandAugment, RandAugmentedImages
from hf_mim.data.splits import check_labels
from hf_mim.evaluation.checkpoint import check_unchanged
from hf_mim.evaluation.classifier import load_classifier, parameter_groups, save_classifier, size_options
from hf_mim.evaluation.finetune_result import AccuracyCurve, LossOnBar, finetuning_result
from hf_mim.evaluation.lowshot import draw_images, parse_budget
from hf_mim.evaluation.result import NotKept, Result
from hf_mim.files import check_destination, new_folder, one_line
from hf_mim.trainer_utils import (
    BrokenImages,
    DatasetEpoch,
    ProcessArguments,
    ProcessTrainer,
    StepSeeds,
    gpu_has_bfloat16,
    seeded,
)


@dataclass
class FinetuningArguments(ProcessArguments):
    """TrainingArguments whose defaults are MAE's fine-tuning of ViT-B (arXiv 2111.06377, table 9, and released code).

    The peak learning rate is `learning_rate` if that is given, otherwise `base_lr` × images per optimizer step / 256.

    Raises:
        ValueError: a value outside its range, in one line that names the argument.
    """

    base_lr: float = field(default=5e-4, metadata={"help": "Peak learning rate of the head for 256 images per step."})
    learning_rate: float | None = field(default=None, metadata={"help": "Peak; default: base_lr × batch / 256."})
    layer_decay: float = field(default=0.65, metadata={"help": "Each block's learning rate / that of the next block."})
    warmup_epochs: float | None = field(default=None, metadata={"help": "Default: 5, but at most a tenth of all."})
    num_train_epochs: float = field(default=100, metadata={"help": "Passes over the training images."})
    per_device_train_batch_size: int = field(default=128, metadata={"help": "Images per device and step."})
    per_device_eval_batch_size: int = field(default=128, metadata={"help": "Images per device in evaluation."})
    lr_scheduler_type: str = field(default="cosine", metadata={"help": "How the rate falls after the warm-up."})
    weight_decay: float = field(default=0.05, metadata={"help": "For matrices; none on biases, norms, tokens, tables."})
    max_grad_norm: float = field(default=0.0, metadata={"help": "Gradient norm to clip to; 0: no clipping."})
    logging_strategy: str = field(default="epoch", metadata={"help": "When to log."})
    remove_unused_columns: bool = field(default=False, metadata={"help": "Drop columns that the model does not take."})
    dataloader_persistent_workers: bool = field(default=True, metadata={"help": "Keep workers between epochs."})

    def __post_init__(self):
        super().__post_init__()
        if self.warmup_epochs is None:
            self.warmup_epochs = min(5, self.num_train_epochs / 10)
        check_schedule(self.num_train_epochs, self.warmup_epochs, self.base_lr, self.layer_decay, self.weight_decay)
        if self.learning_rate is None:
            self.learning_rate = self.base_lr * self.images_per_step / 256
        if not self.warmup_steps:
            self.warmup_steps = self.warmup_epochs / self.num_train_epochs  # Trainer takes a number below 1 as a share
        self.settle_loaders()


def check_schedule(epochs: float, warmup_epochs: float | None, base_lr: float, layer_decay: float, weight_decay: float):
    """Raise ValueError, naming the argument, for a value outside its range."""
    positive(epochs=epochs, base_lr=base_lr)
    if not 0 <= (warmup_epochs or 0) < epochs:
        raise ValueError(f"warmup_epochs must be at least 0 and below the {epochs:g} epochs, not {warmup_epochs!r}")
    share("(0, 1]", layer_decay=layer_decay)
    least(0, weight_decay=weight_decay)


def training_images(images, encoder, crop_scale=(0.08, 1.0), magnitude=9.0, magnitude_std=0.5, seed=0):
    """The dataset to fine-tune on: labelled random crops of a `datasets.Dataset`, through RandAugment.

    Args:
        encoder: its `image_size`, `num_channels` and `mean` are used; the mean fills what RandAugment uncovers.
        magnitude: of RandAugment; 0 turns it off.
    """
    arguments = dict(crop=RandomCrop(tuple(crop_scale)), labels=True, seed=seed, value_range=encoder.value_range)
    if not magnitude:
        return ImageDataset(images, encoder.image_size, encoder.num_channels, **arguments)
    randaugment = RandAugment(magnitude, magnitude_std, fill=tuple(round(255 * x) for x in encoder.mean))
    return RandAugmentedImages(images, encoder.image_size, encoder.num_channels, **arguments, randaugment=randaugment)


class FinetuningTrainer(ProcessTrainer, Trainer):
    """A plain Trainer."""


def make_trainer(model, args: FinetuningArguments, augment: MixAugment, train_images: ImageDataset, **options):
    """A plain Trainer for a classifier: AdamW with learning rates by depth, augmentation on the device and its loss.

    Args:
        model: from `load_classifier`; `augment` is put before its forward.
        train_images: from `training_images`.
        options: of `Trainer`, such as `eval_dataset`.
    """
    augment.attach(model, **size_options(model, train_images.size))
    groups = parameter_groups(model, args.learning_rate, args.weight_decay, args.layer_decay)
    return FinetuningTrainer(
        model,
        args,
        train_dataset=train_images,
        compute_loss_func=augment.loss,
        optimizer_cls_and_kwargs=(torch.optim.AdamW, {"params": groups, "lr": args.learning_rate}),
        callbacks=[DatasetEpoch(train_images), BrokenImages(train_images), StepSeeds()],
        **options,
    )


@dataclass
class Finetune:
    """Top-1 accuracy of the whole model, or of its last blocks, trained to classify; at the last epoch, as in papers.

    The defaults are MAE's recipe for ViT-B (arXiv 2111.06377, table 9, and the released code), except for the paper's
    batch of 1024; the learning rate follows the batch. For ViT-L: base_lr 1e-3, layer_decay .75, epochs 50, drop_path
    .2. Small datasets need more epochs and less augmentation; digits and letters need flip 0. `blocks` is partial
    fine-tuning (figure 9): 0 is a linear probe, the number of blocks is full fine-tuning. The test images are
    classified after up to 20 epochs, for a curve. They choose nothing, and their labels are read last.

    Args:
        epochs: passes over the training images
        batch_size: images of a step; 1024 in the paper
        base_lr: peak learning rate of the head for 256 images per step
        layer_decay: each block's learning rate divided by that of the next block
        warmup_epochs: default: 5, but at most a tenth of all epochs
        weight_decay: for matrices
        blocks: train only so many of the last blocks; default: everything
        drop_path: stochastic depth of the last block
        mixup: α of mixup; 0: none
        cutmix: α of CutMix; 0: none
        label_smoothing: share of a label that is spread equally over all classes
        random_erase: probability of erasing a part of an image
        randaugment_magnitude: mean, 0 to 10; 0: no RandAugment
        randaugment_std: standard deviation of the magnitude
        crop_scale: smallest and largest share of the image in a crop
        flip: probability of a left-right flip
        bf16: autocast to bfloat16; default: if the GPU has it
        output_dir: keep the fine-tuned classifier in this new folder, with its result, pictures and card
        budget: train on a part of the images, the same number of each class: 1%, or 5 of each class; default: all
        seed: for the new classifier, the order, all augmentation and the images of budget
    """

    name: ClassVar[str] = "finetune"
    needs: ClassVar[str] = "labels"
    # Options of the encoder that do nothing here: `seed` also draws the untrained weights.
    unused: ClassVar[tuple[str, ...]] = ("dtype", "cache", "extract_batch_size", "untrained_seed", "pixels")
    unused += ("folds", "beside")

    epochs: float = 100.0
    batch_size: int = 128
    base_lr: float = 5e-4
    layer_decay: float = 0.65
    warmup_epochs: float | None = None
    weight_decay: float = 0.05
    blocks: int | None = None
    drop_path: float = 0.1
    mixup: float = 0.8
    cutmix: float = 1.0
    label_smoothing: float = 0.1
    random_erase: float = 0.25
    randaugment_magnitude: float = 9.0
    randaugment_std: float = 0.5
    crop_scale: tuple[float, float] = (0.08, 1.0)
    flip: float = 0.5
    bf16: bool | None = None
    output_dir: str | None = None
    budget: str | None = None
    seed: int = 0

    def __post_init__(self):
        if self.output_dir is not None:
            check_destination(self.output_dir, "output_dir")  # before hours of training
        least(1, batch_size=self.batch_size)
        least(0, blocks=self.blocks)
        if self.budget is not None:
            parse_budget(self.budget, "budget")
        share("[0, 1)", drop_path=self.drop_path)
        check_schedule(self.epochs, self.warmup_epochs, self.base_lr, self.layer_decay, self.weight_decay)
        self._augment([0.5], [0.5])  # checks its arguments
        share(f"[0, {LARGEST_MAGNITUDE:g}]", randaugment_magnitude=self.randaugment_magnitude)
        least(0, randaugment_std=self.randaugment_std)
        try:
            RandomCrop(tuple(self.crop_scale))
        except ValueError as error:
            raise ValueError(f"crop_{error}") from None

    def run(self, extract, train, test) -> Result:
        encoder = extract.encoder
        if index := encoder.device.index:
            raise ValueError(
                f"device must be {encoder.device.type}, the first that Trainer sees, not {encoder.device}; choose "
                f"another GPU by CUDA_VISIBLE_DEVICES={index}"
            )
        labels = train.read_labels()
        check_labels(labels)
        classes = train.class_names or [str(number) for number in range(int(labels.max()) + 1)]
        if self.budget is not None:
            train = train.select(draw_images(labels, self.budget, self.seed, argument="budget").tolist())
        if self.batch_size > len(train):
            raise ValueError(f"batch_size must be at most the {len(train)} training images, not {self.batch_size}")
        crop = self.crop_scale, self.randaugment_magnitude, self.randaugment_std, self.seed
        train_images = training_images(train.images, encoder, *crop)
        unlabelled = test.images.select_columns("image")
        about = encoder.image_size, encoder.num_channels, extract.crop
        test_images = ImageDataset(unlabelled, *about, value_range=encoder.value_range, keep_empty=True)
        with seeded(self.seed, encoder.device), tempfile.TemporaryDirectory() as folder:
            about = self.drop_path, self.blocks, encoder.is_untrained, encoder.trust_remote_code
            model = load_classifier(encoder.name, classes, *about)
            check_unchanged(encoder.name, encoder.stamps)
            if encoder.modalities is not None:
                model.config.modalities_seen = encoder.modalities
            args = self._arguments(folder, encoder.device, extract.num_workers, not extract.progress)
            trainer = make_trainer(
                model, args, self._augment(encoder.mean, encoder.std, encoder.has_nodata), train_images
            )
            trainer.remove_callback(PrinterCallback)
            if trainer.pop_callback(ProgressCallback) is not None:
                trainer.add_callback(LossOnBar())
            trainer.add_callback(curve := AccuracyCurve(trainer, test_images))
            trainer.train()
            logits = curve.logits()
        check_broken(test_images)
        predicted = curve.predicted
        if broken := test_images.broken_indices():  # another image was predicted in place of each
            kept = [row for row in range(len(logits)) if row not in set(broken)]
            logits, predicted = logits[kept], {epoch: ids[kept] for epoch, ids in predicted.items()}
            test.leave_out(broken)
        failure = self._keep(model, encoder.image_processor(extract.crop))
        result = self._result(trainer, logits, train, test, predicted)
        if failure is not None:
            raise NotKept(f"the classifier was not saved: {failure}", result)
        return result

    def _keep(self, model, processor) -> str | None:
        """Save the classifier in `output_dir`, whole or not at all. Returns what failed."""
        if self.output_dir is None:
            return None
        try:
            with new_folder(self.output_dir, "output_dir") as folder:
                save_classifier(model, folder, processor)
        except (OSError, ValueError) as error:
            return one_line(error)
        return None

    def _arguments(self, folder, device, num_workers: int, silent: bool) -> FinetuningArguments:
        return FinetuningArguments(
            output_dir=str(folder),
            num_train_epochs=self.epochs,
            per_device_train_batch_size=self.batch_size,
            per_device_eval_batch_size=self.batch_size,
            base_lr=self.base_lr,
            layer_decay=self.layer_decay,
            warmup_epochs=self.warmup_epochs,
            weight_decay=self.weight_decay,
            bf16=device.type == "cuda" and gpu_has_bfloat16() if self.bf16 is None else self.bf16,
            seed=self.seed,
            use_cpu=device.type == "cpu",
            dataloader_num_workers=num_workers,
            dataloader_drop_last=True,
            save_strategy="no",
            disable_tqdm=silent,
        )

    def _augment(self, mean, std, nodata: bool = False) -> MixAugment:
        mixing = self.mixup, self.cutmix, self.label_smoothing, self.random_erase, self.flip
        return MixAugment(mean, std, *mixing, nodata=nodata)

    def _result(self, trainer: Trainer, logits: torch.Tensor, train, test, predicted: dict) -> Result:
        """The result. Only here are the test labels read."""
        labels = test.read_labels()
        curve = {epoch: (ids == labels).double().mean().item() for epoch, ids in predicted.items()}
        settings = {name: value for name, value in asdict(self).items() if name != "output_dir"}
        settings["optimizer"] = "AdamW (.9, .999), cosine to 0"
        result = finetuning_result(trainer, logits, labels, settings, curve)
        result.data = {"train": train.describe(), "test": test.describe()}
        result.notes = self.notes(trainer.model, trainer.args.device)
        return result

    def notes(self, model, device: torch.device) -> list[str]:
        """What a reader of the result must know about this model and device."""
        notes = []
        if self.drop_path and not hasattr(model.config, "drop_path_rate"):
            notes.append(f"{type(model).__name__} has no drop path: drop_path {self.drop_path:g} did nothing.")
        if device.type == "cuda":
            notes.append("Another run with the same seed may differ in the last digits: fused attention on a GPU.")
        return notes
