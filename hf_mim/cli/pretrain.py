"""`hf-mim pretrain [RECIPE] [--argument value ...]`."""

import os
import sys

import click

from hf_mim import methods
from hf_mim.cli.errors import Mistake, fail, say, told_in_one_line
from hf_mim.cli.options import HELP, Command, Setting, settings_of, versions
from hf_mim.files import one_line
from hf_mim.pretraining.recipe_files import recipe_names

TEXT = """\
RECIPE is a YAML file, or the name of a recipe that comes with hf_mim (hf-mim recipes lists them). The command line
overrides the recipe, and the recipe overrides the defaults. Without any argument, a small MAE is
pretrained on the embedded textures. Pairs are written 64,96; --streaming means --streaming true."""

# (name, default, text) of the options that most runs set. They are written by hand, because to read them from their
# classes takes seconds of imports, and the help has to be quick. A test compares the two.
MOST_USED = (
    ("method", "mae", "one of {methods}"),
    (
        "dataset",
        "textures",
        "a folder of images, Parquet, Arrow or tar files; owner/name on the Hub; textures (embedded)",
    ),
    ("output_dir", "", "the run folder; default: runs/DATASET_METHOD"),
    ("size", "base", "tiny, small, base, large, huge or giant; width, depth and so on can be set one by one"),
    ("image_size", "224", "side in pixels, or height,width"),
    ("patch_size", "16", "side in pixels, or height,width; divides image_size"),
    ("num_channels", "3", "channels of the images"),
    ("num_train_epochs", "100", "passes over the images; or give max_steps"),
    ("per_device_train_batch_size", "64", "images per device and step"),
    ("base_lr", "0.00015", "peak learning rate for 256 images per step"),
    ("bf16", "", "mixed precision; default: if the GPU has it"),
    ("save_steps", "500", "steps from one checkpoint to the next"),
    ("probe_every", "0", "steps from one measurement of the features to the next; 0: none"),
    ("init_from", "", "a checkpoint to start from: a folder or a name on the Hub (docs/start.md)"),
    ("resume", "false", "continue the run in output_dir, with the settings in its recipe.yaml"),
    ("seed", "42", "seed of weights, crops, masks and order"),
)
EXAMPLES = """\
\b
Examples:
  hf-mim pretrain
  hf-mim pretrain cifar10_mae --dataset ~/cifar10
  hf-mim pretrain --dataset ~/photos --size small --num_train_epochs 200
  hf-mim pretrain --resume --output_dir runs/photos_mae

These are the most used options; hf-mim pretrain --help-all lists all of them."""

# The arguments of transformers that most runs set. --help-all prints only the names of the others.
COMMON = (
    "output_dir num_train_epochs max_steps per_device_train_batch_size gradient_accumulation_steps warmup_steps "
    "adam_beta1 bf16 torch_compile dataloader_num_workers save_steps save_total_limit seed"
).split()
OTHERS = "and of transformers.TrainingArguments"


def settings() -> list[Setting]:
    """All arguments of the run, of each method and of the training, with their defaults."""
    from hf_mim.pretraining.recipe import DEFAULTS, NOT_OFFERED, TRAINING_FIELDS, RunArguments, all_fields, model_fields
    from hf_mim.pretraining.trainer import MIMTrainingArguments

    fields = {method.name: list(model_fields(method.name)) for method in methods.rows()}
    shared = set.intersection(*map(set, fields.values()))
    first, *_ = methods.rows()
    found = settings_of(RunArguments, "the run")
    found[0].hint = all_fields()["method"]  # the names of the methods are known only now
    found += settings_of(first.config_class, "the model", [name for name in fields[first.name] if name in shared])
    for method in methods.rows():
        own = [name for name in fields[method.name] if name not in shared]
        found += settings_of(method.config_class, f"the model, method {method.name}", own)
    own = [name for name in MIMTrainingArguments.__annotations__ if name in TRAINING_FIELDS]
    training = [*COMMON, *(name for name in own if name not in COMMON)]
    found += settings_of(MIMTrainingArguments, "training", training, DEFAULTS)
    found += settings_of(MIMTrainingArguments, OTHERS, sorted(TRAINING_FIELDS.keys() - set(training)))
    found.append(Setting("continue", str, hidden=True))  # `continue_from`, which is a name that Python allows
    # `Recipe` tells why these are refused, whatever their value.
    return found + [Setting(name, bool | str, hidden=True) for name in NOT_OFFERED]


