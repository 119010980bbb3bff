"""Configs: what they refuse, in one line that names the field, and what they keep."""

import pytest
import torch
from huggingface_hub.errors import StrictDataclassFieldValidationError

import hf_mim

MAE, LATENT, STOP = hf_mim.MAEConfig, hf_mim.LatentMIMConfig, hf_mim.StopJepaConfig


@pytest.mark.parametrize(
    ("config", "fields", "message"),
    [
        (
            MAE,
            dict(image_size=225),
            "image_size must be divisible by patch_size, got image_size=225.*224 would be right",
        ),
        (MAE, dict(image_size=(224, 100)), r"image_size=\(224, 100\) with patch_size=16; 96 would be right for 100"),
        (MAE, dict(image_size=0), "image_size must be a positive int"),
        (MAE, dict(hidden_size=100, num_attention_heads=3), "hidden_size must be divisible by num_attention_heads"),
        (MAE, dict(hidden_size=30, num_attention_heads=3), "hidden_size must be divisible .* and by 4"),
        (MAE, dict(decoder_hidden_size=50), "decoder_hidden_size must be divisible by decoder_num_attention_heads"),
        (STOP, dict(predictor_hidden_size=50), "predictor_hidden_size must be divisible by predictor_num"),
        (MAE, dict(mask_ratio=1.0), "mask_ratio must leave between 1 and 195 .* got 1.0, which leaves 0"),
        (MAE, dict(mask_ratio=0), "mask_ratio must leave .* got 0, which leaves 196"),
        (MAE, dict(mask_ratio=1.5), "mask_ratio must leave"),
        (LATENT, dict(mask_ratio=0.999), "mask_ratio must leave"),
        (LATENT, dict(patch_gap=-1), "patch_gap must be 0 or more"),
        (LATENT, dict(temperature=0), "temperature must be above 0"),
        (LATENT, dict(momentum_start=1.5), r"momentum_start must be in \[0, 1\]"),
        (STOP, dict(momentum_end=-1), r"momentum_end must be in \[0, 1\]"),
        (STOP, dict(image_size=(48, 640)), "target.*grid"),
        (STOP, dict(target_scale=(0.5, 0.2)), "target_scale"),
        (STOP, dict(position_noise_std=-0.1), "position_noise_std must be 0 or more"),
        (STOP, dict(use_cls_token=True), "use_cls_token must be False"),
        (STOP, dict(num_candidates=0), "num_candidates must be at least 1"),
        (STOP, dict(num_targets=0), "num_targets must be at least 1"),
        (MAE, dict(drop_path_rate=1.0), r"drop_path_rate must be in \[0, 1\)"),
        (MAE, dict(layer_norm_eps=-1), "layer_norm_eps must be above 0 and finite, got -1"),
        (STOP, dict(layer_norm_eps=0), "layer_norm_eps must be above 0"),
        (LATENT, dict(layer_norm_eps=float("nan")), "layer_norm_eps must be above 0"),
        (MAE, dict(layer_norm_eps=float("inf")), "layer_norm_eps must be above 0"),
        (MAE, dict(hidden_act="gleu"), "hidden_act must be one of"),
        (MAE, dict(use_cls_token=False, pooling="cls"), "pooling='cls' needs use_cls_token"),
        (MAE, dict(num_channels=0), "num_channels must be at least 1"),
        (MAE, dict(mask_ratio=float("nan")), "mask_ratio must leave"),
        (MAE, dict(patch_size=1, image_size=4, num_channels=1), "norm_pix_loss must be False"),
        (LATENT, dict(image_size=32, mask_ratio=0.25), "mask_ratio must leave between 1 and 2 of the 4"),
        (STOP, dict(position_noise_std=float("nan")), "position_noise_std must be 0 or more"),
        (STOP, dict(target_scale=[0.15]), r"target_scale must be \(low, high\)"),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_wrong_settings_are_refused_by_name(config, fields, message):
    with pytest.raises(ValueError, match=message) as raised:
        config(**fields)
    assert type(raised.value) is ValueError and "\n" not in str(raised.value)


@pytest.mark.parametrize("fields", [dict(size="enormous"), dict(mask_ratio="half"), dict(image_size="big")])
def test_values_of_the_wrong_type_are_refused_by_name(fields):
    with pytest.raises(StrictDataclassFieldValidationError, match=next(iter(fields))):
        MAE(**fields)


def test_whole_numbers_are_numbers():
    config = STOP(context_scale=[0.85, 1], target_aspect_ratio=(1, 2), position_noise_std=0)
    assert config.context_scale == [0.85, 1]
    assert MAE(norm_pix_loss=False, patch_size=1, image_size=4, num_channels=1, mask_ratio=0.5).grid_size == (4, 4)


@pytest.mark.parametrize(("hidden_size", "heads"), [(132, 3), (1280, 20), (192, 3), (20, 5)])
def test_the_predictor_fits_every_encoder_by_default(hidden_size, heads):
    config = STOP(hidden_size=hidden_size, num_attention_heads=heads)
    assert config.predictor_hidden_size % heads == config.predictor_hidden_size % 4 == 0


def test_a_grid_on_which_the_mask_ratio_keeps_nothing_is_refused_in_the_forward_too():
    model = hf_mim.MAEForPreTraining(MAE(image_size=32, patch_size=8, hidden_size=48, num_attention_heads=3))
    with pytest.raises(ValueError, match="mask_ratio must leave between 1 and 1 of the 2 patches"):
        model(torch.randn(1, 3, 8, 16))


@pytest.mark.parametrize("config", [MAE, LATENT, STOP])
def test_configs_survive_a_save(config, tmp_path):
    first = config(size="small", image_size=(96, 128), patch_size=[16, 16], num_channels=5, num_hidden_layers=3)
    first.save_pretrained(tmp_path)
    loaded = config.from_pretrained(tmp_path)
    before, after = first.to_dict(), loaded.to_dict()
    for name in before.keys() - {"transformers_version"}:
        same = list(before[name]) == after[name] if isinstance(before[name], tuple) else before[name] == after[name]
        assert same, name
    assert loaded.grid_size == (6, 8) and loaded.hidden_size == 384 and loaded.intermediate_size == 1536


def test_a_width_set_apart_brings_an_mlp_four_times_as_wide():
    config = MAE(size="base", hidden_size=192, num_attention_heads=3)
    assert (config.hidden_size, config.intermediate_size, config.num_hidden_layers) == (192, 768, 12)


@pytest.mark.parametrize(("config", "model"), [(MAE, "MAE"), (LATENT, "LatentMIM"), (STOP, "StopJepa")])
def test_one_kind_of_ids_without_the_other_is_refused(config, model):
    sizes = dict(image_size=32, patch_size=4, hidden_size=48, num_hidden_layers=1, num_attention_heads=3)
    config = config(**sizes)
    model = getattr(hf_mim, f"{model}ForPreTraining")(config)
    with pytest.raises(ValueError, match="context_ids without target_ids"):
        model(torch.randn(1, 3, *config.training_size), context_ids=torch.zeros(1, 2, dtype=torch.long))
