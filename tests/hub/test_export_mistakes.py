"""What cannot be exported is one line, and nothing is half-written."""

import importlib.util
import json

import pytest
from exported import mae, stop_jepa
from safetensors.torch import load_file, save_file
from transformers import ViTConfig, ViTModel

from hf_mim.cli import main


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
        ("absent", "checkpoint: there is no folder "),
    ],
)
def test_a_checkpoint_that_is_not_ours_or_not_whole_is_one_line(others, tmp_path, capsys, folder, message):
    assert message in fails(capsys, others / folder, tmp_path / "dest", "--to", "timm")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--to", "tensorflow"], "to must be one of transformers, timm, remote-code, onnx, space, not 'tensorflow'"),
        ([], "export needs --to transformers, timm, remote-code, onnx or space"),
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
