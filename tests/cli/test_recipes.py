"""Recipes that come with hf_mim are listed and called by their names."""

import pytest

from hf_mim.cli import main
from hf_mim.pretraining.recipe import Recipe
from hf_mim.pretraining.recipe_files import recipe_files, recipe_names, recipe_path
from hf_mim.pretraining.settings import read_yaml


def test_each_recipe_is_valid_and_says_what_it_is():
    for recipe in recipe_files():
        data = {} if read_yaml(recipe_path(recipe.name)).get("dataset") else {"dataset": "my_images"}
        Recipe.read(recipe.name, data | {"output_dir": "somewhere"}).config()
        assert recipe.about.endswith(".") and len(recipe.about) > 40, recipe.name
        if recipe.measured is not None:
            assert "%" in recipe.measured and "#" not in recipe.measured


def test_a_name_is_the_file_of_the_package_and_the_command_line_overrides_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    settings = read_yaml(recipe_path("cifar10_mae"))
    recipe = Recipe.read("cifar10_mae", {"num_train_epochs": "7", "output_dir": "runs/x"})
    assert recipe.run.dataset == settings["dataset"] == "uoft-cs/cifar10"
    assert recipe.training["num_train_epochs"] == 7 and recipe.model["patch_size"] == 4
    (tmp_path / "cifar10_mae").mkdir()  # such as a run of it
    assert Recipe.read("cifar10_mae", {"output_dir": "runs/x"}).model["patch_size"] == 4
    (tmp_path / "cifar10_mae").rmdir()
    (tmp_path / "cifar10_mae").write_text("method: latent_mim")  # a file of this name comes first
    assert Recipe.read("cifar10_mae", {"output_dir": "runs/x"}).run.method == "latent_mim"


def test_the_list_has_each_recipe_with_its_numbers(capsys):
    assert main(["recipes"]) == 0
    out = capsys.readouterr().out
    assert [line for line in out.splitlines() if not line.startswith(" ")] == recipe_names()
    text = " ".join(out.split())
    assert "trained 83.4 ± 2.5 %" in text and "No run of it was measured." in text


@pytest.mark.parametrize(
    ("word", "line"),
    [
        ("cifar_mae", "not 'cifar_mae'; did you mean cifar10_mae?"),
        ("zzz", "not 'zzz'; hf-mim recipes lists the names"),
    ],
)
def test_an_unknown_name_is_refused_with_the_nearest(word, line, capsys):
    assert main(["pretrain", word]) == 2
    assert line in capsys.readouterr().err
