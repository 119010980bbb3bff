"""Compare methods or settings under equal conditions: the same encoder, augmentation and images, and several seeds.

\b
python training/compare.py training/comparisons/digits.yaml          # 3 to 4 minutes on 2 cores
python training/compare.py training/comparisons/cifar10.yaml --dataset path/to/cifar10 --output runs/methods

COMPARISON is a YAML file; docs/compare.md explains it. Each run is made once with each seed, and each is measured in
the same way. The output gets comparison.md (a table), comparison.png (accuracy over images seen) and comparison.json
(all values with their commands). They are written again after each run. The same command goes on where it was stopped.
"""

import os
import shlex
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_type_hints

import click
import torch
from compare_jobs import jobs_of
from compare_plan import Comparison
from compare_report import TABLE, Report, go_on
from compare_run import Launcher, run_jobs

from hf_mim.checks import least
from hf_mim.cli import split_imports
from hf_mim.cli.errors import fail, say, told_in_one_line
from hf_mim.cli.options import Command, settings_of
from hf_mim.files import check_writable, one_line
from hf_mim.lock import LockedError, check_unlocked, locked
from hf_mim.methods import load_module
from hf_mim.pretraining.settings import to_type
from hf_mim.pretraining.signals import INTERRUPTED, Ended, ended_at_once

FAILED = 1  # exit status: a run has failed


@dataclass
class Place:
    """Where a comparison is made.

    Args:
        output: the folder of all that it makes; default: runs/compare_NAME
        jobs: runs at the same time, each with one thread; default: one for each core, or one on an accelerator
        only: runs of the file, to make no others, as their folders are named: Latent_MIM,I-JEPA; what is done of others
            stays
    """

    output: str | None = None
    jobs: int | None = None
    only: list[str] | None = None

    def __post_init__(self):
        least(1, jobs=self.jobs)
        if self.jobs is None:
            self.jobs = 1 if torch.accelerator.is_available() else os.cpu_count() or 1


TYPES = get_type_hints(Place) | get_type_hints(Comparison)
REPLACED = dict.fromkeys(("dataset", "images", "seeds"))  # arguments of the file that the command line may replace
COMMAND = Command(
    "compare",
    None,
    ("COMPARISON",),
    lambda: (
        settings_of(Place, "options") + settings_of(Comparison, "in place of what the file says", REPLACED, REPLACED)
    ),
    __doc__,
)


def main(argv: list[str] | None = None) -> int:
    """Make a comparison and return the exit status: 75 means that the same command goes on."""
    argv = sys.argv[1:] if argv is None else argv
    try:
        with ended_at_once():
            arguments, modules = split_imports(argv)
            words, given = COMMAND.read(arguments)
            with told_in_one_line("nothing was written"):
                report = prepare(words, given, modules, argv)
            return compare(report, modules)
    except Ended as ended:
        say(f"{ended.signal.name} has ended the comparison; the same command goes on")
        return INTERRUPTED
    except click.exceptions.Exit as status:
        return status.exit_code
    except click.ClickException as error:
        return fail(error.format_message())


def prepare(words: list[str], given: dict[str, Any], modules: Sequence[str], argv: Sequence[str]) -> Report:
    """Read and check everything, also what an earlier start has left. Raises ValueError in one line."""
    for module in modules:
        load_module(module)
    given = {name: to_type(name, value, TYPES[name]) for name, value in given.items()}
    place = Place(**{name: value for name, value in given.items() if name not in REPLACED})
    replaced = {name: value for name, value in given.items() if name in REPLACED}
    comparison = Comparison.read(words[0], replaced, place.only)
    output = Path(place.output or Path("runs") / f"compare_{Path(words[0]).stem}")
    check_writable(output, "output")
    jobs = jobs_of(comparison, output)
    for folder in filter(Path.is_dir, [output, *(job.folder for job in jobs)]):
        check_unlocked(folder, "output", print)  # a run may live on after its comparison was killed
    left_out = go_on(comparison, jobs, output, commit())
    return Report(comparison, jobs, output, shlex.join(["python", "training/compare.py", *argv]), place.jobs, left_out)


def compare(report: Report, modules: Sequence[str]) -> int:
    """Do all jobs that are not done, and write the report after each."""
    output = report.output
    try:
        output.mkdir(parents=True, exist_ok=True)
        with locked(output, "output", print):
            for line in report.comparison.uneven_budgets():
                print(line)
            report()
            signal = run_jobs(report.jobs, report.at_once, Launcher(modules, output / "logs"), report)
            report()
    except (LockedError, OSError) as error:
        return fail(one_line(error))
    except KeyboardInterrupt:
        say("interrupted; the same command goes on from the last checkpoints")
        return 130
    print(f"\n{(output / TABLE).read_text()}\nThis is in {output / TABLE}.")
    if signal is not None:
        say(f"{signal.name} has ended the comparison; the same command goes on")
        return INTERRUPTED
    return FAILED if any(job.failure for job in report.jobs) else 0


def commit() -> str | None:
    """The commit of this code, with -dirty if files were changed; None if nobody knows it."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--exclude", "*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


if __name__ == "__main__":
    sys.exit(main())
