"""What `export` writes comes back by `convert` as it was: in → out → in, for every form that others read."""

import json
import os

import pytest
import torch
from huggingface_hub import constants
from minihub import MiniHub
from transformers import IJepaConfig, IJepaModel, ViTConfig, ViTModel

import hf_mim
from hf_mim.data.processor import image_processor
from hf_mim.hub.convert import Conversion, convert
from hf_mim.hub.export import export

SIZES = dict(image_size=32, patch_size=8, hidden_size=48, num_hidden_layers=2, num_attention_heads=6)
PIXELS = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
NAMES = {0: "cat", 1: "dog", 2: "eel"}
LABELS = dict(id2label=NAMES, label2id={name: i for i, name in NAMES.items()})


def mae(model_class, **settings):
    return model_class(hf_mim.MAEConfig(**SIZES, decoder_num_hidden_layers=1, decoder_hidden_size=32, **settings))


def latent_mim(model_class, **settings):
    return model_class(hf_mim.LatentMIMConfig(**SIZES, **settings))


def stop(model_class, **settings):
    return model_class(hf_mim.StopJepaConfig(**SIZES | settings, use_mask_token=False))


CASES = {
    "mae, whole": ("mae", lambda: mae(hf_mim.MAEForPreTraining, norm_pix_loss=False), "transformers"),
    "mae, encoder": ("mae", lambda: mae(hf_mim.MAEModel), "transformers timm"),
    "mae, pools first": ("mae", lambda: mae(hf_mim.MAEModel, pool_before_norm=True), "timm"),
    "mae, no CLS": ("mae", lambda: mae(hf_mim.MAEModel, use_cls_token=False), "transformers timm"),
    "mae, no CLS, classifier": (
        "mae",
        lambda: mae(hf_mim.MAEForImageClassification, use_cls_token=False, **LABELS),
        "transformers timm",
    ),
    "latent_mim, no CLS": (
        "latent_mim",
        lambda: latent_mim(hf_mim.LatentMIMModel, use_cls_token=False),
        "transformers timm",
    ),
    "mae, another activation": ("mae", lambda: mae(hf_mim.MAEModel, hidden_act="silu"), "transformers timm"),
    "mae, registers": ("mae", lambda: mae(hf_mim.MAEModel, num_register_tokens=3), "timm"),
    "stop, registers, not square": (
        "stop",
        lambda: stop(hf_mim.StopJepaModel, num_register_tokens=2, image_size=(16, 40)),
        "timm",
    ),
    "mae, not square": ("mae", lambda: wide(), "timm"),
    "mae, classifier": (
        "mae",
        lambda: mae(hf_mim.MAEForImageClassification, pooling="cls", **LABELS),
        "transformers timm",
    ),
    "mae, fine-tuned": ("mae", lambda: mae(hf_mim.MAEForImageClassification, pool_before_norm=True, **LABELS), "timm"),
    "latent_mim, encoder": ("latent_mim", lambda: latent_mim(hf_mim.LatentMIMModel), "transformers timm"),
    "latent_mim, classifier": (
        "latent_mim",
        lambda: latent_mim(hf_mim.LatentMIMForImageClassification, **LABELS),
        "timm",
    ),
    "stop, encoder": ("stop", lambda: stop(hf_mim.StopJepaModel), "transformers timm"),
    "stop, classifier": ("stop", lambda: stop(hf_mim.StopJepaForImageClassification, **LABELS), "transformers timm"),
}


def wide():
    """Learned positions of 2×4 patches, which no table tells apart from 1×8."""
    model = hf_mim.MAEModel(hf_mim.MAEConfig(**SIZES | {"image_size": (16, 32)}))
    torch.nn.init.normal_(model.embeddings.position_embeddings.table)
    return model


