"""Every vision encoder that `AutoModel` loads gives the features of its own forward, or one line says why not."""

import inspect
import math

import pytest
import torch
from every_encoder import build, model_types
from transformers.models.siglip2.image_processing_pil_siglip2 import convert_image_to_patches

from hf_mim.evaluation.encoder import FeatureSpec, FrozenEncoder
from hf_mim.evaluation.inputs import image_model

STATISTICS = dict(mean=[0.5] * 3, std=[0.5] * 3)
# These are refused, with such a line.
REFUSALS = {
    "which is no vision encoder: its forward must take pixel_values first": "cohere_compass_vision exaone4_5_vision "
    "hyperclovax_vision_v2 qwen2_5_vl_vision qwen3_5_moe_vision qwen3_5_vision qwen3_vl_moe_vision qwen3_vl_vision "
    "qwen4_exp_vision",
    "whose forward needs .*, which images do not tell": "cosmos3_edge_vision gemma4_vision glm_image_vision "
    "hunyuan_vl_vision kimi_k25_vision lfm3_vl_vision muse_glimmer_vision muse_spark_vision video_llama_3_vision "
    "videoprism",
    "an encoder of videos of": "timesformer videomae videoprism_vision_model vivit",
    "nobody can tell": "groupvit swin2sr",
    "whose forward needs target_sizes, which images do not tell": "minicpm_ocr_vision minicpmv4_7_vision",
}
REFUSED = {kind: message for message, kinds in REFUSALS.items() for kind in kinds.split()}
# These encode images of one size only.
ONE_SIZE = "aimv2 aimv2_vision_model granite_docling_vision hiera levit pvt sam sam_hq_vision_model sam_vision_model "
ONE_SIZE += "vjepa2"
SUFFIX = {"yolos": 100}


def own_forward(model, images, **options):
    """What the model returns for images, by the arguments that transformers documents."""
    kind, (height, width) = model.config.model_type, images.shape[2:]
    if kind == "siglip2_vision_model":
        patches = [convert_image_to_patches(image.numpy(), 8) for image in images]
        patches = torch.stack([torch.as_tensor(x) for x in patches])
        shapes = torch.tensor([[height // 8, width // 8]] * len(images))
        return model(patches, torch.ones(patches.shape[:2], dtype=torch.long), shapes, **options)
    if kind == "vjepa2":
        return model(images[:, None].repeat(1, 2, 1, 1, 1), skip_predictor=True, **options)
    if kind == "vit_mae":
        model.config.mask_ratio = 0.0
        options["noise"] = torch.arange(height * width / 64).expand(len(images), -1)
    if "interpolate_pos_encoding" in inspect.signature(model.forward).parameters:
        options["interpolate_pos_encoding"] = (height, width) != (64, 64)
    return model(images, **options)


def patches(tensor, encoder):
    """Tokens or a map of the last layer's grid → its patches `[B, N, D]`."""
    if tensor.ndim == 4:
        is_last = tensor.shape[1:3] == encoder.grid and tensor.shape[2:] != encoder.grid
        return tensor.flatten(1, 2) if is_last else tensor.flatten(2).transpose(1, 2)
    suffix = SUFFIX.get(encoder.model.config.model_type, 0)
    end = tensor.shape[1] - suffix
    return tensor[:, end - math.prod(encoder.grid) : end]


def distance(a, b):
    return (a - b).abs().max().item() / max(1, b.abs().max().item()) if a.shape == b.shape else math.inf


@torch.no_grad()
def check(encoder, images):
    output = own_forward(encoder.model, images)
    own = output.feature_maps[-1] if getattr(output, "last_hidden_state", None) is None else output.last_hidden_state
    own = patches(own, encoder)
    kinds = [FeatureSpec("last", pooling, norm) for pooling in ("mean", "tokens") for norm in (True, False)]
    kinds = [kind for kind in kinds if encoder.norm is not None or not kind.norm]
    if not encoder.layers.streams[-1].is_raster:
        kinds = [kind for kind in kinds if kind.pooling == "mean"]
    found = encoder.extract(images, kinds)
    for pooling, expected in (("mean", own.mean(1)), ("tokens", own)):
        features = [x for kind, x in zip(kinds, found, strict=True) if kind.pooling == pooling]
        assert not features or min(distance(x, expected) for x in features) < 1e-5, pooling
    if encoder.layers.pools_first:
        (pooled,) = encoder.extract(images, [FeatureSpec("last", "mean", True)])
        assert distance(pooled, output.pooler_output.flatten(1)) < 1e-5


def check_hidden_states(encoder, images):
    """Every layer is the model's own hidden state, where it returns one for each."""
    with torch.no_grad():
        states = getattr(own_forward(encoder.model, images, output_hidden_states=True), "hidden_states", None)
    streams = encoder.layers.streams
    features = encoder.extract(images, [FeatureSpec(str(i), "mean", False) for i in range(1, len(streams) + 1)])
    if len(streams) > 3:
        (last4,) = encoder.extract(images, [FeatureSpec("last4", "mean", False)])
        assert torch.equal(last4, torch.cat(features[-4:], dim=1))
    if len(states or ()) != len(streams) + 1 or not streams[0].is_raster:
        return
    if not all(isinstance(state, torch.Tensor) and state.ndim == 3 for state in states):
        return
    suffix = SUFFIX.get(encoder.model.config.model_type, 0)
    for number in range(1, len(streams)):  # some models give their normed output as the last state
        state = states[number][:, streams[0].num_prefix : states[number].shape[1] - suffix]
        assert distance(features[number - 1], state.mean(1)) < 1e-5, number


@pytest.mark.parametrize("kind", model_types())
def test_features_are_those_of_the_models_own_forward(kind):
    model = build(kind)
    if kind in REFUSED:
        with pytest.raises(ValueError, match=REFUSED[kind]) as error:
            FrozenEncoder(model, **STATISTICS, name=kind)
        assert "\n" not in str(error.value)
        return
    generator = torch.Generator().manual_seed(1)
    encoder = FrozenEncoder(model, **STATISTICS, name=kind, image_size=64)
    images = torch.randn(2, 3, 64, 64, generator=generator)
    check(encoder, images)
    check_hidden_states(encoder, images)
    if kind in ONE_SIZE.split():
        with pytest.raises(ValueError, match="image_size 96,64 does not suit") as error:
            FrozenEncoder(model, **STATISTICS, name=kind, image_size=(96, 64))
        assert "\n" not in str(error.value)
        return
    encoder = FrozenEncoder(model, **STATISTICS, name=kind, image_size=(96, 64))
    check(encoder, torch.randn(2, 3, 96, 64, generator=generator))


@pytest.mark.parametrize("kind", ["swin", "resnet", "dinov3_vit", "siglip2", "clip", "convnextv2"])
def test_the_untrained_twin_has_the_same_layers_and_other_features(kind):
    encoder = FrozenEncoder(build(kind), **STATISTICS, name=kind, image_size=64)
    images, spec = torch.randn(2, 3, 64, 64), [FeatureSpec(norm=False)]
    twin = encoder.untrained(seed=7)
    one, two = encoder.extract(images, spec)[0], twin.extract(images, spec)[0]
    assert two.isfinite().all() and one.shape == two.shape and not torch.allclose(one, two)
    assert image_model(twin.model) is twin.model
