"""`training/modalities.py`, and runs on images of two modalities."""

import importlib
import json
import runpy
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Value
from datasets import Image as ImageFeature
from PIL import Image
from tiny_comparison import TRAINING
from transformers import AutoImageProcessor, AutoModel

from hf_mim.cli import main
from hf_mim.data import ImageDataset, WholeImage, load_images
from hf_mim.data.processor import image_processor
from hf_mim.data.stacks import image_parts
from hf_mim.demo.actions import Demo
from hf_mim.embeddings.search import Search
from hf_mim.evaluation.encoder import FrozenEncoder
from hf_mim.models.modeling_interactive_mim import InteractiveMIMForPreTraining
from hf_mim.models.pixels import ValueRange
from hf_mim.pretraining.recipe import Recipe
from hf_mim.pretraining.run import Pretraining
from hf_mim.run_folder import RECIPE
from hf_mim.visualize.viewer import Viewer


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
    picked, told = demo.pick(str(next(two.rglob("chroma/**/*.npy"))))
    assert picked is None and "This model takes one file with the channels of luma and chroma." in told
    words = ["show", str(run), str(two), "--image_column", "luma,chroma", "--what", "pca", "--count", "2"]
    assert main([*words, "--output", str(tmp_path / "pictures")]) == 0
    assert (tmp_path / "pictures" / "pca.png").exists()


# ---- images that lack a modality


@pytest.fixture
def lacking(script, source, tmp_path):
    """Two modalities, of which a third of the training images and two test images lack the chroma."""
    script.main(str(source), str(two := tmp_path / "two"))
    files = sorted((two / "train/chroma").rglob("*.npy")), sorted((two / "test/chroma").rglob("*.npy"))
    for path in [*files[0][::3], *files[1][:2]]:
        path.unlink()
    return two


ZERO = {"image_column": ["luma", "chroma"], "missing_modality": "zero"}


def test_a_run_on_images_that_lack_a_modality_is_trained_and_measured(lacking, tmp_path, capsys):
    run = tmp_path / "run"
    Pretraining(Recipe.resolve(SETTINGS | ZERO | {"dataset": str(lacking), "output_dir": str(run)}))()
    printed = capsys.readouterr().out
    assert "6 images lack chroma, which is masked there" in printed and "in 6 of 16 images (missing parts)" in printed
    recipe = Recipe.read(run / "recipe.yaml", {}).run
    assert (recipe.image_column, recipe.missing_modality) == ("luma:1,chroma:2", "zero") and np.isnan(recipe.nodata)
    images = load_images(lacking, "test", image_column=image_parts("luma:1,chroma:2", "zero"))
    words = ["--dataset", str(lacking), "--image_column", "luma,chroma", "--missing_modality", "zero"]
    embed = ["embed", str(run), *words, "--output", str(tmp_path / "all.npy"), "--split", "test"]
    assert main(embed) == 0
    features, encoder = np.load(tmp_path / "all.npy"), AutoModel.from_pretrained(run).eval()
    nan = ValueRange((0.0,), (255.0,), "uint8", float("nan"))
    samples = ImageDataset(images, 16, 3, WholeImage(), value_range=nan)
    pixels = torch.stack([sample["pixel_values"] for sample in samples]) / 255
    assert pixels[:, 1:].isnan().flatten(1).all(dim=1).nonzero().flatten().tolist() == [0, 1]
    mean, std = (torch.tensor(x).view(3, 1, 1) for x in (recipe.image_mean, recipe.image_std))
    for rows, seen in ((slice(0, 2), ["luma"]), (slice(2, None), ["luma", "chroma"])):
        given = ((pixels[rows] - mean) / std).nan_to_num(nan=0.0)
        expected = encoder(given, modalities=seen).pooler_output.detach().numpy()
        np.testing.assert_allclose(features[rows], expected, atol=1e-4)
    assert main(["evaluate", "knn", str(run), *words, "--k", "3", "--cache", "none"]) == 0
    assert main(["evaluate", "knn", str(run), *words[:4], "--k", "3", "--cache", "none"]) == 2
    assert "--missing_modality zero" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image_column": None}, "missing_modality zero needs the parts of an image as image_column, .* not nothing"),
        ({"cache_images": True}, "cache_images must be false with missing_modality zero"),
        (
            {"image_column": "chroma:2,luma:1"},
            "the parts in the order of modalities, luma,chroma, not chroma:2",
        ),
        ({"image_column": "chroma,luma", "missing_modality": "error"}, "in the order of modalities, luma,chroma, not "),
        ({"image_column": "luma:2,chroma:1"}, r"for each of the modalities \{luma: 1, chroma: 2\}, .* luma:2,chroma:1"),
        ({"method": "mae"}, r"missing_modality zero needs several modalities \(interactive_mim\), and mae has one"),
    ],
)
def test_missing_modalities_that_cannot_be_masked_are_refused(tmp_path, changes, message):
    settings = SETTINGS | ZERO | {"dataset": str(tmp_path), "output_dir": str(tmp_path / "run")} | changes
    if settings["method"] == "mae":
        del settings["modalities"]
    with pytest.raises(ValueError, match=message):
        Pretraining(Recipe.resolve(settings))
    assert not (tmp_path / "run").exists()


