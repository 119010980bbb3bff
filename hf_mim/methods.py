"""The table of methods, one row each. All code that depends on which methods exist loops over this table.

    get("mae").pretraining_class       # a row names its classes by text, so that the table itself imports nothing
    register(Method(name="toy", ...))  # a method of your own: docs/new_method.md

A method of another package gets into the table in two ways. The package names it under the entry point
`hf_mim.methods`, or its module is imported: by `load_module("my_methods")`, or by `--import my_methods` on the command
line.
"""

import dataclasses
import difflib
import importlib
import importlib.util
import inspect
import logging
import os
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

logger = logging.getLogger(__name__)

ENTRY_POINTS = "hf_mim.methods"
RECIPES, CARDS = Path(__file__).with_name("recipes"), Path(__file__).with_name("hub") / "cards"


def _class_of(role: str) -> property:
    """The class that a row gives for a role. If it is text, it is imported when it is first asked for."""

    def load(method: "Method") -> type | None:
        given = getattr(method, role)
        if not isinstance(given, str):
            return given
        module, _, name = given.partition(":")
        try:
            return getattr(importlib.import_module(module), name)
        except (ImportError, AttributeError, ValueError) as error:
            raise ImportError(f"the {role} of method {method.name}, {given}, cannot be imported: {error}") from error

    return property(load)


@dataclass(frozen=True)
class Method:
    """One row of the table.

    A class is given as such or as text, "module:Class". A text is given as it is (`str`) or by its file (`Path`).

    Args:
        name: what `--method` takes: small letters, digits and underscores.
        title: the name in cards and messages.
        config, encoder, pretraining: the classes for `AutoConfig`, `AutoModel`, `AutoModelForPreTraining`.
        card: what the model card says of the method: Markdown, a Jinja template that can use `config`.
        classifier, backbone: those for `AutoModelForImageClassification` and `AutoBackbone`, if the method has them.
        papers: arXiv ids.
        citation: BibTeX entries, one text for each paper.
        training_defaults: settings of a recipe whose default differs for this method.
        embedded: defaults for embedded data, on top of `training_defaults`: its name → settings, or a recipe file. A
            run without `dataset` has the first of these data.
        advice: what to change first when the targets collapse: setting → in which direction.
        variant_of: the name of another method that has the same classes, if this method is only a setting of it.
        settings: the config fields that make the variant, with their values.
        aliases: other names of the method.
        image_processor: the class for `AutoImageProcessor`.

    Raises:
        ValueError: a name has other characters, or a field is missing.
    """

    name: str
    title: str
    config: str | type
    encoder: str | type
    pretraining: str | type
    card: str | Path
    classifier: str | type | None = None
    backbone: str | type | None = None
    papers: tuple[str, ...] = ()
    citation: tuple[str | Path, ...] = ()
    training_defaults: Mapping[str, Any] = field(default_factory=dict)
    embedded: Mapping[str, Mapping[str, Any] | Path] = field(default_factory=dict)
    advice: Mapping[str, str] = field(default_factory=dict)
    variant_of: str | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    aliases: tuple[str, ...] = ()
    image_processor: str | type = "hf_mim.models.image_processing_mim:MIMImageProcessor"

    def __post_init__(self) -> None:
        for name in (self.name, *self.aliases):
            if not re.fullmatch("[a-z][a-z0-9_]*", name):
                raise ValueError(f"name of a method must be small letters, digits and underscores, not {name!r}")
        for role in ("config", "encoder", "pretraining", "card"):
            if not getattr(self, role):
                raise ValueError(f"{role} must be given, and method {self.name} has none")

    config_class = _class_of("config")
    encoder_class = _class_of("encoder")
    pretraining_class = _class_of("pretraining")
    classifier_class = _class_of("classifier")
    backbone_class = _class_of("backbone")
    image_processor_class = _class_of("image_processor")

    @property
    def predicts_pixels(self) -> bool:
        """Whether the pretraining model can show a reconstruction."""
        return hasattr(self.pretraining_class, "reconstruct")

    @property
    def takes_nodata(self) -> bool:
        """Whether the pretraining model can leave pixels without data out of its loss."""
        return "valid_pixels" in inspect.signature(self.pretraining_class.forward).parameters

    @property
    def card_text(self) -> str:
        return _text(self.card)

    @property
    def bibtex(self) -> str:
        """The BibTeX entries of all papers, with a blank line between them."""
        return "\n\n".join(_text(entry).strip() for entry in self.citation)


