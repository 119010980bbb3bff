"""Initialisation as each paper's code has it, from scratch and after a load of part of the weights."""

import math

import pytest
import torch

import hf_mim

SIZES = dict(image_size=64, patch_size=16, hidden_size=192, num_hidden_layers=4, num_attention_heads=3)


def bounds(weight):
    return math.sqrt(6 / sum(weight.shape))


def assert_xavier(weight):
    assert weight.abs().max() <= bounds(weight)
    assert abs(weight.std() - bounds(weight) / math.sqrt(3)) < 0.02 * bounds(weight)


@pytest.mark.parametrize(
    "model",
    [
        lambda: hf_mim.MAEForPreTraining(hf_mim.MAEConfig(**SIZES)),
        lambda: hf_mim.LatentMIMForPreTraining(hf_mim.LatentMIMConfig(**SIZES, mask_ratio=0.8)),
    ],
    ids=["mae", "latent_mim"],
)
def test_every_linear_is_xavier_uniform_with_zero_bias(model):
    torch.manual_seed(0)
    model = model()
    for module in model.modules():
        if isinstance(module, torch.nn.Linear):
            assert_xavier(module.weight)
            assert module.bias is None or not module.bias.any()
        elif isinstance(module, torch.nn.LayerNorm):
            assert (module.weight == 1).all() and not module.bias.any()
    assert abs(model.encoder.embeddings.cls_token.std() - 0.02) < 0.004
    token = model.decoder.mask_token
    assert not token.any() if model.config.model_type == "latent_mim" else abs(token.std() - 0.02) < 0.004


def test_jepa_linears_are_normal_and_residual_branches_shrink_with_depth():
    torch.manual_seed(0)
    model = hf_mim.StopJepaForPreTraining(hf_mim.StopJepaConfig(**SIZES))
    for stack in (model.encoder.layers, model.predictor.layers):
        for depth, layer in enumerate(stack, start=1):
            for linear in (layer.attention.qkv, layer.mlp.fc1):
                assert abs(linear.weight.std() / 0.02 - 1) < 0.03
            for linear in (layer.attention.proj, layer.mlp.fc2):
                assert abs(linear.weight.std() * math.sqrt(2 * depth) / 0.02 - 1) < 0.03
    for linear in (model.predictor.embed, model.predictor.head, model.encoder.embeddings.projection):
        assert abs(linear.weight.std() / 0.02 - 1) < 0.03 and not linear.bias.any()
    assert abs(model.predictor.mask_token.std() - 0.02) < 0.005


@pytest.mark.parametrize("patch_size", [2, 4, 8])
def test_jepa_patch_embedding_speaks_as_loud_for_small_patches(patch_size):
    """The standard deviation of an embedded white-noise patch does not depend on its size."""
    torch.manual_seed(0)
    model = hf_mim.StopJepaModel(hf_mim.StopJepaConfig(**SIZES | dict(patch_size=patch_size)))
    patches = torch.randn(2000, model.embeddings.projection.in_features)
    assert abs(model.embeddings.projection(patches).std() / (0.02 * math.sqrt(768)) - 1) < 0.05


def test_target_equals_the_encoder_at_the_start():
    for config, model in (
        (hf_mim.StopJepaConfig(**SIZES), hf_mim.StopJepaForPreTraining),
        (hf_mim.LatentMIMConfig(**SIZES, mask_ratio=0.8), hf_mim.LatentMIMForPreTraining),
    ):
        model = model(config)
        for target, online in model.target_pairs():
            for t, o in zip(target.parameters(), online.parameters(), strict=True):
                assert torch.equal(t, o) and t.data_ptr() != o.data_ptr()


def test_pretraining_goes_on_from_a_checkpoint_of_the_encoder_alone(tmp_path):
    torch.manual_seed(0)
    encoder = hf_mim.StopJepaModel(hf_mim.StopJepaConfig(**SIZES))
    encoder.save_pretrained(tmp_path)
    model = hf_mim.StopJepaForPreTraining.from_pretrained(tmp_path)
    for network in (model.target_encoder, model.encoder):
        for name, tensor in encoder.state_dict().items():
            assert torch.equal(network.state_dict()[name], tensor), name
    assert all(p.requires_grad for p in model.encoder.parameters())


def test_the_published_patch_sizes_keep_the_published_initialisation():
    for patch_size, image_size in ((16, 64), (14, 56)):
        torch.manual_seed(0)
        sizes = SIZES | dict(patch_size=patch_size, image_size=image_size)
        model = hf_mim.StopJepaModel(hf_mim.StopJepaConfig(**sizes))
        assert abs(model.embeddings.projection.weight.std() / 0.02 - 1) < 0.01


def test_a_checkpoint_without_tables_or_target_gets_them(tmp_path):
    from safetensors.torch import load_file, save_file

    torch.manual_seed(0)
    model = hf_mim.StopJepaForPreTraining(hf_mim.StopJepaConfig(**SIZES))
    model.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    kept = {k: v for k, v in load_file(file).items() if not k.startswith("target_") and "position" not in k}
    save_file(kept, file, metadata={"format": "pt"})
    loaded = hf_mim.StopJepaForPreTraining.from_pretrained(tmp_path)
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name
    assert not any(p.requires_grad for p in loaded.target_encoder.parameters())
