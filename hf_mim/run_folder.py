"""What a run folder contains: the name of every file in it, and the facts in them that a card shows.

config.json, model.safetensors, preprocessor_config.json    the checkpoint
recipe.yaml             every setting of the run
trainer_state.json      the state of transformers' Trainer, with the log
metrics.jsonl           the same log, a line for each entry, written during the run
loss.png, pca.png, and by the method reconstructions.png or prediction.png
pictures/step-STEP/     the same pictures from the time of each probe
results/*.json          measurements: the run writes training.json, health.json and knn.json (and start_health.json and
                        start_knn.json, if it starts from weights), `hf-mim evaluate` others
results/finetune.*      in the folder of a classifier: its test, with predictions, confusion and curve beside it
results/checkpoint-STEP/    measurements of a checkpoint that was deleted since
README.md               the model card
report.html             the page that `hf-mim report` writes
checkpoint-STEP/        checkpoints to resume from, each with a manifest.json
"""

import contextlib
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
from hf_mim.evaluation.checkpoint import checkpoint_sha256, loading_failure
from hf_mim.evaluation.result import Result
from hf_mim.files import one_line
from hf_mim.models.configuration_vit import MIMConfig

CONFIG = "config.json"
RECIPE = "recipe.yaml"
LOCAL = "_local.yaml"  # absolute paths of the recipe's data; like all names with a _ it is never uploaded
TRAINER_STATE = "trainer_state.json"
METRICS = "metrics.jsonl"
CURVE = "loss.png"
RECONSTRUCTIONS = "reconstructions.png"
PICTURES = "pictures"
CARD = "README.md"
REPORT = "report.html"
RESULTS = "results"
# The results that the run itself writes.
TRAINING_RESULT, HEALTH_RESULT, KNN_RESULT = "training", "health", "knn"
START_HEALTH_RESULT, START_KNN_RESULT = "start_health", "start_knn"  # before the first step, of a run from weights
AT_START = "at the start"  # the column of these in the other results
FINETUNE_RESULT = "finetune"  # in the folder of a classifier, with these settings: its start, and that one's hash
STARTED_FROM = "started_from", "started_from_sha256"
RECORDS = f"{TRAINING_RESULT}.json", f"{HEALTH_RESULT}.json"
CHECKPOINT = "checkpoint-"  # before the step
MANIFEST = "manifest.json"
STAGING = "_saving"  # files are written here, and moved to their place when they are whole


def result_path(folder: str | Path, *names: str, key: str = "") -> Path:
    """The file of a checkpoint's result, in `results/` in its folder.

    `names` are protocol, dataset and options, for readers. `key` tells apart what has the same names.
    """
    name = "_".join(re.sub(r"[^\w.-]+", "_", part.replace("%", "percent")).strip("_") for part in names if part)
    if len(name.encode()) > 120:
        name = f"{name.encode()[:100].decode(errors='ignore')}_{hashlib.sha256(name.encode()).hexdigest()[:12]}"
    return Path(folder) / RESULTS / f"{f'{name}_{key}' if key else name}.json"


def evaluation_path(checkpoint: str, names: list[str], key: str) -> Path:
    """Where `hf-mim evaluate` saves a result: `names` and `key` are those of `Evaluation`.

    A checkpoint on the Hub has no local folder: its results go to `results/` in the current folder. If a training has
    deleted the checkpoint meanwhile, see `kept_results`.
    """
    if (folder := Path(checkpoint)).is_dir():
        return result_path(folder, *names, key=key)
    if is_checkpoint(folder) and folder.parent.is_dir():
        return kept_results(folder) / result_path(folder, *names, key=key).name
    return result_path(".", checkpoint.replace("/", "_"), *names, key=key)


def checkpoints(run_folder: str | Path) -> list[Path]:
    """The folders `checkpoint-STEP` of a run, whole or not, the latest step first."""
    found = [path for path in Path(run_folder).glob(f"{CHECKPOINT}*") if is_checkpoint(path) and path.is_dir()]
    return sorted(found, key=step_of, reverse=True)