def _text(given: str | Path) -> str:
    return given.read_text(encoding="utf-8") if isinstance(given, Path) else given


def _ours(
    name: str, prefix: str, citation: tuple[str, ...], embedded: tuple[str, ...] = ("digits",), **about: Any
) -> Method:
    """A method of this package. Its classes, recipe and texts are in files that are named after it."""
    modeling = f"hf_mim.models.modeling_{name}:{prefix}"
    return Method(
        name=name,
        config=f"hf_mim.models.configuration_{name}:{prefix}Config",
        encoder=f"{modeling}Model",
        pretraining=f"{modeling}ForPreTraining",
        classifier=f"{modeling}ForImageClassification",
        backbone=f"{modeling}Backbone",
        citation=tuple(CARDS / f"{key}.bib" for key in citation),
        embedded={data: RECIPES / f"{data}_{name}.yaml" for data in embedded},
        card=CARDS / f"{name}.md",
        **about,
    )


MAE = _ours("mae", "MAE", ("he2022mae",), ("textures", "digits"), title="MAE", papers=("2111.06377",))
LATENT_MIM = _ours(
    "latent_mim",
    "LatentMIM",
    ("wei2024latentmim",),
    title="Latent MIM",
    papers=("2407.15837",),
    training_defaults={"start_lr_ratio": 0.25, "final_lr_ratio": 0.25},
    advice={
        "loss_type": "patch_discrimination",
        "momentum_start": "nearer to 1 (published 0.99)",
        "patch_gap": "a quarter of the patch",
        "mask_ratio": "higher (published 0.9)",
        "similarity_weight": "above 0 (published 0.1)",
        "learning_rate": "lower",
    },
)
STOP_JEPA = _ours(
    "stop_jepa",
    "StopJepa",
    ("bar2024stop", "assran2023ijepa"),
    title="StoP-JEPA",
    papers=("2308.00566", "2301.08243"),
    training_defaults={
        "crop_scale": (0.3, 1.0),
        "base_lr": 1e-4,
        "start_lr_ratio": 0.25,
        "final_lr_ratio": 0.125,
        "weight_decay": 0.04,
        "weight_decay_end": 0.4,
        "adam_beta2": 0.999,
    },
    advice={
        "momentum_start": "nearer to 1 (published 0.996)",
        "learning_rate": "lower, with more warmup_steps",
        "target_scale": "not below (0.15, 0.2)",
        "context_scale": "not below (0.85, 1)",
    },
    aliases=("stop",),
)
SYM_MIM = _ours(
    "sym_mim",
    "SymMIM",
    ("nguyen2024symmim",),
    title="SymMIM",
    papers=("2408.12772",),
    advice={
        "contrast_weight": "lower",
        "momentum_start": "nearer to 1 (0.99 by default)",
        "learning_rate": "lower",
    },
)
INTERACTIVE_MIM = _ours(
    "interactive_mim",
    "InteractiveMIM",
    ("vu2024interactive",),
    title="Interactive MIM",
    papers=("2409.08885",),
)
IJEPA = dataclasses.replace(
    STOP_JEPA,
    name="ijepa",
    title="I-JEPA",
    papers=STOP_JEPA.papers[1:],
    citation=STOP_JEPA.citation[1:],
    variant_of="stop_jepa",
    settings={"position_noise_std": 0.0},
    aliases=("i_jepa",),
)

OURS = (MAE, LATENT_MIM, STOP_JEPA, IJEPA, SYM_MIM, INTERACTIVE_MIM)

