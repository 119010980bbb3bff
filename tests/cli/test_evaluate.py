"""`hf-mim evaluate` as a user runs it: results, and one line for every mistake."""

import dataclasses
import itertools
import json
import time

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import BertConfig, BertModel

from hf_mim.cli import main
from hf_mim.data.decode import open_image
from hf_mim.data.sources import fixed_sample
from hf_mim.docstrings import argument_texts
from hf_mim.evaluation import PROTOCOLS, load_labelled, load_protocol
from hf_mim.evaluation.knn import knn_predict
from hf_mim.evaluation.measure import EncoderArguments, Evaluation, argument_kinds, option_types
from hf_mim.models.configuration_mae import MAEConfig
from hf_mim.models.modeling_mae import MAEForPreTraining
from hf_mim.run_folder import RunFacts


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("checkpoint")
    config = MAEConfig(
        image_size=32, patch_size=8, num_channels=3, hidden_size=32, num_hidden_layers=2, num_attention_heads=4
    )
    MAEForPreTraining(config).save_pretrained(folder)
    return folder


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_MIM_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def evaluate(*words) -> int:
    return main(["evaluate", *map(str, words)])


SMALL = ["--dataset", "digits", "--train_images", 200, "--test_images", 100]


def test_a_result_is_printed_and_saved_with_its_protocol(checkpoint, capsys, cache):
    assert evaluate("knn", checkpoint, *SMALL, "--k", 5) == 0
    (path,) = (checkpoint / "results").glob("knn_digits_k_5_test_images_100_train_images_200_????????.json")
    result = json.loads(path.read_text())
    printed = capsys.readouterr().out
    assert f"knn: accuracy {result['value']:.4f} on 100 images of digits, split test" in printed
    assert str(path) in printed and "T 0.07" in printed
    assert result["settings"] | {"k": 5, "image_size": [32, 32], "dtype": "float32"} == result["settings"]
    assert result["checkpoint"] == checkpoint.name and len(result["checkpoint_sha256"]) == 64
    about = {"image_mean": [0.485, 0.456, 0.406], "crop_fraction": 1.0, "untrained": False}
    assert result["settings"] | about == result["settings"]
    assert result["seconds"] > 0 and "torch" in result["versions"]
    assert len(list(cache.rglob("*.f32"))) == 4  # the encoder equals its untrained twin; raw pixels


def test_two_runs_give_the_same_numbers_with_and_without_cache(checkpoint, tmp_path, cache, monkeypatch):
    monkeypatch.chdir(tmp_path)
    values = []
    for options in (["--cache", "none"], [], []):
        path = tmp_path / f"{len(values)}.json"
        assert evaluate("knn", checkpoint, *SMALL, *options, "--output", path) == 0
        result = json.loads(path.read_text())
        values.append((result["value"], result["table"]))
        assert cache.exists() == (not options or len(values) > 1)
    assert values[0] == values[1] == values[2]
    assert {path.name for path in tmp_path.iterdir() if "." not in path.stem} == {"0.json", "1.json", "2.json", "cache"}


def test_the_untrained_encoder_has_a_file_of_its_own(checkpoint):
    assert evaluate("leave_one_out", checkpoint, *SMALL, "--untrained") == 0
    name = "leave_one_out_digits_test_images_100_train_images_200_untrained_????????.json"
    (path,) = (checkpoint / "results").glob(name)
    result = json.loads(path.read_text())
    assert result["settings"]["untrained"] is True and result["checkpoint_sha256"] is None


@pytest.mark.slow
def test_another_seed_draws_other_untrained_weights(checkpoint, tmp_path):
    values = []
    for seed in (0, 1, 1):
        path = tmp_path / f"{len(values)}.json"
        assert evaluate("knn", checkpoint, *SMALL, "--untrained", "--untrained_seed", seed, "--output", path) == 0
        result = json.loads(path.read_text())
        assert result["settings"]["untrained_seed"] == seed
        values.append(result["table"])
    assert values[0] != values[1] == values[2]


@pytest.mark.parametrize("options", [["knn"], ["linear", "--epochs", 2], ["lowshot", "--draws", 1], ["leave_one_out"]])
def test_raw_pixels_are_measured_as_an_encoder_is(options, checkpoint, tmp_path):
    protocol, *options = options
    assert evaluate(protocol, checkpoint, *SMALL, *options, "--pixels", "--output", tmp_path / "result.json") == 0
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["settings"]["pixels"] is True and result["checkpoint_sha256"] is None
    assert 0.5 < result["value"] <= 1  # far above the .1 of chance


