"""What a comparison is: its YAML file, read and checked."""

import contextlib
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, get_type_hints

from huggingface_hub.errors import StrictDataclassError

from hf_mim import methods
from hf_mim.checks import least, one_of
from hf_mim.evaluation import PROTOCOLS, load_protocol
from hf_mim.evaluation.measure import arguments_of, option_types
from hf_mim.files import one_line
from hf_mim.pretraining.recipe import RUN_FIELDS, Recipe
from hf_mim.pretraining.settings import read_yaml, suggestion, to_type

REFERENCES = ("untrained", "start", "pixels", "supervised")
# These name files and folders of the comparison itself, other rows and other columns.
RESERVED = ("", "supervised", "training", "probe", "logs", "raw_pixels", "supervised_from_scratch")
RESERVED += ("images_seen", "minutes", "device", "note")
# Settings of a run that the comparison sets → from what.
SET = {"dataset": "dataset", "seed": "seeds", "max_steps": "images", "num_train_epochs": "images"}
SET |= {"probe_every": "points", "output_dir": "--output", "resume": "another start"}
SET_IN_EVALUATION = ("output", "output_dir", "untrained", "untrained_seed", "pixels", "beside")
# What has to be equal for all runs: the encoder, and what `RunArguments` says of images and augmentation.
FREE = {"method", "license", "probe_every", "resume", "accept_changed_data"}
FREE |= {"dataset_fingerprint", "test_dataset_fingerprint"}
ENCODER = ("image_size", "patch_size", "num_channels", "hidden_size", "num_hidden_layers", "num_attention_heads")
ENCODER += ("intermediate_size", "layer_norm_eps", "hidden_act", "drop_path_rate")
EQUAL = (*(name for name in RUN_FIELDS if name not in FREE), *ENCODER)


