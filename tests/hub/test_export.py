"""Exported checkpoints give our features in a process that cannot import hf_mim, and come back bit for bit."""

import importlib.util
import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from minihub import MiniHub
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny import head_layers, make_model
from transformers import AutoImageProcessor, AutoModel, AutoModelForPreTraining, ViTConfig, ViTModel

import hf_mim
from hf_mim.cli import main
from hf_mim.data.processor import image_processor, theirs
from hf_mim.hub import export as export_module
from hf_mim.hub import key_tables
from hf_mim.hub.export import export
from hf_mim.models.pixels import ValueRange

SIZES = dict(image_size=32, patch_size=8, hidden_size=48, num_attention_heads=3)
OBLONG = dict(image_size=(24, 40), num_channels=4, intermediate_size=100, hidden_act="gelu_pytorch_tanh")


def make(method, kind="pretraining", **options):
    return make_model(method, kind, **SIZES | head_layers(method, 2) | options)


mae, latent_mim, stop_jepa = (partial(make, method) for method in ("mae", "latent_mim", "stop_jepa"))


# name: (the model, what transformers has for it)
CASES = {
    "mae": (lambda: mae(), "ViTMAEForPreTraining"),
    "mae-oblong": (lambda: mae(**OBLONG), "ViTModel"),
    "mae-oblong-patches": (lambda: mae(patch_size=(8, 4), pooling="cls"), "ViTModel"),
    "mae-without-cls": (lambda: mae(use_cls_token=False), "IJepaModel"),
    "mae-encoder": (lambda: mae("encoder"), "ViTModel"),
    "latent_mim": (lambda: latent_mim(), "ViTModel"),
    "latent_mim-oblong": (lambda: latent_mim(**OBLONG), "ViTModel"),
    "stop_jepa": (lambda: stop_jepa(), "IJepaModel"),
    "stop_jepa-oblong": (lambda: stop_jepa(**OBLONG, position_embedding="learned"), "IJepaModel"),
    "cls-classifier": (
        lambda: mae("classifier", pooling="cls", num_labels=5),
        "ViTForImageClassification",
    ),
    "linear-probe": (
        lambda: mae("classifier", pooling="cls", head_batch_norm=True, num_labels=5),
        "ViTForImageClassification",
    ),
    "mean-classifier": (lambda: stop_jepa("classifier", num_labels=5), "IJepaForImageClassification"),
    "fine-tuned": (lambda: latent_mim("classifier", pool_before_norm=True, num_labels=5), None),
}
# Forms that take long to load, or to write, have one case or two of each method.
ONLY = {
    "onnx": ("linear-probe", "latent_mim-oblong", "stop_jepa"),
    "remote-code": ("mae", "mae-oblong", "latent_mim", "stop_jepa-oblong", "fine-tuned"),
}
INSTALLED = {
    "onnx": all(importlib.util.find_spec(name) for name in ("onnx", "onnxscript", "onnxruntime")),
    "real timm": all(importlib.util.find_spec(name) for name in ("timm", "torchvision")),
}


def filled(model, seed=0):
    """Every tensor random, so that none can be left out or taken for another unnoticed."""
    generator = torch.Generator().manual_seed(seed)
    for tensor in [*model.parameters(), *model.buffers()]:
        if tensor.is_floating_point() and tensor.ndim:
            tensor.data = tensor + 0.1 * torch.rand(tensor.shape, generator=generator)
    return model.eval()


def forms(name):
    all_forms = ("transformers", "timm", "real timm", "remote-code", "onnx")
    possible = [form for form in all_forms if form != "transformers" or CASES[name][1]]
    return [form for form in possible if name in ONLY.get(form, CASES)]


@pytest.fixture(scope="module")
def models():
    return {name: filled(make()) for name, (make, _) in CASES.items()}


@pytest.fixture(scope="module")
def root(models, once):
    """Every case as a checkpoint `NAME/ours`, and its exports `NAME/FORM`."""
    return once("exports", lambda root: write_exports(models, root))


def write_exports(models, root):
    for name, model in models.items():
        model.save_pretrained(root / name / "ours")
        channels = model.config.num_channels
        processor = image_processor(model.config.image_height_width, [0.4] * channels, [0.3] * channels)
        processor.save_pretrained(root / name / "ours")
        for form in forms(name):
            if INSTALLED.get(form, True) and form != "real timm":
                export(root / name / "ours", root / name / form, form)


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
    same(key_tables.to_ours(state, table), model.base_model.state_dict())


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


@pytest.mark.parametrize(("crop_fraction", "most"), [(1.0, 4), (0.8, 4), (None, 1)])
def test_the_processor_of_transformers_gives_the_pixels_of_ours(crop_fraction, most):
    """Theirs resizes and rounds before it crops, so a few grey levels apart; where its crop falls on whole pixels."""
    ours = image_processor((32, 32), [0.0] * 3, [1.0] * 3, crop_fraction=crop_fraction)
    noise = torch.rand(1, 3, 9, 13, generator=torch.Generator().manual_seed(0))
    smooth = F.interpolate(noise * 255, (80, 120), mode="bicubic").clamp(0, 255)[0].permute(1, 2, 0)
    image = Image.fromarray(smooth.to(torch.uint8).numpy())
    found, expected = (p(image, return_tensors="pt")["pixel_values"] * 255 for p in (theirs(ours), ours))
    assert (found - expected).abs().mean() < 1 and (found - expected).abs().max() <= most


