"""One pretraining run, from a `Recipe` to a run folder: what `hf-mim pretrain` and `training/pretrain.py` do.

    run = Pretraining(recipe)  # checks everything, loads the data, builds the model; writes nothing
    run()                      # trains, saves, draws, measures

The run folder is the checkpoint (config, weights, image processor) with `recipe.yaml`, `trainer_state.json`,
`metrics.jsonl`, `loss.png`, for MAE `reconstructions.png`, in `results/` `training.json`, `health.json` and where the
images have labels `knn.json`, and of all these the model card, `README.md`. With `--push_to_hub` it goes to the Hub.
"""

import math
import os
import signal
from pathlib import Path

import torch
from accelerate import PartialState
from accelerate.utils import set_seed
from datasets import Dataset
from transformers import AutoModelForPreTraining, PreTrainedConfig

from hf_mim import methods
from hf_mim.data import DeviceAugment, ImageDataset, ImageStream, RandomCrop, channel_statistics
from hf_mim.data.processor import image_processor
from hf_mim.pretraining import checkpoints
from hf_mim.pretraining.final_results import (
    Readout,
    find_test_split,
    fixed_sample,
    fixed_view,
    load_split,
    measure_health,
    training_record,
)
from hf_mim.pretraining.probe import OnlineProbe
from hf_mim.pretraining.recipe import Recipe, RunArguments, model_fields
from hf_mim.pretraining.settings import read_yaml
from hf_mim.pretraining.trainer import MIMTrainer, MIMTrainingArguments
from hf_mim.visualize import plot_reconstructions, plot_training

NUM_PICTURES = 8


