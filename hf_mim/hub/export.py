"""Writes a checkpoint of ours in a form that loads where hf_mim is not installed, or as a Space."""

import json
import logging
from pathlib import Path

from transformers import AutoConfig
from transformers.utils import cached_file

import hf_mim
from hf_mim.checks import one_of
from hf_mim.data.processor import FILES, transformers_processor
from hf_mim.evaluation.checkpoint import (
    LOADING_ERRORS,
    check_there,
    check_unchanged,
    forget_code,
    load_whole,
    loading_failure,
    weight_stamps,
    without_code,
)
from hf_mim.files import check_destination, new_folder
from hf_mim.hub.onnx import check_onnx, write_onnx
from hf_mim.hub.remote_code import processor_map, write_remote_code
from hf_mim.hub.space import MODEL, write_space
from hf_mim.hub.timm_vit import write_timm
from hf_mim.hub.transformers_vit import write_transformers
from hf_mim.models.configuration_vit import MIMConfig
from hf_mim.models.image_processing_mim import MIMImageProcessor
from hf_mim.models.target_encoder import TargetNetworkMixin
from hf_mim.models.vit import MIMPreTrainedModel

logger = logging.getLogger(__name__)

WRITERS = {
    "transformers": write_transformers,
    "timm": write_timm,
    "remote-code": write_remote_code,
    "onnx": write_onnx,
    "space": write_space,
}


def export(checkpoint: str | Path, dest: str | Path, to: str, encoder: str | None = None) -> str:
    """Write a checkpoint of ours in the form of another library, in float32.

    Args:
        checkpoint: folder or name on the Hub of a pretraining model, an encoder or a classifier of hf_mim.
        dest: the new folder. It is whole at the end, or absent.
        to: "transformers" (its ViTMAE, ViT or I-JEPA), "timm" (its ViT), "remote-code" (with our model files), "onnx",
            or "space" (with a page for the browser; it needs hf_mim).
        encoder: "online" or "target", if the checkpoint has both; then only that encoder is written. By default the
            form gets all that it can hold, with the encoder that the paper evaluates.

    Returns:
        A line that says how to load it.

    Raises:
        ValueError: the checkpoint is not ours or not whole, the form cannot hold it, or `dest` exists.
        ImportError: ONNX is not installed.
    """
    one_of(WRITERS, to=to)
    one_of(("online", "target"), encoder=encoder)
    check_destination(dest)
    if to == "onnx":
        check_onnx()
    model = load_ours(checkpoint)
    forget_code(model.config)
    if encoder is not None:
        if not isinstance(model, TargetNetworkMixin):
            only = f"{type(model).__name__} has only one, and {encoder} was asked for"
            raise ValueError(f"encoder must be left out: {only}")
        if encoder == "target" and not model.target_pairs():
            raise ValueError("encoder must be online: the target is frozen, and is the encoder of another checkpoint")
        model = model.encoder if encoder == "online" else model.target_encoder
    processor = processor_path(checkpoint)  # found now: inside of `new_folder` all that fails is a failure to write
    with new_folder(dest) as folder:
        how_to_load = WRITERS[to](model, folder, checkpoint).format(dest=dest)
        if to != "timm":  # its config.json says how images are prepared
            write_processor(processor, folder / MODEL if to == "space" else folder, to)
    return how_to_load


def load_ours(checkpoint: str | Path) -> MIMPreTrainedModel:
    """The model of a checkpoint, in float32 and evaluation mode. Raises ValueError if it is not one of ours, or if its
    weights do not fit its config."""
    checkpoint = str(checkpoint)
    check_there(checkpoint)
    try:
        config = AutoConfig.from_pretrained(checkpoint, trust_remote_code=False)
    except LOADING_ERRORS as error:
        raise ValueError(f"checkpoint {checkpoint} cannot be read: {loading_failure(error)}") from error
    architecture = (config.architectures or ["nothing"])[0]
    if not isinstance(config, MIMConfig) or architecture not in hf_mim.__all__:
        raise ValueError(
            f"checkpoint {checkpoint} must be of a model of hf_mim, and it is of {architecture} ({config.model_type})"
        )
    stamps = weight_stamps(checkpoint)
    model = load_whole(getattr(hf_mim, architecture), checkpoint, part="model", unusable="cannot be read").eval()
    check_unchanged(checkpoint, stamps)
    return model


def processor_path(checkpoint: str | Path) -> Path | None:
    """The settings of a checkpoint's image processor, downloaded if it is on the Hub; None if there are none."""
    paths = (cached_file(str(checkpoint), name, _raise_exceptions_for_missing_entries=False) for name in FILES)
    path = next(filter(None, paths), None)
    if path is None:
        logger.warning("checkpoint %s has no image processor, so the export has none", checkpoint)
    return path and Path(path)


def write_processor(path: Path | None, folder: Path, to: str):
    """Put an image processor with these settings beside the weights: ours, with its code where that is needed, or one
    of theirs.

    Raises ValueError if no processor of transformers gives the pixels that ours gives.
    """
    if path is None:
        return
    settings = without_code(json.loads(path.read_text()))
    if settings.get("image_processor_type") != MIMImageProcessor.__name__ or to == "space":
        (folder / path.name).write_text(json.dumps(settings, indent=2) + "\n")
    elif to == "transformers":
        transformers_processor(MIMImageProcessor.from_dict(settings)).save_pretrained(folder)
    else:
        settings["auto_map"] = processor_map()
        (folder / FILES[0]).write_text(json.dumps(settings, indent=2) + "\n")
