"""`hf-mim convert` as a user runs it: one line for every mistake, and nothing written at DEST."""

import json
import os
import textwrap

import pytest
import torch
from authors import classifier_state, read, save_jepa, save_mae
from safetensors.torch import save_file
from transformers import AutoModelForPreTraining, BertConfig, BertModel, IJepaConfig, IJepaModel, PreTrainedModel

from hf_mim import methods
from hf_mim.cli import main
from hf_mim.hub.convert import Conversion, convert

HEADS = ("--set", "num_attention_heads=3", "decoder_num_attention_heads=4")


@pytest.fixture
def mae(tmp_path):
    return save_mae(tmp_path / "mae.pth", read("mae")[2])


@pytest.fixture
def run(tmp_path, capsys):
    """A command line with DEST → (status, stdout, stderr); DEST is there only where the status is 0."""

    def run(source, *words):
        capsys.readouterr()
        status = main(["convert", str(source), str(tmp_path / "dest"), *map(str, words)])
        captured = capsys.readouterr()
        assert (tmp_path / "dest").exists() == (status == 0)
        assert not list(tmp_path.glob(".dest*"))
        return status, captured.out, captured.err

    return run


@pytest.fixture
def fails(run):
    def fails(source, *words):
        status, out, error = run(source, *words)
        assert status == 2 and not out
        assert error.startswith("error: ") and error.count("\n") == 1, error
        return error

    return fails


def test_the_command_makes_a_checkpoint_and_says_what_it_assumed(mae, run, tmp_path):
    status, out, _ = run(mae, *HEADS, "--set", "norm_pix_loss=false", "--method=mae")
    assert status == 0
    assert "mae.pth is mae: MAEForPreTraining" in out and "layer_norm_eps=1e-06, mask_ratio=0.75" in out
    assert "norm_pix_loss" not in out
    model = AutoModelForPreTraining.from_pretrained(tmp_path / "dest")
    assert model.config.norm_pix_loss is False and model.config.num_attention_heads == 3


def test_what_is_printed_can_be_run(mae, run):
    out = run(mae, *HEADS)[1]
    names = {}
    exec(textwrap.dedent(out[out.index("    import hf_mim") :]), names)
    assert type(names["model"]).__name__ == "MAEForPreTraining"


def test_a_jepa_file_is_said_to_look_like_stop(tmp_path, run):
    _, out, _ = run(save_jepa(tmp_path / "jepa.pth", read("ijepa")[2]), "--set", "num_attention_heads=3")
    assert "give --method stop" in out


def test_a_method_that_is_said_is_not_doubted(tmp_path, run):
    file = save_jepa(tmp_path / "jepa.pth", read("ijepa")[2])
    _, out, error = run(file, "--set", "num_attention_heads=3", "--method", "ijepa")
    assert "stop" not in out and not error


def test_what_is_left_out_is_said(tmp_path, run):
    file = save_jepa(tmp_path / "stop.pth", read("stop")[2])
    assert "nothing reads it: predictor.mask_token." in run(file, *HEADS[:2], "--method", "stop")[1]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--set", "num_channels=10"], "patch_embed.proj.weight (file 48×3×8×8, model 48×10×8×8)"),
        (["--set", "num_hidden_layers=4"], "missing: blocks.2.norm1.weight"),
        (["--set", "num_hidden_layers=1"], "left over: blocks.1."),
        (["--set", "decoder_num_hidden_layers=3"], "missing: decoder_blocks.2."),
        (["--set", "hidden_size=96"], "of another shape: "),
        (["--set", "patch_size=4"], "of another shape: "),
        (["--set", "image_size=64"], "pos_embed (file 1×"),
        (["--set", "use_cls_token=false"], "left over: cls_token"),
        (["--set", "num_attention_heads=5"], "must be divisible by num_attention_heads"),
        (["--set", "num_attention_heads=three"], "num_attention_heads must be a whole number"),
        (["--set", "num_atention_heads=3"], "did you mean num_attention_heads?"),
        (["--set", "size=large"], "mae has no setting size"),
        (["--set", "patch_gap=4"], "mae has no setting patch_gap"),
        (["--set", "image_mean=0.5"], "image_mean must be given with a number for each of 3 channels, not [0.5]"),
        (["--set", "image_std=0,0,0"], "image_std must have finite numbers above 0, not [0"),
        (["--set", "image_std=-1,1,1"], "image_std must have finite numbers above 0"),
        (["--set", "image_std=1,1,inf"], "image_std must have finite numbers above 0"),
        (
            ["--set", "image_mean=123.7,116.3,103.5", "image_std=58.4,57.1,57.4"],
            "not [123.7, 116.3, 103.5] and [58.4, 57.1, 57.4]; for values in 0..255 they are --set "
            "image_mean=0.4851,0.4561,0.4059 image_std=0.229,",
        ),
        (["--set", "image_mean=0,0,nan"], "image_mean must have finite numbers, not ["),
        (["--set", "layer_norm_eps=-1"], "layer_norm_eps must be above 0"),
        (["--set", "num_attention_heads"], "--set needs name=value, not 'num_attention_heads'"),
        (["--set"], "set needs a value: name=value"),
        (
            ["--method", "dino"],
            f"method must be one of {', '.join(methods.names())}, not 'dino'",
        ),
        (["--method", "stop"], "method must be mae for mae.pth (by its keys), not stop_jepa"),
        (["--method"], "method needs a value: one of mae, latent_mim"),
        (["--force"], "convert has no option force; there is method and prefix and set"),
        (["third"], "convert needs SOURCE and DEST"),
    ],
)
def test_a_setting_that_does_not_fit_is_one_line(mae, fails, words, message):
    assert message in fails(mae, *HEADS, *words)


