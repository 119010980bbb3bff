"""Reads the files of a checkpoint of others: which files there are, the tensors in them, what lies beside them."""

import argparse
import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from hf_mim.evaluation.checkpoint import from_hub
from hf_mim.files import listed, sha256
from hf_mim.hub.loading import load

PICKLES = (".pth", ".pt", ".bin", ".tar", ".ckpt", ".th", ".pkl")
INDEX = ".index.json"
EXTENSIONS = (".safetensors", *PICKLES)
# The first of these that a folder has is read. A folder with none of them must have one weights file of any name.
PREFERRED = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
# Words that torch puts among the names of a module: DataParallel, compile, FSDP, activation checkpoints.
WRAPPERS = re.compile(r"(?:(?<=\.)|^)(?:module|_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
ARGUMENTS = ("hyper_parameters", "args")
PLAIN = (str, int, float, bool, list, tuple, type(None))


@dataclass
class Checkpoint:
    """The tensors of a source under their own names, and what else it says.

    Attributes:
        name: name of the file, folder or Hub repository.
        files: name → sha256.
        state: every tensor, with the names of the dictionaries around it before its own: "model.norm.weight",
            "optimizer.state.0.exp_avg".
        skipped: the classes of objects beside the tensors that were not read.
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
    skipped: list[str] = field(default_factory=list)


def read_checkpoint(source: str | Path) -> Checkpoint:
    """Read a file, a folder of one checkpoint, or a repository of the Hub.

    Raises:
        ValueError: in one line: it does not exist, is damaged, is no checkpoint, or is a pickle of more than tensors.
    """
    path, folder, config = Path(source), None, {}
    if path.is_file():
        name, paths = path.name, shards_of(path) if path.name.endswith(INDEX) else [path]
    else:
        folder = path if path.is_dir() else _download(str(source))
        name = path.resolve().name if path.is_dir() else str(source)
        paths = weight_files(folder, name)
        config = read_json(folder / "config.json") if (folder / "config.json").is_file() else {}
    files = {path.name: sha256(path) for path in paths}  # first, so that a file that cannot be read fails here
    state, arguments, skipped = {}, {}, []
    for path in paths:
        loaded, classes = load(path)
        tensors = tensors_in(loaded, path.name)
        if twice := sorted(tensors.keys() & state.keys()):
            raise ValueError(f"{name} has tensors in several of its files: {listed(twice, 3)}")
        state |= tensors
        arguments |= arguments_in(loaded)
        skipped += classes
    return Checkpoint(name, files, state, config, arguments, folder, skipped)


def _download(repository: str) -> Path:
    """Download the files at the top of a repository: its safetensors, or its pickles if it has none."""
    if repository.endswith(EXTENSIONS):
        raise ValueError(f"there is no file or folder {repository}")
    for extensions in ((".safetensors",), PICKLES):
        folder = from_hub(repository, ["*.json", *(f"*{extension}" for extension in extensions)], "file or folder")
        if any(path.name.endswith(extensions) for path in folder.iterdir()):
            break
    return folder


def weight_files(folder: Path, name: str) -> list[Path]:
    """The weights files of a folder's checkpoint. Raises ValueError if there is none, or several to choose from."""
    chosen = next((folder / file for file in PREFERRED if (folder / file).is_file()), None)
    if chosen is None:
        indices = sorted(folder.glob(f"*{INDEX}"))
        found = sorted(path for path in folder.iterdir() if path.name.endswith(EXTENSIONS) and path.is_file())
        if len(indices) == 1:
            chosen = indices[0]
        elif len(found) == 1:
            chosen = found[0]
        else:
            names = ", ".join(path.name for path in found) or f"none with {', '.join(EXTENSIONS)}"
            raise ValueError(f"{name} must hold one weights file, or give the file itself; there is {names}")
    return shards_of(chosen) if chosen.name.endswith(INDEX) else [chosen]


def shards_of(index: Path) -> list[Path]:
    """The files that an index names. Raises ValueError if one of them is not in its folder."""
    shards = read_json(index).get("weight_map")
    if not isinstance(shards, dict) or not shards or not all(isinstance(file, str) for file in shards.values()):
        raise ValueError(f"{index.name} must have a weight_map from tensors to files")
    paths = [index.parent / file for file in sorted(set(shards.values()))]
    for path in paths:
        if path.parent != index.parent or not path.is_file():
            raise ValueError(f"{index.name} names {path.name}, which is not in {index.parent.resolve().name}")
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


def tensors_in(loaded: Any, name: str, prefix: str = "") -> dict[str, torch.Tensor]:
    """The tensors at any depth of nested dictionaries, by their keys with dots between them, without the words that
    torch's wrappers put among them.

    Raises:
        ValueError: it is no dictionary, or two tensors have one name.
    """
    if not isinstance(loaded, dict):
        raise ValueError(f"{name} must hold tensors by name, not {_article(type(loaded).__name__)}")
    state: dict[str, torch.Tensor] = {}
    left, seen = [(prefix, loaded)], {id(loaded)}  # a container from a pickle may contain itself
    while left:
        before, items = left.pop()
        for key, value in items.items():
            if isinstance(value, dict) and id(value) not in seen:
                seen.add(id(value))
                left.append((f"{before}{key}.", value))
            elif isinstance(value, torch.Tensor):
                path = WRAPPERS.sub("", f"{before}{key}")
                if path in state:
                    raise ValueError(f"{name} has two tensors for {path}: with and without the names of wrappers")
                state[path] = value
    return state


def _article(name: str) -> str:
    return f"the object {name}, whose code would have to run; save its state_dict()" if "." in name else f"a {name}"


def arguments_in(loaded: dict[str, Any]) -> dict[str, Any]:
    """The training arguments beside the weights: numbers, texts and booleans by name."""
    held = (loaded.get(name) for name in ARGUMENTS)
    found: dict[str, Any] = {}
    for given in held:
        given = vars(given) if isinstance(given, argparse.Namespace) else given
        if isinstance(given, dict):
            plain = {name: value.item() if isinstance(value, np.generic) else value for name, value in given.items()}
            found |= {name: value for name, value in plain.items() if isinstance(value, PLAIN)}
    return found


def check_plain(state: dict[str, torch.Tensor], name: str) -> dict[str, torch.Tensor]:
    """Return the tensors of a network. Raises ValueError if one of them is sparse, quantised or without data."""
    wrong = [key for key, value in state.items() if not _is_plain(value)]
    if wrong:
        raise ValueError(
            f"{name} must hold plain tensors by name, and these are sparse, quantised or empty: {listed(wrong)}"
        )
    return state


def _is_plain(value: torch.Tensor) -> bool:
    return value.layout == torch.strided and not value.is_quantized and value.device.type == "cpu"
