"""Runs that start from weights, from the command line to the card."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file
from small_runs import SMALL, read_recipe, run
from transformers import AutoModel

from hf_mim.cli import main
from hf_mim.evaluation.encoder import FrozenEncoder
from hf_mim.pretraining.settings import read_yaml

FEW = ["--knn_train_images", "100", "--knn_test_images", "50", "--per_device_train_batch_size", "32", "--use_cpu"]


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = tmp_path_factory.mktemp("source") / "mae"
    run(*SMALL, "--max_steps", 1, "--knn", "false", "--output_dir", folder)
    return folder


@pytest.fixture(scope="module")
def continued(source, tmp_path_factory):
    """A run from these weights on digits, which never stopped."""
    folder = tmp_path_factory.mktemp("continued") / "run"
    options = ["--max_steps", 4, "--save_steps", 2, "--save_total_limit", 5, "--encoder_layer_decay", 0.7]
    run("--init_from", source, *FEW, *options, "--output_dir", folder)
    return folder


def result(folder, name):
    return json.loads((folder / "results" / f"{name}.json").read_text())


def fails_with(capsys, *arguments):
    assert main(["pretrain", *map(str, arguments)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line.removeprefix("error: ")


def test_sizes_and_normalisation_follow_from_the_weights_unless_they_are_given(source):
    recipe = read_recipe(["--init_from", str(source), "--output_dir", "run"])
    assert recipe.model["hidden_size"] == 16 and recipe.model["decoder_num_hidden_layers"] > 0
    assert recipe.run.image_mean == FrozenEncoder.load(source).mean
    other = read_recipe(
        ["--init_from", str(source), "--method", "latent_mim", "--num_channels", "3", "--image_size", "48"]
    )
    assert (other.model["hidden_size"], other.model["image_size"], other.run.image_mean) == (16, 48, None)


def test_a_run_from_weights_measures_them_before_its_first_step(continued, source):
    knn, before = result(continued, "knn"), result(continued, "start_knn")
    assert list(knn["scores"]) == ["at the start", "untrained", "raw pixels"]
    assert knn["scores"]["at the start"] == before["value"] and knn["data"]["train"] == before["data"]["train"]
    table, started = result(continued, "health")["table"], result(continued, "start_health")["table"]
    assert [row["at the start"] for row in table] == [row["value"] for row in started]
    assert list(table[0])[:4] == ["measure", "value", "at the start", "untrained"]
    card = (continued / "README.md").read_text()
    assert "| measure | value | at the start | untrained |" in card and "before the first step, to compare" in card
    (row,) = (line for line in card.splitlines() if line.startswith("| k-NN") and line.count("|") > 4)
    assert "| trained | at the start | untrained | raw pixels |" in card and "| Started from | mae (" in card
    assert f"| {100 * knn['value']:.1f} % | {100 * before['value']:.1f} % |" in row


def test_what_is_measured_before_the_first_step_are_the_weights_of_the_source(continued, source):
    assert result(continued, "start_health")["value"] == pytest.approx(result(source, "health")["value"], rel=1e-6)
    assert result(continued, "health")["value"] != result(continued, "start_health")["value"]


def test_an_interrupted_run_from_weights_ends_as_one_that_never_stopped(continued, source, tmp_path):
    broken = tmp_path / "broken"
    shutil.copytree(continued, broken)
    shutil.rmtree(broken / "checkpoint-4")
    (broken / "model.safetensors").unlink()
    hidden = source.rename(source.with_name("moved"))  # a resume does not need it
    try:
        run("--output_dir", broken, "--resume")
    finally:
        hidden.rename(source)
    whole, resumed = load_file(continued / "model.safetensors"), load_file(broken / "model.safetensors")
    assert all(torch.equal(x, resumed[name]) for name, x in whole.items())
    assert result(broken, "knn")["scores"] == result(continued, "knn")["scores"]


def test_a_run_that_was_ended_before_its_first_checkpoint_begins_with_the_weights_again(continued, tmp_path, source):
    again = tmp_path / "again"
    again.mkdir()
    for name in ("recipe.yaml", "_local.yaml"):
        shutil.copy(continued / name, again / name)
    run("--output_dir", again, "--resume", "--knn", "false")
    whole, second = load_file(continued / "model.safetensors"), load_file(again / "model.safetensors")
    assert all(torch.equal(x, second[name]) for name, x in whole.items())


def test_the_recipe_names_the_weights_and_their_hash_and_others_are_refused(continued, source, tmp_path, capsys):
    recipe = read_yaml(continued / "recipe.yaml")
    assert recipe["init_from"] == "mae" and len(recipe["init_from_sha256"]) == 64
    run(*SMALL, "--max_steps", 1, "--knn", "false", "--seed", 9, "--output_dir", tmp_path / "mae")
    capsys.readouterr()
    message = fails_with(
        capsys, continued / "recipe.yaml", "--init_from", tmp_path / "mae", "--output_dir", tmp_path / "new"
    )
    assert "has other weights" in message and "take init_from_sha256 out of the recipe" in message


def test_another_method_and_other_channels_start_from_the_encoder(source, tmp_path, capsys):
    folder = tmp_path / "latent"
    options = [
        "--method",
        "latent_mim",
        "--num_channels",
        3,
        "--max_steps",
        1,
        "--knn",
        "false",
        "--learning_rate",
        1e-12,
    ]
    run("--init_from", source, *FEW, *options, "--output_dir", folder)
    assert "; channels 1 → 3" in capsys.readouterr().out
    ours, theirs = AutoModel.from_pretrained(folder), AutoModel.from_pretrained(source)
    gray = torch.randn(2, 1, 32, 32)
    torch.testing.assert_close(
        ours(gray.expand(-1, 3, -1, -1)).last_hidden_state, theirs(gray).last_hidden_state, atol=1e-5, rtol=0
    )


def test_weights_and_a_resume_exclude_each_other(source, capsys, tmp_path):
    message = fails_with(capsys, "--init_from", source, "--resume", "--output_dir", source)
    assert message.startswith("init_from cannot be given with resume: the run goes on from its own checkpoint")


def test_an_empty_name_is_no_checkpoint(capsys, tmp_path):
    for name in ("init_from", "target_from"):
        message = fails_with(capsys, "--method", "latent_mim", f"--{name}", "", "--output_dir", tmp_path / "run")
        assert message == f"{name} must be a checkpoint: a folder, or a name on the Hub; for none leave it out"


def test_settings_that_do_not_fit_are_one_line_before_anything_is_written(source, capsys, tmp_path):
    options = ["--init_from", source, *FEW, "--num_attention_heads", 4, "--output_dir", tmp_path / "run"]
    message = fails_with(capsys, *options)
    assert message.endswith("though its tensors do; --num_attention_heads 2 would fit, or leave out these settings")
    options = ["--init_from", source, *FEW, "--hidden_size", 33, "--output_dir", tmp_path / "run"]
    assert "33; --hidden_size" in fails_with(capsys, *options)
    assert not (tmp_path / "run").exists()


# ---- a run that is made longer

STABLE = ["--lr_scheduler_type", "warmup_stable_decay", "--decay_steps", "0.3", "--knn", "false", "--dataset", "digits"]


@pytest.mark.slow
def test_a_finished_run_is_made_longer_from_the_checkpoint_before_its_decay(tmp_path, capsys):
    run(*SMALL, *STABLE, "--max_steps", 4, "--warmup_steps", 0.5, "--output_dir", tmp_path / "short")
    run(*SMALL, *STABLE, "--max_steps", 6, "--warmup_steps", 2, "--output_dir", tmp_path / "whole")
    run("--continue", tmp_path / "short", "--max_steps", 6, "--output_dir", tmp_path / "longer")
    whole, longer = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "longer"))
    assert all(torch.equal(x, longer[name]) for name, x in whole.items())
    recipe = read_yaml(tmp_path / "longer" / "recipe.yaml")
    assert (recipe["continue_from"], recipe["warmup_steps"], recipe["max_steps"]) == ("short", 2, 6)
    lines = (tmp_path / "longer" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines if "loss" in json.loads(line)] == [1, 2, 3, 4, 5, 6]
    assert "| Continued from | short |" in (tmp_path / "longer" / "README.md").read_text()
    capsys.readouterr()
    more = ["--continue", tmp_path / "short", "--output_dir", tmp_path / "more"]
    assert "must give more steps than the 3 of" in fails_with(capsys, *more, "--max_steps", 3)
    assert fails_with(capsys, *more, "--hidden_size", 32).startswith("hidden_size is 32, but the run in")
    assert "give no recipe, init_from or resume" in fails_with(capsys, *more, "--resume")
    shutil.rmtree(tmp_path / "short" / "checkpoint-3")
    assert "no whole checkpoint before the decay, which began at step 3" in fails_with(capsys, *more, "--max_steps", 9)


def test_a_cosine_run_is_not_made_longer_but_started_from(source, capsys, tmp_path):
    message = fails_with(capsys, "--continue", source, "--num_train_epochs", 9, "--output_dir", tmp_path / "run")
    assert message.startswith("continue needs a run with lr_scheduler_type warmup_stable_decay or constant, and ")
    assert message.endswith(f"start a new run from its weights: hf-mim pretrain --init_from {source}")
    assert "holds none (no recipe.yaml)" in fails_with(capsys, "--continue", tmp_path)