@dataclass
class Comparison:
    """What is compared, and how. The arguments are those of the YAML file, without its `extends` (see `read_file`).

    Args:
        runs: name → the settings of hf-mim pretrain that are this run's own
        images: the budget of each run, in images seen
        dataset: images, as for hf-mim pretrain
        seeds: each run is made once with each of them
        settings: the settings of hf-mim pretrain that all runs share
        varies: settings in which the runs may differ, although they change the encoder, the augmentation or the images
        evaluate: column of the table → options of hf-mim evaluate, and its protocol if the column has another name
        references: what stands beside the runs: untrained, start (the weights of init_from), pixels, supervised
        supervised: options of hf-mim evaluate finetune for the supervised reference
        points: how often a run measures its features while it trains

    Raises:
        ValueError: in one line that names the argument; also if the runs would not be comparable.
    """

    runs: dict[str, Any]
    images: int
    dataset: str
    seeds: list[int] = field(default_factory=lambda: [0, 1])
    settings: dict[str, Any] = field(default_factory=dict)
    varies: list[str] = field(default_factory=list)
    evaluate: dict[str, Any] = field(default_factory=lambda: {"knn": {}, "linear": {}})
    references: list[str] = field(default_factory=lambda: list(REFERENCES))
    supervised: dict[str, Any] = field(default_factory=dict)
    points: int = 10

    @classmethod
    def read(cls, path: str | Path, given: dict[str, Any], only: Sequence[str] | None = None) -> "Comparison":
        """A file's comparison. What is `given` stands in place of what the file says; `only` are the runs it has,
        by the names of their folders."""
        values, types = read_file(Path(path)) | given, get_type_hints(cls)
        for name in values:
            if name not in types:
                meant = suggestion(name, [*types, "extends"])
                raise ValueError(f"unknown argument {name} of a comparison{meant}")
        for name in ("runs", "images", "dataset"):
            if name not in values:
                raise ValueError(f"{name} must be given in the comparison {path}")
        if only is not None:
            known = {file_name(name): name for name in mappings("runs", values["runs"])}
            for name in only:
                one_of(known, only=name)
            values["runs"] = {name: values["runs"][name] for file, name in known.items() if file in only}
        return cls(**{name: to_type(name, value, types[name]) for name, value in values.items()})

    def __post_init__(self):
        least(1, images=self.images, points=self.points)
        if not self.seeds or len(set(self.seeds)) < len(self.seeds) or min(self.seeds) < 0:
            raise ValueError(f"seeds must be different numbers from 0 on, at least one, not {self.seeds}")
        for reference in self.references:
            one_of(REFERENCES, references=reference)
        for name in self.varies:
            one_of(EQUAL, varies=name)
        self.runs, self.evaluate = (mappings(name, getattr(self, name)) for name in ("runs", "evaluate"))
        self._check_equal()
        for column in self.evaluate:
            with named(f"column {column}"):
                self.arguments(self.protocol(column), self.own_options(column))
        with named("supervised"):
            if "epochs" in self.supervised:
                raise ValueError("epochs cannot be given here: images sets it")
            self.arguments("finetune", self.supervised)

    def _check_equal(self):
        """Raise ValueError if the runs differ, by a setting or by a default, in what has to be equal."""
        (first, one), *others = ((name, fair(recipe)) for name, recipe in self.recipes.items())
        for name, other in others:
            for setting in EQUAL:
                if setting not in self.varies and repr(one[setting]) != repr(other[setting]):  # nan is no equal of nan
                    raise ValueError(
                        f"{setting} must be equal for all runs, and is {spelled(one[setting])} for {first} and "
                        f"{spelled(other[setting])} for {name}: give it in settings, or name it in varies"
                    )

    @cached_property
    def recipes(self) -> dict[str, Recipe]:
        """Name of a run → its recipe, without what the comparison sets."""
        recipes = {}
        for name, own in self.runs.items():
            with named(f"run {name}"):
                for setting in self.settings | own:
                    if setting in SET:
                        raise ValueError(f"{setting} cannot be given here: {SET[setting]} sets it")
                recipes[name] = Recipe.resolve({"dataset": self.dataset}, self.settings, own, {"output_dir": name})
                recipes[name].config()  # checks the values of the model
                least(images_per_step(recipes[name]), images=self.images)
        return recipes

    @property
    def first(self) -> Recipe:
        """The recipe of the first run. In what has to be equal, it stands for all."""
        return next(iter(self.recipes.values()))

    def steps(self, run: str) -> int:
        """Optimizer steps of a run."""
        return self.images // images_per_step(self.recipes[run])

    def uneven_budgets(self) -> Iterator[str]:
        """A line for each run whose steps do not make up the budget."""
        for name, recipe in self.recipes.items():
            step = images_per_step(recipe)
            if self.images % step:
                seen = self.steps(name) * step
                yield f"{name} sees {seen:,} of {self.images:,} images: {self.steps(name):,} whole steps of {step}"

    def untrained_row(self, run: str) -> str | None:
        """The name of the row with a run's untrained encoder; None if an earlier run has the same kind of encoder,
        because each kind draws its weights in its own way."""
        kinds = {name: methods.get(recipe.run.method).encoder_class for name, recipe in self.recipes.items()}
        first = next(name for name, kind in kinds.items() if kind is kinds[run])
        return f"untrained encoder of {run}" if first == run and "untrained" in self.references else None

    def start_row(self, run: str) -> str | None:
        """The name of the row with the weights that a run starts from, before its first step; None if it starts from
        nothing, or where an earlier run does."""
        sources = {name: recipe.run.init_from for name, recipe in self.recipes.items() if recipe.run.init_from}
        first = next((name for name in sources if sources[name] == sources.get(run)), None)
        return f"start of {run}" if first == run and "start" in self.references else None

    def protocol(self, column: str) -> str:
        """What measures a column of the table."""
        return str(self.evaluate[column].get("protocol", column))

    def own_options(self, column: str) -> dict[str, Any]:
        """The options of a column's protocol in the file."""
        return {name: value for name, value in self.evaluate[column].items() if name != "protocol"}

    def arguments(self, protocol: str, given: dict[str, Any]) -> tuple:
        """The options of a protocol, typed and checked, as `measure.arguments_of` gives them. Or a ValueError."""
        if protocol not in PROTOCOLS:
            known = f"{', '.join(PROTOCOLS)}, not {protocol}{suggestion(protocol, PROTOCOLS)}"
            raise ValueError(f"protocol must be one of {known}")
        kind = load_protocol(protocol)
        types = option_types(kind)
        for name in given:
            if name in SET_IN_EVALUATION:
                raise ValueError(f"{name} cannot be given here: the comparison sets it")
            if name not in types:
                raise ValueError(f"{protocol} has no option {name}{suggestion(name, types)}")
        options = self.data_options(protocol) | given
        return arguments_of(kind, {name: to_type(name, value, types[name]) for name, value in options.items()})

    def data_options(self, protocol: str) -> dict[str, Any]:
        """The options of a protocol that follow from the images and the device of the runs."""
        run = self.first.run
        found = {"dataset": run.dataset, "test": run.test_dataset, "train_split": run.train_split}
        found |= {"split": run.train_split, "test_split": run.test_split, "image_column": run.image_column}
        found |= {"missing_modality": run.missing_modality, "labels": run.labels, "group": run.group}
        found |= {"device": "cpu" if self.first.training.get("use_cpu") else None}
        offered, usual = option_types(load_protocol(protocol)), (None, "train", "error")
        return {name: value for name, value in found.items() if name in offered and value not in usual}


