"""`hf-mim pretrain` from the command line to the run folder."""

import io
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from small_runs import ENVIRONMENT, REPOSITORY, TINY_RUN, read_recipe, run, same_weights
from transformers import AutoImageProcessor, AutoModel, AutoModelForPreTraining

from hf_mim.cli import main
from hf_mim.data import DeviceAugment, ImageDataset, WholeImage, load_images
from hf_mim.evaluation.encoder import FrozenEncoder
from hf_mim.pretraining.settings import read_yaml


def fails_with(capsys, *arguments):
    """The one line on stderr of a command that is to fail before it writes anything."""
    before = sorted(Path().rglob("*"))
    assert main(["pretrain", *map(str, arguments)]) == 2
    assert sorted(Path().rglob("*")) == before
    lines = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("Retrying")]
    assert len(lines) == 1 and lines[0].startswith("error: "), lines
    return lines[0].removeprefix("error: ")


@pytest.fixture(scope="module")
def mae_run(tmp_path_factory):
    """A finished run of MAE on the digits, and what it printed."""
    folder = tmp_path_factory.mktemp("runs") / "mae"
    command = [sys.executable, "-m", "hf_mim.cli", "pretrain", *TINY_RUN, "--dataset", "digits"]
    command += ["--output_dir", str(folder)]
    done = subprocess.run(command, cwd=REPOSITORY, env=ENVIRONMENT, capture_output=True, text=True, check=True)
    return folder, done.stdout


def test_a_run_folder_is_complete(mae_run):
    folder, _ = mae_run
    files = "config.json model.safetensors preprocessor_config.json recipe.yaml trainer_state.json loss.png".split()
    assert {*files, "reconstructions.png", "pca.png", "results", "README.md"} <= {
        path.name for path in folder.iterdir()
    }
    assert {path.stem for path in (folder / "results").iterdir()} == {"training", "health", "knn"}
    state = json.loads((folder / "trainer_state.json").read_text())
    assert state["global_step"] == 4
    assert sum("loss" in entry for entry in state["log_history"]) == 4  # short runs have a curve too
    assert Image.open(folder / "loss.png").width > 300


def test_a_run_records_what_it_took_and_its_card_tells_it(mae_run):
    folder, printed = mae_run
    history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    record = json.loads((folder / "results" / "training.json").read_text())
    scores, losses = record["scores"], [entry["loss"] for entry in history if "loss" in entry]
    assert (scores["first_loss"], record["value"]) == (losses[0], losses[-1])
    assert (scores["steps"], scores["images_seen"], record["settings"]["processes"]) == (4, 4 * 32, 1)
    logged = sum(entry.get("seconds", 0) for entry in history)
    assert logged <= record["seconds"] <= history[-1]["train_runtime"]
    assert scores["images_per_second"] * record["seconds"] == pytest.approx(128)
    health = json.loads((folder / "results" / "health.json").read_text())
    assert len(health["data"].pop("contents")) == 12
    assert health["data"] == {"source": "digits, split train", "images": 512, "token_images": 256}
    assert f"RankMe {health['value']:.4f}" in printed
    card = (folder / "README.md").read_text()
    assert f"| Last loss logged | {losses[-1]:.4f} |" in card and f"| rank_me | {health['value']:.4f} |" in card


def test_the_end_compares_trained_untrained_and_raw_pixels(mae_run):
    folder, printed = mae_run
    result = json.loads((folder / "results" / "knn.json").read_text())
    data = result["data"]
    assert (result["settings"]["k"], data["train"]["images"], data["test"]["images"]) == (20, 200, 100)
    assert data["test"]["seen_in_pretraining"] is False
    accuracies = {"trained": result["value"], **result["scores"]}
    assert list(accuracies) == ["trained", "untrained", "raw pixels"]
    for name, accuracy in accuracies.items():
        assert re.search(rf"{name} +{100 * accuracy:.1f} %", printed)
    assert result["scores"]["raw pixels"] > 0.8


