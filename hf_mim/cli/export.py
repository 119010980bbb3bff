"""`hf-mim export`: a checkpoint in a form that loads where hf_mim is not installed."""

import logging
import sys
import warnings

from transformers.utils.logging import disable_progress_bar

HELP = """\
usage: hf-mim export CHECKPOINT DEST --to FORM [--encoder online|target]

Writes a checkpoint of hf_mim to the new folder DEST in a form that needs no hf_mim.

  CHECKPOINT   a folder, or a name on the Hub: a pretraining model, an encoder or a classifier
  --to         transformers   ViTMAEForPreTraining (MAE with its decoder), ViTModel, IJepaModel, or their classifiers
               timm           weights and config.json of timm's VisionTransformer
               remote-code    the checkpoint as it is, with the code that trust_remote_code=True runs
               onnx           a graph of the encoder, for batches of any size (needs the extra: hf-mim[onnx])
  --encoder    which of the two that Latent MIM and StoP-JEPA train; it is then all that is written.
               Default: the one that the paper evaluates, Latent MIM's online and StoP-JEPA's target encoder"""


def export_command(arguments: list[str]) -> int:
    """`hf-mim export`."""
    if {"-h", "--help"} & set(arguments) or not arguments:
        print(HELP)
        return 0
    from hf_mim.cli import _fail  # which imports the commands
    from hf_mim.files import one_line
    from hf_mim.hub.export import export

    disable_progress_bar()
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)  # it speaks of torchvision
    warnings.simplefilter("ignore", FutureWarning)  # of torch to itself
    try:
        how_to_load = export(*_parse(arguments))
    except (ValueError, OSError, RuntimeError, ImportError) as error:
        return _fail(one_line(error))
    except KeyboardInterrupt:
        print("\ninterrupted; nothing was written", file=sys.stderr)
        return 130
    print(how_to_load)
    return 0


def _parse(arguments: list[str]) -> tuple[str, str, str, str | None]:
    """CHECKPOINT, DEST, the form, the encoder. Raises ValueError for anything else."""
    from hf_mim.pretraining.settings import split_options

    options, words = split_options(arguments, lambda name: False)
    unknown = sorted(set(options) - {"to", "encoder"})
    if unknown:
        raise ValueError(f"unknown option --{unknown[0]}; export has --to and --encoder")
    if len(words) != 2:
        raise ValueError(f"export needs CHECKPOINT and DEST, and was given {' '.join(words) or 'neither'}")
    if "to" not in options:
        raise ValueError("export needs --to transformers, timm, remote-code or onnx")
    return *words, options["to"], options.get("encoder")
