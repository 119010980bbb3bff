"""How settings become a recipe: layers, types, names, files."""

import dataclasses
from pathlib import Path

import pytest
from small_runs import read_recipe

from hf_mim import methods
from hf_mim.cli import main, pretrain
from hf_mim.data.embedded import EMBEDDED
from hf_mim.docstrings import argument_texts
from hf_mim.pretraining.recipe import RUN_FIELDS, TRAINING_FIELDS, Recipe, RunArguments, all_fields, model_fields
from hf_mim.pretraining.settings import read_yaml, to_type
from hf_mim.pretraining.trainer import MIMTrainingArguments

METHODS = methods.names()
PRESETS = ("histology", "inspection", "satellite")  # for kinds of images, see test_presets.py
RECIPES = sorted((Path(__file__).parents[2] / "training" / "recipes").glob("*.yaml"))
RECIPES = [path for path in RECIPES if path.stem not in PRESETS]


@pytest.fixture
def write(tmp_path):
    def write(text):
        path = tmp_path / "recipe.yaml"
        path.write_text(text)
        return str(path)

    return write


def test_the_command_line_goes_over_the_file_and_the_file_over_the_defaults(write):
    path = write("mask_ratio: 0.5\nnum_train_epochs: 7\n")
    recipe = read_recipe([path, "--mask_ratio", "0.6"])
    assert recipe.model["mask_ratio"] == 0.6
    assert recipe.training["num_train_epochs"] == 7
    assert recipe.training["warmup_steps"] == 0.05
    assert recipe.run.method == "mae"


def test_no_argument_has_two_meanings():
    for method in METHODS:
        names = [*RUN_FIELDS, *TRAINING_FIELDS, *model_fields(method)]
        assert len(names) == len(set(names))


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("base_lr", "1e-3", 1e-3),
        ("image_size", "64,96", [64, 96]),
        ("image_size", "64", 64),
        ("crop_scale", "[0.2, 1]", (0.2, 1.0)),
        ("weight_decay_end", "none", None),
        ("max_steps", "1e3", 1000),
        ("streaming", "false", False),
        ("save_strategy", "no", "no"),
        ("size", "tiny", "tiny"),
        ("dataset", 12, "12"),
        ("accelerator_config", "{even_batches: false}", {"even_batches": False}),
        ("fsdp", "true", True),
        ("fsdp", "full_shard", "full_shard"),
        ("trackio_static_space_id", "false", False),
        ("trackio_static_space_id", "me/curves", "me/curves"),
    ],
)
def test_values_become_the_type_of_their_argument(name, value, expected):
    converted = to_type(name, value, all_fields()[name])
    assert converted == expected and type(converted) is type(expected)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("base_lr", "fast", "base_lr must be a number, not 'fast'"),
        ("max_steps", "1.5", "max_steps must be a whole number, not '1.5'"),
        ("max_steps", True, "max_steps must be a whole number, not True"),
        ("crop_scale", "0.2", "crop_scale must be a pair like 1,2, not '0.2'"),
        ("streaming", "maybe", "streaming must be true or false, not 'maybe'"),
        ("size", "Tiny", "size must be one of tiny, small, base, large, huge, giant, not 'Tiny'"),
        ("save_strategy", "never", "save_strategy must be one of no, steps, epoch, best, not 'never'"),
    ],
)
def test_values_of_the_wrong_type_are_named(name, value, message):
    with pytest.raises(ValueError) as error:
        to_type(name, value, all_fields()[name])
    assert str(error.value) == message


def test_yaml_reads_1e_4_as_a_number_and_no_as_a_word(write):
    settings = read_yaml(write("a: 1e-4\nb: no\nc: true\nd: 2.5E+3\ne: 12\nf: 1.2.3\ng: [1e-3, .5]\nh: runs/1e4\ni:\n"))
    expected = dict(a=1e-4, b="no", c=True, d=2500.0, e=12, f="1.2.3", g=[1e-3, 0.5], h="runs/1e4", i=None)
    assert settings == expected


def test_flags_and_values_are_told_apart():
    words = "--streaming r.yaml --flip-probability 0 --resume false --base_lr=1e-3 --bf16 --image_mean -1,2 --knn"
    paths, given = pretrain.command.read(words.split())
    assert paths == ["r.yaml"]
    assert given.pop("streaming") == given.pop("bf16") == given.pop("knn") == "true"
    assert given == {"flip_probability": "0", "resume": "false", "base_lr": "1e-3", "image_mean": "-1,2"}


@pytest.mark.parametrize("method", methods.rows(), ids=lambda method: method.name)
@pytest.mark.parametrize("data", EMBEDDED)
def test_without_a_recipe_the_run_is_that_of_the_recipe_for_embedded_data(method, data):
    if data not in method.embedded:
        assert Recipe.resolve({"method": method.name, "dataset": data}).config().hidden_size == 128
        return
    """The recipe is read where the package has it; `training/recipes` shows the same file."""
    path = next(path for path in RECIPES if path.name == f"{data}_{method.name}.yaml")
    assert path.read_text() == method.embedded[data].read_text()
    given = {} if data == next(iter(method.embedded)) else {"dataset": data}
    resolved = Recipe.resolve({"method": method.name} | given).settings()
    assert (
        read_yaml(path).items() <= {name: value for part in resolved.values() for name, value in part.items()}.items()
    )


