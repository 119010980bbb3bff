"""Model cards, made of the files in a checkpoint's folder: config, recipe, trainer state, results, pictures. No number
comes from anywhere else, and the card says which numbers are missing.

    model_card("runs/textures_mae").save("runs/textures_mae/README.md")  # or: hf-mim card runs/textures_mae

The text is in `card_template.md`. The text about a method is named by the method's row in `hf_mim.methods`.
"""

import logging
import shlex
from pathlib import Path
from urllib.parse import quote

import jinja2
import yaml
from huggingface_hub import ModelCard, ModelCardData
from PIL import Image

from hf_mim.checks import check_license
from hf_mim.data.nodata import IGNORE_TAGS
from hf_mim.data.stacks import ZERO
from hf_mim.evaluation import PROTOCOLS
from hf_mim.evaluation.result import Result
from hf_mim.files import one_line, replacing
from hf_mim.hub.card_text import (
    counted,
    eval_result,
    fenced,
    is_hub_name,
    literal,
    markdown_table,
    plain,
    shown,
    shown_number,
    words,
)
from hf_mim.hub.classifier_card import classifier_card, is_finetuned
from hf_mim.hub.measured import Measured, data_in_words, headline, measurements, table
from hf_mim.lock import locked
from hf_mim.methods import Method, of_config
from hf_mim.run_folder import CARD, RESULTS, RunFacts, picture_path, pictures, read_config
from hf_mim.scrub import last_name, scrubbed_all
from hf_mim.visualize.captions import CAPTIONS

logger = logging.getLogger(__name__)

TEMPLATE = Path(__file__).with_name("card_template.md")

NOT_RECORDED = "not recorded"
# The first screen, of 1,000 pixels, has a picture of this height at most and so many results; the rest is below.
PICTURE_HEIGHT, LONGEST = 320, 5
STARTS = {"init_from": "Started from", "target_from": "Frozen target"}
# The beginnings of settings that say where and how a recipe ran, not what it computes.
OF_THE_MACHINE = ("output_dir", "dataloader_", "logging_", "save_", "hub_", "push_to_hub", "report_to")
OF_THE_MACHINE += ("use_cpu", "disable_tqdm")


def model_card(folder: str | Path, repo_id: str | None = None, license: str | None = None) -> ModelCard:
    """The card of a checkpoint; of a classifier that fine-tuning wrote, that of `classifier_card`.

    Args:
        folder: the folder of one of hf_mim's models. The card says which of the usual files it lacks.
        repo_id: the name on the Hub that the examples load; default: the folder's own name.
        license: identifier such as apache-2.0; default: the recipe's, or that of the card that is there.

    Raises:
        ValueError: in one line, for a folder without a checkpoint of ours, a damaged file, or a license that is no
            identifier.
    """
    if is_finetuned(folder):
        return classifier_card(folder, repo_id, license)
    facts = RunFacts.read(folder)
    config, recipe, training, health = facts.config, facts.recipe, facts.training, facts.health
    method = of_config(config)
    license = check_license(license or facts.license)
    name = plain(repo_id.rpartition("/")[2] if repo_id else facts.folder.name)
    address = plain(repo_id or facts.folder.name)
    dataset = dataset_name(recipe, training)
    rows, measured = health.table if health else [], measurements(facts)
    own = [row for row in measured if not row.note]
    drawn = {name: CAPTIONS[name] for name in pictures(facts.folder) if name in CAPTIONS}
    return ModelCard.from_template(
        _metadata(name, facts, method, dataset, license),
        template_str=TEMPLATE.read_text(encoding="utf-8"),
        facts=facts,
        config=config,
        method=method,
        name=shown(name),
        address=literal(address),
        shell_address=shlex.quote(address),
        method_text=jinja2.Template(method.card_text).render(config=config),
        auto_class="AutoModelForImageClassification" if facts.is_classifier else "AutoModel",
        image_size=size_text(config.image_size),
        training_size=size_text(config.training_size),
        overview=_overview(config, recipe, facts.trainer_state, dataset, license),
        pictures=drawn,
        first=(first := next(iter(drawn), "")),
        picture_width=_width_to_show(picture_path(facts.folder, first)) if first else None,
        results=markdown_table([{x.capitalize(): shown(y) for x, y in row.items()} for row in table(own[:LONGEST])]),
        num_folded=len(own[LONGEST:]),
        headline=shown(headline(own)),
        in_full=[_in_full(row) for row in measured],
        not_measured=[name for name in PROTOCOLS if name not in facts.measured],
        health=markdown_table([{shown(name): shown_number(x) for name, x in row.items()} for row in rows]),
        health_data=shown(data_in_words(health.data)) if health else None,
        health_notes=[shown(text) for text in health.notes] if health else [],
        worries=[shown(row.get("measure")) for row in rows if row.get("worry") == "yes"],
        compute=[(name, NOT_RECORDED if x is None else shown_number(x)) for name, x in facts.compute.items()],
        compute_notes=[shown(text) for text in training.notes] if training else [],
        augmentation=_augmentation(recipe),
        example_image="image.tif" if config.num_channels > 4 or recipe.get("value_range") else "image.png",
        recipe_block=fenced(recipe_text(recipe, dataset), "yaml"),
        bibtex_block=fenced(method.bibtex, "bibtex") if method.bibtex else "",
        steps=shown(counted(facts.compute["Optimizer steps"])),
        data=shown(training_data(recipe, dataset, training)),
        lacking=shown(_lacking_text(recipe, training)),
    )