def is_checkpoint(path: Path) -> bool:
    """Whether the name is `checkpoint-STEP`."""
    return re.fullmatch(re.escape(CHECKPOINT) + r"\d+", path.name) is not None


def kept_results(checkpoint: Path) -> Path:
    """Where the run folder keeps the results of a checkpoint that is deleted: `results/checkpoint-STEP/`."""
    return checkpoint.parent / RESULTS / checkpoint.name


def step_of(checkpoint: str | Path) -> int:
    """120 for `.../checkpoint-120`."""
    return int(Path(checkpoint).name.removeprefix(CHECKPOINT))


def contents(folder: Path) -> list[str]:
    """The files in a folder that show that it holds a run: recipe, config, Trainer's state, checkpoints."""
    names = [name for name in (RECIPE, CONFIG, TRAINER_STATE) if (folder / name).exists()]
    return names + [path.name for path in checkpoints(folder)]


def logged(folder: str | Path, name: str) -> dict[int, float]:
    """Optimizer step → value of what a run has logged under a name, such as `probe_knn`; also while it trains."""
    return {entry["step"]: entry[name] for entry in log_lines(folder) if entry.get(name) is not None}


def log_lines(folder: str | Path) -> list[dict[str, Any]]:
    """What a run has logged, oldest first, also while it trains. Steps that were made again after a stop are there
    twice."""
    found, path = [], Path(folder) / METRICS
    for line in path.read_text().splitlines() if path.is_file() else ():
        with contextlib.suppress(ValueError):  # a run that is killed, or that writes just now, leaves half a line
            found.append(json.loads(line))
    return found


def picture_path(folder: str | Path, name: str, step: int | None = None) -> Path:
    """The file of a picture of a run, such as `pca`: at its end, or at a step."""
    folder = Path(folder) if step is None else Path(folder) / PICTURES / f"step-{step}"
    return folder / f"{name}.png"


def pictures(folder: str | Path) -> dict[str, Path]:
    """Name → file of each picture in a folder: first what tells most about a model, the curves last."""
    first = [Path(RECONSTRUCTIONS).stem, "prediction", "pca"]
    names = sorted(path.stem for path in Path(folder).glob("*.png") if not path.name.startswith((".", "_")))
    curve = Path(CURVE).stem
    names.sort(key=lambda name: first.index(name) if name in first else 9 if name == curve else 5)
    return {name: picture_path(folder, name) for name in names}


def picture_steps(folder: str | Path) -> list[int]:
    """The steps whose pictures a run has kept."""
    found = (re.fullmatch(r"step-(\d+)", path.name) for path in (Path(folder) / PICTURES).glob("step-*"))
    return sorted(int(match[1]) for match in found if match)


def read_recipe(folder: str | Path) -> dict[str, Any]:
    """The settings in a folder's recipe; {} if there is none. Raises ValueError if it is damaged."""
    return _mapping(Path(folder) / RECIPE, yaml.safe_load)


def read_config(folder: Path) -> PreTrainedConfig:
    """The config in a folder. Raises ValueError if there is none, or none of our methods."""
    if not (folder / CONFIG).is_file():
        raise ValueError(f"checkpoint must be a folder with {CONFIG}, and {folder} is none")
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except (ValueError, TypeError, OSError, KeyError, StrictDataclassError) as error:
        raise ValueError(f"{folder / CONFIG} cannot be read: {loading_failure(error)}") from error
    if not isinstance(config, MIMConfig):
        *titles, last = (method.title for method in methods.rows())
        raise ValueError(f"checkpoint must be {', '.join(titles)} or {last}, and {folder} holds {config.model_type}")
    return config


def read_log(folder: Path) -> list[dict[str, Any]]:
    """What a run has logged, each step once: from its own log, or else from Trainer's state."""
    entries = log_lines(folder) or _mapping(folder / TRAINER_STATE, json.loads).get("log_history") or []
    entries = [entry for entry in entries if isinstance(entry, dict) and isinstance(entry.get("step"), int)]
    last: list[dict[str, Any]] = []
    for entry in entries:  # a run that was stopped has made some steps again, after an earlier checkpoint
        while last and last[-1]["step"] > entry["step"]:
            last.pop()
        last.append(entry)
    return last


