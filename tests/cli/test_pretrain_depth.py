"""`hf-mim pretrain` on images that are not of 8 bits: their depth is kept from the file to the features."""

import json
import re

import numpy as np
import pytest
import tifffile
import torch
from PIL import Image
from small_runs import SMALL, run
from transformers import AutoImageProcessor, AutoModel

from hf_mim.cli import main
from hf_mim.data import load_images
from hf_mim.data.images import Images
from hf_mim.evaluation import FeatureExtractor, FrozenEncoder
from hf_mim.pretraining.settings import read_yaml

OPTIONS = "--image_size 16 --patch_size 8 --max_steps 2 --dataloader_num_workers 0".split()
# kind → (bands, lowest and highest value, the options, the start of the line that tells the range, its two ends)
KINDS = {
    "12 bits of grey": (1, "uint16", 0, 4000, [], "pixels: uint16, ", (0, 4095)),
    "13 bands": (13, "uint16", 55, 2494, [], "pixels: uint16, ", (0, 4095)),
    "colour of 16 bits": (3, "uint16", 0, 65000, [], "pixels: uint16, ", (0, 65535)),
    "decibels": (2, "float32", -30, 5, [], "pixels: float32, -", None),
    "decibels of a given range": (2, "float32", -30, 5, ["--value_range", "-30,5"], "pixels: float32, -", (-30, 5)),
    "signed": (1, "int16", -1024, 3000, [], "pixels: int16, -", None),
    "decibels with stripes of NaN": (2, "float32", -30, 5, ["--nodata", "nan"], "pixels: float32, -30", None),
    "a tag of GDAL's": (1, "int16", -1024, 3000, [], "pixels: int16, -1,02", None),
    "8 bits with black for no data": (3, "uint8", 9, 250, ["--nodata", "0"], "pixels: uint8, ", (0, 255)),
}
DRAWN = ("13 bands", "decibels with stripes of NaN")  # tests/visualize has pictures of every kind
MARKS = dict.fromkeys(DRAWN, [pytest.mark.pictures])
MARKS |= dict.fromkeys(("decibels", "colour of 16 bits", "decibels of a given range", "signed"), [pytest.mark.slow])
# kind → (the value of pixels without data, the tag of the files)
NODATA = {
    "decibels with stripes of NaN": (np.nan, None),
    "a tag of GDAL's": (-9999, "-9999"),
    "8 bits with black for no data": (0, None),
}


def scenes(folder, bands, kind, low, high, nodata=None, tag=None):
    """Smooth waves, two classes, no squares; with `nodata`, half of them have a stripe of it."""
    extra = [] if tag is None else [(42113, "s", 0, tag, True)]
    random = np.random.default_rng(0)
    y, x = (side[..., None] / 24 for side in np.mgrid[0:24, 0:40])
    for number in range(20):
        path = folder / "ab"[number % 2] / f"{number}.tif"
        path.parent.mkdir(parents=True, exist_ok=True)
        wave = np.sin(x * random.uniform(1, 9, bands) + y * random.uniform(1, 9, bands) + random.uniform(0, 6, bands))
        pixels = (low + (high - low) * (wave + 1) / 2).astype(kind)
        if nodata is not None and number % 4 < 2:
            pixels[:, 10:18] = nodata
        pixels, layout = (pixels, "contig") if bands > 1 else (pixels[..., 0], None)
        about = dict(photometric="minisblack", planarconfig=layout, compression="zlib", extratags=extra)
        tifffile.imwrite(path, pixels, **about)
    return folder


