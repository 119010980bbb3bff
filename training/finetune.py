"""Fine-tune a checkpoint on labelled images with a plain `transformers.Trainer`, by MAE's recipe: a script to copy.

    python training/finetune.py runs/digits_mae --dataset digits --epochs 5 --flip 0
    python training/finetune.py runs/digits_mae --dataset digits --epochs 5 --flip 0 --blocks 1
    torchrun --nproc_per_node 8 training/finetune.py runs/imagenet_mae --dataset /path/to/imagenet --bf16 true
    accelerate launch training/finetune.py facebook/dinov2-base --dataset /path/to/images --epochs 50

The first command takes seconds on a CPU, after `hf-mim pretrain digits_mae`. A checkpoint is a
folder or a name on the Hub, of one of our models or of any that `AutoModelForImageClassification` loads. Every argument
of transformers' `TrainingArguments` works too (`--help`). The learning rate is `--base_lr` × images per step / 256.
The folder then holds the classifier, its result with predictions, confusion and curve, and a card.
"""

import contextlib
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from accelerate.utils import gather_object, set_seed
from transformers import HfArgumentParser

from hf_mim.companions import fill_classifier_folder, how_to_use
from hf_mim.data import ImageDataset
from hf_mim.data.labelled import load_labelled
from hf_mim.data.mix import MixAugment
from hf_mim.data.sources import source_name
from hf_mim.evaluation.checkpoint import checkpoint_sha256
from hf_mim.evaluation.classifier import load_classifier, save_classifier
from hf_mim.evaluation.encoder import FrozenEncoder
from hf_mim.evaluation.finetune import FinetuningArguments, make_trainer, training_images
from hf_mim.evaluation.finetune_result import finetuning_result
from hf_mim.evaluation.metrics import compute_metrics
from hf_mim.evaluation.predictions import Predictions
from hf_mim.files import check_destination
from hf_mim.lock import locked

# Beside its own arguments, what the result and the card say of the recipe.
SETTINGS = ("num_train_epochs", "per_device_train_batch_size", "base_lr", "layer_decay", "weight_decay", "seed")


@dataclass
class Arguments:
    dataset: str = field(metadata={"help": 'A folder, a file, a name on the Hub, or "textures".'})
    test_dataset: str | None = field(default=None, metadata={"help": "Default: the test or validation split."})
    labels: str | None = field(default=None, metadata={"help": "The column of the classes, or folder: class folders."})
    group: str | None = field(default=None, metadata={"help": "The column of patients, scenes or the like, or folder."})
    image_size: int | None = field(default=None, metadata={"help": "Side of the crops; default: the checkpoint's."})
    blocks: int | None = field(default=None, metadata={"help": "Train only this many last blocks; 0: linear probe."})
    drop_path: float = field(default=0.1, metadata={"help": "Stochastic depth of the last block."})
    mixup: float = field(default=0.8, metadata={"help": "α of mixup; 0: none."})
    cutmix: float = field(default=1.0, metadata={"help": "α of CutMix; 0: none."})
    label_smoothing: float = field(default=0.1, metadata={"help": "Share of a label that is spread over all classes."})
    random_erase: float = field(default=0.25, metadata={"help": "Probability of erasing a part of an image."})
    flip: float = field(default=0.5, metadata={"help": "Probability of a left-right flip."})
    randaugment_magnitude: float = field(default=9.0, metadata={"help": "Mean magnitude, 0 to 10; 0: no RandAugment."})


def main():
    parser = HfArgumentParser((Arguments, FinetuningArguments))
    parser.add_argument("checkpoint", help="a folder, or a name on the Hub")
    parser.add_argument(
        "--epochs", type=float, dest="num_train_epochs", default=100, help="the same as --num_train_epochs"
    )
    parser.set_defaults(output_dir="runs/finetuned", eval_strategy="epoch", save_strategy="epoch", save_total_limit=1)
    ours, args, rest = parser.parse_args_into_dataclasses()
    if args.resume_from_checkpoint is None:
        check_destination(args.output_dir, "output_dir")

    # The checkpoint's image processor gives size, mean and std. The data workers crop the images.
    encoder = FrozenEncoder.load(rest.checkpoint, ours.image_size, device="cpu")
    with args.main_process_first(desc="loading the images"):
        train, test = load_labelled(ours.dataset, ours.test_dataset, labels=ours.labels, group=ours.group)
    classes = train.class_names or [str(number) for number in range(int(train.read_labels().max()) + 1)]
    train_images = training_images(train.images, encoder, magnitude=ours.randaugment_magnitude, seed=args.seed)
    about = dict(labels=True, value_range=encoder.value_range, keep_empty=True)
    test_images = ImageDataset(test.images, encoder.image_size, encoder.num_channels, encoder.crop, **about)

    set_seed(args.seed)
    model = load_classifier(rest.checkpoint, classes, ours.drop_path, ours.blocks)
    # Flip, normalisation, erasing, mixup and CutMix run on the device before the model. The loss comes with them.
    mixing = ours.mixup, ours.cutmix, ours.label_smoothing, ours.random_erase, ours.flip
    augment = MixAugment(encoder.mean, encoder.std, *mixing, nodata=encoder.has_nodata)
    # A plain Trainer, with AdamW and layer-wise learning rates.
    trainer = make_trainer(
        model, args, augment, train_images, eval_dataset=test_images, compute_metrics=compute_metrics
    )
    main_process = trainer.is_world_process_zero()
    with contextlib.ExitStack() as stack:
        if main_process:  # no other process may write there meanwhile
            Path(args.output_dir).mkdir(parents=True, exist_ok=True)
            stack.enter_context(locked(args.output_dir, "output_dir"))
        trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
        logits = torch.from_numpy(trainer.predict(test_images).predictions)  # the last epoch counts, as in the papers
        broken = set(gather_object(test_images.broken_indices()))  # another image was predicted in place of each
        if main_process:
            save_classifier(model, args.output_dir, encoder.image_processor(encoder.crop))
            logits = logits[[row for row in range(len(test)) if row not in broken]]
            test.leave_out(sorted(broken))
            told = [row for row in trainer.state.log_history if "eval_top1_accuracy" in row]
            curve = {round(row["epoch"]): row["eval_top1_accuracy"] for row in told}
            settings = asdict(ours) | {name: getattr(args, name) for name in SETTINGS}
            result = finetuning_result(trainer, logits, test.read_labels(), settings, curve)
            result.data = {"train": train.describe(), "test": test.describe()}
            result.checkpoint, result.checkpoint_sha256 = (
                source_name(rest.checkpoint),
                checkpoint_sha256(rest.checkpoint),
            )
            result.device = str(args.device)
            result.add_predictions(Predictions.of(result.predicted, test))
            fill_classifier_folder(args.output_dir, result)
    if main_process:
        print(f"\n{result}\n\n{how_to_use(args.output_dir, ours.test_dataset or ours.dataset, result)}")


if __name__ == "__main__":
    try:
        main()
    except ValueError as error:
        sys.exit(f"error: {error}")
