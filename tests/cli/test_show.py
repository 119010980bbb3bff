"""`hf-mim show` writes the pictures that are asked for, or says in one line why it cannot."""

import numpy as np
import pytest
import torch
from PIL import Image
from small_runs import photos

from hf_mim.cli import main
from hf_mim.models.modeling_mae import MAEModel
from hf_mim.visualize import display
from hf_mim.visualize.pictures import PICTURES


def show(*words) -> int:
    return main(["show", *map(str, words)])


@pytest.fixture
def files(tmp_path):
    return [str(path) for path in sorted(photos(tmp_path / "photos", count=6).rglob("*.png"))]


def test_the_fitting_pictures_are_written_and_named(run, files, tmp_path, capsys):
    assert show(run, *files) == 0
    assert capsys.readouterr().out.split() == ["pictures/reconstructions.png", "pictures/pca.png"]
    assert all(Image.open(tmp_path / "pictures" / f"{name}.png").width > 300 for name in ("reconstructions", "pca"))


def test_every_picture_is_made_of_a_source(run, files, tmp_path, capsys):
    wanted = [name for name in PICTURES if name not in ("prediction", "noise")]
    options = ["--patch", "1,2", "--clusters", 2, "--count", 5, "--image_size", "24,32"]
    assert show(run, tmp_path / "photos", "--what", ",".join(wanted), *options, "--output", "seen") == 0
    assert capsys.readouterr().out.split() == [f"seen/{name}.png" for name in wanted]


def test_an_encoder_alone_has_pictures_of_its_features(run, files, tmp_path, capsys):
    MAEModel.from_pretrained(run).save_pretrained(tmp_path / "encoder")
    (tmp_path / "encoder" / "preprocessor_config.json").write_text((run / "preprocessor_config.json").read_text())
    capsys.readouterr()
    assert show(tmp_path / "encoder", files[0]) == 0
    assert capsys.readouterr().out.split() == ["pictures/pca.png"]
    assert show(tmp_path / "encoder", files[0], "--what", "masks") == 2
    assert "masks needs the whole pretraining model, and encoder is an encoder alone" in capsys.readouterr().err


def test_the_bands_are_those_of_the_recipe_or_of_the_option(run, files, monkeypatch):
    (run / "recipe.yaml").write_text("method: mae\nbands: [3, 2, 1]\n")
    found, of = [], display.Display.of
    monkeypatch.setattr(
        display.Display, "of", lambda pixels, bands, stretch: found.append(bands) or of(pixels, bands, stretch)
    )
    show(run, files[0], "--what", "pca")
    show(run, files[0], "--what", "pca", "--bands", "2")
    assert found == [[3, 2, 1], [2]]


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--what", "picture"], "what must be of overview, reconstructions, prediction, "),
        (["--what", ""], "not nothing"),
        (["--what", "map"], "map needs the features of 5 images at least, [n, D], not those of 1"),
        (["--what", "pca", "--clusters", "3"], "clusters is an option of clusters, and what is pca"),
        (["--what", "prediction"], "prediction needs a method that predicts features"),
        (["--what", "pca,similarity", "--patch", "3,1"], "patch must be row,column in 1..2 and 1..2, not 3,1"),
        (["--what", "pca", "--foreground", "2"], "foreground must lie in (0, 1), not 2"),
        (["--bands", "1,2"], "bands must be one number or three"),
        (["--bands", "1,2,4"], "bands must lie in 1..3"),
        (["--count", "0"], "count must be at least 1"),
        (["nowhere"], "nowhere is no image file"),
    ],
)
def test_a_mistake_is_told_in_one_line_and_nothing_is_written(run, files, tmp_path, capsys, words, told):
    assert show(run, files[0], *words) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and told in lines[0]
    assert not (tmp_path / "pictures").exists()


def test_a_damaged_image_is_named(run, tmp_path, capsys):
    (tmp_path / "bad.png").write_bytes(b"no image")
    assert show(run, tmp_path / "bad.png") == 2
    assert "an image cannot be decoded" in (told := capsys.readouterr().err) and "bad.png" in told


def test_a_checkpoint_whose_weights_are_not_finite_is_refused(run, files, capsys):
    from hf_mim.models.modeling_mae import MAEForPreTraining

    model = MAEForPreTraining.from_pretrained(run)
    torch.nn.init.constant_(model.encoder.norm.weight, np.nan)
    model.save_pretrained(run)
    capsys.readouterr()
    assert show(run, files[0], "--what", "pca") == 2
    assert "not finite" in capsys.readouterr().err


def test_checkpoint_and_images_are_asked_for(capsys):
    assert show("only_one") == 2
    assert "show needs CHECKPOINT and IMAGES, not only_one" in capsys.readouterr().err
