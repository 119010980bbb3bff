"""`hf-mim convert SOURCE DEST`: turns a checkpoint of another program into a folder that `from_pretrained` loads."""

import re
from typing import Any, Literal

import click

from hf_mim import methods
from hf_mim.cli.errors import told_in_one_line
from hf_mim.cli.options import Command, Setting
from hf_mim.pretraining.settings import to_type

TEXT = """\
Bring SOURCE in: a file of torch or safetensors of any name, an index of shards, a folder with one checkpoint, or a name
on the Hub. It holds the authors' weights of MAE (pretrained, fine-tuned, linear probe), I-JEPA, StoP or Latent MIM,
transformers' vit_mae or ijepa, or a ViT of timm (such as vit_base_patch16_224.mae). DEST is a new folder, which
AutoModel, AutoModelForPreTraining or AutoModelForImageClassification loads.

The network may lie in dictionaries (state_dict, model_ema) and have a prefix (module., student.backbone.). Every tensor
under this prefix must have a place in the model, and every place a tensor; otherwise nothing is written.
DEST/conversion.json says what came from the file, what was assumed after the paper, and what you gave."""


def settings() -> list[Setting]:
    method = "the file's method; needed for StoP, whose files look like those of I-JEPA"
    fields = (
        "config fields that are not in the file, such as num_attention_heads=12 or image_size=64,96, or the "
        "normalisation of the pixels, image_mean=.485,.456,.406 image_std=.229,.224,.225"
    )
    prefix = (
        "which network, if there are several, such as teacher. or model_ema. Default: the one with most tensors; of "
        "equal ones, an average (ema, teacher, momentum or target in its name)"
    )
    return [
        Setting("method", Literal[tuple(methods.names())], text=method),
        Setting("prefix", str, text=prefix),
        Setting("set", str, "name=value ...", fields, metavar="name=value", multiple=True),
    ]


class Convert(Command):
    """Several settings may follow one `--set`."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        again, follows = [], False
        for word in args:
            if follows and re.match(r"\w+=", word):
                again.append("--set")
            follows = word.startswith("--set=") or (bool(again) and again[-1] == "--set")
            again.append(word)
        return super().parse_args(ctx, again)


def run(source: str, dest: str, method: str | None = None, prefix: str | None = None, set: tuple[str, ...] = ()):
    with told_in_one_line("nothing was written"):
        from transformers.utils import logging

        from hf_mim.files import check_destination
        from hf_mim.hub.convert import Conversion

        given = dict(read_setting(text) for text in set)
        logging.disable_progress_bar()
        check_destination(dest)  # before minutes of reading
        conversion = Conversion.read(source, method, prefix, **given)
        conversion.save(dest)
    print(summary(conversion.record, dest, hint=method is None))


def read_setting(text: str) -> tuple[str, Any]:
    """The name and the typed value of `name=value`. Raises ValueError for other text."""
    from hf_mim.hub.convert import setting_types

    name, has_value, value = text.partition("=")
    if not has_value:
        raise ValueError(f"--set needs name=value, not {text!r}")
    types = {name: kind for method in methods.rows() for name, kind in setting_types(method.name).items()}
    # An unknown name is refused later, when the method is known, with a hint at the name that was meant.
    return name, to_type(name, value, types[name]) if name in types else value


def summary(record: dict[str, Any], dest: str, hint: bool) -> str:
    """What was made, what of it was assumed, and how to load it. `hint`: say so if the file could be one of StoP."""
    kinds = ("ForPreTraining", "ForImageClassification")
    loader = "AutoModel" + next((kind for kind in kinds if record["model"].endswith(kind)), "")
    assumed = ", ".join(f"{name}={value}" for name, value in record["assumed"].items())
    lines = [f"{record['source']} is {record['method']}: {record['model']}.\n", table(record), ""]
    if record["other_prefixes"]:
        others = " or ".join(f"--prefix {prefix or repr(prefix)}" for prefix in record["other_prefixes"])
        taken = record["prefix"] or "the names without a prefix"
        lines.append(f"Taken: {taken}, because it is an average of the training. Other choices: {others}")
    if record["tokens_left"]:
        tokens = ", ".join(record["tokens_left"])
        lines.append(
            f"Not taken over: {tokens}. The original has them, so its features differ from those of this model."
        )
    if record["folded"]:
        lines.append("LayerScale is multiplied into the weights before it: the features stay the same.")
    if record["left_out"]:
        lines.append(f"Left out, because nothing reads it: {', '.join(record['left_out'])}.")
    if hint and record["method"] == "ijepa" and record["model"].endswith("ForPreTraining"):
        lines.append("A file of StoP looks the same; if it is one, give --method stop.")
    if assumed:
        lines.append(f"Not in the file, so assumed after the paper (change them by --set): {assumed}.")
    lines += [f"\nThe checkpoint is in {dest}:\n", "    import hf_mim", f"    from transformers import {loader}"]
    return "\n".join([*lines, f'    model = {loader}.from_pretrained("{dest}")'])


def table(record: dict[str, Any]) -> str:
    """The groups of tensors in the file that became the model, and what did not: name, number of tensors."""
    rows = [(what, name, count) for what in ("taken", "left") for name, count in record[what].items()]
    width = max(len(name) for _, name, _ in rows)
    lines = [f"  {what:5}  {name:{width}}  {count:>4} tensor{'s' * (count > 1)}" for what, name, count in rows]
    return "\n".join([*lines, *(f"  left   {name:{width}}  not read" for name in record["skipped"])])


SUMMARY = "bring in a checkpoint of the authors, of transformers or of timm"
command = Convert("convert", run, ("SOURCE", "DEST"), settings, TEXT, short_help=SUMMARY, no_args_is_help=True)
