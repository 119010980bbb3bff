"""From a checkpoint to a model whose every weight is the checkpoint's, or a line that says why not."""

import contextlib
import pickle
import re
from collections.abc import Sequence
from pathlib import Path

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from torch import nn
from transformers import AutoModel
from transformers.utils import cached_file, logging

import hf_mim  # noqa: F401 (registers the models)
from hf_mim.files import sha256

# What `from_pretrained` raises for what is no checkpoint, or a damaged one.
LOADING_ERRORS = (OSError, ValueError, KeyError, RuntimeError, EOFError, SafetensorError, pickle.UnpicklingError)
LOADING_ERRORS += (StrictDataclassError,)


def load_model(checkpoint: str) -> nn.Module:
    """What `AutoModel` makes of a folder or a name on the Hub, in float32.

    Raises ValueError, in one line, for a checkpoint without an encoder or without some of its weights.
    """
    try:
        # float32 even where it was saved in half precision: `dtype` is what autocast computes in.
        with quiet():  # what it reports of the weights, at length, is checked below
            model, loading = AutoModel.from_pretrained(
                checkpoint, dtype=torch.float32, output_loading_info=True, ignore_mismatched_sizes=True
            )
    except LOADING_ERRORS as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"checkpoint {checkpoint} holds no encoder that can be loaded: {reason[:300]}") from error
    if mismatched := sorted(key for key, *_ in loading["mismatched_keys"]):
        raise ValueError(
            f"checkpoint {checkpoint} has other shapes than its config for {len(mismatched)} weights of its "
            f"encoder, such as {mismatched[0]}"
        )
    missing = sorted(key for key in loading["missing_keys"] if not key.startswith(("pooler", "head")))
    if missing:
        raise ValueError(
            f"checkpoint {checkpoint} lacks {len(missing)} weights of its encoder, such as {missing[0]}: "
            "what was evaluated would be partly random"
        )
    if more := left_over_blocks(model, loading["unexpected_keys"]):
        raise ValueError(f"checkpoint {checkpoint} has more blocks than its config, such as {more[0]}")
    return model


def left_over_blocks(model: nn.Module, keys: Sequence[str]) -> list[str]:
    """Those of a checkpoint's left-over keys that are of blocks beyond the model's last."""
    lists = [(name, module) for name, module in model.named_modules() if isinstance(module, nn.ModuleList)]
    if not lists:
        return []
    name, blocks = max(lists, key=lambda item: len(item[1]))
    prefix = f"{model.base_model_prefix}."  # a file may have it or not
    pattern = re.compile(rf"(?:{re.escape(prefix)})?{re.escape(name.removeprefix(prefix))}\.(\d+)\.")
    found = ((key, pattern.match(key)) for key in sorted(keys))
    return [key for key, match in found if match and int(match[1]) >= len(blocks)]


@contextlib.contextmanager
def quiet():
    """Without what transformers says of a loading that it did not fail in."""
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)


def image_model(model: nn.Module) -> nn.Module:
    """The encoder in a model: without a head, and of an image-text model the image's half."""
    model = getattr(model, "base_model", model)
    return getattr(model, "vision_model", model)


def checkpoint_sha256(checkpoint: str | Path) -> str | None:
    """Of a checkpoint's weight files, in the order of their names; None where there are none (a model in memory)."""
    folder = Path(checkpoint)
    if not folder.is_dir():
        config = cached_file(str(checkpoint), "config.json", _raise_exceptions_for_missing_entries=False)
        folder = Path(config).parent if config else folder
    files = sorted(folder.glob("*.safetensors")) or sorted(folder.glob("pytorch_model*.bin"))
    return sha256(*files) if files else None