def test_a_processor_of_transformers_is_refused_for_images_of_another_depth(tmp_path):
    mae().save_pretrained(tmp_path / "ours")
    value_range = ValueRange((0.0,), (4095.0,), "uint16")
    image_processor((32, 32), [0.4] * 3, [0.3] * 3, value_range).save_pretrained(tmp_path / "ours")
    for form in ("transformers", "timm"):
        with pytest.raises(ValueError, match=r"to must be remote-code: .* 8-bit images.* \[0, 4095\]"):
            export(tmp_path / "ours", tmp_path / form, form)
        assert not (tmp_path / form).exists()


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


def fails(capsys, *words) -> str:
    """The one line that a mistaken command gives."""
    assert main(["export", *map(str, words)]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error: ") and err.count("\n") == 1
    return err


@pytest.fixture
def others(tmp_path_factory, root):
    """Folders that cannot be exported."""
    folder = tmp_path_factory.mktemp("others")
    ViTModel(ViTConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, image_size=32)).save_pretrained(
        folder / "vit"
    )
    ours = root / "mae" / "ours"
    for name in ("lacking", "truncated", "mistyped", "deeper", "shallower", "many-channels"):
        (folder / name).mkdir()
        for path in ours.iterdir():
            (folder / name / path.name).write_bytes(path.read_bytes())
    state = load_file(ours / "model.safetensors")
    del state["encoder.norm.weight"]
    save_file(state, folder / "lacking" / "model.safetensors", {"format": "pt"})
    weights = (ours / "model.safetensors").read_bytes()
    (folder / "truncated" / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    config = json.loads((ours / "config.json").read_text())
    config = {key: value for key, value in config.items() if "out_" not in key}  # of the backbone, by depth
    for name, change in (
        ("mistyped", {"hidden_size": "wide"}),
        ("deeper", {"num_hidden_layers": 3}),
        ("shallower", {"num_hidden_layers": 1}),
        ("many-channels", {"num_channels": 10}),
    ):
        (folder / name / "config.json").write_text(json.dumps(config | change))
    return folder


@pytest.mark.parametrize(
    ("folder", "message"),
    [
        ("vit", "must be of a model of hf_mim, and it is of ViTModel (vit)"),
        ("lacking", "lacks 1 weights of its model, such as encoder.norm.weight"),
        ("truncated", "truncated cannot be read"),
        ("mistyped", "hidden_size"),
        ("deeper", "lacks 12 weights of its model, such as encoder.layers.2."),
        ("shallower", "has no place in its config for 12 weights of its model, such as encoder.layers.1."),
        ("many-channels", "has other shapes than its config for 3 weights of its model, such as decoder.head.bias"),
        ("absent", "absent cannot be read"),
    ],
)
def test_a_checkpoint_that_is_not_ours_or_not_whole_is_one_line(others, tmp_path, capsys, folder, message):
    assert message in fails(capsys, others / folder, tmp_path / "dest", "--to", "timm")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--to", "tensorflow"], "to must be one of transformers, timm, remote-code, onnx, not 'tensorflow'"),
        ([], "export needs --to transformers, timm, remote-code or onnx"),
        (["--to"], "to needs a value"),
        (["--to", "timm", "--size", "3"], "export has no option size; there is to and encoder"),
        (["--to", "timm", "--encoder", "both"], "encoder must be one of online, target, not 'both'"),
        (["--to", "timm", "--encoder", "target"], "MAEForPreTraining has only one"),
        (["--to", "timm", "more"], "export needs CHECKPOINT and DEST, not"),
    ],
)
def test_a_mistaken_command_is_one_line(root, tmp_path, capsys, words, message):
    assert message in fails(capsys, root / "mae" / "ours", tmp_path / "dest", *words)
    assert not list(tmp_path.iterdir())


def test_a_destination_that_holds_something_is_left_alone(root, tmp_path, capsys):
    (tmp_path / "dest").mkdir()
    (tmp_path / "dest" / "thesis.tex").write_text("years of work")
    assert "dest holds something already" in fails(capsys, root / "mae" / "ours", tmp_path / "dest", "--to", "timm")
    assert [path.name for path in (tmp_path / "dest").iterdir()] == ["thesis.tex"]


@pytest.mark.parametrize(
    ("to", "model", "message"),
    [
        ("transformers", lambda: mae("classifier", pooling="mean"), "reads the CLS token, and this"),
        ("transformers", lambda: stop_jepa("classifier", pool_before_norm=True), "pools normalised tokens"),
        ("timm", lambda: mae(layer_norm_eps=1e-5), "timm's ViT has layer_norm_eps 1e-06, and this checkpoint 1e-05"),
        ("timm", lambda: mae(hidden_act="xielu"), "timm's ViT has no hidden_act xielu"),
    ],
)
def test_what_a_form_cannot_hold_is_one_line_that_says_why(tmp_path, capsys, to, model, message):
    model().save_pretrained(tmp_path / "ours")
    assert message in fails(capsys, tmp_path / "ours", tmp_path / "dest", "--to", to)
    assert [path.name for path in tmp_path.iterdir()] == ["ours"]


def test_onnx_without_its_packages_is_one_line_that_names_the_extra(root, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert "onnx and onnxscript: pip install hf-mim[onnx]" in fails(
        capsys, root / "mae" / "ours", tmp_path / "dest", "--to", "onnx"
    )
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