class Pretrain(Command):
    """Its `--help` is short; its `--help-all` looks like the help of other commands."""

    complaint = "unknown argument {name}"

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        if {"--help-all", "--help_all"} & set(args):
            click.echo(super().get_help(ctx))
            ctx.exit()
        imports = "torch" not in sys.modules  # it takes seconds, so a first line comes before
        if imports and not HELP & set(args) and os.environ.get("RANK", "0") == "0":
            click.echo(f"{versions()} starts")
        return super().parse_args(ctx, args)

    def get_help(self, ctx: click.Context) -> str:
        formatter = ctx.make_formatter()
        formatter.write_usage(ctx.command_path, "[RECIPE] [--option value ...]")
        self.format_help_text(ctx, formatter)
        with formatter.section("options"):
            known = ", ".join(methods.names())
            rows = [(f"--{name} {default}".rstrip(), text.format(methods=known)) for name, default, text in MOST_USED]
            formatter.write_dl(rows, col_max=38)
        formatter.write_paragraph()
        formatter.write_text(EXAMPLES)
        return formatter.getvalue().rstrip("\n")

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter):
        shown = [setting for setting in self.settings if not setting.hidden]
        others = [setting for setting in shown if setting.section == OTHERS]
        self.format_settings(ctx, formatter, shown[: -len(others)])
        with formatter.section(OTHERS):
            formatter.write_text(", ".join(setting.name for setting in others))

    def may_be_word(self, word: str) -> bool:
        is_file = word.lower().endswith((".yaml", ".yml")) or os.path.exists(os.path.expanduser(word))
        return is_file or word in recipe_names()

    def check_words(self, path: str, words: list[str]):
        if len(words) > 1:
            raise Mistake(f"{words[1]!r} is one argument too many after the recipe {words[0]}")


def run(recipe: str | None = None, **given: str) -> int:
    """Train and return the exit status. 75 means: the run has saved itself, start it again."""
    from transformers.utils import logging

    from hf_mim.data import BrokenImagesError, ImageFormatError
    from hf_mim.data.damage import DamagedFile
    from hf_mim.front_door import prepare, train
    from hf_mim.lock import LockedError
    from hf_mim.pretraining.guard import NonFiniteError
    from hf_mim.pretraining.resume import resume_command
    from hf_mim.pretraining.signals import INTERRUPTED, Ended, NoImagesError

    logging.disable_progress_bar()  # those of loading and saving; the training shows its own
    with told_in_one_line("nothing was written"):
        pretraining = prepare(recipe, given)
    resume = f"resume with: {resume_command(pretraining.folder)}"
    try:
        train(pretraining)
    except Ended as ended:
        say(f"{ended.signal.name} has ended the run; {resume}")
        return INTERRUPTED
    except (BrokenImagesError, ImageFormatError, DamagedFile, LockedError, NonFiniteError) as error:
        print(file=sys.stderr)  # ends the line with the progress bar
        return fail(one_line(error))
    except OSError as error:
        print(file=sys.stderr)
        return fail(f"{one_line(error)}; {resume}")
    except NoImagesError as error:
        print(f"\nerror: {error}; {resume}", file=sys.stderr)  # perhaps on another rank than the first
        return INTERRUPTED
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        # Not `say`, because the worker may be one of another rank than the first.
        print(
            f"\nerror: {one_line(error)}; a lower dataloader_num_workers takes less memory; {resume}", file=sys.stderr
        )
        return INTERRUPTED
    except KeyboardInterrupt:
        print(f"\ninterrupted; from the last checkpoint, {resume}", file=sys.stderr)
        return 130
    return 0


SUMMARY = "pretrain MAE, Latent MIM, StoP-JEPA, SymMIM or Interactive MIM on images"
command = Pretrain("pretrain", run, ("[RECIPE]",), settings, TEXT, short_help=SUMMARY)
