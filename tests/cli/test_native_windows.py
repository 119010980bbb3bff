"""`hf-mim pretrain --crop_pixels` and the options for images without an up: from the command line to an evaluation."""

import json
import re

import numpy as np
import pytest
import torch
from PIL import Image
from small_runs import SMALL, read_recipe, run
from transformers import AutoImageProcessor, AutoModel

from hf_mim.cli import main
from hf_mim.data import CenterWindow, load_images
from hf_mim.data.crop import crop_rng, load_crop
from hf_mim.evaluation.encoder import FeatureSpec, FrozenEncoder
from hf_mim.pretraining.final_results import central_crop
from hf_mim.pretraining.settings import read_yaml

OPTIONS = "--image_size 32 --patch_size 8 --max_steps 2 --per_device_train_batch_size 8 --dataloader_num_workers 0"
OPTIONS = [
    *SMALL,
    *OPTIONS.split(),
    "--decoder_num_hidden_layers",
    "1",
    "--decoder_hidden_size",
    "16",
    "--knn",
    "false",
]
NO_UP = "--rotate90 --vertical_flip_probability .5 --color_jitter .1".split()


def photographs(folder, count=20, side=60):
    """Noise; the first is smaller than the others."""
    random = np.random.RandomState(0)
    for index in range(count):
        (folder / "ab"[index % 2]).mkdir(parents=True, exist_ok=True)
        height, width = (20, 90) if index == 0 else (side, side + index)
        image = Image.fromarray(random.randint(0, 256, (height, width, 3), dtype=np.uint8))
        image.save(folder / "ab"[index % 2] / f"{index:02}.png")
    return folder


@pytest.fixture(scope="module")
def native_run(tmp_path_factory):
    """A run on windows of 48 pixels that the model sees at 32."""
    folder = tmp_path_factory.mktemp("native")
    photographs(folder / "photos")
    run("--dataset", folder / "photos", *OPTIONS, "--crop_pixels", 48, *NO_UP, "--output_dir", folder / "run")
    return folder


def test_the_run_says_how_windows_are_cut_and_how_many_images_are_smaller(tmp_path, capsys):
    photos = photographs(tmp_path / "photos")
    run("--dataset", photos, *OPTIONS, "--crop_pixels", 32, "--output_dir", tmp_path / "run")
    line = "crops: windows of 32 x 32 pixels, not resized; 1 of 20 images are smaller, and their largest such part"
    assert line in capsys.readouterr().out


def test_evaluation_and_the_saved_processor_see_the_central_window_of_the_same_scale(native_run):
    image = native_run / "photos" / "b" / "05.png"
    expected = load_crop(str(image), CenterWindow((48, 48)), (32, 32), 3, crop_rng(0, 0, 0))
    encoder = FrozenEncoder.load(native_run / "run", device="cpu")
    assert encoder.crop == CenterWindow((48, 48))
    assert FrozenEncoder.load(native_run / "run", 64, device="cpu").crop == CenterWindow((96, 96))
    processor = AutoImageProcessor.from_pretrained(native_run / "run")
    pixels = processor(Image.open(image), return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(pixels, encoder.preprocess(expected[None]), rtol=0, atol=1e-6)
    features = AutoModel.from_pretrained(native_run / "run")(pixels).pooler_output
    (ours,) = encoder.extract(encoder.preprocess(expected[None]), [FeatureSpec()])
    assert torch.cosine_similarity(features, ours).item() > 0.999999


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ([], {"crop_pixels": [48, 48]}),
        (["--crop_fraction", "1"], {"crop_fraction": 1.0}),
        (["--crop_pixels", "20,30"], {"crop_pixels": [20, 30]}),
    ],
)
def test_a_result_says_which_part_of_the_images_was_seen(native_run, tmp_path, monkeypatch, options, said):
    monkeypatch.setenv("HF_MIM_CACHE", str(tmp_path / "cache"))
    where = "--dataset", str(native_run / "photos"), "--output", str(tmp_path / "r.json"), "--k", "3"
    assert main(["evaluate", "knn", str(native_run / "run"), *where, *options]) == 0
    settings = json.loads((tmp_path / "r.json").read_text())["settings"]
    assert {name: settings[name] for name in ("crop_pixels", "crop_fraction") if name in settings} == said


def test_the_saved_recipe_and_the_card_tell_the_windows(native_run):
    saved = read_yaml(native_run / "run" / "recipe.yaml")
    assert saved["crop_pixels"] == 48 and saved["rotate90"] is True and not {"crop_scale", "crop_ratio"} & set(saved)
    assert read_recipe([str(native_run / "run" / "recipe.yaml")]).run.crop_pixels == 48
    card = (native_run / "run" / "README.md").read_text()
    assert (
        "cropped to a window of 48×48 pixels of the image" in card
        and "rotated by a random number of quarter turns" in card
    )


def test_latent_mim_is_evaluated_at_the_scale_of_its_larger_training_input():
    latent = "--method latent_mim --dataset x --image_size 32 --patch_size 8 --patch_gap 2 --crop_pixels 80".split()
    recipe = read_recipe(latent)
    assert recipe.config().training_size == (40, 40)
    assert central_crop(recipe.run, recipe.config()) == CenterWindow((64, 64))


def test_the_command_line_chooses_between_windows_and_shares(tmp_path):
    (tmp_path / "r.yaml").write_text("dataset: x\ncrop_pixels: 256\n")
    assert read_recipe([str(tmp_path / "r.yaml"), "--crop_scale", ".5,1"]).run.crop_pixels is None
    (tmp_path / "r.yaml").write_text("dataset: x\ncrop_scale: [.5, 1]\n")
    assert read_recipe([str(tmp_path / "r.yaml"), "--crop_pixels", "64,128"]).run.crop_pixels == (64, 128)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--crop_pixels 0", "crop_pixels must be a side, or height,width, of at least 1 pixel, not 0"),
        (
            "--crop_pixels 32 --crop_scale .2,1",
            "crop_pixels cannot be given together with crop_scale; give one",
        ),
        ("--crop_pixels 64 --image_size 32,64", "proportions of the input, 32 x 64, not 64,64; 64,128 would be right"),
        ("--crop_pixels 500", "crop_pixels 500,500 must fit into an image, and all 20 .* a square of 60 fits into one"),
        (
            "--rotate90 --image_size 32,64",
            "rotate90 must be false for crops of 32 x 64 pixels",
        ),
        ("--color_jitter 2", "color_jitter must lie in \\[0, 1\\], not 2.0"),
        ("--vertical_flip_probability -1", "vertical_flip_probability must lie in \\[0, 1\\], not -1.0"),
    ],
)
def test_impossible_options_are_refused_in_one_line(tmp_path, capsys, options, message):
    photos = photographs(tmp_path / "photos")
    words = ["--dataset", str(photos), *OPTIONS, *options.split(), "--output_dir", str(tmp_path / "run")]
    assert main(["pretrain", *words]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert re.search(message, line), line
    assert not (tmp_path / "run").exists()


def test_windows_are_cut_from_a_stream_too(tmp_path):
    photos = photographs(tmp_path / "photos")
    options = ["--streaming", "--crop_pixels", 32, "--output_dir", tmp_path / "run"]
    run("--dataset", photos, *OPTIONS, *options)
    assert len(load_images(photos)) == 20 and (tmp_path / "run" / "model.safetensors").exists()
