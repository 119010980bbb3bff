"""Features of any encoder against what transformers itself returns."""

import json

import pytest
import torch
from other_encoders import OTHERS, TINY, build
from tiny import make_model
from transformers import (
    BeitConfig,
    BeitModel,
    CLIPConfig,
    CLIPModel,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessor,
    ViTMAEConfig,
    ViTMAEModel,
    ViTModel,
    YolosConfig,
    YolosModel,
)

from hf_mim.data.processor import read_processor
from hf_mim.evaluation.checkpoint import checkpoint_sha256
from hf_mim.evaluation.encoder import FeatureSpec, FrozenEncoder
from hf_mim.evaluation.raw_pixels import RawPixels
from hf_mim.models.configuration_mae import MAEConfig
from hf_mim.models.configuration_stop_jepa import StopJepaConfig
from hf_mim.models.modeling_mae import MAEForPreTraining
from hf_mim.models.modeling_stop_jepa import StopJepaForPreTraining

NORMALIZATION = dict(mean=[0.5] * 3, std=[0.5] * 3)


@pytest.mark.parametrize("name", OTHERS)
def test_features_are_those_of_the_model_itself(name):
    model, prefix = build(name)
    images = torch.randn(3, 3, 32, 32)
    encoder = FrozenEncoder(model, **NORMALIZATION, name=name)
    output = model(images, output_hidden_states=True)
    norm = model.norm if name == "mae" else model.layernorm
    last4 = torch.cat([norm(tokens)[:, prefix:].mean(1) for tokens in output.hidden_states[-4:]], dim=1)
    expected = {
        "last/mean/norm": output.last_hidden_state[:, prefix:].mean(1),
        "last/tokens/norm": output.last_hidden_state[:, prefix:],
        "last/mean/raw": output.hidden_states[-1][:, prefix:].mean(1),
        "2/mean/raw": output.hidden_states[2][:, prefix:].mean(1),
        "last4/mean/norm": last4,
    }
    if prefix:
        expected["last/cls/norm"] = output.last_hidden_state[:, 0]
    assert (encoder.num_prefix_tokens, encoder.width, encoder.num_layers, encoder.grid) == (prefix, 32, 5, (4, 4))
    features = encoder.extract(images, [FeatureSpec.parse(spec) for spec in expected])
    for (spec, value), feature in zip(expected.items(), features, strict=True):
        torch.testing.assert_close(feature, value.detach(), msg=lambda text, spec=spec: f"{spec}: {text}")


@pytest.mark.parametrize("name", OTHERS)
def test_positions_are_resized_for_another_image_size(name):
    encoder = FrozenEncoder(build(name)[0], **NORMALIZATION, image_size=(48, 64))
    (tokens,) = encoder.extract(torch.randn(2, 3, 48, 64), [FeatureSpec("last", "tokens")])
    assert encoder.grid == (6, 8) and tokens.shape == (2, 48, 32)


def test_transformers_mae_is_not_masked_and_keeps_raster_order():
    torch.manual_seed(0)
    model = ViTMAEModel(ViTMAEConfig(**TINY))
    encoder = FrozenEncoder(model, **NORMALIZATION)
    spec = [FeatureSpec("last", "tokens")]
    image = torch.randn(1, 3, 32, 32)
    (tokens,) = encoder.extract(image, spec)
    assert tokens.shape == (1, 16, 32)
    model.embeddings.patch_embeddings.projection.weight.data.zero_()  # then a token knows nothing but its neighbours
    model.embeddings.position_embeddings.data[:, 1:] = torch.arange(16.0)[None, :, None]
    for layer in encoder.layers.modules:
        layer.register_forward_hook(lambda module, args, output: args[0])  # every block is the identity
    (places,) = encoder.extract(image, [FeatureSpec("last", "tokens", norm=False)])
    assert places[0, :, 0].diff().tolist() == [1.0] * 15


