"""`hf-mim show CHECKPOINT IMAGE... [--what PICTURE,...] [--output FOLDER]`."""

from dataclasses import dataclass
from typing import Literal

from hf_mim.cli.errors import Mistake, told_in_one_line
from hf_mim.cli.options import Command, Setting, settings_of

TEXT = """\
Make pictures of what CHECKPOINT sees, predicts and has learned. CHECKPOINT is a folder, or a name on the Hub, of a
pretraining run, or of any vision encoder that transformers' AutoModel loads. IMAGES are image files; or one source of
images as for hf-mim pretrain: a folder, a table, a name on the Hub, digits."""


@dataclass
class ShowArguments:
    """What `hf-mim show` draws.

    Args:
        what: the pictures, separated by commas; default: those that tell most about the method
        output: the folder for the PNG files
        count: images of a source, drawn with a fixed seed; default: 8, on a map 300
        split: the split of a source; default: test or validation, or train
        image_column: the column of a source, or the parts of an image such as rgb,ir; default: found by its type
        missing_modality: what an image is that lacks a part: error, or zero, the part is masked as a whole there
        image_size: side in pixels, or height,width, to which images are resized; larger ones have finer maps of
            features; default: that of the checkpoint
        bands: which bands are red, green and blue, such as 4,3,2, or the one that is grey; default: those of the
            recipe, or the first three
        patch: row,column from 1, for similarity and attention; default: the middle, and the CLS token for attention
        foreground: for pca, in (0, 1): colours only where the first component is above it
        position: for pca, false takes off what all images have in common at a place
        clusters: how many groups of patches, 2 to 7
        gallery: for nearest, the source of images to search in (500 of them); default: the images themselves
        seed: of the masks, and of the map
    """

    what: list[str] | None = None
    output: str = "pictures"
    count: int | None = None
    split: str | None = None
    image_column: str | None = None
    missing_modality: Literal["error", "zero"] = "error"
    image_size: int | list[int] | None = None
    bands: list[int] | None = None
    patch: list[int] | None = None
    foreground: float | None = None
    position: bool = True
    clusters: int = 6
    gallery: str | None = None
    seed: int = 0


class Show(Command):
    """It takes one word and then one or more."""

    def check_words(self, path: str, words: list[str]):
        if len(words) < 2:
            raise Mistake(f"{path} needs CHECKPOINT and IMAGES, not {' and '.join(words) or 'none'}")


def settings() -> list[Setting]:
    return settings_of(ShowArguments, "options")


def run(checkpoint: str, *images: str, **given: str):
    from typing import get_type_hints

    from transformers.utils import logging

    from hf_mim.pretraining.settings import to_type

    logging.disable_progress_bar()
    hints = get_type_hints(ShowArguments)
    with told_in_one_line("the pictures that were named are whole"):
        values = {name: to_type(name, value, hints[name]) for name, value in given.items()}
        from hf_mim.data.stacks import ERROR, image_parts
        from hf_mim.visualize.pictures import draw_pictures

        missing = values.pop("missing_modality", ERROR)
        values["image_column"] = image_parts(values.get("image_column"), missing)
        for path in draw_pictures(checkpoint, images, **values):
            print(path, flush=True)


command = Show(
    "show",
    run,
    ("CHECKPOINT", "IMAGES..."),
    settings,
    TEXT,
    short_help="make pictures of what a checkpoint predicts and has learned",
    no_args_is_help=True,
)
