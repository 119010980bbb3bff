"""`hf-mim export`: writes a checkpoint in a form that loads without hf_mim, or as a Space."""

import logging
import warnings
from typing import Literal

from hf_mim.cli.errors import Mistake, told_in_one_line
from hf_mim.cli.options import Command, Setting

TEXT = """\
Write a checkpoint of hf_mim to the new folder DEST, in a form that loads without hf_mim, or as a Space. CHECKPOINT is a
folder or a name on the Hub, with a pretraining model, an encoder or a classifier.

\b
--to  transformers   ViTMAEForPreTraining (MAE with its decoder), ViTModel, IJepaModel, or their classifiers
      timm           weights and config.json of timm's VisionTransformer
      remote-code    the checkpoint as it is, with the code that trust_remote_code=True runs
      onnx           a graph of the encoder, for batches of any size (needs the extra: hf-mim[onnx])
      space          a Space for the Hub, or for your own server: the page of hf-mim demo with the checkpoint; it is
                     the only form that needs hf_mim"""


def settings() -> list[Setting]:
    encoder = (
        "write only this one of the two encoders of Latent MIM and StoP-JEPA. Default: the one that the paper "
        "evaluates, Latent MIM's online and StoP-JEPA's target encoder"
    )
    forms = Literal["transformers", "timm", "remote-code", "onnx", "space"]
    return [Setting("to", forms, text="the form"), Setting("encoder", Literal["online", "target"], text=encoder)]


def run(checkpoint: str, dest: str, to: str | None = None, encoder: str | None = None):
    if to is None:
        raise Mistake("export needs --to transformers, timm, remote-code, onnx or space")
    with told_in_one_line("nothing was written"):
        from transformers.utils.logging import disable_progress_bar

        from hf_mim.hub.export import export

        disable_progress_bar()
        logging.getLogger("torch.onnx").setLevel(logging.ERROR)  # it warns that torchvision is missing
        warnings.simplefilter("ignore", FutureWarning)  # torch's warnings about its own code
        how_to_load = export(checkpoint, dest, to, encoder)
    print(how_to_load)


SUMMARY = "write a checkpoint for transformers, timm, remote code, ONNX or a Space"
command = Command("export", run, ("CHECKPOINT", "DEST"), settings, TEXT, short_help=SUMMARY, no_args_is_help=True)