def read_file(path: Path, *extending: Path) -> dict[str, Any]:
    """The arguments of a file, and those of the file that it `extends`. If both give one, the file's own stands;
    `settings` are joined name by name. `extending`: the files that led here."""
    values = read_yaml(path, "comparison")
    if "extends" not in values:
        return values
    base = path.parent / to_type("extends", values.pop("extends"), str)
    if base.resolve() in (one.resolve() for one in (path, *extending)):
        raise ValueError(f"extends must not lead back to the same file: {path} extends {base}")
    if not base.is_file():
        raise ValueError(f"extends must name a file, and there is no {base}, which {path} extends")
    inherited = read_file(base, path, *extending)
    settings = [to_type("settings", one.get("settings") or {}, dict[str, Any]) for one in (inherited, values)]
    return inherited | values | {"settings": settings[0] | settings[1]}


@contextlib.contextmanager
def named(part: str) -> Iterator[None]:
    """Inside, the message of an error begins with the part of the comparison that it is about."""
    try:
        yield
    except (ValueError, StrictDataclassError) as error:
        raise ValueError(f"{part}: {one_line(error)}") from error


def mappings(argument: str, given: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Name → settings, {} for none. Raises ValueError unless each name can be that of a file and of no other."""
    if not given:
        raise ValueError(f"{argument} must have at least one name")
    files = [file_name(name) for name in given]
    for (name, settings), file in zip(given.items(), files, strict=True):
        if not isinstance(settings, dict | None):
            raise ValueError(f"{argument} must have names with settings, and {name} has {settings!r}")
        if file in RESERVED or files.count(file) > 1:
            raise ValueError(f"{argument} must have names of their own, in letters and digits, not {name!r}")
    return {name: settings or {} for name, settings in given.items()}


def fair(recipe: Recipe) -> dict[str, Any]:
    """The values of a recipe that have to be equal for all runs."""
    config = recipe.config()
    return {name: getattr(config if name in ENCODER else recipe.run, name) for name in EQUAL}


def images_per_step(recipe: Recipe) -> int:
    return recipe.training["per_device_train_batch_size"] * recipe.training.get("gradient_accumulation_steps", 1)


def file_name(name: str) -> str:
    """A name as it stands in names of files."""
    return re.sub(r"[^\w.-]+", "_", str(name)).strip("_.")


def spelled(value: Any) -> str:
    """A value as one types it on the command line."""
    if isinstance(value, list | tuple):
        return ",".join(map(spelled, value))
    if isinstance(value, bool) or value is None:
        return str(value).lower()
    return json.dumps(value) if isinstance(value, dict) else str(value)
