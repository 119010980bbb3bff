"""The command line, `hf-mim`: it parses, calls the library and prints. A file for each command.

A user's mistake is one line on stderr and exit status 2, before anything is trained or written. Status 75: start it
again; 130: interrupted by ^C. Files here import the library inside functions, so that `hf-mim --help` is quick.
"""

import sys
from importlib.metadata import version

import click

import hf_mim
from hf_mim.cli import card, convert, evaluate, export, pretrain
from hf_mim.cli.errors import Mistake, fail, say, told_in_one_line
from hf_mim.cli.options import Menu
from hf_mim.pretraining.settings import suggestion

COMMANDS = [module.command for module in (pretrain, evaluate, convert, export, card)]
TEXT = """
Masked image modeling: pretrain on images, measure what was learned, bring checkpoints in and out.

hf-mim COMMAND --help lists what a command can be told. To every command, --import MODULE adds the methods that a Python
module registers (hf_mim.methods.register); it may be repeated.
"""


def refuse(word: str) -> str:
    names = [command.name for command in COMMANDS]
    meant = suggestion(word, names)
    return f"unknown command {word}{f'{meant} There' if meant else '; there'} is {', '.join(names)}"


def show_versions(ctx: click.Context, option: click.Option, asked: bool):
    """Of hf_mim, and of what it stands on without importing it."""
    if asked:
        beside = ", ".join(f"{package} {version(package)}" for package in ("torch", "transformers"))
        click.echo(f"hf-mim {hf_mim.__version__} ({beside})")
        ctx.exit()


VERSION = click.Option(["--version"], is_flag=True, is_eager=True, expose_value=False, callback=show_versions)
program = Menu("hf-mim", refuse, TEXT, params=[VERSION], subcommand_metavar="COMMAND ...")
for _command in COMMANDS:
    program.add_command(_command)


def main(argv: list[str] | None = None) -> int:
    """Run a command; returns the exit status."""
    try:
        arguments, modules = split_imports(sys.argv[1:] if argv is None else argv)
        for module in modules:
            with told_in_one_line("nothing was written"):
                from hf_mim.methods import load_module

                load_module(module)
        return program.main(arguments, "hf-mim", standalone_mode=False) or 0
    except click.exceptions.Exit as status:
        return status.exit_code
    except click.Abort:  # ^C while a command was being read
        say("interrupted")
        return 130
    except click.ClickException as error:
        return fail(error.format_message())


def split_imports(argv: list[str]) -> tuple[list[str], list[str]]:
    """(the arguments without `--import MODULE`, the modules): what they register has to be known before the rest."""
    arguments, modules, rest = [], [], list(argv)
    while rest:
        name, has_value, module = rest.pop(0).partition("=")
        if name != "--import":
            arguments.append(name + has_value + module)
            continue
        if not has_value and (not rest or rest[0].startswith("--")):
            raise Mistake("import needs a value: the name of a Python module")
        modules.append(module if has_value else rest.pop(0))
    return arguments, modules
