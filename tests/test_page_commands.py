"""The commands of the README and of the pages in docs/: all have options that exist, and some pages run as a whole."""

import importlib
import os
import re
import shlex
import subprocess
import sys
import zlib
from pathlib import Path

import click
import numpy as np
import pytest
import tifffile
import yaml
from PIL import Image
from transformers import HfArgumentParser

from hf_mim.cli import main, pretrain, program, split_imports
from hf_mim.cli.options import Command, Menu
from hf_mim.pretraining.recipe import Recipe
from hf_mim.pretraining.recipe_files import recipe_names

REPOSITORY = Path(__file__).parents[1]
PAGES = {path.stem: path for path in (REPOSITORY / "README.md", *sorted((REPOSITORY / "docs").glob("*.md")))}


def commands(page: str) -> list[str]:
    """The commands in the bash blocks of a page, without their comments."""
    text = PAGES[page].read_text(encoding="utf-8")
    blocks = "".join(re.findall(r"^```bash\n(.*?)^```", text, re.MULTILINE | re.DOTALL))
    lines = [re.sub(r"(^|\s+)#.*", "", line) for line in blocks.replace("\\\n", " ").splitlines()]
    return [line for line in lines if line]


# ---- options

# What starts hf-mim → the words that it puts before those of the line.
STARTS = {"hf-mim": [], "hf_mim.cli": [], "training/slurm.sh": ["pretrain"]}
ARGPARSE_SCRIPTS = {"training/detect.py", "training/finetune.py"}
# Programs of others, and scripts that take no options.
NOT_CHECKED = {"make", "pip", "hf", "uv", "my_space/app.py", "training/modalities.py", "training/cross_modal.py"}
PATTERN = "hf-mim evaluate PROTOCOL CHECKPOINT --dataset SOURCE [--test SOURCE] [--option value]"
READ_OTHER_RUNS = {"init_from", "target_from", "continue", "resume"}


class Parsed(Exception):
    """A script has accepted its arguments and is to do no more."""


def parse_only(parser):
    parser.parse_args()
    raise Parsed


def check_hf_mim(words: list[str]):
    words, modules = split_imports(words)
    command = program
    while isinstance(command, Menu) and words:
        _, command, words = command.resolve_command(click.Context(command), words)
    if isinstance(command, Command):
        names, given = command.read(words)
        readable = not modules and not given.keys() & READ_OTHER_RUNS and set(names) <= set(recipe_names())
        if command is pretrain.command and readable:
            Recipe.read(names[0] if names else None, given).config()


def check(words: list[str], scripts, monkeypatch):
    """Raise an error if a command has an option that does not exist."""
    start = next((number for number, word in enumerate(words) if word in STARTS), None)
    if start is not None:
        return check_hf_mim([*STARTS[words[start]], *words[start + 1 :]])
    if words[0] == "python":
        words = words[1:]
    if words[0] == "training/compare.py":
        scripts.compare.COMMAND.read(words[1:])
    elif words[0] in ARGPARSE_SCRIPTS:
        monkeypatch.setattr(sys, "argv", words)
        importlib.import_module(Path(words[0]).stem).main()
    elif words[0] not in NOT_CHECKED:
        raise ValueError("a program that the test does not know")


@pytest.mark.parametrize("page", [page for page in PAGES if commands(page)])
def test_the_commands_of_a_page_have_only_options_that_exist(page, scripts, monkeypatch, capsys):
    monkeypatch.setattr(HfArgumentParser, "parse_args_into_dataclasses", parse_only)
    for command in commands(page):
        if command == PATTERN:
            continue
        try:
            check(shlex.split(command), scripts, monkeypatch)
        except Parsed:
            continue
        except click.exceptions.Exit as asked_for_help:
            assert asked_for_help.exit_code == 0
        except (ValueError, click.ClickException, SystemExit) as error:
            last_line = capsys.readouterr().err.rpartition("error: ")[2]
            pytest.fail(f"{command}\n{getattr(error, 'message', error)} {last_line}")


# ---- whole pages

