"""The commands of the README and of the pages in docs/: all have options that exist, and some pages run as a whole."""

import importlib
import re
import shlex
import sys
from pathlib import Path

import click
import pytest
from transformers import HfArgumentParser

from hf_mim.cli import pretrain, program, split_imports
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
            Recipe.read(names[0] if names else None, given)


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
            pytest.fail(f"{command}\n{getattr(error, 'message', error)} {capsys.readouterr().err}")
