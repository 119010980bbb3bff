"""`hf-mim cache SOURCE DEST`: decodes images once, for `hf-mim pretrain --cache_images DEST`."""

import os
import shlex
from pathlib import Path

from hf_mim.cli.errors import told_in_one_line
from hf_mim.cli.options import Command, Setting
from hf_mim.pretraining.settings import to_type

TEXT = """\
Decode the images of SOURCE once, in full size, to 8 bits, and write them to the new folder DEST. SOURCE is a folder of
images, or whatever hf-mim pretrain takes. Then

    hf-mim pretrain --dataset SOURCE --cache_images DEST

only draws where to crop; the device cuts the crops. That is faster where images are small (CIFAR-10), and takes memory
where they are large. --cache_images true does the same with a place in the user's cache folder. DEST is written aside
and gets its name when it is complete."""


def settings() -> list[Setting]:
    return [
        Setting("train_split", str, "train", "the split to decode"),
        Setting("image_column", str, text="the column of the images; default: found by its type"),
        Setting("num_channels", int, 3, "of the images"),
        Setting("max_image_pixels", int, text="of one image; larger ones are refused; default: 178,956,970"),
    ]


def run(source: str, dest: str, train_split: str = "train", image_column: str | None = None, **given: str):
    with told_in_one_line("nothing was written"):
        from hf_mim.checks import least
        from hf_mim.data import ImageDataset, load_images
        from hf_mim.data.decode import MAX_PIXELS_VARIABLE
        from hf_mim.files import check_destination
        from hf_mim.pretraining.image_cache import write_cache

        values = {name: to_type(name, value, int) for name, value in given.items()}
        least(1, **values)
        if "max_image_pixels" in values:
            os.environ[MAX_PIXELS_VARIABLE] = str(values["max_image_pixels"])
        check_destination(dest)
        images = load_images(source, train_split, image_column=image_column, tell=print)
        write_cache(ImageDataset(images, 1, values.get("num_channels", 3)), Path(dest), print)
    given = "" if train_split == "train" else f" --train_split {shlex.quote(train_split)}"
    print(
        f"\nTrain on them:\n\n    hf-mim pretrain --dataset {shlex.quote(source)}{given} --cache_images "
        f"{shlex.quote(dest)}"
    )


SUMMARY = "decode small images once, to train faster on them"
command = Command("cache", run, ("SOURCE", "DEST"), settings, TEXT, short_help=SUMMARY, no_args_is_help=True)
