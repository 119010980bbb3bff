"""Layers of settings: which of them count, and those that a run folder holds."""

import re
from pathlib import Path
from typing import Any

from hf_mim.pretraining.settings import read_yaml
from hf_mim.run_folder import LOCAL, RECIPE

# Name → the arguments that it overrules. Where a layer gives the name, they are dropped from the layers below.
OVERRULED_BY = {
    "size": ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size"),
    "base_lr": ("learning_rate",),
    "num_train_epochs": ("max_steps",),
    "crop_pixels": ("crop_scale", "crop_ratio"),
    "crop_scale": ("crop_pixels",),
    "crop_ratio": ("crop_pixels",),
}
END = "# end of the recipe"  # a recipe without this line is cut off


def layered(*layers: dict[str, Any]) -> dict[str, Any]:
    """One layer of settings from several. Each overrides those before it."""
    settings = {}
    for layer in layers:
        dropped = [other for name in layer for other in OVERRULED_BY.get(name, ())]
        settings = {name: value for name, value in settings.items() if name not in dropped} | layer
    return settings


def fresh_folder(run) -> str:
    """runs/<dataset>_<method>, with a number from the second run on."""
    if run.resume:
        raise ValueError("resume needs output_dir: the folder of the run to continue")
    source = re.sub(r"\W+", "_", Path(run.dataset).stem).strip("_")
    folder = Path("runs") / f"{source}_{run.method}"
    number = 1
    while (path := folder if number == 1 else folder.with_name(f"{folder.name}_{number}")).exists():
        number += 1
    return str(path)


def held_settings(folder: Path) -> list[dict[str, Any]]:
    """What the run in a folder was started with: its recipe, then the absolute paths of its data.

    Raises ValueError for a recipe that is cut off: the run would go on with defaults in place of what is lost.
    """
    found = settings_in(folder)
    if found and END not in (folder / RECIPE).read_text().splitlines():
        raise ValueError(
            f"{folder / RECIPE} is cut off, or was written by hand: its last line must be {END!r}; to begin again from "
            "it, give it as the recipe, with another output_dir"
        )
    return found


def settings_in(folder: Path) -> list[dict[str, Any]]:
    """The recipe in a folder and the paths of its data, as far as they are there."""
    return [read_yaml(folder / name) for name in (RECIPE, LOCAL) if (folder / name).is_file()]