def test_of_a_batch_for_transformers_mae_each_image_has_its_own_features():
    torch.manual_seed(0)
    config = ViTMAEConfig(**TINY)
    model = ViTMAEModel(config)
    encoder = FrozenEncoder(model, **NORMALIZATION)
    images = torch.randn(4, 3, 32, 32)
    (together,) = encoder.extract(images, [FeatureSpec()])
    alone = torch.cat([encoder.extract(image[None], [FeatureSpec()])[0] for image in images])
    torch.testing.assert_close(together, alone)
    assert torch.cdist(together, together).fill_diagonal_(1).min() > 1e-3
    assert config.mask_ratio == model.config.mask_ratio == 0.75  # as it was, for whoever trains it on


def test_a_part_of_the_modalities_has_its_own_features_and_hash(tmp_path):
    modalities = {"rgb": 3, "ir": 1}
    model = make_model("interactive_mim", "encoder", num_channels=4, modalities=modalities).eval()
    torch.nn.init.normal_(model.embeddings.absent)
    images, found = torch.randn(2, 4, 24, 24), {}
    for seen in (None, ["rgb"], ["ir"]):
        model.config.modalities_seen = seen
        model.save_pretrained(tmp_path / str(seen))
        encoder = FrozenEncoder.load(tmp_path / str(seen), mean=[0.5] * 4, std=[0.5] * 4, device="cpu")
        (features,) = encoder.extract(images, [FeatureSpec()])
        torch.testing.assert_close(features, model(images, modalities=seen).pooler_output.detach())
        found[encoder.sha256] = encoder.describe()
        whole = FrozenEncoder.load(tmp_path / "None", mean=[0.5] * 4, std=[0.5] * 4, device="cpu")
        if seen is not None:
            whole.read_only(seen)
        assert whole.sha256 == encoder.sha256 and torch.equal(whole.extract(images, [FeatureSpec()])[0], features)
        channels = {None: [0, 1, 2, 3], "rgb": [0, 1, 2], "ir": [3]}[seen and seen[0]]
        (pixels,) = RawPixels.of(whole).extract(images, [FeatureSpec()])
        assert torch.equal(pixels, images[:, channels].flatten(1)) and RawPixels.of(whole).width == pixels.shape[1]
    with pytest.raises(ValueError, match="modalities must be one or more of rgb, ir, not depth"):
        whole.read_only(["depth"])
    plain = FrozenEncoder(make_model("mae", "encoder"), [0.5] * 3, [0.5] * 3, name="plain")
    with pytest.raises(ValueError, match="modalities must be left out: the channels of plain are one modality"):
        plain.read_only(["rgb"])
    assert len(found) == 3  # features of one part are neither taken from a cache for another, nor searched in


def test_of_clip_the_image_half_is_evaluated():
    vision = TINY | {"projection_dim": 16}
    text = dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, vocab_size=20)
    model, images = CLIPModel(CLIPConfig(vision_config=vision, text_config=text)), torch.randn(2, 3, 32, 32)
    encoder = FrozenEncoder(model, **NORMALIZATION)
    normed, raw = encoder.extract(images, [FeatureSpec(pooling="cls"), FeatureSpec(pooling="cls", norm=False)])
    output = model.vision_model(images)
    torch.testing.assert_close(normed, output.pooler_output.detach())
    torch.testing.assert_close(raw, output.last_hidden_state[:, 0].detach())


def test_a_pretraining_checkpoint_gives_its_encoder_and_stop_jepas_is_the_target(tmp_path):
    for config_class, model_class in ((MAEConfig, MAEForPreTraining), (StopJepaConfig, StopJepaForPreTraining)):
        torch.manual_seed(0)
        model = model_class(config_class(**TINY)).eval()
        for parameter in model.base_model.parameters():
            parameter.data.add_(0.01)  # so that StoP-JEPA's target is not its online encoder
        folder = tmp_path / model_class.__name__
        model.save_pretrained(folder)
        ViTImageProcessor(
            image_mean=[0.1, 0.2, 0.3], image_std=[1, 2, 4], size={"height": 32, "width": 32}
        ).save_pretrained(folder)
        encoder = FrozenEncoder.load(folder)
        image = torch.randint(0, 256, (1, 3, 32, 32), dtype=torch.uint8)
        pixels = encoder.preprocess(image)
        expected = (image / 255 - torch.tensor([0.1, 0.2, 0.3]).view(3, 1, 1)) / torch.tensor([1, 2, 4]).view(3, 1, 1)
        torch.testing.assert_close(pixels, expected)
        (feature,) = encoder.extract(pixels, [FeatureSpec()])
        torch.testing.assert_close(feature, model.base_model(pixels).pooler_output.detach())
        assert len(checkpoint_sha256(folder)) == 64


