"""One pretraining run, from a `Recipe` to a run folder, as `hf-mim pretrain` does it.

    run = Pretraining(recipe)  # checks everything, loads the data, builds the model; writes nothing
    run()                      # trains, saves, draws, measures

`hf_mim/run_folder.py` lists what is in the run folder afterwards. With `--push_to_hub` it is uploaded to the Hub.
"""

import contextlib
import functools
import math
import os
import shutil
import signal
from pathlib import Path

import torch
from accelerate import PartialState
from accelerate.utils import set_seed
from transformers import AutoModelForPreTraining, PreTrainedConfig

from hf_mim.checks import check_bands
from hf_mim.data import ImageDataset, ImageStream
from hf_mim.data.decode import MAX_PIXELS_VARIABLE
from hf_mim.data.fingerprint import fingerprint
from hf_mim.data.processor import image_processor
from hf_mim.data.sources import fixed_sample
from hf_mim.evaluation.result import git_state
from hf_mim.lock import locked
from hf_mim.models.pixels import EIGHT_BITS, ValueRange
from hf_mim.pretraining.final_results import (
    Readout,
    central_crop,
    check_best,
    health_crops,
    health_record,
    load_split,
)
from hf_mim.pretraining.image_cache import cached_images
from hf_mim.pretraining.images import (
    check_sample,
    check_windows,
    counted_parts,
    device_augment,
    evaluation_images,
    measured_crops,
)
from hf_mim.pretraining.layers import held_settings
from hf_mim.pretraining.longer import check_longer, checkpoint_to_continue
from hf_mim.pretraining.pictures import RunPictures
from hf_mim.pretraining.probe import OnlineProbe
from hf_mim.pretraining.rates import check_schedule
from hf_mim.pretraining.recipe import Recipe, RunArguments
from hf_mim.pretraining.record import training_record
from hf_mim.pretraining.resume import check_resumed_data, check_run_folder, check_same_run
from hf_mim.pretraining.signals import Ended, ended_at_once
from hf_mim.pretraining.start import start_from
from hf_mim.pretraining.telling import FirstSteps, finished, plan, rate_hint
from hf_mim.pretraining.trainer import MIMTrainer, MIMTrainingArguments, check_shared_memory
from hf_mim.pretraining.waiting import WaitingAdvice, advice
from hf_mim.run_folder import CARD, METRICS, checkpoints, step_of


