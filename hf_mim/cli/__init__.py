"""The command line: `hf-mim pretrain [RECIPE.yaml] [--argument value ...]` and `hf-mim evaluate`.

A folder, because each part is of use alone: `recipe.py` (what a run is), `values.py` (text and YAML to typed values),
`help.py`, `pretrain.py` (the run itself), `readout.py` (its k-NN accuracy), and a file for each other command. A user's
mistake is one line on stderr and exit status 2, before anything is trained or written. Status 75: start it again.
"""

import gc
import importlib
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from accelerate import PartialState
from huggingface_hub.errors import StrictDataclassError
from transformers.utils import logging

from hf_mim.cli.help import pretrain_help
from hf_mim.data import BrokenImagesError, ImageFormatError
from hf_mim.files import one_line
from hf_mim.pretraining.guard import INTERRUPTED, NonFiniteError
from hf_mim.pretraining.recipe import Recipe, field_type
from hf_mim.pretraining.settings import read_yaml, split_options
from hf_mim.run_folder import RECIPE

USAGE = """\
usage: hf-mim COMMAND ...

  pretrain    pretrain MAE, Latent MIM or StoP-JEPA on images
  evaluate    measure the features of a checkpoint by one of the papers' protocols
  convert     bring a checkpoint of the authors, of transformers or of timm in
  export      take a checkpoint out: to transformers, timm, remote code or ONNX
  card        write the model card of a checkpoint, from what was measured

hf-mim COMMAND --help lists its arguments."""


def main(argv: list[str] | None = None) -> int:
    """Run a command; returns the exit status."""
    command, *arguments = (sys.argv[1:] if argv is None else argv) or ["--help"]
    if command in ("-h", "--help"):
        print(USAGE)
        return 0
    if command not in COMMANDS:
        return _fail(f"unknown command {command}; there is {', '.join(COMMANDS)}")
    return COMMANDS[command](arguments)


def pretrain_command(arguments: list[str]) -> int:
    """`hf-mim pretrain`."""
    if {"-h", "--help"} & set(arguments):
        print(pretrain_help())
        return 0
    from hf_mim.pretraining.run import Pretraining  # after --help, which needs none of it

    logging.disable_progress_bar()  # those of loading and saving; the training has its own
    try:
        run = Pretraining(read_recipe(arguments))
    except (ValueError, OSError, RuntimeError, ImportError, StrictDataclassError) as error:
        return _fail(one_line(error))
    go_on = f"go on by --resume --output_dir {run.folder}"
    try:
        if ended_by := run():
            _say(f"{ended_by.name} has ended the run after a step; {go_on}")
            return INTERRUPTED
    except (BrokenImagesError, ImageFormatError, NonFiniteError) as error:
        print(file=sys.stderr)  # the end of the line that has the progress bar
        return _fail(one_line(error))
    except OSError as error:
        print(file=sys.stderr)
        return _fail(f"{one_line(error)}; {go_on}")
    except RuntimeError as error:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler raises anew for each worker that is found dead
        if "DataLoader worker" not in str(error):
            raise
        # It may be any rank's.
        print(f"\nerror: {one_line(error)}; a lower dataloader_num_workers takes less memory; {go_on}", file=sys.stderr)
        return INTERRUPTED
    except KeyboardInterrupt:
        print(f"\ninterrupted; go on from the last checkpoint by --resume --output_dir {run.folder}", file=sys.stderr)
        return 130
    finally:
        del run  # what holds the process group has to be gone before it, or its threads may outlive the interpreter
        gc.collect()
        PartialState().destroy_process_group()
    return 0


def evaluate_command(arguments: list[str]) -> int:
    """`hf-mim evaluate`."""
    from hf_mim.cli.evaluate import Evaluation, evaluate_help

    protocol = next((word for word in arguments[:1] if not word.startswith("-")), None)
    try:
        if {"-h", "--help"} & set(arguments) or not arguments:
            print(evaluate_help(protocol))
            return 0
        if protocol is None:
            raise ValueError("evaluate needs a protocol first: hf-mim evaluate PROTOCOL CHECKPOINT")
        logging.disable_progress_bar()
        run = Evaluation.parse(protocol, arguments[1:])
        result = run()
    except (ValueError, OSError, RuntimeError, ImportError, StrictDataclassError) as error:
        return _fail(one_line(error))
    except KeyboardInterrupt:
        print("\ninterrupted; the features so far are kept, and the same command goes on from them", file=sys.stderr)
        return 130
    try:
        path = result.save(run.path)
    except OSError as error:
        print(result)  # what was measured is seen even if it cannot be saved
        return _fail(one_line(error))
    print(f"{result}\n\nThe result is in {path}.")
    return 0


def lazily(module: str) -> Callable[[list[str]], int]:
    """The command of hf_mim/cli/<module>.py, which is imported when it is called."""

    def command(arguments: list[str]) -> int:
        return getattr(importlib.import_module(f"hf_mim.cli.{module}"), f"{module}_command")(arguments)

    return command


COMMANDS = {"pretrain": pretrain_command, "evaluate": evaluate_command}
COMMANDS |= {name: lazily(name) for name in ("convert", "export", "card")}


def read_recipe(arguments: list[str]) -> Recipe:
    """The recipe that a command line asks for: its RECIPE.yaml, or with `--resume` that of the run folder, under it."""
    path, given = parse(arguments)
    if path is None and str(given.get("resume")).lower() == "true" and "output_dir" in given:
        held = Path(given["output_dir"]) / RECIPE
        path = held if held.is_file() else None
    return Recipe.resolve(read_yaml(path) if path else {}, given)


def parse(arguments: list[str]) -> tuple[str | None, dict[str, Any]]:
    """`[RECIPE] --name value --name=value --flag` → the recipe's path and the values, as text or True."""
    options, paths = split_options(arguments, lambda name: field_type(name) is bool)
    if len(paths) > 1:
        raise ValueError(f"{paths[1]!r} is one argument too many after the recipe {paths[0]}")
    return (paths[0] if paths else None), options


def _fail(message: str) -> int:
    _say(f"error: {message}")
    return 2


def _say(message: str):
    if os.environ.get("RANK", "0") == "0":  # once, however many processes there are
        print(message, file=sys.stderr)
