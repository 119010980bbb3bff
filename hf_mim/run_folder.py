"""What a run folder contains: the name of every file in it, and the facts that a card shows.

config.json, model.safetensors, preprocessor_config.json    the checkpoint
recipe.yaml             every setting of the run
trainer_state.json      the state of transformers' Trainer, with the log
metrics.jsonl           the same log, a line for each entry, written while the run goes on
loss.png, reconstructions.png
results/*.json          measurements: training.json, health.json and knn.json by the run itself, others by users
README.md               the model card
checkpoint-STEP/        checkpoints to resume from, each with a manifest.json
"""

import hashlib
import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import ModelCard
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, PreTrainedConfig

from hf_mim import methods
from hf_mim.evaluation.checkpoint import checkpoint_sha256
from hf_mim.evaluation.result import Result
from hf_mim.files import one_line
from hf_mim.models.configuration_vit import MIMConfig

CONFIG = "config.json"
RECIPE = "recipe.yaml"
TRAINER_STATE = "trainer_state.json"
METRICS = "metrics.jsonl"
CURVE = "loss.png"
RECONSTRUCTIONS = "reconstructions.png"
CARD = "README.md"
RESULTS = "results"
# What a run writes there itself.
TRAINING_RESULT, HEALTH_RESULT, KNN_RESULT = "training", "health", "knn"
CHECKPOINT = "checkpoint-"  # a step follows
MANIFEST = "manifest.json"
STAGING = "_saving"  # what is written here gets its name and its place when it is whole


def result_path(folder: str | Path, *names: str) -> Path:
    """Where a result of a checkpoint is kept: `results/` in its folder, named after protocol, dataset, options."""
    name = "_".join(re.sub(r"[^\w.-]+", "_", part).strip("_") for part in names if part)
    if len(name) > 120:
        name = f"{name[:100]}_{hashlib.sha256(name.encode()).hexdigest()[:12]}"
    return Path(folder) / RESULTS / f"{name}.json"


# Options of an evaluation that change no number, and those that name its result anyway.
UNNAMED = {"dataset", "test", "device", "extract_batch_size", "num_workers", "cache", "output", "output_dir"}


def evaluation_path(checkpoint: str, protocol: str, values: dict[str, Any]) -> Path:
    """Where `hf-mim evaluate` keeps a result. The protocol, the data and every option given that may change it name it.

    A checkpoint on the Hub has no folder here: its results go to `results/` in the current one.
    """
    folder, names = Path(checkpoint), [protocol]
    if not folder.is_dir():
        folder, names = Path("."), [checkpoint.replace("/", "_"), protocol]
    names += [Path(values[name]).stem for name in ("dataset", "test") if values.get(name)]
    given = sorted((name, value) for name, value in values.items() if name not in UNNAMED)
    return result_path(folder, *names, *(name if value is True else f"{name}_{value}" for name, value in given))


def checkpoints(run_folder: str | Path) -> list[Path]:
    """The folders `checkpoint-STEP` of a run, the latest step first; whole or not."""
    pattern = re.compile(re.escape(CHECKPOINT) + r"\d+")
    found = [path for path in Path(run_folder).glob(f"{CHECKPOINT}*") if pattern.fullmatch(path.name)]
    return sorted(filter(Path.is_dir, found), key=step_of, reverse=True)


def step_of(checkpoint: str | Path) -> int:
    """120 for `.../checkpoint-120`."""
    return int(Path(checkpoint).name.removeprefix(CHECKPOINT))


def contents(folder: Path) -> list[str]:
    """The names that say that a folder holds a run: recipe, config, Trainer's state, checkpoints."""
    names = [name for name in (RECIPE, CONFIG, TRAINER_STATE) if (folder / name).exists()]
    return names + [path.name for path in checkpoints(folder)]


def read_config(folder: Path) -> PreTrainedConfig:
    """The config in a folder. Raises ValueError if there is none of ours."""
    if not (folder / CONFIG).is_file():
        raise ValueError(f"checkpoint must be a folder with {CONFIG}, and {folder} is none")
    try:
        config = AutoConfig.from_pretrained(folder)
    except (ValueError, TypeError, OSError, KeyError, StrictDataclassError) as error:
        raise ValueError(f"{folder / CONFIG} cannot be read: {one_line(error, 200)}") from error
    if not isinstance(config, MIMConfig):
        *titles, last = (method.title for method in methods.rows())
        raise ValueError(f"checkpoint must be {', '.join(titles)} or {last}, and {folder} holds {config.model_type}")
    return config


