"""Exported checkpoints give our features in a process that cannot import hf_mim, and come back bit for bit."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from exported import CASES, INSTALLED, ONLY, forms, mae
from minihub import MiniHub
from safetensors.torch import load_file, save_file
from transformers import AutoImageProcessor, AutoModel, AutoModelForPreTraining

import hf_mim
from hf_mim.cli import main
from hf_mim.data.processor import image_processor
from hf_mim.hub import export as export_module
from hf_mim.hub import key_tables
from hf_mim.hub.export import export
from hf_mim.models.pixels import ValueRange


@pytest.fixture(scope="module")
def images():
    generator = torch.Generator().manual_seed(1)
    sizes = {
        name: (lambda c: (c.num_channels, *c.image_height_width))(make().config) for name, (make, _) in CASES.items()
    }
    return {name: torch.randn(3, *size, generator=generator) for name, size in sizes.items()}


@pytest.fixture(scope="module")
def hub(root):
    """A Hub with MAE's checkpoint as `tester/ours` and its export with code as `tester/remote-code`."""
    hub = MiniHub()
    for name in ("ours", "remote-code"):
        files = {path.name: path.read_bytes() for path in (root / "mae" / name).iterdir()}
        hub.repos[f"tester/{name}"] = [("0" * 40, files)]
    yield hub
    hub.close()


@pytest.fixture(scope="module")
def seen(root, images, hub, once):
    """What all exports give in one process without hf_mim: {"NAME/FORM/OUTPUT": tensor}."""
    return load_file(once("seen", lambda folder: look(root, images, hub, folder)) / "seen.safetensors")


def look(root, images, hub, folder):
    for name, tensor in images.items():
        save_file({"images": tensor}, folder / f"{name}.safetensors")
    jobs = [
        (name, form, str(root / name / form.removeprefix("real ")))
        for name in CASES
        for form in forms(name)
        if INSTALLED.get(form, True)
    ]
    (folder / "jobs.json").write_text(json.dumps([*jobs, ("mae", "hub", "tester/remote-code")]))
    without = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, Path(__file__).with_name("blind.py"), folder / "jobs.json", folder / "seen.safetensors"],
        cwd=folder,
        env=without | hub.environment(folder / "cache"),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]


def close(theirs, ours):
    torch.testing.assert_close(theirs, ours, atol=1e-5, rtol=0)


@pytest.mark.parametrize(("name", "form"), [*((name, form) for name in CASES for form in forms(name)), ("mae", "hub")])
@torch.no_grad()
def test_an_export_gives_our_features_where_hf_mim_cannot_be_imported(name, form, models, request):
    if not INSTALLED.get(form, True):
        pytest.skip(f"needs {'onnx, onnxscript and onnxruntime' if form == 'onnx' else 'timm and torchvision'}")
    seen, images = (request.getfixturevalue(fixture) for fixture in ("seen", "images"))
    model = models[name]
    output, is_classifier = model.base_model(images[name]), hasattr(model, "classifier")
    theirs = {key.rpartition("/")[2]: value for key, value in seen.items() if key.startswith(f"{name}/{form}/")}
    assert ("features" in theirs or is_classifier) and ("pooled" in theirs or form == "transformers")
    if "features" in theirs and not (form.endswith("timm") and model.config.pool_before_norm):
        close(theirs["features"], output.last_hidden_state)
    if "pooled" in theirs:
        close(theirs["pooled"], model(images[name]).logits if is_classifier else output.pooler_output)
    if "cls" in theirs:  # ViTModel's pooler
        close(theirs["cls"], output.last_hidden_state[:, 0])
    if "map" in theirs:
        tokens = output.last_hidden_state[:, model.config.num_prefix_tokens :]
        close(theirs["map"], tokens.transpose(1, 2).unflatten(-1, model.config.grid_size))
    if "loss" in theirs and form == "transformers":
        close(theirs["loss"], model(images[name], noise=torch.linspace(0, 1, 16).expand(3, -1)).loss)
    elif "loss" in theirs:
        torch.manual_seed(0)
        close(theirs["loss"], model(F.interpolate(images[name], model.config.training_size)).loss)


