"""Model cards from what a checkpoint's folder holds: config, recipe, trainer state, results, pictures. No number comes
from anywhere else; one that is in none of them is said to be missing.

    model_card("runs/digits_mae").save("runs/digits_mae/README.md")  # or: hf-mim card runs/digits_mae

The prose is in `card_template.md`, that of a method in the file or text that its row in `hf_mim.methods` names.
"""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import quote

import jinja2
import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, PreTrainedConfig

from hf_mim import methods
from hf_mim.evaluation import PROTOCOLS
from hf_mim.evaluation.checkpoint import checkpoint_sha256
from hf_mim.evaluation.result import Result, format_number
from hf_mim.hub.card_text import is_hub_name, last_name, markdown_table, scrubbed, scrubbed_all, shown, shown_number
from hf_mim.models.configuration_vit import MIMConfig

TEMPLATE = Path(__file__).with_name("card_template.md")

# Protocols of classes and of masks; the Hub's word for anything else is image-feature-extraction.
TASKS = dict.fromkeys(("knn", "leave_one_out", "linear", "attentive", "lowshot", "finetune"), "image-classification")
TASKS |= dict.fromkeys(("segment", "propagate"), "image-segmentation")
NOT_RECORDED = "not recorded"
# Settings of a recipe that say where and how it ran, not what it computes.
OF_THE_MACHINE = ("output_dir", "dataloader_", "logging_", "save_", "hub_", "push_to_hub", "report_to")
OF_THE_MACHINE += ("use_cpu", "disable_tqdm")


def model_card(folder: str | Path, repo_id: str | None = None, license: str | None = None) -> ModelCard:
    """The card of a checkpoint.

    Args:
        folder: of one of hf_mim's models; what is beside the weights is told, what is not is said to be missing.
        repo_id: the name on the Hub that the examples load; default: the folder's own name.
        license: identifier such as apache-2.0; default: the recipe's, or that of the card that is there.

    Raises:
        ValueError: no checkpoint of ours, a file that is damaged, or a licence that is no identifier; in one line.
    """
    folder = Path(folder).absolute()
    config = read_config(folder)
    recipe = _read(folder / "recipe.yaml", yaml.safe_load) or {}
    state = _read(folder / "trainer_state.json", json.loads) or {}
    results = {path.name: Result.load(path) for path in sorted((folder / "results").glob("*.json"))}
    notes = _result_notes(results, checkpoint_sha256(folder))
    left_out = {name: notes[name] for name in ("training.json", "health.json") if name in notes}
    training, health = (results.pop(name, None) for name in ("training.json", "health.json"))
    training = None if "training.json" in left_out else training
    health = None if "health.json" in left_out else health
    own = {name: result for name, result in results.items() if name not in notes}
    method = methods.of_config(config)
    license = check_license(license or recipe.get("license") or _license_of(folder / "README.md"))
    name = repo_id.rpartition("/")[2] if repo_id else folder.name
    dataset = _dataset(recipe, training)
    measured = {result.protocol for result in own.values()} | ({"health"} if health else set())
    return ModelCard.from_template(
        _metadata(name, config, dataset, own, license),
        template_str=TEMPLATE.read_text(encoding="utf-8"),
        name=shown(name),
        address=repo_id or folder.name,
        title=method.title,
        method_text=jinja2.Template(method.card_text).render(config=config),
        bibtex=method.bibtex,
        predicts_pixels=method.predicts_pixels,
        config=config,
        classifier=is_classifier(config),
        remote_code=hasattr(config, "auto_map"),
        auto_class="AutoModelForImageClassification" if is_classifier(config) else "AutoModel",
        channels=config.num_channels,
        image_size=_size(config.image_size),
        training_size=_size(config.training_size),
        overview=_overview(config, dataset, license),
        results=_results_table(results, notes),
        result_notes=[f"`{name}`: {shown(text)}" for name, result in results.items() for text in result.notes],
        left_out=left_out,
        not_measured=[name for name in PROTOCOLS if name not in measured],
        health=_health_table(health),
        health_data=_data(health.data) if health else None,
        health_notes=[shown(text) for text in health.notes] if health else [],
        worries=[shown(row.get("measure")) for row in health.table if row.get("worry") == "yes"] if health else [],
        curve=(folder / "loss.png").is_file(),
        reconstructions=(folder / "reconstructions.png").is_file(),
        compute=_compute(training, state),
        compute_notes=[shown(text) for text in training.notes] if training else [],
        augmentation=_augmentation(recipe),
        recipe_text=_recipe_text(recipe, dataset),
        data=_training_data(recipe, dataset, training),
    )


