"""Reads checkpoint files of others without running any code that is in them.

A pickle can run any code when it is read. `torch.load(weights_only=True)` builds nothing but tensors, plain containers
and the types that `ALLOWED` adds.
"""

import argparse
import contextlib
import json
import pickle
import pickletools
import re
import struct
import tarfile
import warnings
import zipfile
import zlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch.serialization import safe_globals

from hf_mim.files import listed, one_line, sha256

PICKLES = (".pth", ".pt", ".bin", ".tar", ".ckpt")
EXTENSIONS = (".safetensors", *PICKLES)
# The first of these that a folder has is read. A folder with none of them must have one weights file of any name.
PREFERRED = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
# What torch.load raises for bytes that are no checkpoint: its readers check little.
DAMAGED = (
    *(RuntimeError, pickle.UnpicklingError, EOFError, LookupError, ValueError, TypeError, AttributeError),
    *(AssertionError, ArithmeticError, struct.error, zipfile.BadZipFile, zlib.error, MemoryError, OSError),
)

_multiarray = getattr(np, "_core", None) or np.core
ALLOWED = [
    argparse.Namespace,  # MAE saves its arguments
    np.dtype,
    *((_multiarray.multiarray.scalar, f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")),
    *{type(np.dtype(kind)) for kind in (np.float64, np.float32, np.int64, np.int32, np.bool_)},
]

WEIGHTS = ("model", "state_dict")
NETWORKS = ("encoder", "predictor", "target_encoder")  # I-JEPA's and StoP's, each with a state dict of its own
BESIDE = "optimizer opt scaler loss_scaler epoch args loss batch_size world_size lr best_acc".split()


@dataclass
class Checkpoint:
    """The tensors of a source under their own names, and what else it says.

    Attributes:
        name: name of the file, folder or Hub repository.
        files: name → sha256.
        state: the tensors without `module.` prefixes; I-JEPA's and StoP's networks under "encoder.", "predictor.",
            "target_encoder.".
        config: the content of `config.json`; {} without one.
        arguments: the training arguments that were saved with the weights.
        folder: the folder that `config.json` lies in; None for a single file.
    """

    name: str
    files: dict[str, str]
    state: dict[str, torch.Tensor]
    config: dict[str, Any] = field(default_factory=dict)
    arguments: dict[str, Any] = field(default_factory=dict)
    folder: Path | None = None


def read_checkpoint(source: str | Path) -> Checkpoint:
    """Read a file, a folder of one checkpoint, or a repository of the Hub.

    Raises:
        ValueError: in one line: it does not exist, is damaged, is no checkpoint, or is a pickle of more than tensors.
    """
    path, folder, config = Path(source), None, {}
    if path.is_file():
        name, paths = path.name, [path]
    else:
        folder = path if path.is_dir() else _download(str(source))
        name = path.resolve().name if path.is_dir() else str(source)
        paths = weight_files(folder, name)
        config = read_json(folder / "config.json") if (folder / "config.json").is_file() else {}
    files = {path.name: sha256(path) for path in paths}  # first, so that a file that cannot be read fails here
    state, arguments = {}, {}
    for path in paths:
        tensors, found = weights_in(load(path), path.name)
        state |= tensors
        arguments |= found
    return Checkpoint(name, files, state, config, arguments, folder)


def _download(repository: str) -> Path:
    """Download the files at the top of a repository: its safetensors, or its pickles if it has none."""
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", repository) or repository.endswith(EXTENSIONS):
        raise ValueError(f"there is no file or folder {repository}")
    try:
        for extensions in ((".safetensors",), PICKLES):
            patterns = ["*.json", *(f"*{extension}" for extension in extensions)]
            folder = Path(snapshot_download(repository, allow_patterns=patterns, ignore_patterns=["*/*"]))
            if any(path.name.endswith(extensions) for path in folder.iterdir()):
                break
        return folder
    except (HfHubHTTPError, LocalEntryNotFoundError, HFValidationError, OSError) as error:
        reason = one_line(error)
        raise ValueError(f"there is no file or folder {repository}, and the Hub did not give it: {reason}") from error


def weight_files(folder: Path, name: str) -> list[Path]:
    """The weights files of a folder's checkpoint. Raises ValueError if there is none, or several to choose from."""
    chosen = next((folder / file for file in PREFERRED if (folder / file).is_file()), None)
    if chosen is None:
        found = sorted(path for path in folder.iterdir() if path.name.endswith(EXTENSIONS) and path.is_file())
        if len(found) != 1:
            names = ", ".join(path.name for path in found) or f"none with {', '.join(EXTENSIONS)}"
            raise ValueError(f"{name} must hold one weights file, or give the file itself; there is {names}")
        return found
    if chosen.suffix != ".json":
        return [chosen]
    shards = read_json(chosen).get("weight_map")
    if not isinstance(shards, dict) or not all(isinstance(file, str) for file in shards.values()):
        raise ValueError(f"{chosen.name} must have a weight_map from tensors to files")
    paths = [folder / file for file in sorted(set(shards.values()))]
    for path in paths:
        if path.parent != folder or not path.is_file():
            raise ValueError(f"{chosen.name} names {path.name}, which is not in {name}")
    return paths


def read_json(path: Path) -> dict[str, Any]:
    """The mapping that a JSON file holds. Raises ValueError if it holds none."""
    try:
        content = json.loads(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path.name} is no JSON: {error}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path.name} must hold a mapping, not {type(content).__name__}")
    return content


def load(path: Path) -> Any:
    """The content of a weights file, on the CPU. Raises ValueError if it is damaged, or if it holds objects that are
    not allowed; the message names them."""
    if path.suffix == ".safetensors":
        try:
            return load_file(path)
        except SafetensorError as error:
            raise ValueError(f"{path.name} is damaged or no safetensors file: {error}") from None
    if path.suffix not in PICKLES:
        raise ValueError(f"{path.name} must end in one of {', '.join(EXTENSIONS)}")
    try:
        with safe_globals(ALLOWED), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except DAMAGED as error:
        foreign = re.findall(r"GLOBAL (\S+)", str(error)) or foreign_names(path)
    if foreign:
        raise ValueError(
            f"{path.name} is refused: it holds {listed(foreign, 1)}, and reading that could run any code; a checkpoint "
            "needs tensors only"
        )
    if form := _other_form(path):
        raise ValueError(f"{path.name} is {form}, which is not read; save its state_dict() by today's torch.save")
    raise ValueError(f"{path.name} is truncated, damaged or no checkpoint written by torch.save")


def _other_form(path: Path) -> str | None:
    """The name of another format that torch writes, or wrote before 2018, if the file has it."""
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                is_script = any(name.endswith("/constants.pkl") for name in archive.namelist())
            return "a TorchScript archive" if is_script else None
        return "a tar archive" if tarfile.is_tarfile(path) else None
    except DAMAGED:
        return None


def foreign_names(path: Path) -> list[str]:
    """The names that a pickle would import, found without running it. torch names only those of old protocols."""
    names, strings = [], []
    # Where the file breaks off, or is no pickle, the names until there count.
    with contextlib.suppress(*DAMAGED), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for operation, argument, _ in pickletools.genops(_pickle_in(path)):
            if isinstance(argument, str):
                strings.append(argument)
            if operation.name == "STACK_GLOBAL":
                names.append(".".join(strings[-2:]))
    return [name for name in names if not name.startswith(("torch.", "collections.", "argparse.", "numpy."))]


def _pickle_in(path: Path, limit: int = 1 << 26) -> bytes:
    if not zipfile.is_zipfile(path):
        with open(path, "rb") as file:
            return file.read(limit)
    with zipfile.ZipFile(path) as archive:
        root = archive.namelist()[0].partition("/")[0]
        with archive.open(f"{root}/data.pkl") as file:
            return file.read(limit)


def weights_in(loaded: Any, name: str) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """(tensors by name, training arguments) from the content of a file.

    Raises:
        ValueError: it is neither a state dict nor what the authors save, or it holds several sets of weights.
    """
    if not isinstance(loaded, dict) or not all(isinstance(key, str) for key in loaded):
        raise ValueError(f"{name} must hold tensors by name, not a {type(loaded).__name__}")
    parts = {key: value for key, value in loaded.items() if key in (*WEIGHTS, *NETWORKS) and isinstance(value, dict)}
    if not parts:
        return check_tensors(without_module(loaded), name), {}
    others = [key for key, value in loaded.items() if key not in (*parts, *BESIDE) and _holds_tensors(value)]
    whole = [key for key in parts if key in WEIGHTS]
    if others or len(parts) > 1 and whole:
        raise ValueError(
            f"{name} holds several sets of weights: {', '.join([*parts, *others])}; keep the one to convert"
        )
    if whole:
        state = without_module(parts[whole[0]])
    else:
        state = {f"{net}.{key}": value for net, part in parts.items() for key, value in without_module(part).items()}
    arguments = loaded.get("args")
    arguments = vars(arguments) if isinstance(arguments, argparse.Namespace) else {}
    arguments = {key: value.item() if isinstance(value, np.generic) else value for key, value in arguments.items()}
    return check_tensors(state, name), arguments


def _holds_tensors(value: Any) -> bool:
    """Whether it is a tensor or has one at any depth. A container from a pickle may contain itself."""
    seen, left = set(), [value]
    while left:
        item = left.pop()
        if isinstance(item, torch.Tensor):
            return True
        if isinstance(item, dict | list | tuple | set) and id(item) not in seen:
            seen.add(id(item))
            left += item.values() if isinstance(item, dict) else item
    return False


def without_module(state: dict[str, Any]) -> dict[str, Any]:
    """The state dict without the prefix that DistributedDataParallel adds to all keys."""
    if all(str(key).startswith("module.") for key in state):
        return {key.removeprefix("module."): value for key, value in state.items()}
    return state


def check_tensors(state: dict[str, Any], name: str) -> dict[str, torch.Tensor]:
    """Return the state dict. Raises ValueError if it is empty or has a value that is no plain tensor."""
    wrong = [f"{key} ({type(value).__name__})" for key, value in state.items() if not _is_plain(value)]
    if wrong or not state:
        what = f"these are none: {listed(wrong)}" if wrong else "it has none"
        raise ValueError(f"{name} must hold plain tensors by name, and {what}")
    return state


def _is_plain(value: Any) -> bool:
    is_tensor = isinstance(value, torch.Tensor) and value.layout == torch.strided
    return is_tensor and not value.is_quantized and value.device.type == "cpu"
