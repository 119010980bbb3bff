"""`hf-mim compare RUN RUN…`: several runs side by side."""

import json
from typing import Literal

from hf_mim.cli.errors import Mistake, told_in_one_line
from hf_mim.cli.options import Command, Setting
from hf_mim.pretraining.settings import to_type

TEXT = """\
Show runs of hf-mim pretrain side by side, also those that still train: the settings that differ, what the training
took, loss and probe, and the results. COMPARISON.md, .json and .png (the curves over the images seen) are written.

\b
hf-mim compare runs/mae runs/stop
hf-mim compare runs/* --format markdown --output all_runs"""
FORMATS = Literal["text", "markdown", "json"]


def settings() -> list[Setting]:
    stem = "where to write: OUTPUT.md, OUTPUT.json and OUTPUT.png; files that are there are replaced"
    return [
        Setting("format", FORMATS, "text", "how to print the table"),
        Setting("output", str, "comparison", stem),
    ]


class Compare(Command):
    """It takes any number of runs."""

    def check_words(self, path: str, words: list[str]):
        if not words:
            raise Mistake("compare needs run folders: hf-mim compare RUN RUN")


def run(*folders: str, format: str = "text", output: str = "comparison"):
    with told_in_one_line("nothing was written"):
        from hf_mim.files import check_writable
        from hf_mim.runs import Run, compare

        to_type("format", format, FORMATS)
        for end in (".md", ".json", ".png"):
            check_writable(f"{output}{end}", "output", "file")
        comparison = compare([Run.read(folder) for folder in folders])
        paths = comparison.save(output)
    if format == "json":
        print(json.dumps(comparison.as_json(), indent=2))
        return
    print(comparison.markdown() if format == "markdown" else comparison.text())
    print(f"\nThis is in {paths[0]} and {paths[1]}, the curves are in {paths[2]}.")


SUMMARY = "several runs side by side: settings that differ, curves, results"
command = Compare("compare", run, ("RUN ...",), settings, TEXT, short_help=SUMMARY, no_args_is_help=True)
