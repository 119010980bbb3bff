"""Python that lies beside weights runs only after `--trust_remote_code true`, and no export names it."""

import io
import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import make_model
from transformers import ViTConfig, ViTModel, dynamic_module_utils

from hf_mim.cli import main
from hf_mim.evaluation.classifier import load_classifier
from hf_mim.evaluation.encoder import FeatureSpec, FrozenEncoder
from hf_mim.hub.export import export

CODE = """
from pathlib import Path
from transformers import ViTConfig, ViTModel
Path({ran!r}).touch()

class StrangeConfig(ViTConfig):
    model_type = "strange"

class StrangeModel(ViTModel):
    config_class = StrangeConfig
"""
SIZES = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, image_size=32)


@pytest.fixture
def strange(tmp_path, monkeypatch):
    """(The folder of a ViT whose config names `strange.py`, the file that this code makes when it runs)."""
    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr("sys.stdin", io.StringIO("y\n" * 100))
    folder, ran = tmp_path / "strange", tmp_path / "ran"
    torch.manual_seed(0)
    model = ViTModel(ViTConfig(**SIZES, patch_size=8))
    model.config.save_pretrained(folder)
    save_file(model.state_dict(), folder / "model.safetensors", {"format": "pt"})  # the names of its own modules
    config = json.loads((folder / "config.json").read_text())
    code = {"AutoConfig": "strange.StrangeConfig", "AutoModel": "strange.StrangeModel"}
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "strange", "auto_map": code}))
    (folder / "strange.py").write_text(CODE.format(ran=str(ran)))
    return folder, ran


@pytest.mark.parametrize(
    "words",
    [
        "card {}",
        "evaluate health {} --dataset digits --cache none",
        "evaluate finetune {} --dataset digits",
        "export {} {}_out --to timm",
    ],
)
def test_no_command_runs_it_or_asks_on_stdin(strange, words, capsys):
    folder, ran = strange
    assert main([word.format(folder) for word in words.split()]) == 2
    error = capsys.readouterr().err
    assert "--trust_remote_code true" in error and error.count("\n") == 1
    assert not ran.exists()


def test_no_classifier_is_made_of_it(strange):
    folder, ran = strange
    for untrained in (False, True):
        with pytest.raises(ValueError, match="--trust_remote_code true"):
            load_classifier(folder, ["a", "b"], untrained=untrained)
    assert not ran.exists()


def test_evaluate_runs_it_when_it_is_trusted(strange, capsys, tmp_path):
    folder, ran = strange
    images = torch.randn(2, 3, 32, 32)
    (features,) = FrozenEncoder.load(folder, trust_remote_code=True).extract(images, [FeatureSpec()])
    assert ran.exists()
    vit = ViTModel(ViTConfig(**SIZES, patch_size=8)).eval()
    vit.load_state_dict(load_file(folder / "model.safetensors"))
    torch.testing.assert_close(features, vit(images).last_hidden_state[:, 1:].mean(1))
    words = f"evaluate health {folder} --dataset digits --num_images 20 --cache none --output {tmp_path}/out.json"
    assert main([*words.split(), "--trust_remote_code", "true"]) == 0


@pytest.mark.parametrize("to", ["remote-code", "transformers", "timm"])
def test_an_export_names_no_code_but_its_own(tmp_path, to):
    folder, out = tmp_path / "ours", tmp_path / "out"
    make_model("mae").save_pretrained(folder)
    foreign = {"custom_pipelines": {"image-feature-extraction": {"impl": "foreign/repo--evil.Pipe"}}}
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | foreign))
    processor = {"image_processor_type": "ViTImageProcessor", "auto_map": {"AutoImageProcessor": "foreign/repo--e.P"}}
    (folder / "preprocessor_config.json").write_text(json.dumps(processor | {"image_mean": [0.5] * 3}))
    export(folder, out, to)
    assert not [path.name for path in out.glob("*.json") if "foreign/repo" in path.read_text()]
    if to != "timm":
        assert json.loads((out / "preprocessor_config.json").read_text())["image_mean"] == [0.5] * 3


def test_a_classifier_made_of_a_checkpoint_names_no_foreign_code(tmp_path):
    make_model("mae").save_pretrained(tmp_path / "ours")
    config = json.loads((tmp_path / "ours" / "config.json").read_text())
    config["auto_map"] = {"AutoConfig": "foreign/repo--evil.C"}
    (tmp_path / "ours" / "config.json").write_text(json.dumps(config))
    load_classifier(tmp_path / "ours", ["a", "b"]).save_pretrained(tmp_path / "classifier")
    assert "foreign/repo" not in (tmp_path / "classifier" / "config.json").read_text()
