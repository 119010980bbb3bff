"""The key tables against transformers' own modules and files."""

import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    IJepaConfig,
    IJepaModel,
    ViTConfig,
    ViTMAEConfig,
    ViTMAEForPreTraining,
    ViTMAEModel,
    ViTModel,
)

import hf_mim
from hf_mim.hub import key_tables

SIZES = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64)
IMAGES = dict(image_size=32, patch_size=8, layer_norm_eps=1e-6)
DECODER = dict(decoder_hidden_size=16, decoder_num_hidden_layers=2, decoder_num_attention_heads=2)
TRANSFORMERS = {
    "VIT_MAE": (ViTMAEForPreTraining, ViTMAEConfig, DECODER | dict(decoder_intermediate_size=64)),
    "VIT_MAE_ENCODER": (ViTMAEModel, ViTMAEConfig, dict(mask_ratio=0.0)),
    "VIT_HF": (lambda config: ViTModel(config, add_pooling_layer=False), ViTConfig, {}),
    "IJEPA_HF": (IJepaModel, IJepaConfig, {}),
}


def theirs(name):
    """A transformers model whose every tensor is random, biases and norms too."""
    make, config_class, more = TRANSFORMERS[name]
    model = make(config_class(**SIZES, **IMAGES, **more)).eval()
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.data = 0.3 * torch.randn(parameter.shape, generator=generator)
    return model


def ours(name, state):
    """Our model with every one of those tensors."""
    config = hf_mim.MAEConfig(**SIZES, **IMAGES, **DECODER, use_cls_token=name != "IJEPA_HF")
    model = (hf_mim.MAEForPreTraining if name == "VIT_MAE" else hf_mim.MAEModel)(config).eval()
    model.load_state_dict(key_tables.to_ours(state, getattr(key_tables, name)), strict=True)
    return model


@pytest.mark.parametrize("name", ["VIT_MAE_ENCODER", "VIT_HF", "IJEPA_HF"])
def test_transformers_encoders_become_ours_with_the_same_features(name):
    model, images = theirs(name), torch.randn(2, 3, 32, 32)
    in_order = {"noise": torch.arange(16.0).expand(2, -1)} if name == "VIT_MAE_ENCODER" else {}
    with torch.no_grad():
        expected = model(images, **in_order).last_hidden_state
        features = ours(name, model.state_dict())(images).last_hidden_state
    torch.testing.assert_close(features, expected, atol=1e-5, rtol=0)


def test_transformers_vit_mae_becomes_ours_with_the_same_reconstruction():
    model, images, noise = theirs("VIT_MAE"), torch.randn(2, 3, 32, 32), torch.rand(2, 16)
    with torch.no_grad():
        expected, output = model(images, noise=noise), ours("VIT_MAE", model.state_dict())(images, noise=noise)
    masked = expected.logits.gather(1, output.target_ids[..., None].expand(-1, -1, 192))
    torch.testing.assert_close(output.predictions, masked, atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_transformers_tables_read_backwards_give_every_tensor_back(name):
    state, table = theirs(name).state_dict(), getattr(key_tables, name)
    back = key_tables.to_theirs(key_tables.to_ours(state, table), table, (8, 8))
    assert back.keys() == state.keys()
    assert all(torch.equal(back[key], state[key]) for key in state)


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_names_in_transformers_files_become_those_of_its_modules(name, tmp_path):
    model = theirs(name)
    model.save_pretrained(tmp_path)
    state = key_tables.module_names(load_file(tmp_path / "model.safetensors"))
    assert state.keys() == model.state_dict().keys()
    assert key_tables.module_names(state).keys() == state.keys()
    assert all(torch.equal(state[key], tensor) for key, tensor in model.state_dict().items())


def test_names_of_transformers_4_files_become_those_of_its_modules():
    """The names that facebook/vit-mae-base has on the Hub, layer by layer; the decoder's differ from those of 5.x."""
    in_layer = {
        "attention.attention.query.weight": "attention.q_proj.weight",
        "attention.attention.key.bias": "attention.k_proj.bias",
        "attention.attention.value.weight": "attention.v_proj.weight",
        "attention.output.dense.weight": "attention.o_proj.weight",
        "intermediate.dense.bias": "mlp.fc1.bias",
        "output.dense.weight": "mlp.fc2.weight",
        "layernorm_before.weight": "layernorm_before.weight",
    }
    layers = {"vit.encoder.layer.3.": "vit.layers.3.", "decoder.decoder_layers.7.": "decoder.decoder_layers.7."}
    for layer, now in layers.items():
        for name, named_now in in_layer.items():
            assert list(key_tables.module_names({layer + name: torch.zeros(1)})) == [now + named_now]


@pytest.mark.parametrize("part", "qkv")
def test_a_missing_query_key_or_value_is_an_error_that_says_which_are_there(part):
    state = theirs("VIT_HF").state_dict()
    del state[f"layers.1.attention.{part}_proj.weight"]
    there = " and ".join(sorted({"q", "k", "v"} - {part}))
    with pytest.raises(ValueError, match=f"layers.1.attention.qkv.weight needs .* only {there}$"):
        key_tables.to_ours(state, key_tables.VIT_HF)


def test_a_table_within_prefixes_is_the_same_table():
    state = theirs("VIT_HF").state_dict()
    table = key_tables.within(key_tables.VIT_HF, "target_encoder.", "vit.")
    moved = key_tables.to_ours({f"vit.{key}": tensor for key, tensor in state.items()}, table)
    for key, tensor in key_tables.to_ours(state, key_tables.VIT_HF).items():
        assert torch.equal(moved[f"target_encoder.{key}"], tensor)