_table: dict[str, Method] = {}
_entry_points_are_loaded = False


def register(method: Method, replace: bool = False) -> None:
    """Put a method into the table. transformers' Auto classes know it from their next use on.

    Raises ValueError for a name that another method has. `replace` allows it for a method of the same name.
    """
    for name in (method.name, *method.aliases):
        other = _find(name)
        if other is not None and other != method and not (replace and other.name == method.name):
            raise ValueError(
                f"name must be one that no method has, and {name} is {other.title}; replace=True replaces it"
            )
    if method.variant_of is not None and method.variant_of not in _table:
        raise ValueError(f"variant_of must be a method, and {method.variant_of} is none")
    _table[method.name] = method


def rows(variants: bool = False) -> list[Method]:
    """All methods in the order of the table. With `variants`, also those that have another method's classes."""
    _load_entry_points()
    return [method for method in _table.values() if variants or method.variant_of is None]


def names() -> list[str]:
    """The names of all methods and variants, which `--method` takes."""
    return [method.name for method in rows(variants=True)]


def get(name: str) -> Method:
    """The method with this name or alias. Raises ValueError for an unknown name, with the nearest known one."""
    _load_entry_points()
    method = _find(name)
    if method is None:
        nearest = difflib.get_close_matches(str(name).lower().replace("-", "_"), names(), n=1)
        hint = f"did you mean {nearest[0]}?" if nearest else "--import loads a method of your own"
        raise ValueError(f"method must be one of {', '.join(names())}, not {name!r}; {hint}")
    return method


def of_config(config: Any) -> Method:
    """The method of a model's config, or the variant whose settings it has. Raises ValueError if there is none."""
    found = [
        method
        for method in rows(variants=True)
        if method.config_class.model_type == config.model_type
        and all(getattr(config, name) == value for name, value in method.settings.items())
    ]
    if not found:
        known = ", ".join(method.config_class.model_type for method in rows())
        raise ValueError(f"model_type must be that of a method ({known}), not {config.model_type!r}")
    return max(found, key=lambda method: len(method.settings))


def load_module(name: str) -> None:
    """Import a module that registers methods.

    Args:
        name: that of a module which is installed or in the current folder, or a .py file.

    Raises:
        ValueError: it cannot be imported; one line.
    """
    try:
        if not name.endswith(".py"):
            if os.getcwd() not in sys.path:
                sys.path.append(os.getcwd())  # `python` does so for scripts, but we put it after all that is installed
            importlib.import_module(name)
            return
        path = Path(name).resolve()
        known = getattr(sys.modules.get(path.stem), "__file__", None)
        if known == str(path):
            return
        if path.stem in sys.modules:
            raise ImportError(f"there is a module {path.stem} already; give the file another name")
        spec = importlib.util.spec_from_file_location(path.stem, path)
        assert spec is not None and spec.loader is not None  # a .py file has a loader
        sys.modules[path.stem] = module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    except (ImportError, OSError, SyntaxError, NameError, AttributeError, TypeError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"import must be a module with methods, and {name} cannot be imported: {reason}") from error


def _find(name: str) -> Method | None:
    return next((method for method in _table.values() if name in (method.name, *method.aliases)), None)


def _load_entry_points() -> None:
    """Load the methods of installed packages, once. If one fails, a warning names it, and the others are loaded."""
    global _entry_points_are_loaded
    if _entry_points_are_loaded:
        return
    _entry_points_are_loaded = True
    from importlib.metadata import entry_points  # not at the top, so that `hf-mim --help` is quick

    for entry_point in entry_points(group=ENTRY_POINTS):
        try:
            loaded = entry_point.load()  # a module that registers its methods, or a method
            if isinstance(loaded, Method):
                register(loaded)
        except (ImportError, AttributeError, ValueError) as error:
            logger.warning("the method %s (%s) cannot be loaded: %s", entry_point.name, entry_point.value, error)


for _method in OURS:
    register(_method)
