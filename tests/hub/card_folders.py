"""Run folders without a run, and what every card must keep."""

import html
import json
import math
import re
from pathlib import Path
from urllib.parse import urlparse

import yaml
from huggingface_hub import ModelCard
from PIL import Image
from transformers import AutoModelForPreTraining

from hf_mim import methods
from hf_mim.data.processor import image_processor
from hf_mim.evaluation.checkpoint import checkpoint_sha256
from hf_mim.evaluation.result import Result
from hf_mim.pretraining.recipe import Recipe
from hf_mim.run_folder import read_config

CARDS = Path(__file__).parents[2] / "model_cards"
SMALL = {"image_size": 24, "patch_size": 4, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
SMALL |= {"num_channels": 3, "image_mean": [0.41, 0.42, 0.43], "image_std": [0.21, 0.22, 0.23], "crop_scale": "0.37,1"}
PICTURE_LIMIT = 150_000


def make_folder(folder: Path, method: str = "mae", dataset: str = "owner/photos", **settings) -> Path:
    """A run folder as `hf-mim pretrain` leaves it, without the run."""
    settings = {"method": method, "dataset": dataset} | SMALL | settings
    recipe = Recipe.resolve(settings | {"output_dir": str(folder)})
    AutoModelForPreTraining.from_config(recipe.config()).save_pretrained(folder)
    recipe.save(folder)
    image_processor((24, 24), recipe.run.image_mean, recipe.run.image_std).save_pretrained(folder)
    state = {"global_step": 37, "log_history": [{"step": 1, "loss": 2.345}, {"step": 37, "loss": 1.234}]}
    state["log_history"].append({"train_runtime": 61.7, "train_samples_per_second": 88.9})
    (folder / "trainer_state.json").write_text(json.dumps(state))
    for name in ("loss.png", "reconstructions.png")[: 2 if methods.get(method).predicts_pixels else 1]:
        Image.new("RGB", (8, 8)).save(folder / name)
    local = {"local": dataset.startswith("/")}
    about = {"checkpoint": str(folder), "checkpoint_sha256": checkpoint_sha256(folder), "device": "cpu (x86_64)"}
    data = {"source": f"{dataset}, split train", "images": 4321}
    test = {"source": f"{dataset}, split test", "images": 765}
    scores = {"first_loss": 2.345, "steps": 37, "images_seen": 5920, "images_per_second": 95.95, "hours": 0.01714}
    ran = {"processes": 3, "precision": "float32"}
    results = {
        "training": Result("pretrain", "loss", 1.234, ran, data | local, scores, seconds=61.7, **about),
        "health": Result("health", "RankMe", 12.5, {}, data, table=[HEALTHY, ILL], notes=["Worry: b."], **about),
        "knn": Result("knn", "accuracy", 0.4567, {"k": 19}, {"train": data, "test": test}, {"top5": 0.8765}, **about),
    }
    for name, result in results.items():
        result.save(folder / "results" / f"{name}.json")
    return folder


HEALTHY = {"measure": "a", "value": 12.5, "untrained": 3.5, "worry": "no", "meaning": "below 0.15 | few"}
ILL = HEALTHY | {"measure": "b", "worry": "yes"}


def section(card: ModelCard, title: str) -> str:
    return re.split(r"^##+ ", card.text.partition(f"# {title}\n")[2], flags=re.MULTILINE)[0]


def edit(path: Path, **values):
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def assert_links_resolve(card: ModelCard, folder: Path):
    links = re.findall(r"\]\(([^)\s]+)\)|<img src=\"([^\"]+)\"", card.text)
    links = ["".join(link) for link in links]
    assert links
    for link in links:
        if link.startswith("#"):  # as the Hub makes anchors of headings
            assert link[1:] in [x.lower().replace(" ", "-") for x in re.findall(r"^##+ (.*)", card.text, re.MULTILINE)]
            continue
        if "://" in link:
            address = urlparse(link)
            assert address.scheme == "https" and re.fullmatch(r"[\w.-]+\.\w+", address.netloc), link
        else:
            path = (folder / link).resolve()
            assert path.is_file() and path.is_relative_to(folder.resolve()), link


def numbers(text: str) -> set[float]:
    return {float(x) for x in re.findall(r"(?<![\w.])-?\d+(?:\.\d+)?(?:e[+-]?\d+)?(?!\w)", text)}


def known_numbers(value) -> set[float]:
    """All in a source, as they are and as a card may round them."""
    if isinstance(value, dict):
        return known_numbers([*value, *value.values()])
    if isinstance(value, list):
        return set().union(*map(known_numbers, value))
    if isinstance(value, str):
        return numbers(value)
    if isinstance(value, bool) or not isinstance(value, int | float):
        return set()
    percent = {float(f"{100 * value:.1f}")} if 0 <= value <= 1 else set()
    return percent | {float(f"{value:{form}}") for form in (".4f", ".4g", ".6g", "") if math.isfinite(value)}


def assert_numbers_have_a_source(card: ModelCard, folder: Path):
    """Outside the examples and the citation, a card has the numbers of its sources, shares in percent too; of its own
    only "in 0..1"."""
    sources = [json.loads(path.read_text()) for path in [*folder.glob("*.json"), *folder.glob("results/*.json")]]
    sources += [yaml.safe_load((folder / "recipe.yaml").read_text()), list(read_config(folder).training_size)]
    told, limits = card.text.split("## How to use")[0], section(card, "Limits")
    told = html.unescape(re.sub(r"```python\n.*?```| width=\"\d+\"|k-NN|1-NN", "", told, flags=re.DOTALL))
    text = re.sub(r"\[[^]]*\]\(https:[^)]*\)|\]\([^)]*\)|in 0\.\.1", "", told + limits).replace(folder.name, "")
    text = re.sub(r"(?<=\d),(?=\d{3}\b)", "", text)
    assert not (unknown := numbers(text) - known_numbers(sources)), f"{unknown} in the card are in none of its sources"
