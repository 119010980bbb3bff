"""`hf-mim convert SOURCE DEST`: a checkpoint of others becomes a folder that `from_pretrained` loads."""

import re
import sys
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from transformers.utils import logging

from hf_mim import methods
from hf_mim.hub.convert import Conversion, setting_types
from hf_mim.hub.new_folder import check_destination
from hf_mim.pretraining.settings import convert as to_type

USAGE = """\
usage: hf-mim convert SOURCE DEST [--method mae|latent_mim|ijepa|stop] [--set name=value ...]

  SOURCE    a file (.pth, .pth.tar, .bin, .safetensors), a folder of one checkpoint, or a name on the Hub:
              the authors' files of MAE (pretrained, fine-tuned, linear probe), I-JEPA, StoP, Latent MIM;
              transformers' vit_mae and ijepa; timm's ViT (vit_base_patch16_224.mae and alike)
  DEST      a new folder, for AutoModel, AutoModelForPreTraining or AutoModelForImageClassification
  --method  what to take the file for; needed for StoP, whose files look like I-JEPA's
  --set     config fields that the file does not tell, like num_attention_heads=12, image_size=64,96, or the
            normalisation of the pixels, image_mean=.485,.456,.406 image_std=.229,.224,.225

Every tensor of the file has to find its place, and every place its tensor; nothing is written otherwise. What was
told by the file, assumed after the paper and given is noted in DEST/conversion.json."""


def convert_command(arguments: list[str]) -> int:
    """`hf-mim convert`; returns the exit status."""
    from hf_mim.cli import _fail, one_line  # hf_mim.cli imports this module

    if not arguments or {"-h", "--help"} & set(arguments):
        print(USAGE)
        return 0
    logging.disable_progress_bar()
    try:
        source, dest, method, settings = parse(arguments)
        check_destination(dest)  # before minutes of reading
        conversion = Conversion.read(source, method, **settings)
        conversion.save(dest)
    except (ValueError, OSError, RuntimeError, StrictDataclassError) as error:
        return _fail(one_line(error))
    except KeyboardInterrupt:
        print("\ninterrupted; nothing was written", file=sys.stderr)
        return 130
    print(summary(conversion, dest, hint=method is None))
    return 0


def parse(arguments: list[str]) -> tuple[str, str, str | None, dict[str, Any]]:
    """(source, dest, method, settings). Raises ValueError for what is missing, unknown or of the wrong type."""
    words, settings, method, rest = [], {}, None, list(arguments)
    while rest:
        word, has_value, value = rest.pop(0).partition("=")
        if word == "--method":
            method = value if has_value else _next(rest, "--method needs one of " + ", ".join(methods.names()))
        elif word == "--set":
            given = [value] if has_value else [_next(rest, "--set needs name=value")]
            while rest and re.match(r"\w+=", rest[0]):
                given.append(rest.pop(0))
            settings |= dict(_setting(text) for text in given)
        elif word.startswith("--"):
            raise ValueError(f"convert has no option {word}; there is --method and --set")
        else:
            words.append(word + has_value + value)
    if len(words) != 2:
        raise ValueError(f"convert needs SOURCE and DEST, got {' '.join(words) or 'neither'}")
    return *words, method, settings


def _next(rest: list[str], message: str) -> str:
    if not rest or rest[0].startswith("--"):
        raise ValueError(message)
    return rest.pop(0)


def _setting(text: str) -> tuple[str, Any]:
    name, has_value, value = text.partition("=")
    if not has_value:
        raise ValueError(f"--set needs name=value, not {text!r}")
    types = {name: kind for method in methods.names() for name, kind in setting_types(method).items()}
    # Another name is refused when the method is known, with a hint at what was meant.
    return name, to_type(name, value, types[name]) if name in types else value


def summary(conversion: Conversion, dest: str, hint: bool) -> str:
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