@pytest.mark.parametrize("name", [name for name, (_, architecture) in CASES.items() if architecture])
def test_transformers_has_the_class_that_holds_it(root, name):
    config = json.loads((root / name / "transformers" / "config.json").read_text())
    assert config["architectures"] == [CASES[name][1]]
    assert "auto_map" not in config


def test_transformers_4_knows_every_name_in_the_file_of_vit_mae(root):
    """Its layers are named alike in encoder and decoder, after these two prefixes."""
    keys = load_file(root / "mae" / "transformers" / "model.safetensors").keys()
    layers = {key.partition(".0.")[0]: set() for key in keys if ".0." in key}
    for prefix in layers:
        layers[prefix] = {key.partition(".0.")[2] for key in keys if key.startswith(f"{prefix}.0.")}
    assert list(sorted(layers)) == ["decoder.decoder_layers", "vit.encoder.layer"]
    assert layers["decoder.decoder_layers"] == layers["vit.encoder.layer"]
    assert "attention.attention.query.weight" in layers["vit.encoder.layer"]


def same(theirs, ours):
    assert theirs.keys() == ours.keys()
    assert all(torch.equal(theirs[key], ours[key]) for key in ours)


@pytest.mark.parametrize(
    "name", [name for name in CASES if CASES[name][1] and not hasattr(CASES[name][0](), "classifier")]
)
def test_what_transformers_has_comes_back_bit_for_bit(models, root, name):
    model, architecture = models[name], CASES[name][1]
    state = key_tables.module_names(load_file(root / name / "transformers" / "model.safetensors"))
    state = {key: tensor for key, tensor in state.items() if not key.startswith("pooler.")}
    if architecture == "ViTMAEForPreTraining":
        return same(key_tables.to_ours(state, key_tables.VIT_MAE), model.state_dict())
    table = key_tables.VIT_HF if architecture == "ViTModel" else key_tables.IJEPA_HF
    same(key_tables.to_ours(state, table), model.base_model.plain_state_dict())


@pytest.mark.parametrize(
    "name", ["mae", "mae-oblong", "latent_mim", "latent_mim-oblong", "stop_jepa", "stop_jepa-oblong"]
)
def test_what_timm_has_comes_back_bit_for_bit(models, root, name):
    model = models[name]
    table = key_tables.TIMM_VIT_CLS if model.config.use_cls_token else key_tables.TIMM_VIT
    state = load_file(root / name / "timm" / "model.safetensors")
    same(key_tables.to_ours(state, table), model.base_model.state_dict())


@pytest.mark.parametrize("name", ONLY["remote-code"])
def test_a_folder_with_code_is_the_checkpoint_bit_for_bit(root, name):
    ours, theirs = (load_file(root / name / folder / "model.safetensors") for folder in ("ours", "remote-code"))
    same(theirs, ours)


def test_a_folder_with_code_loads_as_ours_where_hf_mim_is_and_exports_again(root, tmp_path):
    model = AutoModelForPreTraining.from_pretrained(root / "latent_mim" / "remote-code")
    assert type(model) is hf_mim.LatentMIMForPreTraining
    export(root / "latent_mim" / "remote-code", tmp_path / "again", "remote-code")
    for path in (root / "latent_mim" / "remote-code").iterdir():
        assert (tmp_path / "again" / path.name).read_bytes() == path.read_bytes()


@pytest.mark.parametrize("form", ["transformers", "remote-code"])
def test_the_image_processor_comes_along(root, form):
    processor = AutoImageProcessor.from_pretrained(root / "mae-oblong" / form, trust_remote_code=True)
    assert list(processor.image_mean) == [0.4] * 4 and processor.size == {"height": 24, "width": 40}


def test_a_processor_of_transformers_is_refused_for_images_of_another_depth(tmp_path):
    mae().save_pretrained(tmp_path / "ours")
    value_range = ValueRange((0.0,), (4095.0,), "uint16")
    image_processor((32, 32), [0.4] * 3, [0.3] * 3, value_range).save_pretrained(tmp_path / "ours")
    for form in ("transformers", "timm"):
        with pytest.raises(ValueError, match=r"to must be remote-code: .* 8-bit images.* \[0, 4095\]"):
            export(tmp_path / "ours", tmp_path / form, form)
        assert not (tmp_path / form).exists()