@pytest.mark.parametrize("name", [pytest.param(name, marks=MARKS.get(name, [])) for name in KINDS])
def test_a_run_keeps_the_depth_and_the_image_processor_gives_its_features(name, tmp_path, capsys):
    bands, kind, low, high, options, line, ends = KINDS[name]
    nodata, tag = NODATA.get(name, (None, None))
    source, folder = scenes(tmp_path / "scenes", bands, kind, low, high, nodata, tag), tmp_path / "run"
    batch = ["--per_device_train_batch_size", 8, "--num_channels", bands]
    run("--dataset", source, *SMALL, *OPTIONS, *batch, *options, "--output_dir", folder)
    lines = capsys.readouterr().out.splitlines()
    (told,) = [text for text in lines if text.startswith("pixels: ")]
    counted = [text for text in lines if text.startswith("nodata: ")]
    assert len(counted) == (nodata is not None)
    assert str(read_yaml(folder / "recipe.yaml").get("nodata")) == str(None if nodata is None else float(nodata))
    assert told.startswith(line) and (ends is None or f"from {ends[0]:,}..{ends[1]:,}" in told)
    recorded = read_yaml(folder / "recipe.yaml")["value_range"]
    assert len(recorded) == (2 * bands if ends is None else 2) and (ends is None or tuple(recorded) == ends)
    assert (folder / "reconstructions.png").exists() == (name in DRAWN)
    assert (folder / "results" / "knn.json").exists()

    images = load_images(source)
    extract = FeatureExtractor(FrozenEncoder.load(folder), progress=False)
    (measured,) = extract(Images(images.select_columns("image")), ["last/mean/norm"])
    processor, model = AutoImageProcessor.from_pretrained(folder), AutoModel.from_pretrained(folder).eval()
    arrays = [tifffile.imread(row["image"]["path"]) for row in images]
    with torch.no_grad():
        used = model(**processor(arrays, return_tensors="pt")).pooler_output
    assert torch.cosine_similarity(torch.as_tensor(measured), used).min() > 0.999999
    if nodata is not None:
        assert counted[0].startswith("nodata: 10.0 % of the pixels, in 10 of 20 images (")  # whole images, not crops
        assert ("by the tags of the files" in counted[0]) == (tag is not None)
        assert (processor(arrays, return_tensors="pt")["pixel_values"] == 0).float().mean() > 0.05


FILES = {  # name → (bands, the file's name, how it is written)
    "tiff, orientation 6": (1, "0.tif", lambda p, a: tifffile.imwrite(p, a, extratags=[(274, "H", 1, 6, True)])),
    "png of 16 bits": (1, "0.png", lambda p, a: Image.fromarray(a).save(p)),
    "npy, channels first": (4, "0.npy", lambda p, a: np.save(p, np.stack([a] * 4))),
    "5 pages": (5, "0.tif", lambda p, a: tifffile.imwrite(p, np.stack([a + k for k in range(5)]))),
    "one of 2 pages": (1, "0.tif", lambda p, a: tifffile.imwrite(p, np.stack([a, a[::-1]]))),
}


@pytest.mark.parametrize("name", FILES)
def test_the_example_of_the_card_gives_the_features_of_a_file(name, tmp_path, monkeypatch, capsys):
    bands, file, write = FILES[name]
    (tmp_path / "scenes").mkdir()
    random = np.random.default_rng(0)
    for number in range(8):
        wave = np.add.outer(np.arange(24), np.arange(40)) * random.uniform(5, 60)
        write(tmp_path / "scenes" / file.replace("0", str(number)), wave.astype(np.uint16))
    folder = tmp_path / "run"
    batch = ["--per_device_train_batch_size", 8, "--num_channels", bands, "--knn", "false"]
    run("--dataset", tmp_path / "scenes", *SMALL, *OPTIONS, *batch, "--output_dir", folder)
    told = [line for line in capsys.readouterr().out.splitlines() if line.startswith("pages: ")]
    assert len(told) == (name == "one of 2 pages")
    assert not told or "the first of 2 pages is the image, in 8 of 8 TIFF files" in told[0]

    images = load_images(tmp_path / "scenes")
    extract = FeatureExtractor(FrozenEncoder.load(folder), progress=False)
    (expected,) = extract(Images(images.select_columns("image")), ["last/mean/norm"])
    card = (folder / "README.md").read_text()
    low, high = read_yaml(folder / "recipe.yaml")["value_range"]
    assert f"scaled from its own depth: the values {low} to {high} come to lie in 0..1" in card
    (example,) = (block for block in re.findall(r"```python\n(.*?)```", card, re.DOTALL) if '"image.tif"' in block)
    monkeypatch.chdir(tmp_path)
    for index, row in enumerate(images):
        names = {}
        exec(example.replace('"image.tif"', repr(row["image"]["path"])), names)
        found = names["output"].pooler_output[0]
        assert torch.cosine_similarity(torch.as_tensor(expected[index]), found, dim=0) > 0.999999
        assert (torch.as_tensor(expected[index]) - found).abs().max() < 1e-4


