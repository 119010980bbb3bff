"""One pretraining run, from a `Recipe` to a run folder, as `hf-mim pretrain` and `training/pretrain.py` do it.

    run = Pretraining(recipe)  # checks everything, loads the data, builds the model; writes nothing
    run()                      # trains, saves, draws, measures

`hf_mim/run_folder.py` lists what is in the run folder afterwards. With `--push_to_hub` it is uploaded to the Hub.
"""

import functools
import math
import os
import shlex
import signal
from pathlib import Path

import torch
from accelerate import PartialState
from accelerate.utils import set_seed
from datasets import Dataset
from transformers import AutoModelForPreTraining, PreTrainedConfig

from hf_mim import methods
from hf_mim.data import DeviceAugment, ImageDataset, ImageStream, RandomCrop, channel_statistics
from hf_mim.data.decode import MAX_PIXELS_VARIABLE
from hf_mim.data.fingerprint import absolute_source, changes, fingerprint
from hf_mim.data.processor import image_processor
from hf_mim.data.sources import fixed_sample
from hf_mim.data.value_range import find_value_range
from hf_mim.files import check_writable
from hf_mim.models.pixels import EIGHT_BITS, ValueRange
from hf_mim.pretraining.final_results import (
    Readout,
    Tell,
    find_test_split,
    fixed_view,
    health_record,
    load_split,
    training_record,
)
from hf_mim.pretraining.probe import OnlineProbe
from hf_mim.pretraining.recipe import Recipe, RunArguments, held_settings, model_fields
from hf_mim.pretraining.trainer import MIMTrainer, MIMTrainingArguments, check_warmup
from hf_mim.run_folder import CARD, CURVE, RECIPE, RECONSTRUCTIONS, checkpoints, contents
from hf_mim.visualize import plot_reconstructions, plot_training

NUM_PICTURES = 8