def test_missing_and_left_over_tensors_are_listed(tmp_path, fails):
    state = read("mae")[2] | {"blocks.0.gate.weight": torch.ones(48), "head_dist.bias": torch.ones(3)}
    del state["norm.weight"], state["decoder_pred.bias"]
    error = fails(save_mae(tmp_path / "mae.pth", state), *HEADS)
    assert "missing: norm.weight, decoder_pred.bias; left over: blocks.0.gate.weight, head_dist.bias" in error


def test_many_tensors_are_listed_in_part_and_counted(tmp_path, fails):
    state = {key: x for key, x in read("mae")[2].items() if ".attn." not in key}
    error = fails(save_mae(tmp_path / "mae.pth", state), *HEADS)
    assert error.count(".attn.") == 16 and " more" not in error
    state = read("mae")[2] | {f"extra.{i}": torch.ones(1) for i in range(43)}
    error = fails(save_mae(tmp_path / "mae.pth", state), *HEADS)
    assert error.count("extra.") == 40 and "extra.39 and 3 more" in error


@pytest.mark.parametrize("key", ["patch_embed.proj.bias", "blocks.0.mlp.fc1.bias", "pos_embed", "decoder_embed.bias"])
def test_a_tensor_that_tells_a_size_may_be_missing_or_bent(tmp_path, fails, key):
    state = read("mae")[2]
    bent = state | {key: torch.zeros(2, 2, 2, 2)}
    assert key in fails(save_mae(tmp_path / "bent.pth", bent), *HEADS)
    del state[key]
    assert key in fails(save_mae(tmp_path / "missing.pth", state), *HEADS)


def test_settings_that_ask_for_tensors_of_no_file_are_refused(tmp_path, fails):
    file = save_mae(tmp_path / "classifier.pth", classifier_state("cls"))
    error = fails(file, "--set", "num_attention_heads=3", "head_batch_norm=true")
    assert "classifier.pth has no tensors for what the settings ask for" in error and "classifier.batch_norm" in error


def test_quantised_weights_are_refused(tmp_path, fails):
    state = read("mae")[2]
    state["norm.weight"] = state["norm.weight"].to(torch.int8)
    assert "of another type: norm.weight (torch.int8)" in fails(save_mae(tmp_path / "mae.pth", state), *HEADS)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e300])  # the last in float64, no number in float32
def test_weights_that_are_not_finite_are_refused_by_name(tmp_path, fails, value):
    state = read("mae")[2]
    state["norm.weight"] = state["norm.weight"].double()
    state["norm.weight"][1] = value
    error = fails(save_mae(tmp_path / "mae.pth", state), *HEADS)
    assert "not finite (NaN, infinite), the first in norm.weight" in error


def test_no_predictor_between_two_encoders_is_refused(tmp_path, fails):
    state = {key: x for key, x in read("ijepa")[2].items() if not key.startswith("predictor.")}
    error = fails(save_jepa(tmp_path / "jepa.pth", state), "--set", "num_attention_heads=3")
    assert "there is no predictor.predictor_embed.bias" in error


def test_patches_that_are_no_squares_have_to_be_told(tmp_path, fails, run):
    state = read("latent_mim")[2]
    heads = ["--set", "num_attention_heads=3", "decoder_num_attention_heads=4"]
    torch.save({"state_dict": state}, tmp_path / "latent.pth")
    error = fails(tmp_path / "latent.pth", *heads, "num_channels=2")
    assert "so that a patch has 48 values, not 4×4×2" in error
    status, _, _ = run(
        tmp_path / "latent.pth", *heads, "num_channels=2", "patch_size=4,6", "image_mean=0,0", "image_std=1,1"
    )
    assert status == 0


