"""A method that is not ours: the one of docs/new_method.md, taken from that page, works without a change in hf_mim."""

import json
import re
from pathlib import Path

import pytest
import torch
from tiny import SIZES, head_layers, only
from transformers import AutoModel

from hf_mim import methods
from hf_mim.cli import main
from hf_mim.testing import check_method

PAGE = (Path(__file__).parents[1] / "docs" / "new_method.md").read_text(encoding="utf-8")
SOURCE = next(block for block in re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL) if "methods.register" in block)
SMALL = "--hidden_size 16 --num_hidden_layers 1 --num_attention_heads 2 --per_device_train_batch_size 32 --use_cpu"


@pytest.fixture(scope="module")
def module(tmp_path_factory):
    path = tmp_path_factory.mktemp("toy") / "my_methods_of_the_page.py"
    path.write_text(SOURCE)
    methods.load_module(str(path))
    yield path
    methods._table.pop("mean_mim")


@pytest.fixture(scope="module")
def run(module, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "toy"
    words = ["pretrain", "--import", str(module), "--method", "mean_mim", "--dataset", "digits", *SMALL.split()]
    words += ["--max_steps", "3"]
    assert main([*words, "--logging_steps", "1", "--output_dir", str(folder)]) == 0
    return folder


@pytest.mark.parametrize("name", methods.names())
def test_our_methods_keep_what_every_method_promises(name):
    check_method(name, **SIZES | head_layers(name, 1) | only(name, mask_ratio=0.75, patch_gap=2))


@pytest.mark.parametrize("changes", [{}, {"num_channels": 5, "image_size": (16, 24)}])
def test_the_method_of_the_page_keeps_what_every_method_promises(module, changes):
    check_method("mean_mim", **SIZES | changes)


def test_the_short_help_names_a_method_that_import_loads(module, capsys):
    assert main(["pretrain", "--import", str(module), "--help"]) == 0
    assert "mean_mim" in capsys.readouterr().out


def test_it_pretrains_and_auto_model_loads_it(run):
    losses = [entry["loss"] for entry in json.loads((run / "trainer_state.json").read_text())["log_history"][:3]]
    assert len(losses) == 3 and losses[2] < losses[0]
    model = AutoModel.from_pretrained(run)
    assert type(model).__name__ == "MeanModel"
    assert model(torch.randn(1, 1, 32, 32)).pooler_output.shape == (1, 16)


def test_its_card_tells_its_own_text_and_cites_no_paper_of_ours(run):
    card = (run / "README.md").read_text()
    assert "pretrained by Mean MIM" in card and "A share of 0.75 is masked" in card
    assert "mean-mim" in card and "arxiv:" not in card and "bibtex" not in card
    assert "I-JEPA" not in card and "masked autoencoder" not in card


def test_it_is_measured_like_any_other(run, capsys):
    words = ["evaluate", "knn", str(run), "--dataset", "digits", "--train_images", "200", "--test_images", "100"]
    assert main([*words, "--cache", "none"]) == 0
    assert "accuracy" in capsys.readouterr().out
    assert json.loads((run / "results" / "knn.json").read_text())["scores"].keys() == {"untrained", "raw pixels"}


def test_pixels_without_data_are_refused_because_its_loss_would_count_them(module, tmp_path, capsys):
    options = ["--nodata", "0", "--output_dir", str(tmp_path / "run"), *SMALL.split()]
    assert main(["pretrain", "--method", "mean_mim", *options]) == 2
    error = capsys.readouterr().err
    assert "nodata 0 needs a method whose forward takes valid_pixels, and mean_mim has none" in error
    assert not (tmp_path / "run").exists()


def test_its_own_option_is_an_option_of_the_command_line(module, capsys):
    assert main(["pretrain", "--method", "mean_mim", "--mask_ratio", "often"]) == 2
    assert "mask_ratio must be a number, not 'often'" in capsys.readouterr().err
    assert main(["pretrain", "--method", "mean_mim", "--norm_pix_loss", "true"]) == 2
    assert (
        "norm_pix_loss is an argument of mae, sym_mim, interactive_mim, not of method mean_mim"
        in capsys.readouterr().err
    )


@pytest.mark.parametrize(
    ("line", "replacement", "promise"),
    [
        ('return {"context_ids": context_ids, "target_ids": target_ids}', 'return {"ids": context_ids}', None),
        ('metrics = {"target_variance": targets.var()}', 'metrics = {"loss_again": loss}', "detached 0-dim"),
        ("features.mean(1, keepdim=True) + places", "features.mean(1, keepdim=True).detach() + places", "gradient"),
        ('"target_ids": target_ids}', '"target_ids": context_ids}', "both context and target"),
    ],
)
def test_a_broken_method_is_told_which_promise_it_breaks(module, tmp_path, monkeypatch, line, replacement, promise):
    assert line in SOURCE
    broken = SOURCE.replace(line, replacement).replace("mean_mim", "broken_mim")
    namespace = {"__name__": "broken_mim"}
    monkeypatch.setattr(methods, "_table", dict(methods._table))
    exec(compile(broken, "broken_mim", "exec"), namespace)
    with pytest.raises((AssertionError, KeyError), match=promise):
        check_method("broken_mim", **SIZES)


def test_a_name_is_taken_once_and_an_unknown_one_is_an_error(module, capsys):
    with pytest.raises(ValueError, match="name must be one that no method has, and mae is MAE"):
        methods.register(
            methods.Method(name="mae", title="Mine", config="a:A", encoder="a:B", pretraining="a:C", card="x")
        )
    assert main(["pretrain", "--method", "mean_mum"]) == 2
    assert "did you mean mean_mim?" in capsys.readouterr().err
    assert main(["pretrain", "--import", "no_such_module"]) == 2
    assert "import must be a module with methods, and no_such_module cannot be imported" in capsys.readouterr().err