def card_license(folder: Path) -> str | None:
    """The license in the card of a folder."""
    try:
        license = ModelCard.load(folder / CARD).data.license if (folder / CARD).is_file() else None
    except (ValueError, yaml.YAMLError):  # no card, or a damaged one, which will be replaced
        return None
    return license if isinstance(license, str) else None


@dataclass(frozen=True)
class RunFacts:
    """What the files of a run folder say. A fact whose file is missing is None or empty.

    results: file name → measurement, without `training` and `health`.
    notes: file name → why a measurement is not one of these weights.
    training, health: the run's own records, if they were made with these weights.
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
        """Raises a ValueError of one line if there is no checkpoint of ours, or if a file is damaged."""
        folder = Path(folder).absolute()
        config = read_config(folder)
        recipe = read_recipe(folder)
        state = _mapping(folder / TRAINER_STATE, json.loads)
        results = {path.name: Result.load(path) for path in sorted((folder / RESULTS).glob("*.json"))}
        notes = _notes(results, checkpoint_sha256(folder))
        training, health = (None if name in notes else results.get(name) for name in RECORDS)
        results = {name: result for name, result in results.items() if name not in RECORDS}
        return cls(folder, config, recipe, state, results, notes, training, health)

    @property
    def own_results(self) -> dict[str, Result]:
        """The results that were measured on these weights."""
        return {name: result for name, result in self.results.items() if name not in self.notes}

    @property
    def left_out(self) -> dict[str, str]:
        """Those of the run's own records that were not made with these weights → why."""
        return {name: self.notes[name] for name in RECORDS if name in self.notes}

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
    def license(self) -> str | None:
        """The recipe's license, or that of the card in the folder, so that a later card does not lose it."""
        return self.recipe.get("license") or card_license(self.folder)

    @property
    def compute(self) -> dict[str, Any]:
        """What the training took, from the run's own record or else Trainer's state; None for what neither has."""
        record = self.training or _record_of(self.trainer_state)
        scores, settings = record.scores, record.settings
        return {
            "Device": record.device,
            "Processes": settings.get("processes"),
            "Precision": settings.get("precision"),
            "Hours": scores.get("hours"),
            "Seconds": record.seconds,
            "Images per second": scores.get("images_per_second"),
            "Images seen": scores.get("images_seen"),
            "Optimizer steps": scores.get("steps"),
            "First loss logged": scores.get("first_loss"),
            "Last loss logged": record.value,
        }


def _record_of(trainer_state: dict[str, Any]) -> Result:
    """The few facts of a training record that Trainer's state has too."""
    history = trainer_state.get("log_history")
    history = [entry for entry in history if isinstance(entry, dict)] if isinstance(history, list) else []
    losses = [entry["loss"] for entry in history if "loss" in entry] or [None]
    end = next((entry for entry in reversed(history) if "train_runtime" in entry), {})
    scores = {"first_loss": losses[0], "steps": trainer_state.get("global_step")}
    scores["images_per_second"] = end.get("train_samples_per_second")
    return Result("pretrain", "loss", losses[-1], {}, {}, scores, seconds=end.get("train_runtime"))


def _mapping(path: Path, parse: Callable[[str], Any]) -> dict[str, Any]:
    """Names and values from a file; {} if there is no file. Raises ValueError for any other content."""
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
    """File name → why its measurement is not one of the weights with this hash."""
    notes = {}
    for name, result in results.items():
        if result.settings.get(AT_START):
            notes[name] = "before the first step, to compare"
        elif result.settings.get("untrained"):
            notes[name] = "untrained encoder, to compare"
        elif result.settings.get("pixels"):
            notes[name] = "raw pixels, to compare"
        elif sha256 and result.checkpoint_sha256 and result.checkpoint_sha256 != sha256:
            notes[name] = "of other weights"
    return notes