def write_card(folder: str | Path, repo_id: str | None = None, license: str | None = None) -> Path:
    """Write `model_card(...)` to the folder's README.md, whole or not at all."""
    card, path = model_card(folder, repo_id, license), Path(folder) / "README.md"
    aside = path.with_name("README.md.part")
    card.save(aside)
    aside.replace(path)
    return path


def read_config(folder: Path) -> PreTrainedConfig:
    """The config in a folder. Raises ValueError if there is none of ours."""
    if not (folder / "config.json").is_file():
        raise ValueError(f"checkpoint must be a folder with config.json, and {folder} is none")
    try:
        config = AutoConfig.from_pretrained(folder)
    except (ValueError, TypeError, OSError, KeyError, StrictDataclassError) as error:
        raise ValueError(f"{folder / 'config.json'} cannot be read: {' '.join(str(error).split())[:200]}") from error
    if not isinstance(config, MIMConfig):
        *titles, last = (method.title for method in methods.rows())
        raise ValueError(f"checkpoint must be {', '.join(titles)} or {last}, and {folder} holds {config.model_type}")
    return config


def is_classifier(config: PreTrainedConfig) -> bool:
    return any(name.endswith("ForImageClassification") for name in config.architectures or [])


def check_license(license: str | None) -> str | None:
    """Raise ValueError for anything but one of the Hub's short names."""
    if license is not None and not (isinstance(license, str) and re.fullmatch(r"[a-z0-9][a-z0-9.-]*", license)):
        raise ValueError(f"license must be an identifier of the Hub such as apache-2.0 or cc-by-nc-4.0, not {license}")
    return license


def _read(path: Path, parse: Callable[[str], Any]) -> dict | None:
    """A mapping from a file; None where there is no file. Raises ValueError for any other content."""
    if not path.is_file():
        return None
    try:
        values = parse(path.read_text(encoding="utf-8"))
    except (ValueError, yaml.YAMLError) as error:
        raise ValueError(f"{path} cannot be read: {' '.join(str(error).split())}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path} must hold names and values")
    return values


def _license_of(path: Path) -> str | None:
    """What the card that is already there says, so that a later one does not forget it."""
    if not path.is_file():
        return None
    try:
        license = ModelCard.load(path).data.license
        return license if isinstance(license, str) else None
    except (ValueError, yaml.YAMLError):  # not a card, or one that is damaged: it is about to be replaced
        return None


def _metadata(name: str, config, dataset: str, results: dict[str, Result], license: str | None) -> ModelCardData:
    method = methods.of_config(config)
    tags = ["hf_mim", "masked-image-modeling", "self-supervised-learning", method.title.lower().replace(" ", "-")]
    return ModelCardData(
        model_name=name,
        library_name="transformers",
        pipeline_tag="image-classification" if is_classifier(config) else "image-feature-extraction",
        license=license,
        datasets=[dataset] if is_hub_name(dataset) else None,
        tags=tags + [f"arxiv:{paper}" for paper in method.papers],
        eval_results=[_eval_result(result) for result in results.values() if result.value is not None] or None,
    )


def _eval_result(result: Result) -> EvalResult:
    measured = result.data.get("test", result.data)
    source, _, split = scrubbed(measured.get("source", "images")).partition(", split ")
    return EvalResult(
        task_type=TASKS.get(result.protocol, "image-feature-extraction"),
        dataset_type=source if is_hub_name(source) else re.sub(r"[^\w.-]+", "-", source),
        dataset_name=source,
        dataset_split=split or None,
        metric_type=re.sub(r"\W+", "_", result.metric.lower()),
        metric_name=f"{result.metric} ({result.protocol})",
        metric_value=result.value,
    )


def _result_notes(results: dict[str, Result], sha256: str | None) -> dict[str, str]:
    """File → why its number is not one of these weights."""
    notes = {}
    for name, result in results.items():
        if result.settings.get("untrained"):
            notes[name] = "untrained encoder, to compare"
        elif sha256 and result.checkpoint_sha256 and result.checkpoint_sha256 != sha256:
            notes[name] = "**of other weights**"
    return notes


def _results_table(results: dict[str, Result], notes: dict[str, str]) -> str:
    marks = {name: f" ({note})" for name, note in notes.items()}
    rows = [
        {
            "Protocol": f"[{shown(result.protocol)}](results/{quote(name)}){marks.get(name, '')}",
            "Data": _data(result.data),
            "Metric": shown(result.metric),
            "Value": "not finite" if result.value is None else format_number(result.value),
            "Beside it": "; ".join(f"{shown(key)} {shown_number(value)}" for key, value in result.scores.items()),
            "Protocol in full": "; ".join(f"{shown(key)} {shown(value)}" for key, value in result.settings.items()),
        }
        for name, result in results.items()
    ]
    return markdown_table(rows)


