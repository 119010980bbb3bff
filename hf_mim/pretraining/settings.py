"""Turns text and YAML into typed values: also `1e-4` in YAML and pairs, which `HfArgumentParser` does not read."""

import contextlib
import dataclasses
import difflib
import os
import re
import types
from collections.abc import Iterable
from enum import Enum
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

import yaml

from hf_mim.files import one_line

WORDS = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "text",
    dict: "a mapping",
    list: "a list like 1,2",
    tuple: "a pair like 1,2",
    types.NoneType: "none",
}
# Names in other programs → our names. A command may know only some of ours.
BROUGHT = {
    "accum_iter": ["gradient_accumulation_steps"],
    "amp": ["bf16", "dtype"],
    "arch": ["method", "size"],
    "base_lr": ["learning_rates"],
    "batch_size": ["per_device_train_batch_size"],
    "blr": ["base_lr"],
    "ckpt": ["resume"],
    "data": ["dataset"],
    "data_dir": ["dataset"],
    "data_path": ["dataset"],
    "device": ["use_cpu"],
    "epochs": ["num_train_epochs"],
    "finetune_from": ["init_from"],
    "init": ["init_from"],
    "label_column": ["labels"],
    "lr": ["base_lr", "learning_rate", "learning_rates"],
    "learning_rate": ["base_lr", "learning_rates"],
    "model": ["method", "size"],
    "num_train_epochs": ["epochs"],
    "num_workers": ["dataloader_num_workers"],
    "pretrained": ["init_from"],
    "per_device_train_batch_size": ["batch_size", "extract_batch_size"],
    "resume_from_checkpoint": ["resume"],
    "warmup_epochs": ["warmup_steps"],
    "wd": ["weight_decay", "weight_decays"],
    "workers": ["dataloader_num_workers", "num_workers"],
}
# What the conversion of a value to the wrong type raises.
NOT_THIS = (ValueError, TypeError, OverflowError, StopIteration, yaml.YAMLError)


class YamlLoader(yaml.SafeLoader):
    """Reads plain words as YAML 1.2 does: `no` is text, `1e-4` is a number."""


BOOL, FLOAT = "tag:yaml.org,2002:bool", "tag:yaml.org,2002:float"
YamlLoader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag not in (BOOL, FLOAT)]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
YamlLoader.add_implicit_resolver(BOOL, re.compile(r"^(true|True|false|False)$"), list("tTfF"))
YamlLoader.add_implicit_resolver(
    FLOAT,
    re.compile(r"^[-+]?(\d+\.\d*|\.\d+|\d+(?=[eE]))([eE][-+]?\d+)?$|^[-+]?\.(inf|Inf|INF)$|^\.(nan|NaN|NAN)$"),
    list("-+0123456789."),
)


class YamlDumper(yaml.SafeDumper):
    """Writes a list on one line, `[0.2, 1.0]`, and everything else on lines of its own."""


YamlDumper.add_representer(
    list, lambda dumper, value: dumper.represent_sequence("tag:yaml.org,2002:seq", value, flow_style=True)
)


def default_of(field: dataclasses.Field) -> Any:
    """The default of a dataclass's field."""
    return field.default if field.default_factory is dataclasses.MISSING else field.default_factory()


def read_yaml(path: str | Path, kind: str = "recipe") -> dict[str, Any]:
    """The settings in a file. Raises a ValueError of one line if it is no file, no YAML or no mapping of names.

    kind: what the file is to be, for messages.
    """
    path = Path(path)
    if path.is_dir():
        raise ValueError(f"the {kind} must be a YAML file, and {path} is a folder; give images by --dataset {path}")
    if not path.is_file():
        raise ValueError(f"there is no {kind} {path}")
    try:
        settings = yaml.load(path.read_text(), YamlLoader)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"the {kind} {path} is no YAML: {one_line(error)}") from None
    settings = {} if settings is None else settings
    if not isinstance(settings, dict) or not all(isinstance(name, str) for name in settings):
        raise ValueError(f"the {kind} {path} must consist of lines like `name: value`")
    return settings