def write_card(folder: str | Path, repo_id: str | None = None, license: str | None = None) -> Path:
    """Write the `model_card` to the folder's README.md. The file is whole, or stays as it was.

    Raises:
        ValueError: as `model_card`; or a training or another card is being written there (`LockedError`).
        OSError: the folder cannot be written.
    """
    path = Path(folder) / CARD
    if not path.parent.is_dir():
        read_config(path.parent)  # raises
    with locked(folder, "checkpoint"):
        card = model_card(folder, repo_id, license)
        with replacing(path) as aside:
            card.save(aside)
    return path


def unedited(folder: str | Path) -> bool:
    """Whether a checkpoint has the card that `write_card` would write now, so that a new one loses nobody's words."""
    try:
        there, new = ModelCard.load(Path(folder) / CARD), model_card(folder, _pushed_as(folder))
        return there.content.strip() == new.content.strip()
    except (ValueError, OSError):  # there is no card, the model is none of ours, or a file is damaged
        return False


def refresh_card(folder: str | Path):
    """Write the card anew, under the name on the Hub that the recipe has. If that fails, there is a warning."""
    try:
        write_card(folder, _pushed_as(folder))
    except (ValueError, OSError) as error:
        logger.warning("the card of %s was not written again: %s", folder, one_line(error))


def _pushed_as(folder: str | Path) -> str | None:
    return RunFacts.read(folder).recipe.get("hub_model_id")


def _metadata(name: str, facts: RunFacts, method: Method, dataset: str, license: str | None) -> ModelCardData:
    tags = ["hf_mim", "masked-image-modeling", "self-supervised-learning", method.title.lower().replace(" ", "-")]
    results = [eval_result(result) for result in facts.own_results.values() if result.value is not None]
    return ModelCardData(
        model_name=name,
        library_name="transformers" if getattr(facts.config, "auto_map", None) else "hf_mim",
        pipeline_tag="image-classification" if facts.is_classifier else "image-feature-extraction",
        license=license,
        datasets=[dataset] if is_hub_name(dataset) else None,
        tags=tags + [f"arxiv:{paper}" for paper in method.papers],
        eval_results=results or None,
    )


def _in_full(row: Measured) -> dict:
    """What the folded part of a measurement shows."""
    numbers = [{shown(name): shown_number(x) for name, x in line.items()} for line in row.numbers]
    return {
        "title": shown(row.in_full),
        "numbers": markdown_table(numbers),
        "settings": markdown_table([{"setting": shown(name), "value": shown(x)} for name, x in row.settings.items()]),
        "files": ", ".join(f"[{column}]({RESULTS}/{quote(name)})" for column, (name, _) in row.results.items()),
        "notes": [shown(note) for note in row.notes],
    }


def _overview(config, recipe: dict, trainer_state: dict, dataset: str, license: str | None) -> list[tuple[str, str]]:
    best = _best(recipe, trainer_state)
    size, patch = size_text(config.image_size), size_text(config.patch_size)
    heads = "1 head" if config.num_attention_heads == 1 else f"{config.num_attention_heads} heads"
    return [
        ("Encoder", f"width {config.hidden_size}, depth {config.num_hidden_layers}, {heads}"),
        (
            "Input",
            f"{config.num_channels} × {size} pixels, patches of {patch}",
        ),
        ("Pretrained on", shown(dataset)),
        *((title, shown(source_text(recipe, name))) for name, title in STARTS.items() if recipe.get(name)),
        *([("Continued from", shown(last_name(recipe["continue_from"])))] if recipe.get("continue_from") else []),
        *([("Best checkpoint", best)] if best else []),
        ("Licence", license or "not given"),
    ]


