"""The command line, `hf-mim`: it parses, calls the library and prints. Each command has a file.

A user's mistake gives one line on stderr and exit status 2, before anything is trained or written. Exit status 75 means
"start it again", 130 "interrupted by ^C". The files import the library inside functions, so that `hf-mim --help` is
quick.
"""

import argparse
import os
import sys
import threading

import click

from hf_mim.cli import (
    benchmark,
    cache,
    card,
    compare,
    convert,
    demo,
    embed,
    evaluate,
    export,
    plan,
    predict,
    prepare,
    pretrain,
    recipes,
    report,
    runs,
    search,
    show,
)
from hf_mim.cli.errors import Mistake, fail, say, told_in_one_line
from hf_mim.cli.options import Menu, versions
from hf_mim.methods import load_module
from hf_mim.pretraining.settings import suggestion
from hf_mim.pretraining.signals import INTERRUPTED, Ended, ended_at_once

MODULES = recipes, plan, benchmark, prepare, cache, pretrain, runs, compare, report
MODULES += evaluate, predict, show, demo, embed, search, convert, export, card
COMMANDS = [module.command for module in MODULES]
TEXT = """
Masked image modeling: pretrain on images, measure and show what was learned, bring checkpoints in and out.

hf-mim COMMAND --help lists the options of a command. Every command also takes --import MODULE, once or more, which adds
the methods that a Python module registers (hf_mim.methods.register).
"""


def refuse(word: str) -> str:
    names = [command.name for command in COMMANDS]
    meant = suggestion(word, names)
    return f"unknown command {word}{f'{meant} There' if meant else '; there'} is {', '.join(names)}"


def show_versions(ctx: click.Context, option: click.Option, asked: bool):
    if asked:
        click.echo(versions())
        ctx.exit()


VERSION = click.Option(["--version"], is_flag=True, is_eager=True, expose_value=False, callback=show_versions)
program = Menu("hf-mim", refuse, TEXT, params=[VERSION], commands=COMMANDS, subcommand_metavar="COMMAND ...")


def main(argv: list[str] | None = None) -> int:
    """Run a command and return the exit status."""
    threads = set(threading.enumerate())
    status = status_of(argv)
    if status in (INTERRUPTED, 130):
        end_threads(threads, status)
    return status


def end_threads(but: set[threading.Thread], status: int):
    """End the process if it has other threads than these that Python would wait for, such as of an upload."""
    if any(not thread.daemon and thread not in but for thread in threading.enumerate()):
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def status_of(argv: list[str] | None) -> int:
    try:
        with ended_at_once():
            arguments, modules = split_imports(sys.argv[1:] if argv is None else argv)
            with told_in_one_line("nothing was written"):
                for module in modules:
                    load_module(module)
            return program.main(arguments, "hf-mim", standalone_mode=False) or 0
    except Ended as ended:
        say(f"{ended.signal.name} has ended the command; the same command starts it again")
        return INTERRUPTED
    except click.exceptions.Exit as status:
        return status.exit_code
    except click.Abort:  # ^C while click parsed the command
        say("interrupted")
        return 130
    except click.ClickException as error:
        return fail(error.format_message())


def split_imports(argv: list[str]) -> tuple[list[str], list[str]]:
    """(the arguments without `--import MODULE`, the modules). The modules add options, so click needs them first."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--import", dest="modules", action="append", default=[])
    try:
        given, arguments = parser.parse_known_args(argv)
    except argparse.ArgumentError:
        raise Mistake("import needs a value: the name of a Python module") from None
    return arguments, given.modules
