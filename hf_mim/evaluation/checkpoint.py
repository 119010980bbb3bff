"""Load a model whose every weight comes from the checkpoint, or raise an error of one line that says why not."""

import hashlib
import pickle
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    StrictDataclassError,
)
from safetensors import SafetensorError
from torch import nn
from transformers import AutoModel
from transformers.utils import cached_file

import hf_mim  # noqa: F401 (registers the models)
from hf_mim.files import one_line, quiet, sha256

# What `from_pretrained` raises if there is no checkpoint, or a damaged one.
LOADING_ERRORS = (OSError, ValueError, KeyError, RuntimeError, EOFError, SafetensorError, pickle.UnpicklingError)
LOADING_ERRORS += (StrictDataclassError,)
# The names under which a config tells transformers what code it may run.
NAMES_OF_CODE = ("auto_map", "custom_pipelines")
NAME_ON_HUB = re.compile(r"[\w.-]+(/[\w.-]+)?")


def from_hub(name: str, files: Sequence[str], kind: str = "folder") -> Path:
    """The folder into which these files (patterns) at the top of a repository of the Hub were downloaded.

    The Hub is asked once, while loaders of transformers ask for half a minute. Raises ValueError, in one line, if there
    is neither a `kind` here nor a repository of this name.
    """
    here = f"there is no {kind} {name}"
    if not NAME_ON_HUB.fullmatch(name):
        raise ValueError(here)
    try:
        return Path(snapshot_download(name, allow_patterns=list(files), ignore_patterns=["*/*"]))
    except RepositoryNotFoundError as error:
        raise ValueError(f"{here}, and the Hub has no model of this name that you may see") from error
    except LocalEntryNotFoundError as error:
        raise ValueError(f"{here}, and the Hub cannot be reached") from error
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        raise ValueError(f"{here}, and the Hub did not give it: {one_line(error, 200)}") from error


def check_there(checkpoint: str | Path, argument: str = "checkpoint"):
    """Raise ValueError, in one line that begins with `argument`, if there is no such folder and the Hub gives none."""
    if not Path(checkpoint).exists():
        try:
            from_hub(str(checkpoint), ["config.json"])
        except ValueError as error:
            raise ValueError(f"{argument}: {error}") from error


def load_whole(
    model_class,
    checkpoint: str,
    part: str = "encoder",
    unusable: str = "holds no encoder that can be loaded",
    may_be_new: Callable[[nn.Module, str], bool] = lambda model, key: False,
    trust_remote_code: bool = False,
    **options,
) -> nn.Module:
    """A model in float32 whose every weight comes from the checkpoint.

    Args:
        model_class: a model class or an Auto class; its `from_pretrained` loads the checkpoint.
        checkpoint: a folder, or a name on the Hub.
        part: what is loaded. "encoder" or "classifier": other weights of the checkpoint, such as a decoder's, may be
            left over, but not blocks of the encoder. "model": no weight may be left over.
        unusable: what the error says about a checkpoint that cannot be loaded at all.
        may_be_new: (model, name of a weight) → whether the checkpoint may lack it, such as the weight of a new head.
        trust_remote_code: run the Python that the checkpoint brings along.
        options: of `from_pretrained`.

    Raises:
        ValueError: in one line: it is no such checkpoint, it is damaged, it needs code that is not trusted, or it lacks
            weights.
    """
    check_there(checkpoint)
    if model_class.__module__.startswith("transformers.models.auto"):
        options["trust_remote_code"] = trust_remote_code
    try:
        # float32 even if it was saved in half precision, because `dtype` only says in what autocast computes.
        with quiet():  # transformers reports at length about the weights; they are checked below
            model, loading = model_class.from_pretrained(
                checkpoint, dtype=torch.float32, output_loading_info=True, ignore_mismatched_sizes=True, **options
            )
    except LOADING_ERRORS as error:
        raise ValueError(f"checkpoint {checkpoint} {unusable}: {loading_failure(error)}") from error
    mismatched = [key for key, *_ in loading["mismatched_keys"]]
    left_over = loading["unexpected_keys"] if part == "model" else []
    for keys, says, consequence in (
        (mismatched, "has other shapes than its config for", ""),
        (loading["missing_keys"], "lacks", ": the model would be partly random"),
        (left_over, "has no place in its config for", ""),
    ):
        if wrong := sorted(key for key in keys if not may_be_new(model, key)):
            weights = f"{len(wrong)} weights of its {part}, such as {wrong[0]}"
            raise ValueError(f"checkpoint {checkpoint} {says} {weights}{consequence}")
    if part != "model" and (more := left_over_blocks(model, loading["unexpected_keys"])):
        raise ValueError(f"checkpoint {checkpoint} has more blocks than its config, such as {more[0]}")
    return model


