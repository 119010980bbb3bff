"""What a run says of itself: what it is about to do, how long that takes, and why it may not work."""

import math
import os
import shlex
import sys
import time
from pathlib import Path

import pyarrow.compute
import torch
from datasets import Dataset
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedConfig, TrainerCallback

from hf_mim import methods
from hf_mim.data.dicom import split_frame
from hf_mim.data.labelled import LabelledImages
from hf_mim.evaluation.result import Result
from hf_mim.models.configuration_vit import SIZES, pair
from hf_mim.models.pixels import ValueRange
from hf_mim.pretraining.arguments import CONSTANT, STABLE, MIMTrainingArguments
from hf_mim.pretraining.longer import checkpoint_to_continue
from hf_mim.pretraining.progress import duration, short
from hf_mim.pretraining.recipe import Recipe
from hf_mim.pretraining.waiting import sampled_sizes
from hf_mim.run_folder import RECIPE

LETTERS = {"tiny": "Ti", "small": "S", "base": "B", "large": "L", "huge": "H", "giant": "g"}
COLOURS = {1: "grey", 3: "RGB"}
SLOW_STEP = 20.0  # seconds of a step on a CPU from which on a hint is given
MEASURED = 3.0  # seconds of steps that an estimate needs
SPREAD = 0.02  # about the standard deviation of a transformer's fresh weights


def plan(recipe: Recipe, images, trainer, steps: int, value_range: ValueRange | None, done: int) -> str:
    """What a run is about to do after so many steps that are `done`, in one line: images, model, method, machine,
    steps, folder."""
    args, config = trainer.args, trainer.model.config
    device = args.device.type
    if device == "cuda":
        device = torch.cuda.get_device_name(args.device)
    machine = [device, counted(args.world_size, "process", "processes"), counted(args.dataloader_num_workers, "worker")]
    epochs = f" ({steps * args.images_per_step / len(images):.1f} epochs)" if isinstance(images, Dataset) else ""
    work = f"{counted(steps, 'step')} of {args.images_per_step:,}{epochs}, peak lr {short(args.learning_rate)}"
    work += f", from step {done + 1:,} on" if done else ""
    parts = images_in_words(images, config.num_channels, value_range), model_in_words(trainer.model)
    return " · ".join([*parts, methods.get(recipe.run.method).title, ", ".join(machine), work, args.output_dir])


def counted(number: int, one: str, many: str | None = None) -> str:
    return f"{number:,} {one if number == 1 else many or f'{one}s'}"


def images_in_words(images, num_channels: int, value_range: ValueRange | None) -> str:
    """How many images there are, in how many folders, their sizes in a sample, and as what they are read."""
    count = counted(len(images), "image") if isinstance(images, Dataset) else "a stream of images"
    if (folders := count_folders(images)) > 1:
        count += f" in {folders:,} folders"
    kind = COLOURS.get(num_channels, f"{num_channels} bands")
    if value_range is not None and value_range.pixel_type not in (None, "uint8"):
        kind += f" of {value_range.pixel_type}"
    sizes = sampled_sizes(images, num_channels) if isinstance(images, Dataset) else []
    if not sizes:
        return f"{count}, read as {kind}"
    comma = "," * kind[0].isdigit()
    ends = [(fit(side[0] for side in sizes), fit(side[1] for side in sizes)) for fit in (min, max)]
    return f"{count}, {' to '.join(dict.fromkeys(f'{width}×{height}' for width, height in ends))}{comma} {kind}"


def count_folders(images) -> int:
    """The folders that image files lie in; 0 if the images are no files of their own."""
    if not isinstance(images, Dataset) or not len(images):
        return 0
    first = images[0]["image"]
    if not isinstance(first, dict) or first.get("bytes") is not None or not first.get("path"):
        return 0
    column = images.select_columns("image").with_format("arrow")[:]["image"]
    paths = filter(None, pyarrow.compute.struct_field(column, "path").to_pylist())
    return len({os.path.dirname(split_frame(path)[0]) for path in paths})


def model_in_words(model) -> str:
    """Such as `ViT-Ti/16 at 64 px, 5.4 M`: the encoder that the checkpoint gives, with its parameters."""
    config: PreTrainedConfig = model.config
    width, depth = config.hidden_size, config.num_hidden_layers
    size = next((LETTERS[name] for name, size in SIZES.items() if size[:2] == (width, depth)), None)
    name = f"ViT-{size}" if size else f"ViT of {counted(depth, 'block')}, width {width},"
    patch, side = (times(getattr(config, name)) for name in ("patch_size", "image_size"))
    return f"{name}{'/' if size else ' patch '}{patch} at {side} px, {millions(model.base_model.num_parameters())}"


def times(size) -> str:
    """`16` for a square, or `16×8`."""
    height, width = pair(size)
    return str(height) if height == width else f"{height}×{width}"