class Pretraining:
    """A run that is ready to start. Raises ValueError, before anything is written, if the recipe cannot work."""

    def __init__(self, recipe: Recipe):
        git_state()  # now, because a checkout may change before the run ends
        self.recipe, run = recipe, recipe.run
        config = recipe.config()
        check_bands(run.bands, config.num_channels)
        run.image_column = counted_parts(run, config)
        args = training_arguments(recipe)
        config.check_batch(args.per_device_train_batch_size * args.world_size)
        self.folder = Path(args.output_dir)
        run.dataset_fingerprint = fingerprint(run.dataset)
        run.test_dataset_fingerprint = run.test_dataset and fingerprint(run.test_dataset)
        check_run_folder(self.folder, recipe, print if args.process_index == 0 else lambda line: None)
        if run.max_image_pixels:
            os.environ[MAX_PIXELS_VARIABLE] = str(run.max_image_pixels)
        # One line for each source, although the test images may be loaded twice.
        tell = functools.cache(print if args.process_index == 0 else lambda line: None)
        with args.main_process_first(desc="loading the images"):
            self.images, account = load_split(run, "dataset", run.train_split, tell)
            train_images, value_range, found, self.nodata = measured_crops(recipe, self.images, config, args)
            windows = None if run.crop_pixels is None else check_windows(self.images, train_images)
            self.augment = device_augment(recipe, train_images.in_range(value_range), config)
            check_sample(train_images)
            train_images = train_images.in_range(value_range or EIGHT_BITS, own_depth=True)
            if run.cache_images:
                train_images = cached_images(train_images, run.cache_images, tell)
            self.readout = Readout.find(self.images, account, run, tell) if run.knn or run.probe_every else None
            eval_images = None if args.eval_strategy == "no" else evaluation_images(run, config, value_range, tell)
        check_resumed_data(recipe, self.folder)  # again, because only now are the commits of data on the Hub known
        if args.process_index == 0:
            for line in filter(None, (found, windows)):
                print(line)
        # A run that was ended before its first checkpoint begins again.
        resumes = bool(run.resume and checkpoints(self.folder))
        self.begins_at = None if resumes else self._continued()
        check_best(run, args, self.readout)
        steps = self._checked_steps(args, train_images)
        if isinstance(train_images, ImageStream):  # for other images the trainer checks it
            check_shared_memory(args, config.num_channels * math.prod(config.training_size))
        if "logging_steps" not in recipe.training:
            args.logging_steps = min(args.logging_steps, max(1, steps // 20))  # a short run needs a curve too
        set_seed(args.seed)
        model = AutoModelForPreTraining.from_config(config)
        is_new = not resumes and self.begins_at is None
        self.starts_from_weights = run.init_from is not None and is_new
        if is_new:
            start_from(run, model, tell)
        self.trainer = MIMTrainer(
            model,
            args,
            train_dataset=train_images,
            eval_dataset=eval_images,
            augment=self.augment,
            processing_class=evaluation_processor(run, config, value_range),
        )
        self._look_while_it_trains(config)
        # Last, because it reads whole checkpoints.
        self.checkpoint = self.trainer.checkpoint_to_resume(str(self.begins_at) if self.begins_at else resumes)
        self.plan = self._plan(steps, value_range) if args.process_index == 0 else []

    def _checked_steps(self, args: MIMTrainingArguments, train_images) -> int:
        """The number of steps. Raises ValueError if the schedule does not fit it."""
        steps = number_of_steps(args, train_images)
        if self.begins_at:
            check_longer(self.begins_at, steps)
        if steps > 0:
            check_schedule(args, steps)  # Trainer would find out only after it has begun
        return steps

    def _plan(self, steps: int, value_range: ValueRange | None) -> list[str]:
        """The lines that say what the run is about to do, and why it may not work."""
        recipe, trainer, done = self.recipe, self.trainer, step_of(self.checkpoint) if self.checkpoint else 0
        if self.begins_at is None and 0 < steps <= done:
            return [finished(self.folder, recipe, trainer.args, steps)]
        lines = [plan(recipe, self.images, trainer, steps, value_range, done)]
        if not done and recipe.run.init_from is None:
            lines += filter(None, [rate_hint(trainer.args, steps)])
        return lines

    def _continued(self) -> Path | None:
        """The checkpoint of another run that this one makes longer."""
        if not self.recipe.run.continue_from:
            return None
        checkpoint = checkpoint_to_continue(other := Path(self.recipe.run.continue_from))
        check_same_run(Recipe.resolve(*held_settings(other)), self.recipe, other)
        return checkpoint

    def _look_while_it_trains(self, config: PreTrainedConfig):
        """Give the trainer the callbacks that advise, measure the features and draw pictures."""
        run = self.recipe.run
        about = self.images, run, self.trainer.args, config.training_size, config.num_channels
        self.trainer.add_callback(FirstSteps())
        self.trainer.add_callback(WaitingAdvice(functools.partial(advice, *about)))
        if run.probe_every:
            samples = self.readout.sample(run.probe_images, run.probe_images // 4) if self.readout else None
            samples = samples or (None, fixed_sample(self.images, run.probe_images // 4))
            self.trainer.add_callback(OnlineProbe(self.trainer, run.probe_every, *samples, run.keep_best))
        self.pictures = RunPictures(self.trainer, self.images, run)
        self.trainer.add_callback(self.pictures)

    def __call__(self) -> signal.Signals | None:
        """Train, fill the run folder and print the results. Returns the signal that ended the run, if one did.

        Raises LockedError if another process writes into the run folder.
        """
        trainer, run, main = self.trainer, self.recipe.run, self.trainer.is_world_process_zero()
        PartialState().wait_for_everyone()  # until every rank has looked into the folder
        with contextlib.ExitStack() as stack:
            if main:
                self.folder.mkdir(parents=True, exist_ok=True)
                stack.enter_context(locked(self.folder, "output_dir", print))
                print(*self.plan, sep="\n", flush=True)
            try:
                with ended_at_once():
                    if main:
                        self.recipe.save(self.folder)
                        if self.begins_at and (log := self.begins_at.parent / METRICS).is_file():
                            shutil.copy(log, self.folder / METRICS)  # the trainer drops what came after the checkpoint
                        if self.starts_from_weights:
                            self.measure_start()
                    trainer.train(resume_from_checkpoint=self.checkpoint)
                    if trainer.guard.signal:
                        return trainer.guard.signal
                    if run.export_best and not trainer.load_best() and main:
                        print("\nNo best checkpoint was kept: the model of the run folder is the last one.")
                    trainer.save_model(_internal_call=True)  # not pushed yet: the card is still to come
                    trainer.save_state()
                    if main:
                        self.finish()
                    if trainer.args.push_to_hub:
                        trainer.push_to_hub()
            except Ended as error:
                return error.signal
        return None

    def finish(self):
        """Put pictures, measurements and the card into the run folder. Only the main process calls it."""
        model = self.trainer.accelerator.unwrap_model(self.trainer.model)
        if self.trainer.is_fsdp_enabled:  # one process has only a part of a sharded model
            model = AutoModelForPreTraining.from_pretrained(self.folder).to(self.trainer.args.device)
        self.pictures.draw(model.eval())
        self.measure(model.eval())
        self.trainer.create_model_card()
        print(
            f"\nThe checkpoint is in {self.folder}, its card in {CARD}. Three lines of Python load its encoder:\n\n"
            "    import hf_mim\n"
            "    from transformers import AutoModel\n"
            f'    model = AutoModel.from_pretrained("{self.folder}")'
        )

    def measure_start(self):
        """Measure the weights that the run starts from, before the first step."""
        model, run, batch_size = self.trainer.model, self.recipe.run, self.trainer.args.per_device_eval_batch_size
        training = model.training
        with self.warned("The weights to start from were not measured"):
            health_record(model.eval(), self.augment, self.images, run, batch_size, self.folder, is_start=True)
            if self.readout is not None and run.knn:
                self.readout.measure_start(model, self.augment, batch_size, self.folder)
        model.train(training)

    def measure(self, model):
        """Measure what the training took, the health of the features and, if there are labels, their k-NN accuracy."""
        trainer, run = self.trainer, self.recipe.run
        batch_size = trainer.args.per_device_eval_batch_size
        record = training_record(trainer, run, self.images, self.nodata)
        waited = f"The training waited {record.scores['data_wait_share']:.1%} of its time for images."
        print(f"\n{waited} Now its features are measured.", flush=True)
        kept = health_crops()
        with self.warned("The health of the features was not measured"):  # they are not finite, or images are broken
            health_record(model, self.augment, self.images, run, batch_size, self.folder, kept=kept)
        kept.keep_no_more()  # the k-NN test reads many more images, each once
        if self.readout is not None and run.knn:
            set_seed(trainer.args.seed)
            untrained = AutoModelForPreTraining.from_config(model.config).to(model.device).eval()
            with self.warned("The k-NN accuracy was not measured"):  # too many broken images, no label in a stream
                self.readout.measure(model, untrained, self.augment, batch_size, self.folder, kept)

    @contextlib.contextmanager
    def warned(self, what: str):
        """Inside, a ValueError of a measurement becomes a line, because the run itself is good."""
        try:
            yield
        except ValueError as error:
            print(f"\n{what}: {error}")


def evaluation_processor(run: RunArguments, config: PreTrainedConfig, value_range: ValueRange | None):
    """The image processor that is saved with each checkpoint, so that each can be evaluated."""
    part = central_crop(run, config)
    about = config.image_height_width, run.image_mean, run.image_std, value_range
    return image_processor(*about, crop_fraction=part.fraction, crop_pixels=getattr(part, "pixels", None))


def training_arguments(recipe: Recipe) -> MIMTrainingArguments:
    """The recipe's training arguments. Several processes without an accelerator use the gloo backend."""
    settings = dict(recipe.training)
    if int(os.environ.get("WORLD_SIZE", 1)) > 1 and not torch.accelerator.is_available():
        settings = {"use_cpu": True, "ddp_backend": "gloo"} | settings
    return MIMTrainingArguments(**settings)


def number_of_steps(args: MIMTrainingArguments, images: ImageDataset | ImageStream) -> int:
    """Optimizer steps of the run, as Trainer counts them; -1 for a stream without `max_steps`."""
    if args.max_steps > 0 or not isinstance(images, ImageDataset):
        return args.max_steps
    batches = len(images) // (args.per_device_train_batch_size * args.world_size)
    return math.ceil(args.num_train_epochs * max(1, math.ceil(batches / args.gradient_accumulation_steps)))