@pytest.mark.parametrize(("case", "to"), [(case, to) for case in CASES for to in CASES[case][2].split()])
def test_an_export_comes_back_bit_for_bit(tmp_path, case, to):
    method, make, _ = CASES[case]
    torch.manual_seed(0)
    first = make().eval()
    first.save_pretrained(tmp_path / "first")
    image_processor(first.config.image_height_width, [0.5] * 3, [0.25] * 3).save_pretrained(tmp_path / "first")
    export(tmp_path / "first", tmp_path / "out", to)
    conversion = Conversion.read(tmp_path / "out", method)
    second, state = conversion.model, first.state_dict()
    assert type(second) is type(first) and second.state_dict().keys() == state.keys()
    assert all(torch.equal(tensor, state[key]) for key, tensor in second.state_dict().items())
    pixels = torch.randn(2, 3, *first.config.image_height_width, generator=torch.Generator().manual_seed(0))
    if "ForPreTraining" not in type(first).__name__:
        output = "logits" if hasattr(first, "classifier") else "pooler_output"
        assert torch.equal(second(pixels)[output], first(pixels)[output])
    assert (conversion.image_mean, conversion.image_std) == ([0.5] * 3, [0.25] * 3)
    same = ("use_cls_token", "num_attention_heads", "layer_norm_eps", "image_size", "norm_pix_loss", "id2label")
    first.config.image_size = first.config.image_height_width
    second.config.image_size = second.config.image_height_width
    assert [getattr(first.config, name, None) for name in same] == [getattr(second.config, name, None) for name in same]


def test_a_pooler_that_does_something_is_left_over(tmp_path):
    config = ViTConfig(**SIZES, intermediate_size=96, pooler_act="tanh")
    ViTModel(config).save_pretrained(tmp_path / "vit")
    with pytest.raises(ValueError, match="left over: pooler.dense.bias, pooler.dense.weight"):
        convert(tmp_path / "vit")
    ViTModel(config, add_pooling_layer=False).save_pretrained(tmp_path / "bare")
    assert type(convert(tmp_path / "bare")) is hf_mim.MAEModel


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"act_layer": "swirl"}, "hidden_act must be one of"),
        ({"num_heads": "six"}, "num_attention_heads"),
        ({"num_heads": 5}, "must be divisible by num_attention_heads"),
        ({"img_size": [64, 64]}, "pos_embed"),
    ],
)
def test_a_timm_config_that_is_wrong_is_refused(tmp_path, changes, message):
    mae(hf_mim.MAEModel).save_pretrained(tmp_path / "first")
    export(tmp_path / "first", tmp_path / "timm", "timm")
    config = json.loads((tmp_path / "timm" / "config.json").read_text())
    config["model_args"] |= changes
    (tmp_path / "timm" / "config.json").write_text(json.dumps(config))
    with pytest.raises(Exception, match=message):
        convert(tmp_path / "timm")


@pytest.fixture
def hub(monkeypatch, tmp_path):
    hub = MiniHub()
    monkeypatch.setattr(constants, "ENDPOINT", hub.address)
    template = hub.address + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    yield hub
    hub.close()


def test_a_name_on_the_hub_is_fetched_without_what_is_not_needed(hub, tmp_path):
    theirs = IJepaModel(IJepaConfig(**SIZES, intermediate_size=96)).eval()
    theirs.save_pretrained(tmp_path / "theirs")
    files = {path.name: path.read_bytes() for path in (tmp_path / "theirs").iterdir()}
    files |= {"pytorch_model.bin": b"not needed", "checkpoint-5/model.safetensors": b"not needed"}
    hub.repos["tester/ijepa"] = [("a" * 40, files)]
    conversion = Conversion.read("tester/ijepa")
    features = conversion.model(PIXELS).last_hidden_state
    torch.testing.assert_close(features, theirs(PIXELS).last_hidden_state, atol=1e-5, rtol=0)
    assert conversion.record["source"] == "tester/ijepa"
    fetched = {file for _, _, names in os.walk(tmp_path / "cache") for file in names}
    assert "model.safetensors" in fetched and "pytorch_model.bin" not in fetched


def test_a_name_that_the_hub_does_not_have_is_one_line(hub):
    with pytest.raises(
        ValueError, match="no file or folder tester/nothing, and the Hub has no model of this name"
    ) as error:
        convert("tester/nothing")
    assert "\n" not in str(error.value)