def test_raw_pixels_are_no_result_of_the_checkpoint(checkpoint):
    assert evaluate("knn", checkpoint, *SMALL[:2], "--test_images", 30, "--pixels") == 0
    facts = RunFacts.read(checkpoint)
    (name,) = [name for name in facts.results if name.startswith("knn_digits_pixels_test_images_30")]
    assert facts.notes[name] == "raw pixels, to compare" and name not in facts.own_results


def test_the_pixels_are_those_that_the_encoder_sees(checkpoint, tmp_path):
    assert evaluate("knn", checkpoint, *SMALL, "--pixels", "--output", tmp_path / "result.json") == 0
    parts = [fixed_sample(part, n, in_order=True) for part, n in zip(load_labelled("digits"), (200, 100), strict=True)]
    grey = [[np.array(open_image(row["image"])) / 255 for row in part.images] for part in parts]
    # The digits are grey, and this encoder takes three channels.
    normal = [(np.stack(side)[..., None] - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225] for side in grey]
    train, test = (torch.from_numpy(side).flatten(1) for side in normal)
    predicted = knn_predict(train, parts[0].read_labels(), test)
    value = json.loads((tmp_path / "result.json").read_text())["value"]
    assert value == (predicted == parts[1].read_labels()).double().mean().item()


def test_other_options_do_not_overwrite_a_result(checkpoint):
    before = set((checkpoint / "results").glob("*.json"))
    for options in ([], ["--features", "1/cls/raw"], ["--crop_fraction", 0.5], ["--extract_batch_size", 7]):
        assert evaluate("leave_one_out", checkpoint, *SMALL[:2], "--test_images", 40, *options) == 0
    assert len(set((checkpoint / "results").glob("*.json")) - before) == 3  # the batch size changes nothing


def test_another_image_size_changes_the_grid(checkpoint, tmp_path):
    assert evaluate("knn", checkpoint, *SMALL, "--image_size", "16,48", "--output", tmp_path / "r.json") == 0
    assert json.loads((tmp_path / "r.json").read_text())["settings"]["image_size"] == [16, 48]


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_every_option_of_every_protocol_is_explained_and_means_one_thing(protocol, capsys):
    kinds = argument_kinds(load_protocol(protocol))
    unused = getattr(load_protocol(protocol), "unused", ())
    texts = [argument_texts(kind) for kind in kinds]
    names = [f.name for kind in kinds for f in dataclasses.fields(kind) if f.name not in unused]
    assert len(set(names)) == len(names)
    assert evaluate(protocol, "--help") == 0
    printed = capsys.readouterr().out
    for name in names:
        assert any(text.get(name) for text in texts) and f"--{name}" in printed


def test_help_lists_the_protocols(capsys):
    assert evaluate() == evaluate("--help") == 0
    printed = capsys.readouterr().out
    for name in PROTOCOLS:
        assert f"\n  {name}" in printed
    assert max(map(len, printed.splitlines())) <= 120


