"""What `hf-mim pretrain --help` prints: all arguments, from the docstrings and metadata of their classes."""

import dataclasses
import inspect
import re
import textwrap
from typing import Any

from hf_mim import methods
from hf_mim.pretraining.recipe import DEFAULTS, TRAINING_FIELDS, RunArguments, model_fields
from hf_mim.pretraining.trainer import MIMTrainingArguments

USAGE = """\
usage: hf-mim pretrain [RECIPE.yaml] [--dataset SOURCE] [--output_dir DIR] [--any_argument value]

The command line goes over the recipe, the recipe over the defaults. Without any argument, MAE is pretrained on the
embedded digits. Pairs are written 64,96; --streaming means --streaming true."""

# Of transformers' own arguments, those that most runs set; of the others only the names are printed.
COMMON = (
    "output_dir",
    "num_train_epochs",
    "max_steps",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "warmup_steps",
    "adam_beta1",
    "bf16",
    "torch_compile",
    "dataloader_num_workers",
    "save_steps",
    "save_total_limit",
    "seed",
)
WIDTH, INDENT = 118, 40


def pretrain_help() -> str:
    """All arguments of `hf-mim pretrain`, grouped, with their defaults."""
    run = [(f.name, f.default, f.metadata["help"]) for f in dataclasses.fields(RunArguments)]
    training = {f.name: f for f in dataclasses.fields(MIMTrainingArguments)}
    shown = [*COMMON, *(name for name in MIMTrainingArguments.__annotations__ if name not in COMMON)]
    others = ", ".join(sorted(TRAINING_FIELDS.keys() - set(shown)))
    return "\n\n".join(
        [
            USAGE,
            section("the run", run),
            *_model_sections(),
            section(
                "training",
                [
                    (name, DEFAULTS.get(name, _default(training[name])), training[name].metadata["help"])
                    for name in shown
                ],
            ),
            "and of transformers.TrainingArguments:\n" + textwrap.indent(textwrap.fill(others, WIDTH - 2), "  "),
        ]
    )


def _model_sections() -> list[str]:
    own = {method.name: set(model_fields(method.name)) for method in methods.rows()}
    shared = set.intersection(*own.values())
    groups = [("the model", next(iter(own)), shared)]
    groups += [(f"the model, method {method}", method, members - shared) for method, members in own.items()]
    sections = []
    for title, method, members in groups:
        config_class = methods.get(method).config_class
        texts = {name: text for base in reversed(config_class.__mro__) for name, text in documented(base).items()}
        rows = [
            (f.name, _default(f), texts.get(f.name, "")) for f in dataclasses.fields(config_class) if f.name in members
        ]
        sections.append(section(title, rows))
    return sections


def documented(cls: type) -> dict[str, str]:
    """Argument → text, from the `Args:` part of a class's own docstring; several may share one text."""
    _, _, part = inspect.cleandoc(cls.__dict__.get("__doc__") or "").partition("Args:\n")
    texts = {}
    for entry in re.finditer(r"^ {4}(\w+(?:, \w+)*): (.*(?:\n {8}.*)*)", part, re.MULTILINE):
        texts |= dict.fromkeys(entry[1].split(", "), " ".join(entry[2].split()))
    return texts


def _default(field: dataclasses.Field) -> Any:
    return field.default if field.default_factory is dataclasses.MISSING else field.default_factory()


def section(title: str, rows: list[tuple[str, Any, str]]) -> str:
    """Arguments with their defaults to the left, what they mean to the right."""
    lines = [f"{title}:"]
    for name, default, text in rows:
        value = ",".join(map(str, default)) if isinstance(default, list | tuple) else str(default)
        value = value.lower() if isinstance(default, bool) else value
        left = f"  --{name}" + ("" if default is None else f" {value}")
        if text and len(left) > INDENT - 2:
            lines.append(left)
            left = ""
        right = textwrap.wrap(text, WIDTH - INDENT) or [""]
        lines += [(left.ljust(INDENT) + right[0]).rstrip(), *(" " * INDENT + more for more in right[1:])]
    return "\n".join(lines)