# (the beginning of a command, what is added to it): budgets of seconds, and encoders that do not learn in them.
TINY = "--hidden_size 16 --num_hidden_layers 1 --num_attention_heads 2 --decoder_hidden_size 16 --max_steps 2 --use_cpu"
TINY += " --decoder_num_hidden_layers 1 --per_device_train_batch_size 4"
ADDED = [
    ("hf-mim pretrain", TINY),
    ("hf-mim evaluate linear", "--epochs 1"),
    ("python training/compare.py comparisons/", "--images 64 --seeds 0 --only MAE"),
]
# (page, a text of its commands, what stands for it here).
REPLACED = [
    ("compare", "training/comparisons/", "comparisons/"),
    ("modalities", "my_scenes --output_dir runs/both", "my_scenes --output_dir runs/again"),
    ("modalities", "recipe.yaml --image_column", "recipe.yaml --dataset my_parts --image_column"),
    ("modalities", "my_scenes --image_column", "my_parts --image_column"),
]


def image(path: Path, side: int, bands: int = 3, kind: str = "uint8"):
    """Noise, in the format that the end of the path says."""
    path.parent.mkdir(parents=True, exist_ok=True)
    values = np.random.default_rng(zlib.crc32(str(path).encode())).integers(0, 256, (side, side, bands)).astype(kind)
    if path.suffix == ".npy":
        np.save(path, values)
    elif path.suffix == ".tif":
        tifffile.imwrite(path, values, photometric="minisblack", planarconfig="contig")
    else:
        Image.fromarray(values.squeeze()).save(path)


def classes(folder: str, names: str, side: int, *about, ending="png"):
    """24 images of each class for training, and 4 for the test."""
    for name in names.split():
        for split, count in (("train", 24), ("test", 4)):
            for number in range(count):
                image(Path(folder, split, name, f"{number}.{ending}"), side, *about)


def for_histology():
    for number in range(2):
        image(Path(f"slides/{number}.jpg"), 520)
    classes("tissue_labelled", "tumour stroma", 224)


def for_satellite():
    for number in range(2):
        image(Path(f"scenes/{number}.tif"), 260, 4, "uint16")
    classes("land_use", "field forest", 128, 4, "uint16", ending="tif")
    for number in range(10):
        image(Path(f"water/images/{number}.tif"), 128, 4, "uint16")
        image(Path(f"water/masks/{number}.png"), 128, 1)


def for_inspection():
    for number in range(2):
        image(Path(f"parts/{number}.png"), 260, 1)
    classes("defects_labelled", "good scratch", 128, 1)


def for_compare():
    """The comparisons of the page with one column and no references, which take a process each."""
    Path("comparisons").mkdir()
    for name in ("digits.yaml", "cifar10.yaml"):
        comparison = yaml.safe_load((REPOSITORY / "training" / "comparisons" / name).read_text(encoding="utf-8"))
        comparison |= {"evaluate": {"20-NN": {"protocol": "knn"}}, "references": []}
        comparison["runs"]["MAE"]["per_device_train_batch_size"] = 16  # there are 48 images to train on
        Path("comparisons", name).write_text(yaml.safe_dump(comparison, sort_keys=False))
    classes("path/to/cifar10", "cat dog", 32)


def for_modalities():
    text = PAGES["modalities"].read_text(encoding="utf-8")
    Path("recipe.yaml").write_text(re.search(r"```yaml\n(# recipe.yaml\n.*?)```", text, re.DOTALL)[1])
    classes("my_scenes", "field forest", 32, 4, ending="npy")
    for modality, bands in (("rgb", 3), ("ir", 1)):
        for split in ("train", "test"):
            for number in range(24):
                image(Path("my_parts", split, modality, "ab"[number % 2], f"{number}.png"), 32, bands)
    Path("my_parts/train/ir/a/8.png").unlink()
    classes("path/to/cifar10", "cat dog", 32)


PAGES_THAT_RUN = {
    "histology": for_histology,
    "satellite": for_satellite,
    "inspection": for_inspection,
    "compare": for_compare,
    "modalities": for_modalities,
}


def run(command: str) -> int:
    words = shlex.split(command)
    if words[0] == "hf-mim":
        return main(words[1:])
    assert words[0] == "python", f"{command} is a command that this test cannot run"
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    return subprocess.run([sys.executable, *words[1:]], env=environment, check=False).returncode


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES_THAT_RUN)
def test_the_commands_of_a_page_run_one_after_the_other(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_MIM_CACHE", str(tmp_path / "cache"))
    Path("training").symlink_to(REPOSITORY / "training")
    PAGES_THAT_RUN[page]()
    for command in commands(page):
        for where, text, replacement in REPLACED:
            command = command.replace(text, replacement) if where == page else command
        added = [more for beginning, more in ADDED if command.startswith(beginning)]
        assert run(" ".join([command, *added])) == 0, command
