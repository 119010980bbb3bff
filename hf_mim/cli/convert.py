"""`hf-mim convert SOURCE DEST`: a checkpoint of others becomes a folder that `from_pretrained` loads."""

import re
from typing import TYPE_CHECKING, Any, Literal

import click

from hf_mim import methods
from hf_mim.cli.errors import told_in_one_line
from hf_mim.cli.options import Command, Setting
from hf_mim.pretraining.settings import to_type

if TYPE_CHECKING:
    from hf_mim.hub.convert import Conversion

TEXT = """\
Bring SOURCE in: a file (.pth, .pth.tar, .bin, .safetensors), a folder of one checkpoint, or a name on the Hub: the
authors' files of MAE (pretrained, fine-tuned, linear probe), I-JEPA, StoP, Latent MIM; transformers' vit_mae and ijepa;
timm's ViT (vit_base_patch16_224.mae and alike). DEST is a new folder, for AutoModel, AutoModelForPreTraining or
AutoModelForImageClassification.

Every tensor of the file has to find its place, and every place its tensor; nothing is written otherwise. What was
told by the file, assumed after the paper and given is noted in DEST/conversion.json."""


def settings() -> list[Setting]:
    method = "what to take the file for; needed for StoP, whose files look like I-JEPA's"
    fields = (
        "config fields that the file does not tell, like num_attention_heads=12, image_size=64,96, or the "
        "normalisation of the pixels, image_mean=.485,.456,.406 image_std=.229,.224,.225"
    )
    return [
        Setting("method", Literal[tuple(methods.names())], text=method),
        Setting("set", str, "name=value ...", fields, metavar="name=value", multiple=True),
    ]


class Convert(Command):
    """`--set` may be followed by several settings."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        again, follows = [], False
        for word in args:
            if follows and re.match(r"\w+=", word):
                again.append("--set")
            follows = word.startswith("--set=") or (bool(again) and again[-1] == "--set")
            again.append(word)
        return super().parse_args(ctx, again)


def run(source: str, dest: str, method: str | None = None, set: tuple[str, ...] = ()):
    with told_in_one_line("nothing was written"):
        from transformers.utils import logging

        from hf_mim.hub.convert import Conversion
        from hf_mim.hub.new_folder import check_destination

        given = dict(read_setting(text) for text in set)
        logging.disable_progress_bar()
        check_destination(dest)  # before minutes of reading
        conversion = Conversion.read(source, method, **given)
        conversion.save(dest)
    print(summary(conversion, dest, hint=method is None))


def read_setting(text: str) -> tuple[str, Any]:
    """`name=value` as the name and the value in its type. Raises ValueError."""
    from hf_mim.hub.convert import setting_types

    name, has_value, value = text.partition("=")
    if not has_value:
        raise ValueError(f"--set needs name=value, not {text!r}")
    types = {name: kind for method in methods.rows() for name, kind in setting_types(method.name).items()}
    # Another name is refused when the method is known, with a hint at what was meant.
    return name, to_type(name, value, types[name]) if name in types else value


def summary(conversion: "Conversion", dest: str, hint: bool) -> str:
    """What was made, what of it no file told, and how to load it; with a hint at StoP where it could be that."""
    record, loader = conversion.record, "AutoModel"
    for part in ("ForPreTraining", "ForImageClassification"):
        loader += part if record["model"].endswith(part) else ""
    assumed = ", ".join(f"{name}={value}" for name, value in record["assumed"].items())
    lines = [f"{record['source']} is {record['method']}: {record['model']}, every tensor in its place."]
    if record["left_out"]:
        lines.append(f"Left out, because nothing reads it: {', '.join(record['left_out'])}.")
    if hint and record["method"] == "ijepa" and record["model"].endswith("ForPreTraining"):
        lines.append("A file of StoP looks the same; for one, say --method stop.")
    if assumed:
        lines.append(f"Not told by the file, so assumed after the paper (other values by --set): {assumed}.")
    lines += [f"\nThe checkpoint is in {dest}:\n", "    import hf_mim", f"    from transformers import {loader}"]
    return "\n".join([*lines, f'    model = {loader}.from_pretrained("{dest}")'])


SUMMARY = "bring a checkpoint of the authors, of transformers or of timm in"
command = Convert("convert", run, ("SOURCE", "DEST"), settings, TEXT, short_help=SUMMARY, no_args_is_help=True)
