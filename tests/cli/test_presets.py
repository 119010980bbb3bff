"""The recipes for kinds of images: prepared and pretrained for a few steps, as their pages in docs/ say."""

import re
from pathlib import Path

import numpy as np
import pytest
import tifffile
from PIL import Image
from small_runs import read_recipe, run

from hf_mim.cli import main
from hf_mim.pretraining.settings import read_yaml

REPOSITORY = Path(__file__).parents[2]
RECIPES = REPOSITORY / "training" / "recipes"
SMALL = "--hidden_size 16 --num_hidden_layers 1 --num_attention_heads 2 --decoder_hidden_size 16 --use_cpu"
SMALL += " --decoder_num_hidden_layers 1 --per_device_train_batch_size 4 --max_steps 2 --dataloader_num_workers 0"


def scene(folder, index, side, bands, kind):
    folder.mkdir(exist_ok=True)
    values = np.random.RandomState(index).randint(0, 256 if kind == "uint8" else 3000, (side, side, bands)).astype(kind)
    if kind == "uint8":
        Image.fromarray(values.squeeze()).save(folder / f"{index}.{'jpg' if bands == 3 else 'png'}")
    else:
        tifffile.imwrite(folder / f"{index}.tif", values, photometric="minisblack", planarconfig="contig")


@pytest.mark.parametrize(
    ("name", "source", "tile", "bands", "kind", "more"),
    [
        ("histology", "slides", 512, 3, "uint8", []),
        ("satellite", "scenes", 256, 4, "uint16", ["--num_channels", "4"]),
        ("inspection", "parts", 256, 1, "uint8", []),
    ],
)
def test_a_preset_runs_on_what_was_prepared(tmp_path, monkeypatch, capsys, name, source, tile, bands, kind, more):
    monkeypatch.chdir(tmp_path)
    for index in range(2):
        scene(Path(source), index, tile + 8, bands, kind)
    assert main(["prepare", source, "tiles", "--tile", str(tile), "--num_workers", "0"]) == 0
    run(RECIPES / f"{name}.yaml", "--dataset", "tiles", *more, *SMALL.split(), "--output_dir", "run")
    size = read_recipe([str(RECIPES / f"{name}.yaml"), "--dataset", "tiles"]).config().image_size
    assert f"windows of {size} x {size} pixels, not resized; 0 of 8 images are smaller" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["histology", "satellite", "inspection"])
def test_the_page_of_a_preset_and_its_head_give_the_same_commands(name):
    head = (RECIPES / f"{name}.yaml").read_text().split("\n\n")[0]
    page = (REPOSITORY / "docs" / f"{name}.md").read_text()
    for command in re.findall(r"#   (hf-mim .*)", head):
        assert command in page
    assert (RECIPES / f"{name}.yaml").read_text() == (REPOSITORY / "hf_mim" / "recipes" / f"{name}.yaml").read_text()
    settings = {key: value for key, value in read_yaml(RECIPES / f"{name}.yaml").items() if value is not None}
    told = {key for key in settings if f"`{key}" in page or f"--{key}" in page}
    assert {"crop_pixels", "flip_probability", "rotate90", "color_jitter", "patch_size"} <= told