def millions(count: int) -> str:
    for unit, size in (("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if count >= size:
            return f"{count / size:.1f} {unit}" if count < 10 * size else f"{count / size:.0f} {unit}"
    return str(count)


def rate_hint(args: MIMTrainingArguments, steps: int) -> str | None:
    """What to say if the rates of all steps add up to less than fresh weights differ.

    AdamW moves a weight by about the rate in a step, whatever the loss.
    """
    if "adam" not in getattr(args.optim, "value", args.optim) or not 0 < steps:
        return None
    total = 0.0
    for step in range(steps):
        if (total := total + args.learning_rate_at(step, steps)) >= SPREAD:
            return None
    return (
        f"hint: the rates of {counted(steps, 'step')} add up to {short(total)}, and fresh weights differ by about "
        f"{SPREAD}: the model will hardly change; train longer (--num_train_epochs) or at a higher rate (--base_lr)"
    )


def features_hint(result: Result, test: LabelledImages) -> str | None:
    """What to say if the accuracy is not above that of the untrained encoder, or of always naming one class, by two
    standard errors."""
    labels: Tensor = test.read_labels()
    chance = labels.unique(return_counts=True)[1].max().item() / len(labels)
    found = []
    for other, name in ((result.scores["untrained"], "the untrained encoder"), (chance, "always naming one class")):
        error = math.sqrt((result.value * (1 - result.value) + other * (1 - other)) / len(labels))
        if result.value <= other + 2 * error:
            found.append(f"{name} ({100 * other:.1f} %)")
    if not found:
        return None
    return (
        f"hint: on {counted(len(labels), 'image')}, {100 * result.value:.1f} % is not clearly better than "
        f"{' and '.join(found)}; more steps, a higher --base_lr or more images may help, and loss.png shows whether "
        "the loss still fell"
    )


def finished(folder: Path, recipe: Recipe, args: MIMTrainingArguments, steps: int) -> str:
    """That the run in the folder has made all its steps, and the command that goes on from there."""
    longer = f"--max_steps {2 * steps}" if args.max_steps > 0 else f"--num_train_epochs {2 * args.num_train_epochs:g}"
    command = f"--continue {shlex.quote(str(folder))} {longer}"
    try:
        if args.lr_scheduler_type not in (STABLE, CONSTANT):
            raise ValueError("its rate has fallen")
        checkpoint_to_continue(folder)
        how = "to make it longer"
    except ValueError:
        how = "to start a new run from its weights"
        command = f"--init_from {shlex.quote(str(folder))} --output_dir {shlex.quote(f'{folder}_more')}"
        if recipe.run.init_from or recipe.run.continue_from:  # its recipe names other weights
            dataset = shlex.quote(str(recipe.run.dataset))
            command = f"--method {recipe.run.method} --dataset {dataset} {command} {longer}"
        else:
            command = f"{shlex.quote(str(folder / RECIPE))} {command}"
    return (
        f"the run in {folder} has made all its {steps:,} steps: only its pictures, measurements and card are made "
        f"again; {how}:\nhf-mim pretrain {command}"
    )


class FirstSteps(TrainerCallback):
    """Says once how long the training will take, measured on its first steps, and gives a hint if a CPU is too slow.

    The first step is left out, because workers start in it and kernels are chosen, unless it was a slow one on a CPU.
    On an accelerator the time is read where a log has waited for the device.
    """

    def on_train_begin(self, args, state, control, **kwargs):
        self.said = not state.is_world_process_zero
        self.begun = self.start = None

    def on_step_begin(self, args, state, control, **kwargs):
        # Not when the training begins, because a probe may still measure then.
        self.begun = self.begun or (time.perf_counter(), state.global_step)

    def on_step_end(self, args, state, control, **kwargs):
        if args.device.type == "cpu":
            self._look(args, state)

    def on_log(self, args, state, control, logs=None, **kwargs):
        if args.device.type != "cpu" and "loss" in logs:
            self._look(args, state)

    def _look(self, args, state):
        now, step = time.perf_counter(), state.global_step
        since, first = self.start or self.begun
        is_slow_step = self.start is None and args.device.type == "cpu" and not args.torch_compile
        enough = SLOW_STEP if is_slow_step else MEASURED
        if self.start is None and not (is_slow_step and now - since >= enough):
            self.start = now, step
            return
        if self.said or now - since < enough or step == first:
            return
        self.said, each = True, (now - since) / (step - first)
        which = f"step {step}" if step == first + 1 else f"steps {first + 1} to {step}"
        left = each * (state.max_steps - step)
        lines = [f"about {duration(left)} to go: {each:.{0 if each >= 10 else 1}f} s a step, measured on {which}"]
        if args.device.type == "cpu" and each >= SLOW_STEP:
            lines.append(
                f"hint: at {each:.0f} s a step on this CPU, 1,000 steps take {duration(1000 * each)}: take a smaller "
                "--size (tiny), a smaller --image_size, or a GPU"
            )
        for line in lines:
            tqdm.write(line, file=sys.stdout)
