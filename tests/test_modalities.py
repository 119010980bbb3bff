"""`training/modalities.py`, and runs on images of two modalities."""

import importlib
import json
import shutil
import sys

import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Value
from datasets import Image as ImageFeature
from PIL import Image
from tiny_comparison import TRAINING
from transformers import AutoModel

from hf_mim.cli import main
from hf_mim.data import ImageDataset, WholeImage, load_images
from hf_mim.data.processor import image_processor
from hf_mim.demo.actions import Demo
from hf_mim.models.modeling_interactive_mim import InteractiveMIMForPreTraining
from hf_mim.pretraining.recipe import Recipe
from hf_mim.pretraining.run import Pretraining
from hf_mim.run_folder import RECIPE


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(str(TRAINING))
    yield importlib.import_module("modalities")
    sys.modules.pop("modalities")


@pytest.fixture
def source(tmp_path):
    rng = np.random.default_rng(0)
    for split in ("train", "test"):
        for name in ("a", "b"):
            folder = tmp_path / "images" / split / name
            folder.mkdir(parents=True)
            for number in range(8):
                Image.fromarray(rng.integers(0, 256, (16, 16, 3), np.uint8)).save(folder / f"{number}.png")
    return tmp_path / "images"


def test_the_modalities_of_an_image_are_read_as_one_image_with_its_class(script, source, tmp_path):
    script.main(str(source), str(tmp_path / "two"), "luma_chroma", "10")
    train, test = (load_images(tmp_path / "two", split, image_column="luma,chroma") for split in ("train", "test"))
    assert (len(train), len(test)) == (10, 16) and train.features["label"].names == ["a", "b"]
    pixels = ImageDataset(test, 16, 3, WholeImage())[0]["pixel_values"].permute(1, 2, 0).numpy()
    first = load_images(source, "test")[0]["image"]["path"]
    assert np.array_equal(pixels, np.asarray(Image.open(first).convert("YCbCr")))


def test_an_image_without_a_label_gets_no_class_and_ids_without_names_are_names(script, tmp_path):
    rows = {"image": [Image.new("RGB", (8, 8))] * 4}
    for feature in (ClassLabel(names=["0", "1"]), Value("int64")):
        features = Features(image=ImageFeature(decode=False), label=feature)
        images = Dataset.from_dict(rows | {"label": [0, 1, 1, -1]}, features)
        script.write(images, tmp_path / str(feature.dtype), script.luma_chroma)
        found = sorted(path.relative_to(tmp_path).parts[2:] for path in tmp_path.glob(f"{feature.dtype}/luma/**/*.npy"))
        assert found == [("0", "00000.npy"), ("00003.npy",), ("1", "00001.npy"), ("1", "00002.npy")]
        shutil.rmtree(tmp_path / str(feature.dtype))


def test_the_gradient_of_a_ramp_is_its_slope(script):
    ramp = Image.fromarray(np.repeat((3 * np.arange(40, dtype=np.uint8))[None, :, None], 20, 0).repeat(3, 2))
    parts = script.rgb_gradient(ramp)
    assert np.array_equal(parts["rgb"], np.asarray(ramp)) and (parts["gradient"] == 3).all()


SETTINGS = {
    "method": "interactive_mim",
    "modalities": {"luma": 1, "chroma": 2},
    "image_size": 16,
    "patch_size": 4,
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "decoder_num_hidden_layers": 1,
    "max_steps": 2,
    "per_device_train_batch_size": 4,
    "use_cpu": True,
    "disable_tqdm": True,
    "knn": False,
}


def test_a_run_on_two_folders_is_measured_with_both_and_with_each(script, source, tmp_path, capsys):
    script.main(str(source), str(tmp_path / "two"))
    data = {"dataset": str(tmp_path / "two"), "output_dir": str(tmp_path / "run")}
    Pretraining(Recipe.resolve(SETTINGS | data | {"image_column": "luma,chroma"}))()
    words = [
        "evaluate",
        "knn",
        str(tmp_path / "run"),
        "--dataset",
        str(tmp_path / "two"),
        "--k",
        "3",
        "--cache",
        "none",
    ]
    found = {}
    for seen in (None, "luma", "chroma"):
        chosen = ["--modalities", seen] if seen else []
        assert main([*words, "--image_column", "luma,chroma", *chosen]) == 0
        path = tmp_path / "run/results" / capsys.readouterr().out.split("results/")[-1].split(".json")[0]
        result = json.loads(path.with_suffix(".json").read_text())
        assert result["settings"].get("modalities") == (seen and [seen])
        found[seen] = result
    assert len({str(result["scores"]) for result in found.values()}) > 1
    embed = ["embed", str(tmp_path / "run"), "--dataset", str(tmp_path / "two"), "--image_column", "luma,chroma"]
    assert main([*embed, "--modalities", "luma", "--output", str(tmp_path / "luma.npy"), "--split", "test"]) == 0
    features = np.load(tmp_path / "luma.npy")
    encoder = AutoModel.from_pretrained(tmp_path / "run").eval()
    images = load_images(tmp_path / "two", "test", image_column="luma,chroma")
    recipe = Recipe.read(tmp_path / "run/recipe.yaml", {})
    pixels = torch.stack([s["pixel_values"] for s in ImageDataset(images, 16, 3, WholeImage())]).float() / 255
    mean, std = (torch.tensor(x).view(3, 1, 1) for x in (recipe.run.image_mean, recipe.run.image_std))
    expected = encoder((pixels - mean) / std, modalities=["luma"]).pooler_output.detach().numpy()
    np.testing.assert_allclose(features, expected, atol=1e-4)


def test_folders_of_modalities_that_nobody_has_named_are_no_classes(script, source, tmp_path):
    script.main(str(source), str(tmp_path / "two"))
    recipe = Recipe.resolve(SETTINGS | {"dataset": str(tmp_path / "two"), "output_dir": str(tmp_path / "run")})
    with pytest.raises(ValueError, match="give --image_column luma,chroma"):
        Pretraining(recipe)


def test_show_and_the_demo_read_images_of_parts(script, source, tmp_path):
    run, two = tmp_path / "run", tmp_path / "two"
    script.main(str(source), str(two))
    settings = SETTINGS | {"dataset": str(two), "image_column": "luma,chroma"}
    config = Recipe.resolve(settings | {"output_dir": str(run)}).config()
    InteractiveMIMForPreTraining(config).save_pretrained(run)
    image_processor((16, 16), [0.5] * 3, [0.5] * 3).save_pretrained(run)
    (run / RECIPE).write_text(json.dumps(settings))
    demo = Demo.load(run)
    assert len(demo.thumbnails()) == 8 and {*demo.examples[0]} == {"luma:", "chroma:"}
    words = ["show", str(run), str(two), "--image_column", "luma,chroma", "--what", "pca", "--count", "2"]
    assert main([*words, "--output", str(tmp_path / "pictures")]) == 0
    assert (tmp_path / "pictures" / "pca.png").exists()