def test_ijepa_is_stop_jepa_without_noise(tmp_path):
    recipe, stop = Recipe.resolve({"method": "ijepa"}), Recipe.resolve({"method": "stop"})
    assert (recipe.run.method, stop.run.method) == ("ijepa", "stop_jepa")
    assert recipe.config().position_noise_std == 0 and stop.config().position_noise_std == 0.25
    assert recipe.training["output_dir"] == "runs/digits_ijepa"
    assert recipe.settings()["model"] == stop.settings()["model"] | {"position_noise_std": 0}
    training = stop.settings()["training"]
    assert recipe.settings()["training"] == training | {"output_dir": "runs/digits_ijepa"}
    with pytest.raises(ValueError, match="position_noise_std must be 0.0 for method ijepa, not 0.1; method stop_jepa"):
        Recipe.resolve({"method": "ijepa"}, {"position_noise_std": "0.1"})


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_is_valid_and_says_how_to_run_it(path):
    recipe = Recipe.resolve({"dataset": "given"}, {k: v for k, v in read_yaml(path).items() if v is not None})
    others = ("imagenet_", "digits", "textures")
    assert recipe.config().grid_size == (8, 8) or any(word in path.name for word in others)
    assert path.stem.endswith(recipe.run.method)
    head = path.read_text().split("\n\n")[0]
    assert f"pretrain {path.stem}" in head and "NUMBERS" not in head


@pytest.mark.parametrize("method", METHODS)
def test_a_saved_recipe_resolves_to_itself_and_lacks_nothing(tmp_path, method):
    recipe = Recipe.resolve({"method": method, "image_size": [32, 64], "learning_rate": 1e-3, "hub_token": "secret"})
    recipe.save(tmp_path)
    again = Recipe.resolve(read_yaml(tmp_path / "recipe.yaml"))
    assert again.settings() == recipe.settings()
    assert again.config().to_json_string() == recipe.config().to_json_string()
    assert set(model_fields(method)) <= set(read_yaml(tmp_path / "recipe.yaml"))
    assert "secret" not in (tmp_path / "recipe.yaml").read_text()


def test_an_argument_given_above_is_not_overruled_by_one_from_below(write):
    path = write("hidden_size: 64\nnum_attention_heads: 2\nlearning_rate: 1.0e-3\nmax_steps: 5\n")
    config = read_recipe([path, "--size", "small"]).config()
    assert (config.hidden_size, config.num_attention_heads) == (384, 6)
    assert read_recipe([path, "--size", "small", "--hidden_size", "96"]).config().hidden_size == 96
    assert "learning_rate" not in read_recipe([path, "--base_lr", "1e-3"]).training
    assert "max_steps" not in read_recipe([path, "--num_train_epochs", "2"]).training


def test_a_tilde_is_the_home_in_files_and_in_options(write, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    recipe = Recipe.read(write("dataset: ~/pictures\ntest_dataset: ~/test"), {"output_dir": "~/run"})
    assert (recipe.run.dataset, recipe.run.test_dataset) == (f"{tmp_path}/pictures", f"{tmp_path}/test")
    assert recipe.training["output_dir"] == f"{tmp_path}/run"
    _, values = pretrain.command.read(["--output_dir=~/run", "--dataset", "~/x~y"])
    assert values == {"output_dir": f"{tmp_path}/run", "dataset": f"{tmp_path}/x~y"}


def test_output_dir_defaults_to_a_folder_that_no_run_has(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert Recipe.resolve({"dataset": "a/my-photos.parquet"}).training["output_dir"] == "runs/my_photos_mae"
    (tmp_path / "runs" / "textures_mae").mkdir(parents=True)
    assert Recipe.resolve().training["output_dir"] == "runs/textures_mae_2"


def test_help_all_shows_every_argument(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")
    assert main(["pretrain", "--help-all"]) == 0
    text = capsys.readouterr().out
    missing = [name for name in all_fields() if name not in text]
    assert not missing
    assert all(len(line) <= 120 for line in text.splitlines())
    assert "--mask_ratio 0.9 " in text and "--mask_ratio 0.75 " in text  # Latent MIM's default and MAE's
    assert f"[{'|'.join(METHODS)}]" in text and "[tiny|small|base|large|huge|giant]" in text


def test_the_short_help_tells_the_real_defaults(capsys):
    assert main(["pretrain", "--help"]) == 0
    text, real = capsys.readouterr().out, {}
    for setting in reversed(pretrain.settings()):
        real[setting.name] = setting.get_help_record(None)[0]
    assert [f"--{name} {default}".rstrip() for name, default, _ in pretrain.MOST_USED] == [
        real[name] for name, _, _ in pretrain.MOST_USED
    ]
    assert all(real[name] in text for name, _, _ in pretrain.MOST_USED) and "--help-all" in text
    assert text.count("\n  hf-mim pretrain") == 4  # examples


def test_every_own_argument_is_explained():
    for config_class in (method.config_class for method in methods.rows()):
        sizes = {
            "num_channels",
            "hidden_size",
            "num_hidden_layers",
            "num_attention_heads",
            "layer_norm_eps",
            "hidden_act",
        }
        decoder = {"decoder_hidden_size", "decoder_num_attention_heads"}  # Latent MIM points to MAE's
        fields = {f.name for f in dataclasses.fields(config_class)} & set(all_fields())
        assert fields - argument_texts(config_class).keys() <= sizes | decoder
    for own in (RunArguments, MIMTrainingArguments):
        assert own.__annotations__.keys() <= argument_texts(own).keys()
