"""`hf-mim benchmark step | data SOURCE | evaluate [--option value ...]`."""

import functools
import json
from dataclasses import fields
from pathlib import Path

import click

from hf_mim.benchmark import BENCHMARKS, load_benchmark
from hf_mim.cli.errors import told_in_one_line
from hf_mim.cli.options import Command, Menu, Setting, settings_of
from hf_mim.docstrings import description
from hf_mim.pretraining.settings import suggestion

TEXT = """\
Measure this machine: the training step of each method (step), the loading of your images (data SOURCE), k-NN and linear
heads (evaluate). Each stands beside a plain way to do the same. hf-mim benchmark NAME --help lists the options."""


class Benchmarks(Menu):
    """Each benchmark is a command. Its options are the fields of its dataclass; `source` is a word."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(BENCHMARKS)

    def get_command(self, ctx: click.Context, name: str) -> Command | None:
        if name not in BENCHMARKS:
            return None
        benchmark = load_benchmark(name)
        text, options = description(benchmark), [field.name for field in fields(benchmark)]
        words = ("SOURCE",) if "source" in options else ()
        settings = functools.partial(settings_of_benchmark, benchmark, options[len(words) :])
        summary = text.splitlines()[0].rstrip(".")
        return Command(name, functools.partial(run, benchmark), words, settings, text, short_help=summary)


def settings_of_benchmark(benchmark: type, names: list[str]) -> list[Setting]:
    return [*settings_of(benchmark, "options", names), Setting("json", str, text="write the numbers here too")]


def run(benchmark: type, *words: str, **given: str):
    with told_in_one_line("nothing was written"):
        from typing import get_type_hints

        from hf_mim.benchmark.machine import machine
        from hf_mim.data.sources import source_name
        from hf_mim.evaluation.result import git_state, installed_versions
        from hf_mim.files import check_file, replacing
        from hf_mim.pretraining.settings import to_type

        path, hints = given.pop("json", None), get_type_hints(benchmark)
        if path is not None:
            check_file(Path(path), "json")
        measure = benchmark(*words, **{name: to_type(name, value, hints[name]) for name, value in given.items()})
        result = measure()
        if path is not None:
            with replacing(path) as file:
                settings = vars(measure) | ({"source": source_name(measure.source)} if words else {})
                about = {"versions": installed_versions(), "git": git_state(), "settings": settings}
                file.write_text(json.dumps({"machine": machine(), **about, **result}, indent=2) + "\n")


def refuse(word: str) -> str:
    return f"benchmark must be one of {', '.join(BENCHMARKS)}, not {word}{suggestion(word, BENCHMARKS)}"


command = Benchmarks(
    "benchmark",
    refuse,
    TEXT,
    subcommand_metavar="step | data SOURCE | evaluate [--option value ...]",
    short_help="measure this machine: training steps, loading of images, evaluation",
)