def _best(recipe: dict, trainer_state: dict) -> str:
    """Which checkpoint was best by `keep_best`, and whether it is this one; "" if the run has kept none."""
    step, value = trainer_state.get("best_global_step"), trainer_state.get("best_metric")
    if not recipe.get("keep_best") or not step:
        return ""
    name = f"step {shown_number(step)} of {shown_number(trainer_state.get('global_step'))}"
    name += f", by {shown(recipe['keep_best'])} ({shown_number(value)})"
    where = (
        "these weights" if recipe.get("export_best") else f"in `checkpoint-{shown(step)}`, these weights are the last"
    )
    return f"{name}: {where}"


def source_text(recipe: dict, name: str) -> str:
    """A checkpoint that the run has taken weights from, as readers may see it."""
    hashed = str(recipe.get(f"{name}_sha256") or "")[:12]
    return f"{words(last_name(recipe[name]))} ({f'sha256 {words(hashed)}…' if hashed else 'hash not recorded'})"


def dataset_name(recipe: dict, training: Result | None) -> str:
    """What the run was trained on, as readers may see it. `owner/name` can be a folder, so it is taken for a name on
    the Hub only if the run has noted that."""
    dataset = str(recipe.get("dataset") or NOT_RECORDED)
    if "://" in dataset or (is_hub_name(dataset) and training is not None and training.data.get("local") is False):
        return plain(dataset)
    return plain(last_name(dataset))


def training_data(recipe: dict, dataset: str, training: Result | None) -> str:
    """The images that a run was trained on, in words."""
    count = training.data.get("images") if training else None
    number = "the number of images is not recorded" if count is None else f"{counted(count)} images"
    return f"{dataset}, split {words(recipe.get('train_split', NOT_RECORDED))} ({number})"


def _augmentation(recipe: dict) -> dict[str, str]:
    """The recipe's settings as text; "" for a probability of 0, which the card leaves out."""
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
    for name in ("vertical_flip_probability", "rotate90", "color_jitter", "crop_pixels"):  # older recipes lack them
        value = recipe.get(name)
        told[name] = (size_text(value) if name == "crop_pixels" else shown(str(value))) if value else ""
    told["value_range"], told["nodata"] = _range_text(recipe.get("value_range")), _nodata_text(recipe)
    return told if recipe else {}


def _range_text(value_range) -> str:
    """[low, high], or such a pair for each channel, in words; "" for none."""
    if not value_range or not isinstance(value_range, list):
        return ""
    pairs = [f"{shown(low)} to {shown(high)}" for low, high in zip(value_range[::2], value_range[1::2], strict=False)]
    if not pairs:
        return ""
    return f"the values {', '.join(pairs)}{' of its channels, in this order,' if len(pairs) > 1 else ''}"


def _nodata_text(recipe: dict) -> str:
    """Where an image has no data, in words; "" if it has data everywhere."""
    nodata, places = recipe.get("nodata"), []
    lacking = recipe.get("missing_modality") == ZERO
    if nodata not in (None, IGNORE_TAGS):
        finite = str(nodata) == "nan"
        if not (finite and lacking):
            places = ["a value is not finite" if finite else f"a value is {shown(nodata)} or not finite"]
    return " and where ".join([*(["it lacks a modality"] if lacking else []), *places])


def _lacking_text(recipe: dict, training: Result | None) -> str:
    """How many images lacked a modality, in a sentence; "" if none could."""
    if recipe.get("missing_modality") != ZERO:
        return ""
    found = training.data.get("nodata") if training else None
    count = "how many is not recorded" if found is None else f"without data are {words(found)}"
    return f"Some of the images lack a modality, which is masked as a whole there: {count}."


def recipe_text(recipe: dict, dataset: str) -> str:
    """The settings that decide what a run computes, as YAML, without what tells of this machine."""
    kept = {name: value for name, value in recipe.items() if not str(name).startswith(OF_THE_MACHINE)}
    kept |= {"dataset": dataset} if "dataset" in kept else {}
    kept |= {"test_dataset": last_name(kept["test_dataset"])} if kept.get("test_dataset") else {}
    return yaml.safe_dump(scrubbed_all(kept), sort_keys=False, default_flow_style=None, allow_unicode=True).strip()


def _width_to_show(picture: Path) -> int:
    """The width in pixels at which a picture is not higher than `PICTURE_HEIGHT`."""
    try:
        with Image.open(picture) as image:
            return min(image.width, round(PICTURE_HEIGHT * image.width / image.height))
    except OSError as error:
        raise ValueError(f"{picture} cannot be read: {one_line(error)}") from error


def size_text(size) -> str:
    """`224×224`, for one number too."""
    return "×".join(map(str, size if isinstance(size, list | tuple) else (size, size)))