def ijepa_folder(tmp_path, **changes):
    folder = tmp_path / "theirs"
    sizes = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48)
    IJepaModel(IJepaConfig(**sizes, image_size=32, patch_size=8)).save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))
    return folder


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"num_attention_heads": "four"},
            "the config.json of theirs is wrong: Field 'num_attention_heads' expected int",
        ),
        ({"num_hidden_layers": 3}, "missing: layers.2."),
        ({"num_channels": 10}, "of another shape: "),
        ({"model_type": "swin"}, "is of type swin; known are vit_mae, vit, dinov2, dinov2_with_registers, ijepa"),
        ({"model_type": ["vit"]}, "is of type ['vit']"),
        ({"model_type": None}, "give the folder"),
        ({"model_type": "vit_mae"}, "missing: embeddings.cls_token"),
        ({"model_type": "stop_jepa"}, "a checkpoint of hf_mim already"),
        ({"hidden_act": "swirl"}, "hidden_act must be one of"),
        ({"hidden_size": 0}, "hidden_size must be divisible"),
        ({"num_attention_heads": 0}, "hidden_size must be divisible by num_attention_heads"),
        ({"id2label": ["cat"]}, "the config.json of theirs is wrong"),
        ({"pretrained_cfg": {"mean": "grey"}}, "image_mean must be given with a number for each of 3 channels"),
    ],
)
def test_a_config_of_transformers_that_is_wrong_is_one_line(tmp_path, fails, changes, message):
    assert message in fails(ijepa_folder(tmp_path, **changes))


def test_weights_of_transformers_without_their_folder_are_refused(tmp_path, fails):
    assert "give the folder" in fails(ijepa_folder(tmp_path) / "model.safetensors")


def test_another_model_is_refused(tmp_path, fails):
    BertModel(
        BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8, vocab_size=9)
    ).save_pretrained(tmp_path / "bert")
    assert "is no checkpoint of MAE, I-JEPA, StoP or Latent MIM" in fails(tmp_path / "bert")


def test_a_truncated_and_a_missing_file_are_one_line(tmp_path, fails):
    save_file(read("mae")[2], tmp_path / "mae.safetensors")
    whole = (tmp_path / "mae.safetensors").read_bytes()
    (tmp_path / "mae.safetensors").write_bytes(whole[: len(whole) // 2])
    assert "mae.safetensors is damaged" in fails(tmp_path / "mae.safetensors")
    assert "there is no file or folder" in fails(tmp_path / "missing.pth")


class Hostile:
    def __reduce__(self):
        return os.system, ("touch ran",)


def test_a_hostile_pickle_is_one_line(tmp_path, fails, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"model": read("mae")[2], "args": Hostile()}, tmp_path / "mae.pth")
    assert f"it holds {os.name}.system" in fails(tmp_path / "mae.pth")
    assert not (tmp_path / "ran").exists()


def test_dest_is_never_written_over(mae, tmp_path, capsys):
    for dest in (mae, tmp_path):
        before = sorted(tmp_path.rglob("*"))
        assert main(["convert", str(mae), str(dest), *HEADS]) == 2
        assert "DEST must be a new folder" in capsys.readouterr().err
        assert sorted(tmp_path.rglob("*")) == before
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    assert main(["convert", str(mae), str(tmp_path / "link"), *HEADS]) == 2
    assert "DEST must be a new folder, and" in capsys.readouterr().err
    (tmp_path / "empty").mkdir()
    assert main(["convert", str(mae), str(tmp_path / "empty"), *HEADS]) == 0
    assert (tmp_path / "empty" / "config.json").exists()


@pytest.mark.parametrize("dest", ["/proc/here", "/proc/below/here", "link/here", "file/here"])
def test_a_dest_that_cannot_be_made_is_told_before_reading(tmp_path, capsys, dest):
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    (tmp_path / "file").write_text("")
    before = sorted(tmp_path.rglob("*"))
    assert main(["convert", str(tmp_path / "missing.pth"), str(tmp_path / dest)]) == 2
    error = capsys.readouterr().err
    assert "DEST must be a folder that can be written" in error and error.count("\n") == 1
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("error", [OSError("No space left on device"), KeyboardInterrupt()])
def test_a_saving_that_fails_half_way_leaves_no_dest(mae, run, monkeypatch, error):
    save_pretrained = PreTrainedModel.save_pretrained

    def fail_after_saving(model, folder, **kwargs):
        save_pretrained(model, folder, **kwargs)
        raise error

    monkeypatch.setattr(PreTrainedModel, "save_pretrained", fail_after_saving)
    status, _, message = run(mae, *HEADS)
    assert status in (2, 130) and ("No space left" in message or "nothing was written" in message)


def test_settings_of_a_wrong_type_from_python_are_named(mae):
    for settings in ({"num_channels": "three"}, {"image_mean": 0.5}, {"norm_pix_loss": 1}):
        with pytest.raises(Exception, match=next(iter(settings))):
            convert(mae, num_attention_heads=3, decoder_num_attention_heads=4, **settings)


def test_a_classifier_of_ten_channels_needs_its_normalisation(tmp_path):
    state = classifier_state("cls")
    state["patch_embed.proj.weight"] = torch.randn(48, 10, 8, 8)
    torch.save({"model": state}, tmp_path / "ten.pth")
    with pytest.raises(ValueError, match="image_mean must be given with a number for each of 10 channels"):
        Conversion.read(tmp_path / "ten.pth", num_attention_heads=3)


def test_help_names_the_sources(capsys):
    assert main(["convert", "--help"]) == 0
    assert "I-JEPA" in capsys.readouterr().out
