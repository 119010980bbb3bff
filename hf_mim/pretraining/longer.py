"""`--continue RUN`: a run that goes on from another one, before its learning rate fell, to a later end."""

import json
import math
import shlex
from pathlib import Path
from typing import Any

from hf_mim.pretraining.arguments import CONSTANT, COSINE, decay_start
from hf_mim.pretraining.checkpoints import newest_whole
from hf_mim.pretraining.layers import held_settings, layered
from hf_mim.pretraining.settings import to_type
from hf_mim.run_folder import RECIPE, TRAINER_STATE, checkpoints, step_of

# Settings of the run in the folder that the longer run does not take from it.
OWN = ("output_dir", "resume", "continue_from")


def settings_of_continued(folder: Path) -> dict[str, Any]:
    """The settings of the run in a folder, for a run that makes it longer: all but its folder. The warm-up has as many
    steps as there.

    Raises ValueError if the folder holds no run, or one whose learning rate has fallen from the start.
    """
    held = layered(*held_settings(folder))
    if not held:
        raise ValueError(f"continue must be the folder of a run, and {folder} holds none (no {RECIPE})")
    if held.get("lr_scheduler_type", COSINE) == COSINE:
        raise ValueError(
            f"continue needs a run with lr_scheduler_type warmup_stable_decay or constant, and {folder} has cosine, "
            "whose learning rate has fallen for its own length; start a new run from its weights: hf-mim pretrain "
            f"--init_from {shlex.quote(str(folder))}"
        )
    warmup, steps = to_type("warmup_steps", held.get("warmup_steps", 0), float), length_of(folder)
    held["warmup_steps"] = math.ceil(warmup * steps) if warmup < 1 else int(warmup)
    return {name: value for name, value in held.items() if name not in OWN}


def length_of(folder: Path) -> int:
    """The steps that a run was to have. Raises ValueError if it has no checkpoint."""
    for place in (folder, *checkpoints(folder)):
        if (place / TRAINER_STATE).is_file():
            return json.loads((place / TRAINER_STATE).read_text())["max_steps"]
    raise ValueError(f"continue: {folder} has no checkpoint to go on from")


def checkpoint_to_continue(folder: Path) -> Path:
    """The last whole checkpoint of a run before its decay, or the last one of a run with a constant rate.

    Raises ValueError if there is none.
    """
    held, steps = layered(*held_settings(folder)), length_of(folder)
    decay = held.get("decay_steps")
    decay = None if decay is None else to_type("decay_steps", decay, float)
    last = None if held.get("lr_scheduler_type") == CONSTANT else decay_start(decay, steps)
    found = newest_whole(folder, up_to=last)
    if found is None:
        before = "" if last is None else f" before the decay, which began at step {last}"
        raise ValueError(f"continue: {folder} has no whole checkpoint{before}; start from its weights by --init_from")
    return found


def check_longer(checkpoint: Path, steps: int):
    """Raise ValueError if a run of so many steps ends before the checkpoint that it goes on from."""
    if 0 < steps <= step_of(checkpoint):
        raise ValueError(
            f"num_train_epochs (or max_steps) must give more steps than the {step_of(checkpoint)} of {checkpoint}, "
            f"where the run begins, not {steps}"
        )
