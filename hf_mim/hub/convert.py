"""Turns checkpoints of others into ours: `convert` gives the model, `Conversion` also writes the folder.

`reading.py` reads files, `recognise.py` finds out what they are, `sizes.py` their sizes; `key_tables.py` has the names.
"""

import dataclasses
import difflib
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypedDict

import torch
from huggingface_hub.dataclasses import validate_typed_dict
from transformers import PreTrainedConfig, PreTrainedModel

from hf_mim import methods
from hf_mim.checks import check_statistics
from hf_mim.data import IMAGENET_MEAN, IMAGENET_STD
from hf_mim.data.processor import image_processor, read_processor
from hf_mim.files import listed, new_folder
from hf_mim.hub.key_tables import to_ours, to_theirs
from hf_mim.hub.prefixes import grouped
from hf_mim.hub.reading import Checkpoint, read_checkpoint
from hf_mim.hub.recognise import Layout, recognise
from hf_mim.hub.sizes import infer
from hf_mim.scrub import scrubbed_all

NORMALISATION = {"image_mean": list[float | int], "image_std": list[float | int]}


def setting_types(method: str) -> dict[str, Any]:
    """Name → type of the settings of a method: its config's own fields, and the normalisation of the pixels."""
    inherited = {field.name for field in dataclasses.fields(PreTrainedConfig)} | {"size"}
    fields = dataclasses.fields(methods.get(method).config_class)
    own = {field.name: field.type for field in fields if field.name not in inherited and field.name[0] != "_"}
    return own | NORMALISATION


def convert(source: str | Path, method: str | None = None, prefix: str | None = None, **settings) -> PreTrainedModel:
    """Load a checkpoint of others as one of our models, in evaluation mode, in float32.

    Args:
        source: a file (.pth, .pth.tar, .bin, .safetensors, …), a folder with one checkpoint, or a name on the Hub. It
            may come from the authors of MAE, I-JEPA, StoP and Latent MIM, from transformers' ViTMAE, ViT, I-JEPA and
            DINOv2 (with registers too, but not its giant, which has SwiGLU), or from timm's ViT.
        method: "mae", "latent_mim", "ijepa" or "stop_jepa"; by default the keys decide (`hf_mim.hub.recognise`).
        prefix: which network, if the file holds several that are equally whole, such as "teacher.".
        settings: config fields that override what the file tells and the papers say (`hf_mim.hub.sizes`).

    Returns:
        `…ForPreTraining` if the file has a whole pretraining model, `…ForImageClassification` if it has a classifier,
        else the encoder, `…Model`.

    Raises:
        ValueError: in one line, if the source cannot be read, if its tensors are not exactly those of the model, or if
            a setting does not exist or does not fit.
        StrictDataclassFieldValidationError: a setting has the wrong type.
    """
    return Conversion.read(source, method, prefix, **settings).model


@dataclass
class Conversion:
    """A converted checkpoint.

    `record` says where it comes from (source, the sha256 of its files), what it was taken for (method, model), and for
    each setting who decided it: the file ("told"), the paper ("assumed") or the user ("given").
    """

    model: PreTrainedModel
    image_mean: list[float]
    image_std: list[float]
    record: dict[str, Any]

    @classmethod
    def read(cls, source: str | Path, method: str | None = None, prefix: str | None = None, **settings) -> "Conversion":
        """Arguments and errors are those of `convert`; `image_mean` and `image_std` are settings too."""
        return cls.of(read_checkpoint(source), method, prefix, **settings)

    @classmethod
    def of(cls, checkpoint: Checkpoint, method: str | None = None, prefix: str | None = None, **settings):
        """As `read`, of a checkpoint that is read already."""
        layout = recognise(checkpoint, method, prefix, settings.get("image_size"))
        given = check_settings(settings, layout.method)
        told, assumed = infer(layout, given)
        config = layout.config_class(**told | assumed | given)
        check_tensors_fit(layout, config, checkpoint.name)
        mean, std = normalisation(checkpoint, config.num_channels, settings)
        record = {
            "source": checkpoint.name,
            "sha256": checkpoint.files,
            "method": layout.method,
            "model": layout.model_class.__name__,
            "told": told,
            "assumed": assumed,
            "given": settings,
            "left_out": list(layout.unread),
            "tokens_left": list(layout.tokens),
            "folded": list(layout.folded),
            "prefix": layout.prefix,
            "other_prefixes": list(layout.others),
            "taken": grouped(layout.taken, layout.prefix.count(".") + 1),
            "left": grouped(sorted(checkpoint.state.keys() - set(layout.taken))),
            "skipped": checkpoint.skipped,
        }
        return cls(fill_model(layout, config), mean, std, record)

    def save(self, dest: str | Path):
        """Write a folder that `from_pretrained` loads, with an image processor and the record (`conversion.json`).

        The folder is whole, or nothing is left of it.

        Raises:
            ValueError: there is something at `dest`, or it cannot be made.
        """
        with new_folder(dest) as folder:
            self.model.save_pretrained(folder)
            size = self.model.config.image_height_width
            image_processor(size, self.image_mean, self.image_std).save_pretrained(folder)
            (folder / "conversion.json").write_text(json.dumps(scrubbed_all(self.record), indent=2) + "\n")


