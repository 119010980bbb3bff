"""A checkpoint is loaded whole, or refused in one line."""

import json

import pytest
from huggingface_hub.errors import LocalEntryNotFoundError
from other_encoders import TINY, build
from transformers import (
    BertConfig,
    BertModel,
    ResNetConfig,
    ResNetModel,
    ViTConfig,
    ViTForImageClassification,
    ViTModel,
)

from hf_mim.evaluation.classifier import load_classifier
from hf_mim.evaluation.encoder import FrozenEncoder
from hf_mim.evaluation.trained_classifier import TrainedClassifier
from hf_mim.hub.export import load_ours
from hf_mim.hub.reading import read_checkpoint
from hf_mim.hub.start import Source
from hf_mim.models.configuration_mae import MAEConfig
from hf_mim.models.configuration_stop_jepa import StopJepaConfig
from hf_mim.models.modeling_mae import MAEForPreTraining
from hf_mim.models.modeling_stop_jepa import StopJepaForPreTraining


def test_a_damaged_image_processor_and_damaged_weights_are_errors(tmp_path):
    build("vit")[0].save_pretrained(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text("{")
    with pytest.raises(ValueError, match="the image processor of .* cannot be read"):
        FrozenEncoder.load(tmp_path)
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(ValueError, match="holds no encoder that can be loaded"):
        FrozenEncoder.load(tmp_path)


@pytest.mark.parametrize("content", [b"", b"no weights", b"{}"])
def test_pickled_weights_that_are_damaged_are_one_line(content, tmp_path):
    ViTConfig(**TINY).save_pretrained(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(content)
    for checkpoint in (tmp_path, tmp_path / "config.json"):
        for load in (FrozenEncoder.load, lambda folder: load_classifier(folder, ["a", "b"])):
            with pytest.raises(ValueError, match="holds no encoder that can be") as error:
                load(checkpoint)
            assert "\n" not in str(error.value)


@pytest.mark.parametrize("model_class", [ViTForImageClassification, ViTModel])
def test_a_config_of_fewer_blocks_than_the_weights_is_an_error(model_class, tmp_path):
    model_class(ViTConfig(**TINY)).save_pretrained(tmp_path)
    ViTConfig(**TINY | {"num_hidden_layers": 2}).save_pretrained(tmp_path)
    for load in (FrozenEncoder.load, lambda folder: load_classifier(folder, ["a", "b"])):
        with pytest.raises(ValueError, match=r"has more blocks than its config, such as .*layers?\.2\."):
            load(tmp_path)


def test_of_our_pretraining_models_too_blocks_beyond_the_config_are_an_error(tmp_path):
    for config_class, model_class in ((MAEConfig, MAEForPreTraining), (StopJepaConfig, StopJepaForPreTraining)):
        sizes = dict(image_size=32, patch_size=8, hidden_size=32, num_attention_heads=2)
        folder = tmp_path / model_class.__name__
        model_class(config_class(**sizes, num_hidden_layers=3)).save_pretrained(folder)
        FrozenEncoder.load(folder)
        config_class(**sizes, num_hidden_layers=2).save_pretrained(folder)
        with pytest.raises(ValueError, match="has more blocks than its config, such as"):
            FrozenEncoder.load(folder)


def test_a_config_of_other_sizes_or_types_than_the_weights_is_one_line(tmp_path, capfd):
    MAEForPreTraining(MAEConfig(**TINY)).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    for change, message in (
        (
            {"num_channels": 10},
            "has other shapes than its config for 1 weights of its encoder, such as embed",
        ),
        ({"hidden_size": "wide"}, "holds no encoder that can be loaded: .*hidden_size"),
        ({"num_hidden_layers": 7}, "lacks 24 weights of its encoder, such as layers.5"),
    ):
        (tmp_path / "config.json").write_text(json.dumps(config | change))
        with pytest.raises(ValueError, match=message) as error:
            FrozenEncoder.load(tmp_path, mean=[0.5] * 10, std=[0.5] * 10)
        assert "\n" not in str(error.value)
    assert "REPORT" not in capfd.readouterr().err


def test_a_classifier_without_pooler_loads_and_missing_weights_are_an_error(tmp_path):
    model = ViTForImageClassification(ViTConfig(**TINY))
    model.save_pretrained(tmp_path / "vit")
    assert FrozenEncoder.load(tmp_path / "vit").mean == [0.485, 0.456, 0.406]  # no image processor: ImageNet's
    state = {k: v for k, v in model.state_dict().items() if "layers.3." not in k and "layer.3." not in k}
    model.save_pretrained(tmp_path / "half", state_dict=state)
    with pytest.raises(ValueError, match=r"half lacks 16 weights of its encoder, such as .*3.*partly random"):
        FrozenEncoder.load(tmp_path / "half")


def test_another_model_is_refused_in_one_line(tmp_path):
    BertModel(BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1)).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="holds BertModel, which is no vision encoder") as error:
        FrozenEncoder.load(tmp_path)
    assert "\n" not in str(error.value)


def test_a_network_whose_config_has_no_size_gets_that_of_its_processor_or_224(tmp_path):
    ResNetModel(ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1])).save_pretrained(tmp_path)
    encoder = FrozenEncoder.load(tmp_path)
    assert (encoder.image_size, encoder.grid, encoder.patch_size, encoder.width) == ((224, 224), (28, 28), (8, 8), 16)
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({"size": {"shortest_edge": 64}}))
    assert FrozenEncoder.load(tmp_path).image_size == (64, 64)


def test_a_folder_without_checkpoint_is_refused(tmp_path):
    with pytest.raises(ValueError, match="holds no encoder that can be loaded"):
        FrozenEncoder.load(tmp_path)


LOADERS = {
    "evaluate, embed, search, show and demo": (FrozenEncoder.load, "checkpoint: there is no folder "),
    "evaluate finetune": (lambda name: load_classifier(name, ["a", "b"]), "checkpoint: there is no folder "),
    "predict": (TrainedClassifier.load, "CLASSIFIER: there is no folder "),
    "export": (load_ours, "checkpoint: there is no folder "),
    "convert": (read_checkpoint, "there is no file or folder "),
    "pretrain --init_from": (Source.read, "init_from: there is no file or folder "),
}


@pytest.mark.parametrize("command", LOADERS)
def test_a_checkpoint_that_is_not_there_is_one_plain_line_and_the_hub_is_not_asked_again_and_again(
    command, monkeypatch, caplog
):
    load, told = LOADERS[command]
    asked = []

    def unreachable(name, **_):
        asked.append(name)
        raise LocalEntryNotFoundError("An error happened while trying to locate the files on the Hub.\nCheck it.")

    monkeypatch.setattr("hf_mim.evaluation.checkpoint.snapshot_download", unreachable)
    for name, more in (("runs/nope", ", and the Hub cannot be reached"), ("./runs/mine/nope", "")):
        with pytest.raises(ValueError) as error:
            load(name)
        assert str(error.value) == f"{told}{name}{more}"
    assert 0 < len(asked) <= 2 and set(asked) == {"runs/nope"} and not caplog.records