class Pretraining:
    """A run that is ready to start. Raises ValueError, before anything is written, if the recipe cannot work."""

    def __init__(self, recipe: Recipe):
        self.recipe, run = recipe, recipe.run
        config = recipe.config()
        args = training_arguments(recipe)
        self.folder = Path(args.output_dir)
        check_run_folder(self.folder, recipe)
        with args.main_process_first(desc="loading the images"):
            self.images = load_split(run, "dataset", run.train_split)
            train_images = training_images(self.images, run, config, args.seed)
            self.augment = device_augment(recipe, train_images, config)
            self.readout = Readout.find(self.images, run) if run.knn or run.probe_every else None
            eval_images = None if args.eval_strategy == "no" else evaluation_images(run, config)
        steps = number_of_steps(args, train_images)
        if 0 < steps < args.warmup_steps:  # Trainer would find out after it has begun
            raise ValueError(
                f"warmup_steps must be at most the {steps} steps of the run, or below 1 as a share of them, "
                f"not {args.warmup_steps:g}"
            )
        if "logging_steps" not in recipe.training:
            args.logging_steps = min(args.logging_steps, max(1, steps // 20))  # a short run is to have a curve too
        set_seed(args.seed)
        model = AutoModelForPreTraining.from_config(config)
        self.trainer = MIMTrainer(
            model,
            args,
            train_dataset=train_images,
            eval_dataset=eval_images,
            augment=self.augment,
            # Saved with each checkpoint, so that each can be evaluated.
            processing_class=image_processor(config.image_height_width, run.image_mean, run.image_std),
        )
        if run.probe_every:
            samples = self.readout.sample(run.probe_images, run.probe_images // 4) if self.readout else None
            samples = samples or (None, fixed_sample(self.images, run.probe_images // 4))
            self.trainer.add_callback(OnlineProbe(self.trainer, run.probe_every, *samples))
        # The last thing that can be wrong. A run that was ended before its first checkpoint begins again.
        resumes = bool(run.resume and checkpoints.checkpoints(self.folder))
        self.checkpoint = self.trainer.checkpoint_to_resume(resumes)

    def __call__(self) -> signal.Signals | None:
        """Train, then fill the run folder and say what came out. The signal that has ended the training, if one has."""
        trainer, main = self.trainer, self.trainer.is_world_process_zero()
        PartialState().wait_for_everyone()  # every rank has looked into the folder by now
        if main:
            self.folder.mkdir(parents=True, exist_ok=True)
            self.recipe.save(self.folder / "recipe.yaml")
        trainer.train(resume_from_checkpoint=self.checkpoint)
        if trainer.guard.signal:
            return trainer.guard.signal
        trainer.save_model(_internal_call=True)  # else it would be pushed before it is described
        trainer.save_state()
        if main:
            self.finish()
        if trainer.args.push_to_hub:
            trainer.push_to_hub()
        return None

    def finish(self):
        """Pictures, measurements and the card into the run folder; on the main process only."""
        model = self.trainer.accelerator.unwrap_model(self.trainer.model)
        if self.trainer.is_fsdp_enabled:  # of the sharded one a single process has a part
            model = AutoModelForPreTraining.from_pretrained(self.folder).to(self.trainer.args.device)
        self.draw(model.eval())
        self.measure(model.eval())
        self.trainer.create_model_card()
        print(
            f"\nThe checkpoint is in {self.folder}, its card in README.md. Three lines of Python load its encoder:\n\n"
            "    import hf_mim\n"
            "    from transformers import AutoModel\n"
            f'    model = AutoModel.from_pretrained("{self.folder}")'
        )

    def draw(self, model):
        """The training curve and, where the model predicts pixels, reconstructions."""
        plot_training(self.trainer.state.log_history, self.folder / "loss.png")
        if hasattr(model, "reconstruct"):
            view = fixed_view(self.images, model.config, NUM_PICTURES)
            images = torch.stack([sample["pixel_values"] for sample in view]).to(model.device)
            plot_reconstructions(model, images, self.augment, self.folder / "reconstructions.png")

    def measure(self, model):
        """What the training took, the health of the features and, where there are labels, their k-NN accuracy."""
        trainer, run = self.trainer, self.recipe.run
        batch_size = trainer.args.per_device_eval_batch_size
        training_record(trainer, run, self.images)
        try:
            measure_health(model, self.augment, self.images, run, batch_size, self.folder)
        except ValueError as error:  # features that are not finite, too many broken images
            print(f"\nThe health of the features cannot be told: {error}")
        if self.readout is not None and run.knn:
            set_seed(trainer.args.seed)
            untrained = AutoModelForPreTraining.from_config(model.config).to(model.device).eval()
            try:
                self.readout.measure(model, untrained, self.augment, batch_size, self.folder)
            except ValueError as error:  # too many broken images, no label in a stream: the run itself is good
                print(f"\nThere is no k-NN accuracy: {error}")


def training_arguments(recipe: Recipe) -> MIMTrainingArguments:
    """The recipe's; several processes without an accelerator talk by gloo."""
    settings = dict(recipe.training)
    if int(os.environ.get("WORLD_SIZE", 1)) > 1 and not torch.accelerator.is_available():
        settings = {"use_cpu": True, "ddp_backend": "gloo"} | settings
    return MIMTrainingArguments(**settings)


def check_run_folder(folder: Path, recipe: Recipe):
    """Raise ValueError if the folder cannot be written, or holds another run than that of the recipe."""
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"output_dir must be a folder, and {folder} is a file")
    above = next(parent for parent in (folder, *folder.absolute().parents) if parent.exists())
    if not above.is_dir() or not os.access(above, os.W_OK):
        raise ValueError(f"output_dir must be a folder that can be written, and {folder} cannot be made in {above}")
    held = [name for name in ("recipe.yaml", "config.json", "trainer_state.json") if (folder / name).exists()]
    held += [path.name for path in checkpoints.checkpoints(folder)]
    if not recipe.run.resume:
        if held:
            raise ValueError(
                f"output_dir {folder} holds another run ({held[0]}); go on with it by --resume, or give another"
            )
        return
    if "recipe.yaml" not in held:
        raise ValueError(f"output_dir {folder} holds no run to resume (no recipe.yaml)")
    before = Recipe.resolve(read_yaml(folder / "recipe.yaml"))
    own, held_by = methods.get(recipe.run.method), methods.get(before.run.method)
    if own.config_class is not held_by.config_class:  # a variant is told apart by its settings, below
        raise ValueError(f"method is {recipe.run.method}, but the run in {folder} has {before.run.method}")
    old, new = before.config(), recipe.config()
    for name in model_fields(recipe.run.method):
        if getattr(old, name) != getattr(new, name):
            raise ValueError(f"{name} is {getattr(new, name)}, but the run in {folder} has {getattr(old, name)}")


def number_of_steps(args: MIMTrainingArguments, images: ImageDataset | ImageStream) -> int:
    """Optimizer steps of the run, as Trainer counts them; -1 if nothing says how many."""
    if args.max_steps > 0 or not isinstance(images, ImageDataset):
        return args.max_steps
    batches = len(images) // (args.per_device_train_batch_size * args.world_size)
    return math.ceil(args.num_train_epochs * max(1, math.ceil(batches / args.gradient_accumulation_steps)))


def training_images(images, run: RunArguments, config: PreTrainedConfig, seed: int) -> ImageDataset | ImageStream:
    """Random crops of the size that the method trains on; a stream is shuffled within its buffer."""
    try:
        crop = RandomCrop(run.crop_scale, run.crop_ratio)
    except ValueError as error:
        raise ValueError(f"crop_{error}") from None
    if isinstance(images, Dataset):
        return ImageDataset(images, config.training_size, config.num_channels, crop, seed=seed)
    images = images.shuffle(seed=seed, buffer_size=run.shuffle_buffer)
    return ImageStream(images, config.training_size, config.num_channels, crop, seed=seed)


def evaluation_images(run: RunArguments, config: PreTrainedConfig) -> ImageDataset | ImageStream:
    """Test images in the size that the method trains on, for `eval_loss`."""
    images, _ = find_test_split(run)
    if images is None:
        raise ValueError(f"eval_strategy needs test_dataset: {run.dataset} has no validation or test split")
    return fixed_view(images, config, run.knn_test_images, size=config.training_size)


def device_augment(recipe: Recipe, images: ImageDataset | ImageStream, config: PreTrainedConfig) -> DeviceAugment:
    """Augmentation and normalisation. A mean and std that were not given are measured, and noted in the recipe."""
    run = recipe.run
    if run.image_mean is None:
        mean, std = channel_statistics(images)
        run.image_mean, run.image_std = [round(x, 4) for x in mean], [round(x, 4) for x in std]
    if len(run.image_mean) != config.num_channels:
        raise ValueError(f"image_mean must have {config.num_channels} values (num_channels), not {run.image_mean}")
    return DeviceAugment(
        run.image_mean,
        run.image_std,
        run.flip_probability,
        run.grayscale_probability,
        run.blur_probability,
        run.blur_sigma,
    )