def check_settings(settings: dict[str, Any], method: str) -> dict[str, Any]:
    """The config fields among the settings. Raises ValueError for a setting that the method does not have, and
    StrictDataclassFieldValidationError for one of the wrong type."""
    known = setting_types(method)
    for name in settings:
        if name not in known:
            close = difflib.get_close_matches(name, known, 1)
            hint = f"did you mean {close[0]}?" if close else f"there is {', '.join(known)}"
            raise ValueError(f"{method} has no setting {name}; {hint}")
    validate_typed_dict(TypedDict("Settings", known, total=False), settings)
    return {name: value for name, value in settings.items() if name not in NORMALISATION}


def normalisation(
    checkpoint: Checkpoint, num_channels: int, settings: dict[str, Any]
) -> tuple[Sequence[float], Sequence[float]]:
    """(mean, std) of the channels: those given, else of the folder's image processor, else of timm's config, else
    ImageNet's, by which all the authors normalise."""
    found = read_processor(checkpoint.folder, num_channels) if checkpoint.folder else None
    timm = checkpoint.config.get("pretrained_cfg")
    timm = timm if isinstance(timm, dict) else {}
    mean, std = timm.get("mean", [*IMAGENET_MEAN]), timm.get("std", [*IMAGENET_STD])
    mean, std = (found.mean, found.std) if found else (mean, std)
    mean, std = settings.get("image_mean", mean), settings.get("image_std", std)
    for name, values in (("image_mean", mean), ("image_std", std)):
        is_list = isinstance(values, list | tuple) and all(isinstance(value, int | float) for value in values)
        if not is_list or len(values) != num_channels:
            raise ValueError(f"{name} must be given with a number for each of {num_channels} channels, not {values}")
        low = 0 if name == "image_std" else -math.inf
        if not all(low < value < math.inf for value in values):
            raise ValueError(f"{name} must have finite numbers{' above 0' * (low == 0)}, not {values}")
    if settings.keys() & NORMALISATION.keys():
        check_statistics(mean, std, "--set image_mean={} image_std={}")
    return mean, std


def check_tensors_fit(layout: Layout, config: PreTrainedConfig, name: str):
    """Raise ValueError unless the tensors are those of the model, and finite in float32. The message has the names of
    the file."""
    with torch.device("meta"):
        model = layout.model_class(config)
    try:
        expected = to_theirs(model.state_dict(), layout.table, config.patch_height_width)
    except ValueError as error:
        raise ValueError(f"{name} has no tensors for what the settings ask for: {error}") from None
    state = layout.state
    problems = {
        "missing": [key for key in expected if key not in state],
        "left over": [key for key in state if key not in expected],
        "of another shape": [
            f"{key} (file {_shape(tensor)}, model {_shape(expected[key])})"
            for key, tensor in state.items()
            if key in expected and tensor.shape != expected[key].shape
        ],
        "of another type": [
            f"{key} ({tensor.dtype})"
            for key, tensor in state.items()
            if key in expected and tensor.is_floating_point() != expected[key].is_floating_point()
        ],
    }
    found = [f"{what}: {listed(keys, 40)}" for what, keys in problems.items() if keys]
    if found:
        raise ValueError(f"{name} does not fit {layout.model_class.__name__}; {'; '.join(found)}")
    broken = next((key for key, tensor in state.items() if not tensor.float().isfinite().all()), None)
    if broken is not None:
        raise ValueError(f"{name} has weights that are not finite (NaN, infinite), the first in {broken}")


def _shape(tensor: torch.Tensor) -> str:
    return "×".join(map(str, tensor.shape)) or "scalar"


def fill_model(layout: Layout, config: PreTrainedConfig) -> PreTrainedModel:
    """The model with the tensors of a layout, after `check_tensors_fit`."""
    state = to_ours(layout.state, layout.table)
    # Copies, because the tensors of a memory-mapped file change with the file.
    state = {
        key: x.detach().to(torch.float32 if x.is_floating_point() else x.dtype, copy=True) for key, x in state.items()
    }
    return layout.model_class.from_pretrained(None, config=config, state_dict=state, dtype=torch.float32)