def fails_with(capsys, *words) -> str:
    """The error of a command that must fail with one line, status 2, and nothing written."""
    assert evaluate(*words) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert lines[-1].startswith("error: ")
    assert sum("error" in line for line in lines) == 1
    return lines[-1].removeprefix("error: ")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("knnn {checkpoint} --dataset digits", "protocol must be one of knn, leave_one_out, linear"),
        ("--dataset digits", "evaluate needs a protocol first"),
        ("knn --dataset digits", "evaluate knn needs one CHECKPOINT, not none"),
        ("knn {checkpoint} other --dataset digits", "evaluate knn needs one CHECKPOINT, not"),
        ("knn {checkpoint}", "dataset must be given"),
        ("knn {checkpoint} --dataset", "dataset needs a value"),
        ("knn {checkpoint} --dataset digits --tempature 1", "knn has no option tempature; did you mean temperature?"),
        ("knn {checkpoint} --dataset digits --k many", "k must be a whole number, not 'many'"),
        ("knn {checkpoint} --dataset digits --k 0", "k must be at least 1, not 0"),
        ("knn {checkpoint} --dataset digits --train_images 200 --k 201", "k must be at most the 200 training images"),
        ("knn {checkpoint} --dataset digits --train_images 0", "train_images must be at least 1, not 0"),
        ("knn {checkpoint} --dataset digits --features last/cls", "features must be layer/pooling/norm"),
        ("knn {checkpoint} --dataset digits --features 3/cls/norm", "features 3/cls/norm need a layer"),
        ("knn {checkpoint} --dataset digits --image_size 30", "image_size must be divisible by the patch size (8, 8)"),
        ("knn {checkpoint} --dataset digits --image_size 8,16,24", "image_size must be a side or height,width"),
        ("knn {checkpoint} --dataset digits --image_mean 0.5", "image_mean and image_std must be given together"),
        ("knn {checkpoint} --dataset digits --extract_batch_size 0", "extract_batch_size must be at least 1, not 0"),
        (
            "knn {checkpoint} --dataset digits --untrained_seed 1",
            "untrained_seed must be given together",
        ),
        ("knn {checkpoint} --dataset digits --untrained --pixels", "pixels cannot be given together with untrained"),
        ("finetune {checkpoint} --dataset digits --pixels", "finetune has no option pixels"),
        ("knn {checkpoint} --dataset digits --crop_fraction 2", "crop_fraction must lie in (0, 1], not 2.0"),
        ("knn {checkpoint} --dataset digits --device abacus", "device must be one that this machine has"),
        ("knn {checkpoint} --dataset digits --image_size 0", "image_size must be divisible by the patch size"),
        ("knn {checkpoint} --dataset digits --test_split train", "test_split must be another split than train"),
        ("segment {checkpoint} --dataset digits --test_split train", "test_split must be another split than train"),
        ("knn {checkpoint} --dataset {empty}", "source"),
        ("knn {checkpoint} --dataset {flat}", "has no labels in split train; give --labels COLUMN"),
        ("knn {empty} --dataset digits", "holds no encoder that can be loaded"),
        ("knn {bert} --dataset digits", "BertModel, which is no vision encoder"),
        ("segment {checkpoint} --dataset {flat}", "mask"),
    ],
)
def test_a_mistake_is_one_line_and_nothing_is_written(words, message, checkpoint, tmp_path, capsys):
    places = {name: tmp_path / name for name in ("empty", "flat", "bert")}
    for path in places.values():
        path.mkdir()
    for number in range(3):
        Image.new("RGB", (32, 32)).save(places["flat"] / f"{number}.png")
    if "{bert}" in words:
        BertModel(BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1)).save_pretrained(places["bert"])
    output = tmp_path / "result.json"
    words = words.format(checkpoint=checkpoint, **places).split()
    assert message in fails_with(capsys, *words, "--output", output)
    assert not output.exists() and not (tmp_path / "cache").exists()


def test_a_result_that_cannot_be_written_is_known_before_any_work(checkpoint, tmp_path, capsys, cache):
    (tmp_path / "file").touch()
    for output in (tmp_path, tmp_path / "file" / "result.json", "/proc/results/result.json"):
        assert "output must be a file that can be written" in fails_with(
            capsys, "knn", checkpoint, *SMALL, "--output", output
        )
    assert not cache.exists()


def test_an_option_that_a_protocol_does_not_use_is_not_offered():
    assert "dataset" not in option_types(load_protocol("local"))
    assert "labels" not in option_types(load_protocol("propagate"))
    assert {f.name for f in dataclasses.fields(EncoderArguments)} <= option_types(load_protocol("knn")).keys()


def test_an_interrupted_evaluation_says_that_it_goes_on(checkpoint, capsys, monkeypatch):
    def interrupt(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(load_protocol("knn"), "run", interrupt)
    assert evaluate("knn", checkpoint, *SMALL) == 130
    assert "the same command goes on from them" in capsys.readouterr().err


def test_a_library_user_measures_without_the_command_line(checkpoint, monkeypatch):
    monkeypatch.setattr(time, "perf_counter", itertools.count(0.0, 1.5).__next__)  # a real one may round to 0 seconds
    evaluation = Evaluation(
        "knn", str(checkpoint), {"dataset": "digits", "train_images": 60, "test_images": 20, "k": 5}
    )
    result = evaluation()
    assert result.settings["k"] == 5 and result.settings["image_size"] == [32, 32] and result.device == "cpu"
    assert result.checkpoint == checkpoint.name and result.checkpoint_sha256 and result.seconds >= 1.5
    with pytest.raises(ValueError, match="dataset must be given: images with labels"):
        Evaluation("knn", str(checkpoint), {})
