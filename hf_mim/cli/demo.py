"""`hf-mim demo CHECKPOINT`: serves a page in the browser."""

from dataclasses import dataclass
from typing import Any, get_type_hints

import click

from hf_mim.cli.errors import told_in_one_line
from hf_mim.cli.options import Command, Setting, settings_of
from hf_mim.pretraining.settings import to_type

TEXT = """\
Serve a page in the browser on which one uploads an image and sees what CHECKPOINT makes of it: its predictions for
patches that one hides, the patches that are like one patch, and the nearest images of a collection. CHECKPOINT is a
folder, or a name on the Hub, of a pretraining run, or of any vision encoder that transformers' AutoModel loads, which
has no predictions. The extra hf-mim[demo] is needed.

\b
hf-mim demo runs/mine
hf-mim demo runs/mine --in photos.parquet --examples my_photos --port 8000"""


@dataclass
class DemoArguments:
    """What `hf-mim demo` shows, and where.

    Args:
        examples: a source of images, 8 of which are offered; default: what the run was trained on, if it is here
        image_size: side in pixels, or height,width, to which images are resized; larger ones have finer maps of
            features; default: that of the checkpoint
        bands: which bands are red, green and blue, such as 4,3,2, or the one that is grey; default: those of the
            recipe, or the first three
        host: the address to listen on; 0.0.0.0 lets in everyone whose machine reaches this one
        port: default: the first free one from 7860 on
        max_image_pixels: of one image; larger ones are refused; default: 50,000,000
    """

    examples: str | None = None
    image_size: int | list[int] | None = None
    bands: list[int] | None = None
    host: str = "127.0.0.1"
    port: int | None = None
    max_image_pixels: int | None = None


def settings() -> list[Setting]:
    where = "where to search for the nearest images: a file or folder of hf-mim embed, or a source of images"
    return [Setting("in", str, text=where), *settings_of(DemoArguments, "options")]


class Demo(Command):
    """Its `--in` has a name that Python keeps for itself."""

    def invoke(self, ctx: click.Context) -> Any:
        return self.callback(*ctx.args, where=ctx.params.pop("in", None), **ctx.params)


def run(checkpoint: str, where: str | None = None, host: str = "127.0.0.1", **given: str):
    with told_in_one_line("the demo has ended"):
        from transformers.utils.logging import disable_progress_bar

        from hf_mim.demo.app import launch

        disable_progress_bar()
        hints = get_type_hints(DemoArguments)
        values = {name: to_type(name, value, hints[name]) for name, value in given.items()}
        launch(checkpoint, where=where, host=host, **values)


SUMMARY = "try a checkpoint in the browser, on images of your own"
command = Demo("demo", run, ("CHECKPOINT",), settings, TEXT, short_help=SUMMARY, no_args_is_help=True)