def test_a_run_on_8_bit_rgb_and_16_bit_infrared_and_what_its_checkpoint_makes_of_an_image(tmp_path, capsys):
    rng, two = np.random.default_rng(0), tmp_path / "two"
    for number in range(8):
        rgb, ir = rng.integers(0, 256, (16, 16, 3), np.uint8), rng.integers(0, 4096, (16, 16), np.uint16)
        for name, array in (("rgb", rgb), ("ir", ir)):
            (two / name).mkdir(parents=True, exist_ok=True)
            Image.fromarray(array).save(two / name / f"{number}.png")
    run = tmp_path / "run"
    settings = {"modalities": {"rgb": 3, "ir": 1}, "num_channels": 4, "image_column": "rgb,ir"}
    Pretraining(Recipe.resolve(SETTINGS | settings | {"dataset": str(two), "output_dir": str(run)}))()
    recipe = Recipe.read(run / "recipe.yaml", {}).run
    assert recipe.value_range == [0, 255, 0, 255, 0, 255, 0, 4095]
    assert np.allclose(recipe.image_mean, 0.5, atol=0.05) and np.allclose(recipe.image_std, 0.25, atol=0.03)
    assert "are clipped" not in capsys.readouterr().out
    both = np.concatenate([rgb, ir[..., None]], axis=2, dtype=np.uint16)
    pixels = AutoImageProcessor.from_pretrained(run)(both, return_tensors="pt")["pixel_values"][0]
    mean, std = (torch.tensor(x).view(4, 1, 1) for x in (recipe.image_mean, recipe.image_std))
    scaled = torch.from_numpy(both.astype(np.float32)).permute(2, 0, 1) / torch.tensor([255, 255, 255, 4095]).view(
        -1, 1, 1
    )
    torch.testing.assert_close(pixels, (scaled - mean) / std, rtol=1e-4, atol=1e-4)
    encoder = FrozenEncoder.load(run)
    stack = load_images(two, image_column="rgb,ir")[7]["image"]
    read = encoder.preprocess(Viewer(encoder).read([stack]).pixels)
    torch.testing.assert_close(read[0], pixels, rtol=1e-4, atol=1e-4)


def test_a_query_is_found_by_the_file_of_one_of_its_parts(script, source, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_MIM_CACHE", str(tmp_path / "cache"))
    run, two = tmp_path / "run", tmp_path / "two"
    script.main(str(source), str(two))
    config = Recipe.resolve(SETTINGS | {"dataset": str(two), "output_dir": str(run)}).config()
    InteractiveMIMForPreTraining(config).save_pretrained(run)
    nodata = ValueRange((0.0,), (255.0,), "uint8", float("nan"))
    image_processor((16, 16), [0.5] * 3, [0.5] * 3, nodata).save_pretrained(run)
    parts = {"image_column": "luma,chroma", "missing_modality": "zero"}
    search = Search(run, two / "train", k=1, cache="none", **parts)
    file = sorted((two / "train/luma").rglob("*.npy"))[3]
    for query in (file, Path(str(file).replace("luma", "chroma"))):
        ((nearest,),) = search.nearest([query])
        assert nearest.cosine > 0.9999 and nearest.name == str(file.relative_to(two / "train"))
    (alone := tmp_path / "alone" / "luma").mkdir(parents=True)
    shutil.copy(file, alone / "1.npy")
    assert {key: bool(held) for key, held in search.query(str(alone / "1.npy")).items()} == {
        "luma::zero": True,
        "chroma::zero": False,
    }
    shutil.copy(str(file).replace("luma", "chroma"), tmp_path / "1.npy")
    with pytest.raises(ValueError, match="with --image_column luma,chroma, a file in a folder with the name of its"):
        search.nearest([tmp_path / "1.npy"])


def test_a_modality_is_predicted_from_the_other_alone_and_compared_with_the_mean_of_the_training_images(
    source, tmp_path, script, capsys
):
    """With heads that say zero, the ratio is the mean square of the targets over their variance around the mean."""
    two, run, cross_modal = tmp_path / "two", tmp_path / "run", importlib.import_module("cross_modal")
    script.main(str(source), str(two))
    data = {"dataset": str(two), "image_column": "luma,chroma", "output_dir": "run"}
    model = InteractiveMIMForPreTraining(Recipe.resolve(SETTINGS | data | {"norm_pix_loss": False}).config())
    for head in model.decoder.heads:
        torch.nn.init.zeros_(head.weight)
    model.save_pretrained(run)
    image_processor((16, 16), [0.5] * 3, [0.5] * 3).save_pretrained(run)
    cross_modal.main(str(run), str(two), "luma,chroma")
    rows = json.loads(capsys.readouterr().out)
    assert [(row["predicted"], row["from"], row["places_seen"]) for row in rows] == [
        *[("luma", ["chroma"], count) for count in (16, 4)],
        *[("chroma", ["luma"], count) for count in (16, 4)],
    ]
    train, test = (
        torch.stack([torch.from_numpy(np.load(path)) for path in sorted((two / split / "luma").rglob("*.npy"))])
        for split in ("train", "test")
    )
    train, test = (x.float()[..., 0] / 127.5 - 1 for x in (train, test))
    assert rows[0]["error"] == pytest.approx(test.square().mean().item(), rel=1e-5)
    assert rows[0]["mean_predictor"] == pytest.approx((test - train.mean(0)).square().mean().item(), rel=1e-5)


@pytest.mark.parametrize("name", ["modalities", "cross_modal", "bands"])
@pytest.mark.parametrize("words", [[], ["--help"], ["nowhere", "nowhere", "luma,chroma"]])
def test_a_script_says_how_it_is_called_and_what_is_wrong(name, words, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [f"{name}.py", *words])
    with pytest.raises(SystemExit) as stopped:
        runpy.run_path(str(TRAINING / f"{name}.py"), run_name="__main__")
    told = stopped.value.code
    assert told.startswith("error: ") and "\n" not in told if words[1:] else f"python training/{name}.py " in told
    assert not list(tmp_path.iterdir())