def suggestion(name: str, known: Iterable[str]) -> str:
    """The end of a message about an unknown name: the known name that was meant. Empty if none is near."""
    meant = [ours for ours in BROUGHT.get(name, ()) if ours in known] or difflib.get_close_matches(name, known, n=1)
    return f"; did you mean {' or '.join(meant)}?" if meant else ""


def to_type(name: str, value: Any, hint: Any) -> Any:
    """A value from YAML or the command line in the type of its argument.

    Pairs and lists may be written `64,96`; none, true and false are these words. Raises a ValueError that names the
    argument.
    """
    try:
        return _as(value, hint)
    except NOT_THIS:
        given = " ".join(repr(value).split())  # that of a dataset has lines
        advice = "; its save_to_disk(FOLDER) makes a folder to give" if hasattr(value, "save_to_disk") else ""
        raise ValueError(f"{name} must be {type_in_words(hint)}, not {given}{advice}") from None


def type_in_words(hint: Any) -> str:
    """A type in words, for error messages."""
    kind, arguments = get_origin(hint) or hint, get_args(hint)
    if kind in (Union, types.UnionType):
        words = [type_in_words(argument) for argument in _alternatives(arguments)]
        return " or ".join(word for word in dict.fromkeys(words) if word != "a whole number" or "a number" not in words)
    if kind is Literal and len(arguments) == 1:
        return str(arguments[0])
    if kind is Literal or _is_enum(kind):
        return f"one of {', '.join(choices(kind if _is_enum(kind) else hint))}"
    return WORDS[kind]


def choices(hint: Any) -> list[str]:
    """The words that a type allows; none for most types."""
    kind, arguments = get_origin(hint) or hint, get_args(hint)
    if kind in (Union, types.UnionType):
        return [word for argument in arguments for word in choices(argument)]
    if kind is Literal:
        return [str(argument) for argument in arguments]
    return [member.value for member in kind] if _is_enum(kind) else []


def _as(value: Any, hint: Any) -> Any:
    kind, arguments = get_origin(hint) or hint, get_args(hint)
    if kind in (Union, types.UnionType):
        for alternative in sorted(_alternatives(arguments), key=lambda one: get_origin(one) is not Literal):
            with contextlib.suppress(*NOT_THIS):
                return _as(value, alternative)
        raise ValueError
    if kind is Literal:
        word = "none" if isinstance(value, str) and value.lower() == "none" else str(value)  # None itself is no word
        return next(a for a in arguments if str(a) == (word.capitalize() if isinstance(a, bool) else word))
    if _is_enum(kind):
        return kind(str(value)).value
    if kind is types.NoneType and str(value).lower() in ("none", "null"):
        return None
    if kind in (tuple, list):
        items = re.sub(r"[][() ]", "", value).split(",") if isinstance(value, str) else value
        if not isinstance(items, list | tuple) or (kind is tuple and len(items) != len(arguments)):
            raise ValueError
        return kind(_as(item, arguments[0]) if arguments else item for item in items)
    if kind is bool and str(value).lower() in ("true", "false"):
        return str(value).lower() == "true"
    if kind in (int, float) and not isinstance(value, bool):
        number = float(value)
        if kind is int and number != int(number):
            raise ValueError
        return kind(number)
    if kind is dict:
        value = yaml.load(value, YamlLoader) if isinstance(value, str) else value
    if kind is str and isinstance(value, int | float) and not isinstance(value, bool):
        value = str(value)
    if kind is str and isinstance(value, str | os.PathLike):
        return os.path.expanduser(value)  # no shell has done it in YAML, nor in --name=~/x
    if kind is dict and isinstance(value, dict):
        return value
    raise ValueError


def _alternatives(arguments: tuple) -> list[Any]:
    """The types of a union. `str` is left out beside an enum, because there it only spells the enum's members."""
    spelled = any(_is_enum(argument) for argument in arguments)
    return [argument for argument in arguments if not (spelled and argument is str)]


def _is_enum(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, Enum)


def plain(settings: dict[str, Any]) -> dict[str, Any]:
    """Tuples become lists, because YAML has no tuples."""
    return {name: list(value) if isinstance(value, tuple) else value for name, value in settings.items()}