class Pretraining:
    """A run that is ready to start. Raises ValueError, before anything is written, if the recipe cannot work."""

    def __init__(self, recipe: Recipe):
        self.recipe, run = recipe, recipe.run
        config = recipe.config()
        args = training_arguments(recipe)
        self.folder = Path(args.output_dir)
        run.dataset_fingerprint = fingerprint(run.dataset)
        run.test_dataset_fingerprint = run.test_dataset and fingerprint(run.test_dataset)
        check_run_folder(self.folder, recipe)
        if run.max_image_pixels:
            os.environ[MAX_PIXELS_VARIABLE] = str(run.max_image_pixels)
        # One line for each source, although the test images may be loaded twice.
        tell = functools.cache(print if args.process_index == 0 else lambda line: None)
        with args.main_process_first(desc="loading the images"):
            self.images, account = load_split(run, "dataset", run.train_split, tell)
            train_images = random_crops(self.images, run, config, args.seed)
            value_range, found = find_value_range(train_images, run.value_range, config.num_channels)
            if value_range is not None:
                run.value_range = value_range.as_list()
            self.augment = device_augment(recipe, train_images.in_range(value_range), config)
            train_images = train_images.in_range(value_range or EIGHT_BITS, own_depth=True)
            self.readout = Readout.find(self.images, account, run, tell) if run.knn or run.probe_every else None
            eval_images = None if args.eval_strategy == "no" else evaluation_images(run, config, value_range, tell)
        check_resumed_data(recipe, self.folder)  # again, because only now are the commits of data on the Hub known
        if found and args.process_index == 0:
            print(found)
        steps = number_of_steps(args, train_images)
        if steps > 0:
            check_warmup(args, steps)  # Trainer would find out only after it has begun
        if "logging_steps" not in recipe.training:
            args.logging_steps = min(args.logging_steps, max(1, steps // 20))  # a short run needs a curve too
        set_seed(args.seed)
        model = AutoModelForPreTraining.from_config(config)
        self.trainer = MIMTrainer(
            model,
            args,
            train_dataset=train_images,
            eval_dataset=eval_images,
            augment=self.augment,
            # It is saved with each checkpoint, so that each can be evaluated.
            processing_class=image_processor(
                config.image_height_width, run.image_mean, run.image_std, value_range, crop_fraction=1.0
            ),
        )
        if run.probe_every:
            samples = self.readout.sample(run.probe_images, run.probe_images // 4) if self.readout else None
            samples = samples or (None, fixed_sample(self.images, run.probe_images // 4))
            self.trainer.add_callback(OnlineProbe(self.trainer, run.probe_every, *samples))
        # Last, because it reads whole checkpoints. A run that was ended before its first checkpoint begins again.
        resumes = bool(run.resume and checkpoints(self.folder))
        self.checkpoint = self.trainer.checkpoint_to_resume(resumes)

    def __call__(self) -> signal.Signals | None:
        """Train, fill the run folder and print the results. Returns the signal that ended the training, if one did."""
        trainer, main = self.trainer, self.trainer.is_world_process_zero()
        PartialState().wait_for_everyone()  # until every rank has looked into the folder
        if main:
            self.folder.mkdir(parents=True, exist_ok=True)
            self.recipe.save(self.folder)
        trainer.train(resume_from_checkpoint=self.checkpoint)
        if trainer.guard.signal:
            return trainer.guard.signal
        trainer.save_model(_internal_call=True)  # not pushed yet: the card is still to come
        trainer.save_state()
        if main:
            self.finish()
        if trainer.args.push_to_hub:
            trainer.push_to_hub()
        return None

    def finish(self):
        """Put pictures, measurements and the card into the run folder. Only the main process calls it."""
        model = self.trainer.accelerator.unwrap_model(self.trainer.model)
        if self.trainer.is_fsdp_enabled:  # one process has only a part of a sharded model
            model = AutoModelForPreTraining.from_pretrained(self.folder).to(self.trainer.args.device)
        self.draw(model.eval())
        self.measure(model.eval())
        self.trainer.create_model_card()
        print(
            f"\nThe checkpoint is in {self.folder}, its card in {CARD}. Three lines of Python load its encoder:\n\n"
            "    import hf_mim\n"
            "    from transformers import AutoModel\n"
            f'    model = AutoModel.from_pretrained("{self.folder}")'
        )

    def draw(self, model):
        """Draw the training curve and, if the model predicts pixels, reconstructions."""
        plot_training(self.trainer.state.log_history, self.folder / CURVE)
        if hasattr(model, "reconstruct"):
            view = fixed_view(self.images, model.config, NUM_PICTURES, self.augment.value_range)
            images = torch.stack([sample["pixel_values"] for sample in view]).to(model.device)
            plot_reconstructions(model, images, self.augment, self.folder / RECONSTRUCTIONS)

    def measure(self, model):
        """Measure what the training took, the health of the features and, if there are labels, their k-NN accuracy."""
        trainer, run = self.trainer, self.recipe.run
        batch_size = trainer.args.per_device_eval_batch_size
        training_record(trainer, run, self.images)
        try:
            health_record(model, self.augment, self.images, run, batch_size, self.folder)
        except ValueError as error:  # the features are not finite, or too many images are broken
            print(f"\nThe health of the features was not measured: {error}")
        if self.readout is not None and run.knn:
            set_seed(trainer.args.seed)
            untrained = AutoModelForPreTraining.from_config(model.config).to(model.device).eval()
            try:
                self.readout.measure(model, untrained, self.augment, batch_size, self.folder)
            except ValueError as error:  # too many broken images, no label in a stream; the run itself is good
                print(f"\nThe k-NN accuracy was not measured: {error}")


def training_arguments(recipe: Recipe) -> MIMTrainingArguments:
    """The recipe's training arguments. Several processes without an accelerator use the gloo backend."""
    settings = dict(recipe.training)
    if int(os.environ.get("WORLD_SIZE", 1)) > 1 and not torch.accelerator.is_available():
        settings = {"use_cpu": True, "ddp_backend": "gloo"} | settings
    return MIMTrainingArguments(**settings)


def check_run_folder(folder: Path, recipe: Recipe):
    """Raise ValueError if the folder cannot be written, or if it holds another run than the recipe's."""
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"output_dir must be a folder, and {folder} is a file")
    check_writable(folder, "output_dir")
    held = contents(folder)
    if not recipe.run.resume:
        if held:
            raise ValueError(
                f"output_dir {folder} holds another run ({held[0]}); give another, "
                f"or resume it with: {resume_command(folder)}"
            )
        return
    if RECIPE not in held:
        raise ValueError(f"output_dir {folder} holds no run to resume (no {RECIPE})")
    before = Recipe.resolve(*held_settings(folder))
    own, held_by = methods.get(recipe.run.method), methods.get(before.run.method)
    if own.config_class is not held_by.config_class:  # a variant differs only in settings, which are compared below
        raise ValueError(f"method is {recipe.run.method}, but the run in {folder} has {before.run.method}")
    old, new = before.config(), recipe.config()
    for name in model_fields(recipe.run.method):
        if getattr(old, name) != getattr(new, name):
            raise ValueError(f"{name} is {getattr(new, name)}, but the run in {folder} has {getattr(old, name)}")
    check_resumed_data(recipe, folder)


def check_resumed_data(recipe: Recipe, folder: Path):
    """`check_same_data` for a run that resumes the one in the folder."""
    if recipe.run.resume:
        check_same_data(Recipe.resolve(*held_settings(folder)).run, recipe.run, folder)


def check_same_data(before: RunArguments, now: RunArguments, folder: Path):
    """Raise ValueError if a resume would go on with other images than those that the run in the folder has begun with.

    Files that were only moved count as the same. Data on the Hub are compared by name and, if both are known, by their
    commit. The test images must be the same too.
    """
    for name in ("dataset", "test_dataset"):
        given, began = getattr(now, name), getattr(before, name)
        one, other = (getattr(run, f"{name}_fingerprint") for run in (before, now))
        difference = ""
        if name == "dataset" and before.train_split != now.train_split:
            difference = f"train_split is {now.train_split}, and was {before.train_split}"
        elif one and other:
            difference = changes(one, other)
        elif absolute_source(began) != absolute_source(given):
            difference = f"it is {given}, and was {began}"
        if difference and not now.accept_changed_data:
            raise ValueError(
                f"{name} {given} is not what the run in {folder} began with: {difference}; give the images of then, "
                "or go on with --accept_changed_data true"
            )


def resume_command(folder: Path) -> str:
    """The shell command that continues the run in a folder."""
    return f"hf-mim pretrain --resume --output_dir {shlex.quote(str(folder))}"


def number_of_steps(args: MIMTrainingArguments, images: ImageDataset | ImageStream) -> int:
    """Optimizer steps of the run, as Trainer counts them; -1 for a stream without `max_steps`."""
    if args.max_steps > 0 or not isinstance(images, ImageDataset):
        return args.max_steps
    batches = len(images) // (args.per_device_train_batch_size * args.world_size)
    return math.ceil(args.num_train_epochs * max(1, math.ceil(batches / args.gradient_accumulation_steps)))


def random_crops(images, run: RunArguments, config: PreTrainedConfig, seed: int) -> ImageDataset | ImageStream:
    """Random crops in the size that the method trains on, in their own depth. A stream is shuffled within a buffer."""
    try:
        crop = RandomCrop(run.crop_scale, run.crop_ratio)
    except ValueError as error:
        raise ValueError(f"crop_{error}") from None
    if isinstance(images, Dataset):
        return ImageDataset(images, config.training_size, config.num_channels, crop, seed=seed, own_depth=True)
    images = images.shuffle(seed=seed, buffer_size=run.shuffle_buffer)
    return ImageStream(images, config.training_size, config.num_channels, crop, seed=seed, own_depth=True)


def evaluation_images(
    run: RunArguments, config: PreTrainedConfig, value_range: ValueRange | None, tell: Tell = None
) -> ImageDataset | ImageStream:
    """Test images in the size that the method trains on, for `eval_loss`."""
    images, _, _ = find_test_split(run, tell=tell)
    if images is None:
        raise ValueError(f"eval_strategy needs test_dataset: {run.dataset} has no validation or test split")
    return fixed_view(images, config, run.knn_test_images, value_range, size=config.training_size)


def device_augment(recipe: Recipe, images: ImageDataset | ImageStream, config: PreTrainedConfig) -> DeviceAugment:
    """Augmentation and normalisation. If mean and std are not given, they are measured and put into the recipe."""
    run = recipe.run
    if run.image_mean is None:
        run.image_mean, run.image_std = ([round(x, 4) for x in values] for values in channel_statistics(images))
    if len(run.image_mean) != config.num_channels:
        raise ValueError(f"image_mean must have {config.num_channels} values (num_channels), not {run.image_mean}")
    return DeviceAugment(
        run.image_mean,
        run.image_std,
        run.flip_probability,
        run.grayscale_probability,
        run.blur_probability,
        run.blur_sigma,
        images.value_range,
    )