def test_a_model_with_a_head_gives_the_features_of_its_encoder():
    model = ViTForImageClassification(ViTConfig(**TINY)).eval()
    images = torch.randn(2, 3, 32, 32)
    (tokens,) = FrozenEncoder(model, **NORMALIZATION).extract(images, [FeatureSpec(pooling="tokens")])
    torch.testing.assert_close(tokens, model.vit(images).last_hidden_state[:, 1:].detach())


def test_features_after_a_norm_that_is_not_there_are_refused():
    encoder = FrozenEncoder(BeitModel(BeitConfig(**TINY, use_mean_pooling=True)), **NORMALIZATION)
    with pytest.raises(ValueError, match="last/mean/norm need a final norm, and .* has none: take raw"):
        encoder.check(FeatureSpec())
    assert encoder.extract(torch.randn(2, 3, 32, 32), [FeatureSpec(norm=False)])[0].shape == (2, 32)


def test_tokens_after_the_patches_are_no_patches():
    model = YolosModel(YolosConfig(**TINY | {"image_size": [32, 32]}, num_detection_tokens=10)).eval()
    images = torch.randn(2, 3, 32, 32)
    (tokens,) = FrozenEncoder(model, **NORMALIZATION).extract(images, [FeatureSpec(pooling="tokens")])
    torch.testing.assert_close(tokens, model(images).last_hidden_state[:, 1:17].detach())


def test_tokens_of_which_nobody_knows_which_are_patches_are_refused():
    model = ViTModel(ViTConfig(**TINY))
    order = [0, *range(16, 0, -1)]
    model.embeddings.register_forward_hook(lambda module, args, output: output[:, order])
    with pytest.raises(ValueError, match="nobody can tell which of its 17 tokens are the 16 patches") as error:
        FrozenEncoder(model, **NORMALIZATION)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["mae", "vit"])
def test_a_checkpoint_in_half_precision_is_computed_in_float32(name, tmp_path):
    model, _ = build(name)
    model.to(torch.bfloat16).save_pretrained(tmp_path)
    images = torch.randn(2, 3, 32, 32)
    (feature,) = FrozenEncoder.load(tmp_path).extract(images, [FeatureSpec()])
    (expected,) = FrozenEncoder(model.float(), **NORMALIZATION).extract(images, [FeatureSpec()])
    torch.testing.assert_close(feature, expected)


@pytest.mark.parametrize(
    ("settings", "mean", "std"),
    [
        ({"image_mean": [0.1, 0.2, 0.3], "image_std": [1, 2, 4]}, [0.1, 0.2, 0.3], [1, 2, 4]),
        ({"image_mean": 0.5, "image_std": 0.25}, [0.5] * 3, [0.25] * 3),
        ({"do_normalize": False, "image_mean": [0.1] * 3, "image_std": [9] * 3}, [0] * 3, [1] * 3),
        ({"rescale_factor": 1 / 127.5, "image_mean": [1] * 3, "image_std": [1] * 3}, [0.5] * 3, [0.5] * 3),
        ({"do_rescale": False, "image_mean": [127.5] * 3, "image_std": [51] * 3}, [0.5] * 3, [0.2] * 3),
    ],
)
def test_pixels_are_normalised_as_the_image_processor_says(settings, mean, std, tmp_path):
    build("vit")[0].save_pretrained(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(settings))
    encoder = FrozenEncoder.load(tmp_path)
    assert encoder.mean == pytest.approx(mean) and encoder.std == pytest.approx(std)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"image_mean": "abc"}, "finite numbers as image_mean, not"),
        ({"image_mean": [0.5, "a", 0.5]}, "finite numbers as image_mean, not"),
        ({"image_mean": [0.5, float("nan"), 0.5]}, "finite numbers as image_mean, not"),
        ({"image_std": [1, 1, 0]}, "finite numbers above 0 as image_std, not"),
        ({"rescale_factor": "1/255"}, "finite numbers above 0 as rescale_factor, not"),
        ({"size": 3.5}, "whole numbers above 0 as size, not 3.5"),
        ({"size": {"height": 32}}, "whole numbers above 0 as size, not"),
        ([1], r"must be a mapping, not \[1\]"),
    ],
)
def test_an_image_processor_of_wrong_values_is_one_line(settings, message, tmp_path):
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(settings))
    with pytest.raises(ValueError, match=message) as error:
        read_processor(tmp_path, 3)
    assert "\n" not in str(error.value)