def test_the_three_lines_printed_load_the_encoder_in_a_fresh_process_offline(mae_run, tmp_path):
    _, printed = mae_run
    lines = [line.strip() for line in printed.splitlines() if line.startswith("    ")][-3:]
    script = "\n".join([*lines, "print(type(model).__name__, model.config.hidden_size)"])
    offline = ENVIRONMENT | {"HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, "-c", script], cwd=REPOSITORY, env=offline, capture_output=True, text=True)
    assert done.stdout.split() == ["MAEModel", "16"], done.stderr


def test_the_recipe_in_a_run_folder_repeats_the_run_to_the_bit(mae_run, tmp_path):
    folder, _ = mae_run
    run(folder / "recipe.yaml", "--output_dir", tmp_path / "again")
    assert same_weights(folder, tmp_path / "again")
    first, second = (read_yaml(path / "recipe.yaml") for path in (folder, tmp_path / "again"))
    assert first.pop("output_dir") != second.pop("output_dir")
    assert first == second


def test_the_saved_processor_gives_what_the_evaluation_saw(mae_run):
    folder, _ = mae_run
    recipe = read_yaml(folder / "recipe.yaml")
    images = load_images("digits", "test")
    pixels = torch.stack(
        [sample["pixel_values"] for sample in ImageDataset(images.select(range(8)), 32, 1, WholeImage())]
    )
    expected = DeviceAugment(recipe["image_mean"], recipe["image_std"]).normalize(pixels)
    processor = AutoImageProcessor.from_pretrained(folder)
    pictures = [Image.open(io.BytesIO(image["bytes"])) for image in images[:8]["image"]]
    torch.testing.assert_close(processor(pictures, return_tensors="pt")["pixel_values"], expected)


def test_a_second_run_into_the_same_folder_is_refused(mae_run, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(mae_run[0], "first")
    before = {path: path.stat().st_mtime_ns for path in Path("first").iterdir()}
    message = fails_with(capsys, *TINY_RUN, "--output_dir", "first")
    assert message.startswith("output_dir first holds another run (recipe.yaml); give another, or resume it with: ")
    assert message.endswith("hf-mim pretrain --resume --output_dir first")
    assert {path: path.stat().st_mtime_ns for path in Path("first").iterdir()} == before
    message = fails_with(capsys, *TINY_RUN, "--output_dir", "first", "--resume", "--hidden_size", "32")
    assert message == "hidden_size is 32, but the run in first has 16"
    Path("empty").mkdir()
    assert "no run to resume" in fails_with(capsys, "--output_dir", "empty", "--resume")


def test_a_resumed_run_ends_as_one_that_was_never_interrupted(tmp_path):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    options = [*TINY_RUN, "--save_steps", 2, "--save_total_limit", 5, "--knn", "false", "--seed", 3]
    run(*options, "--output_dir", whole)
    one, last = (FrozenEncoder.load(folder) for folder in (whole / "checkpoint-2", whole))  # each can be evaluated
    assert one.mean == last.mean and one.std == last.std and len(one.mean) == 1
    broken.mkdir()
    shutil.copytree(whole / "checkpoint-2", broken / "checkpoint-2")
    shutil.copy(whole / "recipe.yaml", broken / "recipe.yaml")
    run("--output_dir", broken, "--resume")
    assert same_weights(whole, broken)
    assert not (broken / "results" / "knn.json").exists()


def test_a_resume_on_other_images_is_refused_unless_it_is_accepted(tmp_path, capsys, monkeypatch):
    for place in ("one", "two"):
        (tmp_path / place / "photos").mkdir(parents=True)
        for number in range(40):
            Image.new("L", (32, 32), number).save(tmp_path / place / "photos" / f"{number:02}.png")
    monkeypatch.chdir(tmp_path / "one")
    shape = "--hidden_size", 16, "--num_hidden_layers", 1, "--num_attention_heads", 2, "--decoder_hidden_size", 16
    shape += "--decoder_num_hidden_layers", 1, "--decoder_num_attention_heads", 2, "--image_size", 32
    shape += "--dataloader_num_workers", 0  # starting workers takes longer than five such runs
    run(*TINY_RUN, *shape, "--save_steps", 2, "--dataset", "photos", "--output_dir", tmp_path / "run")
    line = "dataset 'photos', split train: 40 images (40 .png); no labels"
    assert capsys.readouterr().out.splitlines()[0] == line
    recipe, local = (read_yaml(tmp_path / "run" / name) for name in ("recipe.yaml", "_local.yaml"))
    assert recipe["dataset"] == "photos" and "accept_changed_data" not in recipe  # it may be uploaded
    assert local == {"dataset": str(tmp_path / "one" / "photos"), "output_dir": str(tmp_path / "run")}
    shutil.rmtree(tmp_path / "run" / "checkpoint-4")
    shutil.copytree(tmp_path / "run", tmp_path / "copy")
    monkeypatch.chdir(tmp_path / "two")
    shutil.copytree(tmp_path / "run", tmp_path / "again")
    run("--output_dir", tmp_path / "again", "--resume")  # the same images, though another folder here has their name
    recipe, local = (read_yaml(tmp_path / "again" / name) for name in ("recipe.yaml", "_local.yaml"))
    assert recipe["dataset"] == "photos" and local["dataset"] == str(tmp_path / "one" / "photos")
    run("--output_dir", tmp_path / "copy", "--resume", "--dataset", "photos")  # the same files at another place
    Image.new("L", (32, 32)).save(tmp_path / "two" / "photos" / "more.png")
    monkeypatch.chdir(tmp_path)
    resume = "--output_dir", "run", "--resume", "--dataset", "two/photos"
    capsys.readouterr()
    assert fails_with(capsys, *resume) == (
        "dataset two/photos is not what the run in run began with: it had 40 files and has 41; give the "
        "images of then, or go on with --accept_changed_data true"
    )
    assert "it is digits, and was" in fails_with(capsys, "--output_dir", "run", "--resume", "--dataset", "digits")
    run(*resume, "--accept_changed_data", "true")
    assert read_yaml(tmp_path / "run" / "recipe.yaml")["dataset_fingerprint"].startswith("41 files")


@pytest.mark.pictures
@pytest.mark.parametrize("method", ["latent_mim", pytest.param("stop_jepa", marks=pytest.mark.slow)])
def test_the_other_methods_fill_their_run_folders_and_load(tmp_path, method):
    folder = tmp_path / method
    run("--method", method, *TINY_RUN, "--output_dir", folder)
    assert (folder / "results" / "knn.json").exists() and (folder / "loss.png").exists()
    assert (folder / "prediction.png").exists() and (folder / "pca.png").exists()
    assert not (folder / "reconstructions.png").exists()
    model, encoder = AutoModelForPreTraining.from_pretrained(folder), AutoModel.from_pretrained(folder)
    for name, weight in model.base_model.state_dict().items():
        assert torch.equal(weight, encoder.state_dict()[name])


def test_ctrl_c_is_one_line_that_says_how_to_go_on(tmp_path, monkeypatch, capsys):
    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr("hf_mim.pretraining.trainer.MIMTrainer.train", interrupted)
    assert main(["pretrain", *TINY_RUN, "--output_dir", str(tmp_path / "run")]) == 130
    line = capsys.readouterr().err.strip().splitlines()[-1]
    resume = f"resume with: hf-mim pretrain --resume --output_dir {tmp_path / 'run'}"
    assert line == f"interrupted; from the last checkpoint, {resume}"


@pytest.mark.parametrize("flag", [["--resume"], ["--resume", "true"], ["--resume=True"]])
def test_every_way_to_write_resume_reads_the_runs_own_recipe(flag, mae_run):
    recipe = read_recipe([*flag, "--output_dir", str(mae_run[0])])
    assert recipe.run.resume and recipe.model["hidden_size"] == 16 and recipe.training["max_steps"] == 4


def test_a_stream_is_pretrained_on_and_measured(tmp_path):
    options = [*TINY_RUN, "--streaming", "--dataloader_num_workers", 0, "--max_steps", 2]
    run(*options, "--output_dir", tmp_path / "run")
    assert json.loads((tmp_path / "run" / "results" / "knn.json").read_text())["data"]["test"]["images"] == 100


def test_eval_loss_is_measured_on_test_images(tmp_path):
    options = [*TINY_RUN, "--method", "latent_mim", "--eval_strategy", "steps", "--eval_steps", 2, "--knn", "false"]
    run(*options, "--output_dir", tmp_path / "run")
    log = json.loads((tmp_path / "run" / "trainer_state.json").read_text())["log_history"]
    assert [entry["step"] for entry in log if "eval_loss" in entry] == [2, 4]


BAD_INPUT = [
    ("--dataset missing/folder/of/images", "dataset 'missing/folder/of/images'"),
    ("--dataset empty", "dataset 'empty' holds no images"),
    ("--dataset file.txt", "dataset 'file.txt' must be a folder or a file"),
    ("--image_column pixels", "image_column='pixels' is not a column; columns: image, label"),
    ("--train_split half", "split 'half' is not in dataset 'textures'; it has test, train"),
    ("--test_dataset empty", "test_dataset 'empty' holds no images"),
    ("--test_split half", "split 'half' is not in dataset 'textures'"),
    ("--image_size 33", "image_size must be divisible by patch_size, got image_size=33 with patch_size=8; 32"),
    ("--hidden_size 30 --num_attention_heads 4", "hidden_size must be divisible by num_attention_heads"),
    ("--hidden_size 18 --num_attention_heads 3", "hidden_size must be divisible by num_attention_heads and by 4"),
    ("--mask_ratio 1", "mask_ratio must leave between 1 and 15 of the 16 patches visible"),
    ("--mask_ratio 0", "mask_ratio must leave between 1 and 15 of the 16 patches visible"),
    ("--method stop_jepa --image_size 12,160 --patch_size 4", "target_scale="),
    (
        "--method stop_jepa --mask_ratio 0.5",
        "mask_ratio is an argument of mae, latent_mim, interactive_mim, not of",
    ),
    ("--method jepa", "method must be one of mae, latent_mim, stop_jepa, ijepa, sym_mim, interactive_mim, not 'jepa'"),
    ("--method sym_mim --per_device_train_batch_size 1", "per_device_train_batch_size must be 2 or more on a single"),
    ("--mask_ration 0.5", "unknown argument mask_ration; did you mean mask_ratio?"),
    ("wrong_key.yaml", "unknown argument mask_ration; did you mean mask_ratio?"),
    ("no.yaml", "there is no recipe no.yaml"),
    ("empty", "the recipe must be a YAML file, and empty is a folder; give images by --dataset empty"),
    ("broken.yaml", "the recipe broken.yaml is no YAML"),
    ("list.yaml", "the recipe list.yaml must consist of lines like `name: value`"),
    ("wrong_key.yaml list.yaml", "'list.yaml' is one argument too many"),
    ("--base_lr", "base_lr needs a value: a number"),
    ("--base_lr 0", "base_lr must be above 0"),
    ("--num_channels 10", "image 0: num_channels=10, but the image has 1"),
    ("--crop_scale 0,1", "crop_scale must be two positive numbers"),
    ("--flip_probability 2", "flip_probability must lie in [0, 1]"),
    ("--image_mean 0.5", "image_mean and image_std must be given together"),
    ("--image_mean .5,.5 --image_std .2,.2", "image_mean must have 1 values (num_channels), not [0.5, 0.5]"),
    ("--warmup_steps 5000", "warmup_steps must be at most the 2790 steps of the run"),
    ("--per_device_train_batch_size 5000", "per_device_train_batch_size"),
    ("--per_device_train_batch_size 0", "per_device_train_batch_size must be at least 1, not 0"),
    ("--gradient_accumulation_steps 0", "gradient_accumulation_steps must be at least 1, not 0"),
    ("--dataloader_num_workers -1", "dataloader_num_workers must be at least 0, not -1"),
    ("--max_steps 0", "max_steps must be at least 1, or -1 for num_train_epochs, got 0"),
    ("--adam_beta2 2", "adam_beta2 must lie in [0, 1), not 2"),
    ("--streaming", "max_steps must be given"),
    ("--output_dir file.txt/run", "output_dir must be a folder that can be written, and file.txt/run cannot be made"),
    ("--output_dir file.txt", "output_dir must be a folder, and file.txt is a file"),
    ("--resume", "resume needs output_dir"),
    ("null.yaml", "dataset must be given: a folder, files, the name of a dataset on the Hub"),
]


@pytest.mark.parametrize(("arguments", "message"), BAD_INPUT, ids=[arguments for arguments, _ in BAD_INPUT])
def test_mistakes_are_one_line_before_anything_is_written(arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("empty").mkdir()
    Path("file.txt").write_text("text")
    Path("wrong_key.yaml").write_text("mask_ration: 0.5\n")
    Path("broken.yaml").write_text("a: [1\n")
    Path("list.yaml").write_text("- 1\n")
    Path("null.yaml").write_text("dataset: null\n")
    assert fails_with(capsys, *arguments.split()).startswith(message)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("method", ["mae", "latent_mim", "stop_jepa"])
def test_300_steps_of_the_cifar10_recipes_are_healthy_on_real_images(tmp_path, shared_data, method):
    recipe = REPOSITORY / "training" / "recipes" / f"cifar10_{method}.yaml"
    options = ["--max_steps", 300, "--per_device_train_batch_size", 32, "--knn", "false", "--dataloader_num_workers", 0]
    run(recipe, "--dataset", shared_data / "cifar10_unit2k", *options, "--output_dir", tmp_path / "run")
    log = json.loads((tmp_path / "run" / "trainer_state.json").read_text())["log_history"]
    log = [entry for entry in log if "loss" in entry]
    spreads = [name for name in log[0] if name.endswith("_std")]
    assert all(np.isfinite(entry["loss"]) for entry in log) and spreads
    assert all(entry[name] > 0.02 for entry in log for name in spreads)
    if method != "stop_jepa":  # a JEPA's loss may rise and be healthy
        assert log[-1]["loss"] < 0.9 * log[0]["loss"]