def _health_table(health: Result | None) -> str:
    rows = health.table if health else []
    return markdown_table([{shown(name): shown_number(value) for name, value in row.items()} for row in rows])


def _overview(config, dataset: str, license: str | None) -> list[tuple[str, str]]:
    heads = "1 head" if config.num_attention_heads == 1 else f"{config.num_attention_heads} heads"
    return [
        ("Encoder", f"width {config.hidden_size}, depth {config.num_hidden_layers}, {heads}"),
        ("Input", f"{config.num_channels} × {_size(config.image_size)} pixels, patches of {_size(config.patch_size)}"),
        ("Pretrained on", shown(dataset)),
        ("Licence", license or "not given"),
    ]


def _compute(training: Result | None, state: dict) -> list[tuple[str, str]]:
    """From the run's own record, or else what Trainer's state has of it."""
    history = state.get("log_history")
    history = [entry for entry in history if isinstance(entry, dict)] if isinstance(history, list) else []
    losses = [entry["loss"] for entry in history if "loss" in entry]
    end = next((entry for entry in reversed(history) if "train_runtime" in entry), {})
    facts = {
        "Optimizer steps": state.get("global_step"),
        "Images per second": end.get("train_samples_per_second"),
        "Seconds": end.get("train_runtime"),
        "First loss logged": losses[0] if losses else None,
        "Last loss logged": losses[-1] if losses else None,
    }
    if training is not None:
        scores, settings = training.scores, training.settings
        facts |= {
            "Device": training.device,
            "Processes": settings.get("processes"),
            "Precision": settings.get("precision"),
            "Optimizer steps": scores.get("steps"),
            "Images seen": scores.get("images_seen"),
            "Images per second": scores.get("images_per_second"),
            "Hours": scores.get("hours"),
            "Seconds": training.seconds,
            "First loss logged": scores.get("first_loss"),
            "Last loss logged": training.value,
        }
    order = ["Device", "Processes", "Precision", "Hours", "Seconds", "Images per second", "Images seen"]
    order += ["Optimizer steps", "First loss logged", "Last loss logged"]
    return [(name, NOT_RECORDED if facts.get(name) is None else shown_number(facts[name])) for name in order]


def _dataset(recipe: dict, training: Result | None) -> str:
    """What the run was trained on, as readers may see it. `owner/name` is one of the Hub only if the run has noted so:
    a folder beside it may have been meant, and is not where this card is written."""
    dataset = str(recipe.get("dataset") or NOT_RECORDED)
    if "://" in dataset or (is_hub_name(dataset) and training is not None and training.data.get("local") is False):
        return scrubbed(dataset)
    return last_name(dataset)


def _training_data(recipe: dict, dataset: str, training: Result | None) -> str:
    count = training.data.get("images") if training else None
    number = "their number is not recorded" if count is None else f"{shown(count)} images"
    return f"{shown(dataset)}, split {shown(recipe.get('train_split', NOT_RECORDED))} ({number})"


def _augmentation(recipe: dict) -> dict[str, str]:
    """Settings of the recipe as they are told; a probability of 0 is not."""
    told = {}
    for name in ("crop_scale", "crop_ratio", "blur_sigma", "image_mean", "image_std"):
        values = recipe.get(name)
        between = ", " if name.startswith("image") else " to "
        told[name] = (
            between.join(shown(str(value)) for value in values) if values and isinstance(values, list) else NOT_RECORDED
        )
    for name in ("flip_probability", "grayscale_probability", "blur_probability"):
        value = recipe.get(name, NOT_RECORDED)
        told[name] = shown(str(value)) if value else ""
    return told if recipe else {}


def _recipe_text(recipe: dict, dataset: str) -> str:
    kept = {name: value for name, value in recipe.items() if not str(name).startswith(OF_THE_MACHINE)}
    kept |= {"dataset": dataset} if "dataset" in kept else {}
    kept |= {"test_dataset": last_name(kept["test_dataset"])} if kept.get("test_dataset") else {}
    return yaml.safe_dump(scrubbed_all(kept), sort_keys=False, default_flow_style=None, allow_unicode=True).strip()


def _data(data: dict) -> str:
    """A result's `data` in words: where the images come from, how many, and what else is told."""
    if "test" in data:
        return " → ".join(_data(data[name]) for name in ("train", "test") if name in data)
    known = {name: value for name, value in data.items() if name not in ("source", "images", "local")}
    known |= {"folder": last_name(known["folder"])} if "folder" in known else {}
    words = [shown(data.get("source", "images"))]
    words += [f"{shown(data['images'])} images"] if "images" in data else []
    return ", ".join(words + [f"{shown(name.replace('_', ' '))}: {shown(value)}" for name, value in known.items()])


def _size(size) -> str:
    return "×".join(map(str, size if isinstance(size, list | tuple) else (size, size)))