def test_a_processor_of_others_is_refused_for_images_with_pixels_without_data(tmp_path):
    mae().save_pretrained(tmp_path / "ours")
    value_range = ValueRange((0.0,), (255.0,), "uint8", nodata=0.0)
    image_processor((32, 32), [0.4] * 3, [0.3] * 3, value_range).save_pretrained(tmp_path / "ours")
    for form in ("transformers", "timm"):
        with pytest.raises(ValueError, match=r"to must be remote-code or onnx: .* nodata 0"):
            export(tmp_path / "ours", tmp_path / form, form)
        assert not (tmp_path / form).exists()
    export(tmp_path / "ours", tmp_path / "code", "remote-code")
    processor = AutoImageProcessor.from_pretrained(tmp_path / "code", trust_remote_code=True)
    assert processor.nodata == 0 and (tmp_path / "code" / "nodata.py").exists()


def test_timm_is_told_how_images_are_prepared_and_what_the_classes_are(root):
    config = json.loads((root / "linear-probe" / "timm" / "config.json").read_text())
    images = {"mean": [0.4] * 3, "std": [0.3] * 3, "input_size": [3, 32, 32], "crop_pct": 1.0, "crop_mode": "center"}
    assert config["pretrained_cfg"] | images == config["pretrained_cfg"]
    assert config["label_names"] == [f"LABEL_{i}" for i in range(5)]


@pytest.mark.parametrize("form", ["transformers", "remote-code"])
@pytest.mark.parametrize(("name", "default"), [("latent_mim", "online"), ("stop_jepa", "target")])
@torch.no_grad()
def test_the_encoder_that_is_asked_for_is_the_one_that_is_written(models, root, images, tmp_path, name, default, form):
    model = models[name]
    wanted = {"online": model.encoder, "target": model.target_encoder}
    for which in (None, "online", "target"):
        export(root / name / "ours", tmp_path / str(which), form, which)
        features = AutoModel.from_pretrained(tmp_path / str(which)).eval()(images[name]).last_hidden_state
        close(features, wanted[which or default](images[name]).last_hidden_state)
        if which is not None:
            others = ("encoder.layers.", "target", "decoder.", "predictor.", "projector.")
            assert not any(key.startswith(others) for key in load_file(tmp_path / which / "model.safetensors"))
    assert (model.encoder(images[name])[0] - model.target_encoder(images[name])[0]).abs().max() > 0.01


@pytest.mark.parametrize("form", ["transformers", "timm", "remote-code", "onnx"])
def test_an_export_that_fails_half_way_leaves_nothing(root, tmp_path, monkeypatch, form):
    def fail(*args):
        (args[1] / "half").write_text("")
        raise OSError("no space left on device")

    monkeypatch.setitem(export_module.WRITERS, form, fail)
    monkeypatch.setattr(export_module, "check_onnx", lambda: None)
    with pytest.raises(OSError, match="no space"):
        export(root / "mae" / "ours", tmp_path / "dest", form)
    assert not list(tmp_path.iterdir())


def test_the_command_prints_the_line_that_loads_what_it_wrote(root, tmp_path, capsys):
    assert main(["export", str(root / "mae" / "ours"), str(tmp_path / "new" / "dest"), "--to", "transformers"]) == 0
    line = capsys.readouterr().out.strip()
    assert line == f'transformers.ViTMAEForPreTraining.from_pretrained("{tmp_path}/new/dest")'
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == ["dest"]


@pytest.mark.slow
def test_a_checkpoint_may_be_named_by_its_repository_on_the_hub(root, hub, tmp_path):
    command = [sys.executable, "-m", "hf_mim.cli", "export", "tester/ours", str(tmp_path / "dest"), "--to", "timm"]
    done = subprocess.run(command, env=os.environ | hub.environment(tmp_path / "cache"), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    for path in (root / "mae" / "timm").iterdir():
        assert (tmp_path / "dest" / path.name).read_bytes() == path.read_bytes()
