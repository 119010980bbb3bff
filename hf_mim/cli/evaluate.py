"""`hf-mim evaluate PROTOCOL CHECKPOINT --dataset SOURCE [--test SOURCE] [--option value ...]`."""

import functools
from typing import Any

import click

from hf_mim.cli.errors import told_in_one_line
from hf_mim.cli.options import Command, Menu, Setting, settings_of
from hf_mim.docstrings import description
from hf_mim.evaluation import PROTOCOLS, load_protocol
from hf_mim.pretraining.settings import suggestion

TEXT = """\
Measure the features of CHECKPOINT: a folder, or a name on the Hub, of any vision encoder that transformers'
AutoModel loads. The result is saved in CHECKPOINT/results/. hf-mim evaluate PROTOCOL --help lists the options."""


class Protocols(Menu):
    """Each protocol is a command. Its options come from dataclasses, which are imported when it is asked for."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(PROTOCOLS)

    def get_command(self, ctx: click.Context, name: str) -> Command | None:
        if name not in PROTOCOLS:
            return None
        protocol = load_protocol(name)
        summary = description(protocol).splitlines()[0]
        text = f"{description(protocol)}\n\n{TEXT}"
        settings = functools.partial(protocol_settings, protocol)
        return Command(name, functools.partial(run, name), ("CHECKPOINT",), settings, text, short_help=summary)


def protocol_settings(protocol: type[Any]) -> list[Setting]:
    """All options of a protocol."""
    from hf_mim.evaluation.measure import argument_kinds, option_types

    encoder, source, own = argument_kinds(protocol)
    kinds = {f"protocol {protocol.name}": own, "images": source, "encoder": encoder}
    found = [setting for title, kind in kinds.items() for setting in settings_of(kind, title)]
    return [setting for setting in found if setting.name in option_types(protocol)]


def run(protocol: str, checkpoint: str, **given: str):
    from transformers.utils import logging

    from hf_mim.companions import how_to_use
    from hf_mim.evaluation.result import NotKept
    from hf_mim.front_door import evaluate

    logging.disable_progress_bar()
    with told_in_one_line("the features so far are kept, and the same command goes on from them"):
        try:
            result, failure = evaluate(protocol, checkpoint, **given), None
        except NotKept as error:
            result, failure = error.result, error
        print(result)
        if result.path is not None:
            ends = ", ".join(other.name.removeprefix(result.path.stem) for other in result.beside)
            print(f"\nThe result is in {result.path}{f', beside it under the same name {ends}' if ends else ''}.")
        if failure is None and given.get("output_dir"):
            print(f"\n{how_to_use(given['output_dir'], given.get('test', given['dataset']), result)}")
        if failure is not None:
            raise failure


def refuse(word: str) -> str:
    if word.startswith("-"):
        return "evaluate needs a protocol first: hf-mim evaluate PROTOCOL CHECKPOINT"
    return f"protocol must be one of {', '.join(PROTOCOLS)}, not {word}{suggestion(word, PROTOCOLS)}"


command = Protocols(
    "evaluate",
    refuse,
    TEXT,
    subcommand_metavar="PROTOCOL CHECKPOINT [--dataset SOURCE] [--test SOURCE] [--option value ...]",
    short_help="measure the features of a checkpoint by one of the papers' protocols",
)
