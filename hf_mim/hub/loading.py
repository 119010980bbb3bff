"""Loads weights files of any name, without running any code that is in them.

A pickle can run any code when it is read. `torch.load(weights_only=True)` builds nothing but tensors, plain containers
and the types that `ALLOWED` adds. Another object beside the weights becomes a `Skipped`, which does nothing: its class
is not imported and its code does not run. A file that names what only an attack needs is refused.
"""

import argparse
import contextlib
import pickle
import pickletools
import re
import struct
import tarfile
import warnings
import zipfile
import zlib
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch.serialization import safe_globals

from hf_mim.files import listed

# What torch.load raises for bytes that are no checkpoint: its readers check little.
DAMAGED = (
    *(RuntimeError, pickle.UnpicklingError, EOFError, LookupError, ValueError, TypeError, AttributeError),
    *(AssertionError, ArithmeticError, struct.error, zipfile.BadZipFile, zlib.error, MemoryError, OSError),
    SafetensorError,
)

BUILTINS = ("builtins", "__builtin__")
PLAIN_TYPES = (int, float, bool, str, complex, list, dict, tuple, set, frozenset, slice, object)
_multiarray = getattr(np, "_core", None) or np.core
ALLOWED = [
    argparse.Namespace,  # MAE saves its arguments
    np.dtype,
    *((_multiarray.multiarray.scalar, f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")),
    *{type(np.dtype(kind)) for kind in np.typecodes["All"]},
    *((kind, f"{module}.{kind.__name__}") for module in BUILTINS for kind in PLAIN_TYPES),
]
# No training script saves these beside its weights by accident. Enums are pickled by getattr, which is harmless here.
ATTACKS = (
    r"(os|posix|nt|sys|subprocess|pty|shutil|socket|runpy|importlib|ctypes|code|codeop|commands|multiprocessing|asyncio|"
    r"webbrowser|pickle|_pickle|marshal|types|urllib|http|requests|ftplib|smtplib|threading|signal|tempfile)(\..*)?"
)
HARMLESS_BUILTINS = "getattr range bytes bytearray".split()
DICTIONARIES = ("collections.defaultdict",)


class Skipped:
    """What stands for an object beside the weights. It takes every argument and state, and does nothing."""

    def __new__(cls, *args, **kwargs):
        return object.__new__(cls)

    def __init__(self, *args, **kwargs):
        pass

    def __setstate__(self, state):
        pass


class SkippedDictionary(Skipped):
    """The same for dictionaries of other classes: their content is kept in a plain one."""

    def __new__(cls, *args, **kwargs):
        return OrderedDict()


def load(path: Path) -> tuple[Any, list[str]]:
    """(the content of a weights file, on the CPU; the names of the classes of objects that were skipped).

    The content decides how it is read: safetensors, or what torch.save writes. Raises ValueError if it is neither, if
    it is damaged, or if it holds code; the message names it.
    """
    if is_safetensors(path):
        try:
            return load_file(path), []
        except SafetensorError as error:
            raise ValueError(f"{path.name} is damaged or no safetensors file: {error}") from None
    stubs: dict[str, type] = {}
    while True:
        try:
            with safe_globals([*ALLOWED, *named(stubs)]), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                return _torch_load(path), sorted(stubs)
        except DAMAGED as error:
            message = str(error)
        if not add_stub(stubs, message):
            raise ValueError(why_not(path, message))


def _torch_load(path: Path) -> Any:
    if path.suffix == ".safetensors":  # torch.load goes by this extension, unless it is given the open file
        with open(path, "rb") as file:
            return torch.load(file, map_location="cpu", weights_only=True)
    return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))


def named(stubs: dict[str, type]) -> list[tuple[type, str]]:
    """(stub, the name in the pickle): a name without a module is one of Python's own."""
    modules = {name: ("",) if "." in name else ("builtins.", "__builtin__.") for name in stubs}
    return [(stub, f"{module}{name}") for name, stub in stubs.items() for module in modules[name]]


def add_stub(stubs: dict[str, type], message: str) -> bool:
    """By torch's message about a pickle, let one more name be skipped. Returns whether this was possible."""
    found = re.search(r"GLOBAL (\S+) was not an allowed global", message)
    if found and found[1] not in stubs and not is_attack(found[1]):
        kind = SkippedDictionary if found[1] in DICTIONARIES else Skipped
        stubs[found[1]] = type(found[1], (kind,), {})
        return True
    for name, stub in stubs.items():
        if "Can only SETITEM" in message and str(stub) in message and not issubclass(stub, SkippedDictionary):
            stubs[name] = type(name, (SkippedDictionary,), {})
            return True
    return False


def is_attack(name: str) -> bool:
    module, _, word = name.rpartition(".")
    if module in ("", *BUILTINS):  # torch leaves out the module of some
        return word not in HARMLESS_BUILTINS
    return re.fullmatch(ATTACKS, module) is not None or name in ("io.open", "_io.open")


def is_safetensors(path: Path) -> bool:
    """Whether the file has the head of a safetensors file, or, if it has no head that torch writes, its extension."""
    with open(path, "rb") as file:
        head = file.read(9)
    if len(head) == 9 and head[8:] == b"{":
        return True
    return path.suffix == ".safetensors" and head[:2] not in (b"PK", b"\x80\x02")


def why_not(path: Path, message: str) -> str:
    """Why a file is not read, in one line."""
    foreign = re.findall(r"GLOBAL ([\w.]+)", message) or foreign_names(path)
    if foreign:
        return (
            f"{path.name} is refused: it holds {listed(foreign, 1)}, and reading that could run any code; a checkpoint "
            "needs tensors only"
        )
    if form := other_form(path):
        return f"{path.name} is {form}, which is not read; save its state_dict() by today's torch.save"
    return f"{path.name} is truncated, damaged or no file of safetensors or torch.save"


def other_form(path: Path) -> str | None:
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