@dataclass(frozen=True)
class RunFacts:
    """What the files of a run folder say. What a file would say that is not there is None or empty.

    results: file name → measurement, without those of `training` and `health`.
    notes: file name → why its number is not one of these weights, for all measurements.
    training, health: what the run has written of itself, where it is of these weights.
    """

    folder: Path
    config: PreTrainedConfig
    recipe: dict[str, Any]
    trainer_state: dict[str, Any]
    results: dict[str, Result]
    notes: dict[str, str]
    training: Result | None
    health: Result | None

    @classmethod
    def read(cls, folder: str | Path) -> "RunFacts":
        """Raises ValueError, in one line, where there is no checkpoint of ours or a file is damaged."""
        folder = Path(folder).absolute()
        config = read_config(folder)
        recipe = _mapping(folder / RECIPE, yaml.safe_load)
        state = _mapping(folder / TRAINER_STATE, json.loads)
        results = {path.name: Result.load(path) for path in sorted((folder / RESULTS).glob("*.json"))}
        notes = _notes(results, checkpoint_sha256(folder))
        training, health = (results.pop(f"{name}.json", None) for name in (TRAINING_RESULT, HEALTH_RESULT))
        training = None if f"{TRAINING_RESULT}.json" in notes else training
        health = None if f"{HEALTH_RESULT}.json" in notes else health
        return cls(folder, config, recipe, state, results, notes, training, health)

    @property
    def own_results(self) -> dict[str, Result]:
        """Those of these weights."""
        return {name: result for name, result in self.results.items() if name not in self.notes}

    @property
    def left_out(self) -> dict[str, str]:
        """Which of the run's own records are not of these weights, and why."""
        records = f"{TRAINING_RESULT}.json", f"{HEALTH_RESULT}.json"
        return {name: self.notes[name] for name in records if name in self.notes}

    @property
    def measured(self) -> set[str]:
        """The protocols by which these weights were measured."""
        return {result.protocol for result in self.own_results.values()} | ({"health"} if self.health else set())

    @property
    def is_classifier(self) -> bool:
        return any(name.endswith("ForImageClassification") for name in self.config.architectures or [])

    @property
    def has_curve(self) -> bool:
        return (self.folder / CURVE).is_file()

    @property
    def has_reconstructions(self) -> bool:
        return (self.folder / RECONSTRUCTIONS).is_file()

    @property
    def license(self) -> str | None:
        """The recipe's, or that of the card that is already there, so that a later card does not forget it."""
        if self.recipe.get("license"):
            return self.recipe["license"]
        try:
            license = ModelCard.load(self.folder / CARD).data.license if (self.folder / CARD).is_file() else None
        except (ValueError, yaml.YAMLError):  # not a card, or one that is damaged: it is about to be replaced
            return None
        return license if isinstance(license, str) else None

    @property
    def compute(self) -> dict[str, Any]:
        """What the training took, by the run's own record or else by Trainer's state; None for what neither has."""
        history = self.trainer_state.get("log_history")
        history = [entry for entry in history if isinstance(entry, dict)] if isinstance(history, list) else []
        losses = [entry["loss"] for entry in history if "loss" in entry]
        end = next((entry for entry in reversed(history) if "train_runtime" in entry), {})
        names = ("Device", "Processes", "Precision", "Hours", "Seconds", "Images per second", "Images seen")
        facts = dict.fromkeys((*names, "Optimizer steps", "First loss logged", "Last loss logged"))
        if self.training is None:
            return facts | {
                "Optimizer steps": self.trainer_state.get("global_step"),
                "Images per second": end.get("train_samples_per_second"),
                "Seconds": end.get("train_runtime"),
                "First loss logged": losses[0] if losses else None,
                "Last loss logged": losses[-1] if losses else None,
            }
        scores, settings = self.training.scores, self.training.settings
        return facts | {
            "Device": self.training.device,
            "Processes": settings.get("processes"),
            "Precision": settings.get("precision"),
            "Optimizer steps": scores.get("steps"),
            "Images seen": scores.get("images_seen"),
            "Images per second": scores.get("images_per_second"),
            "Hours": scores.get("hours"),
            "Seconds": self.training.seconds,
            "First loss logged": scores.get("first_loss"),
            "Last loss logged": self.training.value,
        }


def _mapping(path: Path, parse: Callable[[str], Any]) -> dict[str, Any]:
    """Names and values from a file; {} where there is no file. Raises ValueError for any other content."""
    if not path.is_file():
        return {}
    try:
        values = parse(path.read_text(encoding="utf-8"))
    except (ValueError, yaml.YAMLError) as error:
        raise ValueError(f"{path} cannot be read: {one_line(error)}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path} must hold names and values")
    return values


def _notes(results: dict[str, Result], sha256: str | None) -> dict[str, str]:
    """File name → why its number is not one of the weights with this hash."""
    notes = {}
    for name, result in results.items():
        if result.settings.get("untrained"):
            notes[name] = "untrained encoder, to compare"
        elif sha256 and result.checkpoint_sha256 and result.checkpoint_sha256 != sha256:
            notes[name] = "**of other weights**"
    return notes
