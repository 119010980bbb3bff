"""`hf-mim pretrain` on images that are not of 8 bits: their depth is kept from the file to the features."""

import numpy as np
import pytest
import tifffile
import torch
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
}


def scenes(folder, bands, kind, low, high):
    """Smooth waves, two classes, no squares."""
    random = np.random.default_rng(0)
    y, x = (side[..., None] / 24 for side in np.mgrid[0:24, 0:40])
    for number in range(20):
        path = folder / "ab"[number % 2] / f"{number}.tif"
        path.parent.mkdir(parents=True, exist_ok=True)
        wave = np.sin(x * random.uniform(1, 9, bands) + y * random.uniform(1, 9, bands) + random.uniform(0, 6, bands))
        pixels = (low + (high - low) * (wave + 1) / 2).astype(kind)
        pixels, layout = (pixels, "contig") if bands > 1 else (pixels[..., 0], None)
        tifffile.imwrite(path, pixels, photometric="minisblack", planarconfig=layout, compression="zlib")
    return folder


@pytest.mark.parametrize("name", KINDS)
def test_a_run_keeps_the_depth_and_the_image_processor_gives_its_features(name, tmp_path, capsys):
    bands, kind, low, high, options, line, ends = KINDS[name]
    source, folder = scenes(tmp_path / "scenes", bands, kind, low, high), tmp_path / "run"
    batch = ["--per_device_train_batch_size", 8, "--num_channels", bands]
    run("--dataset", source, *SMALL, *OPTIONS, *batch, *options, "--output_dir", folder)
    (told,) = [text for text in capsys.readouterr().out.splitlines() if text.startswith("pixels: ")]
    assert told.startswith(line) and (ends is None or f"from {ends[0]:,}..{ends[1]:,}" in told)
    recorded = read_yaml(folder / "recipe.yaml")["value_range"]
    assert len(recorded) == (2 * bands if ends is None else 2) and (ends is None or tuple(recorded) == ends)
    assert (folder / "reconstructions.png").exists() and (folder / "results" / "knn.json").exists()

    images = load_images(source)
    extract = FeatureExtractor(FrozenEncoder.load(folder), progress=False)
    (measured,) = extract(Images(images.select_columns("image")), ["last/mean/norm"])
    processor, model = AutoImageProcessor.from_pretrained(folder), AutoModel.from_pretrained(folder).eval()
    arrays = [tifffile.imread(row["image"]["path"]) for row in images]
    with torch.no_grad():
        used = model(**processor(arrays, return_tensors="pt")).pooler_output
    assert torch.cosine_similarity(torch.as_tensor(measured), used).min() > 0.999999


def test_a_resume_keeps_the_range_that_was_measured(tmp_path, capsys):
    source, folder = scenes(tmp_path / "scenes", 2, "float32", -30, 5), tmp_path / "run"
    options = [*SMALL, *OPTIONS, "--per_device_train_batch_size", 8, "--num_channels", 2, "--save_steps", 1]
    run("--dataset", source, *options, "--knn", "false", "--output_dir", folder)
    before = read_yaml(folder / "recipe.yaml")["value_range"]
    run("--output_dir", folder, "--resume", "--max_steps", 3)
    assert read_yaml(folder / "recipe.yaml")["value_range"] == before


def test_files_of_several_depths_are_one_line_before_anything_is_written(tmp_path, capsys):
    source = scenes(tmp_path / "scenes", 3, "uint16", 0, 4000)
    for path in list(source.glob("a/*.tif")):
        tifffile.imwrite(path, tifffile.imread(path).astype(np.uint8), photometric="rgb")
    options = [*SMALL, *OPTIONS, "--per_device_train_batch_size", 8, "--output_dir", tmp_path / "run"]
    assert main(["pretrain", "--dataset", str(source), *map(str, options)]) == 2
    assert "error: the images have several depths, uint" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