def loading_failure(error: Exception) -> str:
    """Why a checkpoint could not be loaded, in one line. transformers says at length that code is not trusted."""
    if "trust_remote_code" in str(error):
        return (
            "its config names Python code, which would have to run; read that code first. Only evaluate runs it, after "
            "--trust_remote_code true"
        )
    return one_line(error, 300)


def forget_code(config):
    """Take the names of code out of a config, so that what is saved with it names none."""
    for name in NAMES_OF_CODE:
        vars(config).pop(name, None)


def without_code(settings: Any) -> Any:
    """The content of a JSON file without the names of code that transformers would run, at any depth."""
    if isinstance(settings, dict):
        return {name: without_code(value) for name, value in settings.items() if name not in NAMES_OF_CODE}
    return [without_code(value) for value in settings] if isinstance(settings, list) else settings


def load_encoder(checkpoint: str, trust_remote_code: bool = False) -> nn.Module:
    """The model that `AutoModel` makes of a checkpoint. Poolers and heads may be new. Raises as `load_whole`."""

    def may_be_new(model: nn.Module, key: str) -> bool:
        return key.startswith(("pooler", "head"))

    return load_whole(AutoModel, checkpoint, may_be_new=may_be_new, trust_remote_code=trust_remote_code)


def module_lists(model: nn.Module) -> dict[str, nn.ModuleList]:
    """Name → ModuleList, the one with most weights first; of two with the same weights, the outer one."""
    found = {name: module for name, module in model.named_modules() if isinstance(module, nn.ModuleList)}
    weights = {name: sum(x.numel() for x in module.parameters()) for name, module in found.items()}
    return {name: found[name] for name in sorted(found, key=weights.get, reverse=True)}


def blocks_of(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """(name, list) of the blocks, or of the stages: the ModuleList with most weights. Raises ValueError without one."""
    found = module_lists(model)
    if not found:
        raise ValueError(f"{type(model).__name__} has no list of layers, and is no transformer that can be used here")
    return next(iter(found.items()))


def left_over_blocks(model: nn.Module, keys: Sequence[str]) -> list[str]:
    """Among keys that a checkpoint has left over, those of blocks beyond the model's last block."""
    name, blocks = blocks_of(model)
    prefix = f"{model.base_model_prefix}."  # keys may have it or not
    pattern = re.compile(rf"(?:{re.escape(prefix)})?{re.escape(name.removeprefix(prefix))}\.(\d+)\.")
    found = ((key, pattern.match(key)) for key in sorted(keys))
    return [key for key, match in found if match and int(match[1]) >= len(blocks)]


def weight_stamps(checkpoint: str | Path) -> list[tuple]:
    """What tells whether the weight files in a folder are still the same ones; [] for a checkpoint on the Hub."""
    return [(file.name, (about := file.stat()).st_size, about.st_mtime_ns) for file in _weight_files(Path(checkpoint))]


def check_unchanged(checkpoint: str | Path, stamps: list[tuple] | None):
    """Raise ValueError if the weight files are others than those of `weight_stamps`. None: there were no files."""
    if stamps is not None and weight_stamps(checkpoint) != stamps:
        raise ValueError(
            f"checkpoint {checkpoint} got other weights, or was deleted, while it was read: a training goes on there; "
            "wait until it has ended, or take one of its checkpoint-STEP folders"
        )


def checkpoint_sha256(checkpoint: str | Path) -> str | None:
    """The hash of a checkpoint's weight files, in the order of their names; None if there are none."""
    folder = Path(checkpoint)
    if not folder.is_dir():
        config = cached_file(str(checkpoint), "config.json", _raise_exceptions_for_missing_entries=False)
        folder = Path(config).parent if config else folder
    files = _weight_files(folder)
    return sha256(*files) if files else None


def model_sha256(model: nn.Module) -> str:
    """The hash of the weights that decide what a model gives: names, types, shapes and values."""
    digest = hashlib.sha256()
    state = getattr(model, "plain_state_dict", model.state_dict)()
    for name, tensor in sorted(state.items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def _weight_files(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.safetensors")) or sorted(folder.glob("pytorch_model*.bin"))
