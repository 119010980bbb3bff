"""May a run begin in its folder, or go on there? What is refused, and why."""

import dataclasses
import shlex
from pathlib import Path
from typing import Any

from hf_mim import methods
from hf_mim.data.fingerprint import absolute_source, changes
from hf_mim.files import check_writable
from hf_mim.lock import check_unlocked
from hf_mim.pretraining.arguments import MIMTrainingArguments
from hf_mim.pretraining.final_results import Tell
from hf_mim.pretraining.recipe import Recipe, RunArguments, held_settings, model_fields
from hf_mim.run_folder import RECIPE, contents

# What must stay as it is when a run is resumed, beside the model's settings and the images. All else takes effect.
FIXED = (
    "train_split",
    "missing_modality",
    "image_column",
    "streaming",
    "shuffle_buffer",
    "image_mean",
    "image_std",
    "value_range",
    "nodata",
    "seed",
    "data_seed",
    "optim",
    "optim_args",
    "encoder_layer_decay",
    "keep_best",
    "dataloader_drop_last",
    "train_sampling_strategy",
)


def check_run_folder(folder: Path, recipe: Recipe, say: Tell = print):
    """Raise ValueError if the folder cannot be written, or if it holds another run than the recipe's."""
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"output_dir must be a folder, and {folder} is a file")
    check_writable(folder, "output_dir")
    check_unlocked(folder, "output_dir", say)
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
    check_same_run(Recipe.resolve(*held_settings(folder)), recipe, folder)
    check_resumed_data(recipe, folder)


def check_same_run(before: Recipe, recipe: Recipe, folder: Path):
    """Raise ValueError if a recipe differs, in what must stay, from the recipe `before` of the run in the folder."""
    own, held_by = methods.get(recipe.run.method), methods.get(before.run.method)
    if own.config_class is not held_by.config_class:  # a variant differs only in settings, which are compared below
        raise ValueError(f"method is {recipe.run.method}, but the run in {folder} has {before.run.method}")
    old, new = before.config(), recipe.config()
    for name in model_fields(recipe.run.method):
        if getattr(old, name) != getattr(new, name):
            raise ValueError(f"{name} is {getattr(new, name)}, but the run in {folder} has {getattr(old, name)}")
    old, new = every_setting(before), every_setting(recipe)
    for name in FIXED:
        if repr(old[name]) != repr(new[name]):  # nan is not equal to nan
            raise ValueError(f"{name} is {new[name]}, but the run in {folder} has {old[name]}")


def check_resumed_data(recipe: Recipe, folder: Path):
    """`check_same_data` for a run that resumes the one in the folder, or makes another one longer."""
    folder = folder if recipe.run.resume else recipe.run.continue_from and Path(recipe.run.continue_from)
    if folder:
        check_same_data(Recipe.resolve(*held_settings(folder)).run, recipe.run, folder)


def every_setting(recipe: Recipe) -> dict[str, Any]:
    """Name → value of the settings of run and training, with the defaults of those that are not given."""
    defaults = {f.name: f.default for f in dataclasses.fields(MIMTrainingArguments)}
    return defaults | vars(recipe.run) | recipe.training


def check_same_data(before: RunArguments, now: RunArguments, folder: Path):
    """Raise ValueError if a resume would go on with other images than those that the run in the folder has begun with.

    Files that were only moved count as the same. Data on the Hub are compared by name and, if both are known, by their
    commit. The test images must be the same too.
    """
    for name in ("dataset", "test_dataset"):
        given, began = getattr(now, name), getattr(before, name)
        one, other = (getattr(run, f"{name}_fingerprint") for run in (before, now))
        difference = ""
        if one and other:
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
