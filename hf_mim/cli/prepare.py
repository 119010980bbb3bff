"""`hf-mim prepare SOURCE DEST --tile N | --short_side N`: makes files that train fast of large images."""

import os
import shlex
from typing import Literal

from hf_mim.cli.errors import told_in_one_line
from hf_mim.cli.options import Command, Setting
from hf_mim.files import listed
from hf_mim.pretraining.settings import to_type

NODATA = float | Literal["none"] | None
TEXT = """\
Cut the images of SOURCE into tiles of native pixels, or make them smaller, and write them to the new folder DEST.
SOURCE is a folder of images, or whatever hf-mim pretrain takes. Depth, bands, class folders, splits and labels stay.

\b
--tile 256        name_r003_c012.png is the tile in row 3 and column 12. The last tiles of a row and of a column are
                  shifted inwards: they overlap their neighbours. An image that is smaller gives one smaller tile.
--short_side 320  resized with antialiasing; smaller images are copied as they are.

From JPEGs come JPEGs of quality 95, from other 8-bit images PNGs, from 16 bits, floats and many bands lossless TIFFs
(.npy where tifffile is missing). An image with a nodata value becomes a TIFF whose GDAL_NODATA tag has the value, and
--short_side mixes no such pixel with others. DEST is written aside and gets its name when it is complete."""


def settings() -> list[Setting]:
    channels = "of the images, where a file can be read in two ways: arrays, the pages of a TIFF"
    pixels = "of one image; larger ones are refused; default: 178,956,970"
    nodata = "the value of pixels without data, nan, or none; default: what the tag of each file says"
    return [
        Setting("tile", int, text="side of the tiles in pixels"),
        Setting("short_side", int, text="length of the shorter side in pixels"),
        Setting("num_channels", int, text=channels),
        Setting("nodata", NODATA, text=nodata),
        Setting("max_image_pixels", int, text=pixels),
        Setting("num_workers", int, text="processes; default: one for each core"),
    ]


def run(source: str, dest: str, **given: str):
    with told_in_one_line("nothing was written"):
        from hf_mim.checks import least
        from hf_mim.data.decode import MAX_PIXELS_VARIABLE
        from hf_mim.data.prepare import Prepare

        values = {name: to_type(name, value, NODATA if name == "nodata" else int) for name, value in given.items()}
        least(1, max_image_pixels=(pixels := values.pop("max_image_pixels", None)))
        if pixels is not None:
            os.environ[MAX_PIXELS_VARIABLE] = str(pixels)
        values.setdefault("num_workers", len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1)
        prepare = Prepare(source, dest, **values)
        prepared = prepare()
    print(summary(prepare, prepared))


def summary(prepare, prepared) -> str:
    """What was written, what was not, and how to train on it."""
    kinds = ", ".join(f"{count:,} {extension}" for extension, count in sorted(prepared.files.items()))
    what = "tiles" if prepare.tile else "files"
    lines = [f"{prepare.dest} holds {prepared.files.total():,} {what} ({kinds}) of {prepared.images:,} images."]
    if prepared.small:
        told = "are smaller than a tile in a side" if prepare.tile else "were small already and are copied as they are"
        lines.append(f"{prepared.small:,} images {told}.")
    if prepared.left_out:
        lines.append("left out: " + ", ".join(f"{count:,} {kind}" for kind, count in prepared.left_out.items()))
    if prepared.broken:
        lines.append(f"{len(prepared.broken):,} images cannot be decoded: {listed(prepared.broken, 20)}")
    if prepared.untold:
        lines.append(untold(prepared))
    return "\n".join([*lines, f"\nTrain on them:\n\n    {train_command(prepare, prepared)}"])


def untold(prepared) -> str:
    """A line about pixels without data that no tag of a file tells."""
    values = ", ".join(f"{text} in {count:,} images" for text, count in prepared.untold.items())
    line = f"Pixels without data, of which the files have no tag: {values}."
    return line if len(prepared.untold) == 1 else f"{line} A run needs one --nodata that holds for all."


def train_command(prepare, prepared) -> str:
    """The shell command that pretrains on what was written."""
    words = ["hf-mim", "pretrain", "--dataset", prepare.dest]
    channels = max(prepared.channels, key=prepared.channels.get)
    bands = {".tif", ".npy"} & prepared.files.keys() and channels not in (1, 3)  # a PNG has alpha, and no more bands
    words += ["--num_channels", str(channels)] if bands else []
    if prepare.tile:
        side = min(224, prepare.tile // 16 * 16) or 16
        words += ["--image_size", str(side), "--crop_pixels", str(min(side, prepare.tile))]
    words += ["--nodata", next(iter(prepared.untold))] if len(prepared.untold) == 1 else []
    return shlex.join(words)


SUMMARY = "cut large images into tiles, or make them smaller"
command = Command("prepare", run, ("SOURCE", "DEST"), settings, TEXT, short_help=SUMMARY, no_args_is_help=True)