def test_a_resume_keeps_the_range_that_was_measured(tmp_path, capsys):
    source, folder = scenes(tmp_path / "scenes", 2, "float32", -30, 5), tmp_path / "run"
    options = [*SMALL, *OPTIONS, "--per_device_train_batch_size", 8, "--num_channels", 2, "--save_steps", 1]
    run("--dataset", source, *options, "--knn", "false", "--output_dir", folder)
    before = read_yaml(folder / "recipe.yaml")["value_range"]
    run("--output_dir", folder, "--resume", "--max_steps", 3)
    assert read_yaml(folder / "recipe.yaml")["value_range"] == before


def test_nodata_none_ignores_the_tags_and_a_resume_does_so_too(tmp_path, capsys):
    source, folder = scenes(tmp_path / "scenes", 1, "int16", -1024, 3000, -9999, "-9999"), tmp_path / "run"
    options = [*SMALL, *OPTIONS, "--per_device_train_batch_size", 8, "--num_channels", 1, "--save_steps", 1]
    run("--dataset", source, *options, "--knn", "false", "--nodata", "none", "--output_dir", folder)
    run("--output_dir", folder, "--resume", "--max_steps", 3)
    assert read_yaml(folder / "recipe.yaml")["nodata"] == "none"
    told = capsys.readouterr().out
    assert "nodata:" not in told and "pixels: int16, -9,999" in told
    assert main(["pretrain", "--output_dir", str(folder), "--resume", "--nodata", "-9999"]) == 2
    assert "nodata is -9999.0, but the run in" in capsys.readouterr().err


def test_files_of_several_depths_are_one_line_before_anything_is_written(tmp_path, capsys):
    source = scenes(tmp_path / "scenes", 3, "uint16", 0, 4000)
    for path in list(source.glob("a/*.tif")):
        tifffile.imwrite(path, tifffile.imread(path).astype(np.uint8), photometric="rgb")
    options = [*SMALL, *OPTIONS, "--per_device_train_batch_size", 8, "--output_dir", tmp_path / "run"]
    assert main(["pretrain", "--dataset", str(source), *map(str, options)]) == 2
    assert "error: the images have several depths, uint" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("method", ["latent_mim", "stop_jepa"])
def test_a_run_of_every_method_leaves_pixels_without_data_out(method, tmp_path):
    source, folder = scenes(tmp_path / "scenes", 1, "float32", -30, 5, np.nan), tmp_path / "run"
    options = "--image_size 32 --patch_size 4 --max_steps 2 --dataloader_num_workers 0 --num_channels 1 --knn false"
    batch = ["--per_device_train_batch_size", 8, "--logging_steps", 1, "--blur_probability", 0.5]
    run(
        "--method",
        method,
        "--dataset",
        source,
        *SMALL,
        *options.split(),
        *batch,
        "--nodata",
        "nan",
        "--output_dir",
        folder,
    )
    log = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    assert all(np.isfinite(entry["loss"]) for entry in log if "loss" in entry)
    record = json.loads((folder / "results" / "training.json").read_text())
    assert record["data"]["nodata"].endswith(" of 20 images (nan)")


@pytest.mark.parametrize(
    ("nodata", "kind", "options", "message"),
    [
        (np.nan, "float32", [], r"error: .*\.tif: has values that are not finite; pretrain with --nodata nan"),
        (0, "uint8", ["--nodata", 300], "error: nodata must be a whole number in 0..255 for images of uint8 "),
        (0, "uint8", ["--nodata", "inf"], "error: nodata must be a number or nan"),
        (0, "uint8", ["--nodata", "black"], "error: nodata must be a number or none, not 'black'"),
    ],
)
def test_a_wrong_nodata_is_one_line_before_anything_is_written(nodata, kind, options, message, tmp_path, capsys):
    source = scenes(tmp_path / "scenes", 1, kind, 1, 9, nodata)
    batch = ["--per_device_train_batch_size", 8, "--num_channels", 1, "--output_dir", tmp_path / "run"]
    words = ["--dataset", source, *SMALL, *OPTIONS, *batch, *options]
    assert main(["pretrain", *map(str, words)]) == 2
    assert re.search(message, capsys.readouterr().err) and not (tmp_path / "run").exists()