def test_sizes_that_do_not_fit_are_refused():
    model = build("vit")[0]
    with pytest.raises(ValueError, match="divisible by the patch size.*not 36,32; 32 would be right for 36"):
        FrozenEncoder(model, **NORMALIZATION, image_size=(36, 32))
    with pytest.raises(ValueError, match="image_mean and image_std must have 3 values"):
        FrozenEncoder(model, mean=[0.5], std=[0.5])
    with pytest.raises(ValueError, match="last/cls/norm need a CLS token"):
        FrozenEncoder(build("ijepa")[0], **NORMALIZATION).check(FeatureSpec(pooling="cls"))
    with pytest.raises(ValueError, match="need a layer .* it has 5"):
        FrozenEncoder(model, **NORMALIZATION).check(FeatureSpec("6"))


@pytest.mark.parametrize("text", ["last", "last/mean", "last/mean/normed", "0/mean/norm", "first/mean/norm", "a/b/c/d"])
def test_feature_names_are_checked(text):
    with pytest.raises(ValueError, match="features must be layer/pooling/norm"):
        FeatureSpec.parse(text)


def test_feature_names_read_as_they_are_written():
    for text in ("last/mean/norm", "last4/cls/raw", "6/tokens/norm"):
        assert str(FeatureSpec.parse(text)) == text


def test_the_untrained_encoder_has_other_weights_always_the_same(tiny_encoder):
    torch.manual_seed(5)
    state = torch.get_rng_state()
    one, two = tiny_encoder.untrained(seed=1), tiny_encoder.untrained(seed=1)
    assert torch.equal(torch.get_rng_state(), state)
    assert one.sha256 == two.sha256 != tiny_encoder.sha256
    assert tiny_encoder.untrained(seed=2).sha256 != one.sha256


def test_transformers_untrained_mae_has_positions():
    encoder = FrozenEncoder(ViTMAEModel(ViTMAEConfig(**TINY)), **NORMALIZATION)
    assert encoder.untrained().model.embeddings.position_embeddings[0, 1:].norm(dim=1).min() > 1


def test_bfloat16_features_are_close(tiny_encoder):
    images = torch.randn(4, 3, 32, 32)
    half = FrozenEncoder(tiny_encoder.model, **NORMALIZATION, dtype=torch.bfloat16)
    one, two = (encoder.extract(images, [FeatureSpec()])[0] for encoder in (tiny_encoder, half))
    assert two.dtype == torch.float32 and 0 < (one - two).abs().max() < 0.05


def test_raw_pixels_are_averaged_down_to_32():
    encoder = RawPixels([0.0], [1 / 255], (64, 64))
    images = torch.arange(64, dtype=torch.uint8).view(1, 1, 1, 64).expand(2, 1, 64, 64)
    (pixels,) = encoder.extract(encoder.preprocess(images), [FeatureSpec()])
    assert pixels.shape == (2, 32 * 32) and encoder.width == 32 * 32
    torch.testing.assert_close(pixels[0, :3], torch.tensor([0.5, 2.5, 4.5]))
