"""What each method promises beyond the matrix of `test_models.py`."""

import pytest
import torch
from passes import drawn, given_back, gradients, head, make, tables
from tiny import METHODS, head_layers, only
from transformers import AutoBackbone, AutoModel, AutoModelForImageClassification, AutoModelForPreTraining

import hf_mim
from hf_mim.models.losses import patch_discrimination
from hf_mim.models.vit import patchify, unpatchify


@pytest.mark.parametrize("method", METHODS)
def test_given_ids_reproduce_a_drawn_pass(method):
    model = make(method, **only(method, noise_on="both"))
    images = torch.randn(2, 3, *model.config.training_size)
    first = drawn(model, images)
    assert not torch.equal(drawn(model, images, seed=2).loss, first.loss)
    assert torch.equal(model(images, **given_back(first)).loss, first.loss)


@pytest.mark.parametrize("method", METHODS)
def test_forward_uses_drawn_masks_as_they_are(method):
    """`draw_masks` draws what `forward` would, in the same order, and keeps what it is given."""
    model = make(method, **only(method, noise_on="both"))
    config = model.config
    images = torch.randn(2, 3, *config.training_size)
    expected = given_back(drawn(model, images))
    torch.manual_seed(1)
    masks = model.draw_masks(2, config.grid_size, images.device)
    assert masks.keys() == expected.keys()
    assert all(torch.equal(masks[name], expected[name]) for name in expected)
    assert torch.equal(model(images, **masks).loss, drawn(model, images).loss)
    ids = {name: masks[name] for name in ("context_ids", "target_ids")}
    torch.manual_seed(2)
    again = model.draw_masks(2, config.grid_size, images.device, **ids)
    for name in masks:
        assert torch.equal(again[name], masks[name]) == (name in ids)
    with pytest.raises(ValueError, match="given together"):
        model.draw_masks(2, config.grid_size, images.device, context_ids=ids["context_ids"])


@pytest.mark.parametrize("method", METHODS)
def test_contexts_and_targets_never_overlap(method):
    model = make(method)
    for _ in range(5):
        output = model(torch.randn(8, 3, *model.config.training_size))
        for context, target in zip(output.context_ids, output.target_ids.flatten(1), strict=True):
            assert not set(context.tolist()) & set(target.tolist())


@pytest.mark.parametrize("method", METHODS)
def test_the_encoder_sees_only_the_patches_it_is_given(method):
    model = make(method).eval()
    images = torch.randn(2, 3, 32, 32)
    ids = torch.stack([torch.randperm(64)[:10] for _ in range(2)])
    features = model.encoder(images, patch_ids=ids).last_hidden_state
    hidden = torch.ones(2, 64, dtype=torch.bool).scatter(1, ids, False)
    patches = patchify(images, (4, 4))
    changed = unpatchify(torch.where(hidden[..., None], torch.randn_like(patches), patches), (4, 4), (8, 8))
    assert not torch.equal(images, changed)
    assert torch.equal(model.encoder(changed, patch_ids=ids).last_hidden_state, features)
    # and with all ids in raster order it is the unmasked pass
    every = torch.arange(64).expand(2, -1)
    whole = model.encoder(images).last_hidden_state
    torch.testing.assert_close(model.encoder(images, patch_ids=every).last_hidden_state, whole)


@pytest.mark.parametrize("method", METHODS)
def test_an_unmasked_pass_is_deterministic_in_train_mode_and_knows_the_order_of_patches(method):
    encoder = make(method).encoder.train()
    images = torch.randn(2, 3, 32, 32)
    assert torch.equal(encoder(images).last_hidden_state, encoder(images).last_hidden_state)
    shuffled = unpatchify(patchify(images, (4, 4))[:, torch.randperm(64)], (4, 4), (8, 8))
    pooled, pooled_shuffled = encoder(images).pooler_output, encoder(shuffled).pooler_output
    assert (pooled - pooled_shuffled).abs().max() > 0.01


@pytest.mark.parametrize("method", METHODS)
def test_any_image_whose_sides_divide_is_encoded(method):
    encoder = make(method).encoder.eval()
    prefix = encoder.config.num_prefix_tokens
    assert encoder(torch.randn(1, 3, 20, 48)).last_hidden_state.shape == (1, prefix + 60, 48)
    with pytest.raises(ValueError, match="divisible by patch_size"):
        encoder(torch.randn(1, 3, 30, 32))
    with pytest.raises(ValueError, match="num_channels=3"):
        encoder(torch.randn(1, 4, 32, 32))


@pytest.mark.parametrize("method", METHODS)
def test_attentions_and_hidden_states_are_recorded_for_the_encoder_only(method):
    model = make(method).eval()
    model.set_attn_implementation("eager")
    encoder = model.encoder
    output = encoder(torch.randn(2, 3, 32, 32), output_attentions=True, output_hidden_states=True)
    tokens = 64 + encoder.config.num_prefix_tokens
    assert [a.shape for a in output.attentions] == [(2, 3, tokens, tokens)] * 2
    torch.testing.assert_close(output.attentions[0].sum(-1), torch.ones(2, 3, tokens))
    assert len(output.hidden_states) == 3
    assert torch.equal(encoder.norm(output.hidden_states[-1]), output.last_hidden_state)


@pytest.mark.parametrize("method", METHODS)
def test_the_last_layer_computes_only_what_the_loss_reads(method):
    """The same predictions come out when the last layer computes every token."""
    model = make(method).eval()
    images = torch.randn(2, 3, *model.config.training_size)
    seen, last = [], head(model).layers[-1]
    hook = last.mlp.register_forward_hook(lambda module, args, output: seen.append(output.shape[1]))
    short = drawn(model, images)
    hook.remove()
    assert seen == [short.target_ids.shape[-1]]
    every_token = type(last).forward

    def compute_all(*args, num_queries=None, **kwargs):
        args, queries = (args[:-1], args[-1]) if num_queries is None else (args, num_queries)
        return every_token(last, *args, **kwargs)[:, -queries:]

    last.forward = compute_all
    torch.testing.assert_close(drawn(model, images).predictions, short.predictions, atol=1e-5, rtol=0)


@pytest.mark.parametrize("method", METHODS)
def test_classifier_starts_from_the_pretrained_encoder_with_only_the_head_new(method, tmp_path):
    model = make(method).eval()
    if hasattr(model, "target_encoder"):  # which may be the one that is to be loaded
        torch.nn.init.normal_(model.target_encoder.norm.bias)
    model.save_pretrained(tmp_path)
    classifier, info = AutoModelForImageClassification.from_pretrained(
        tmp_path, num_labels=5, output_loading_info=True, head_batch_norm=True
    )
    assert all(key.startswith("classifier.") for key in info["missing_keys"]) and not info["unexpected_keys"]
    images, labels = torch.randn(4, 3, 32, 32), torch.tensor([0, 1, 2, 4])
    output = classifier.eval()(images, labels=labels)
    pooled = model.base_model(images).pooler_output
    expected = pooled / (1 + 1e-6) ** 0.5 @ classifier.classifier.linear.weight.T
    torch.testing.assert_close(output.logits, expected, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(output.loss, torch.nn.functional.cross_entropy(output.logits, labels))
    # Under gradient accumulation Trainer says how many labels the whole step has.
    part = classifier(images, labels=labels, num_items_in_batch=torch.tensor(16))
    torch.testing.assert_close(part.loss, output.loss * 4 / 16)
    output.loss.backward()
    assert all(p.grad is not None for p in classifier.parameters())


@pytest.mark.parametrize("method", METHODS)
def test_backbone_gives_normalised_feature_maps(method, tmp_path):
    model = make(method).eval()
    model.save_pretrained(tmp_path)
    backbone = AutoBackbone.from_config(type(model.config).from_pretrained(tmp_path, out_features=["stage1", "stage2"]))
    backbone = type(backbone).from_pretrained(tmp_path, out_features=["stage1", "stage2"])
    images = torch.randn(2, 3, 24, 40)
    maps = backbone(images).feature_maps
    assert [m.shape for m in maps] == [(2, 48, 6, 10)] * 2 and backbone.channels == [48, 48]
    tokens = model.base_model(images).last_hidden_state[:, model.config.num_prefix_tokens :]
    torch.testing.assert_close(maps[-1].flatten(2).transpose(1, 2), tokens)


@pytest.mark.parametrize("method", METHODS)
def test_half_precision_models_load_with_their_target_in_float32(method, tmp_path):
    model = make(method)
    model.save_pretrained(tmp_path)
    half = AutoModelForPreTraining.from_pretrained(tmp_path, dtype=torch.bfloat16)
    for name, p in half.named_parameters():
        assert p.dtype == (torch.float32 if name.startswith("target_") else torch.bfloat16), name
    for name, module in tables(half).items():
        assert torch.equal(module.table, model.get_submodule(name).table)
    images = torch.randn(8, 3, *model.config.training_size)
    output = drawn(half, images)
    assert output.loss.dtype == torch.float32
    output.loss.backward()
    torch.testing.assert_close(output.loss, drawn(model.eval(), images).loss, rtol=0.05, atol=0)
    half.update_target(0.5)


LOSSES = {
    "mae": torch.nn.functional.mse_loss,
    "stop_jepa": torch.nn.functional.smooth_l1_loss,
    "latent_mim": lambda predictions, targets: patch_discrimination(predictions, targets, temperature=0.2),
}


@pytest.mark.parametrize("method", METHODS)
def test_under_autocast_the_loss_is_computed_in_float32(method):
    model = make(method)
    images = torch.randn(3, 3, *model.config.training_size)
    loss, _ = gradients(model, images)
    with torch.autocast("cpu", torch.bfloat16):
        output = drawn(model, images)
    predictions, targets = output.predictions, output.targets
    assert predictions.dtype == torch.bfloat16 and targets.dtype == output.loss.dtype == torch.float32
    if method in LOSSES:
        computed = output.metrics.get("patch_discrimination", output.loss)
        assert torch.equal(computed, LOSSES[method](predictions.float(), targets))
    torch.testing.assert_close(output.loss, loss, rtol=0.03, atol=0)


@pytest.mark.parametrize("method", METHODS)
def test_a_checkpoint_with_more_layers_than_the_model_does_not_load_unnoticed(method, tmp_path):
    model = make(method)
    model.save_pretrained(tmp_path)
    shallow = {"num_hidden_layers": 1} | head_layers(method, 1)
    _, info = AutoModelForPreTraining.from_pretrained(tmp_path, **shallow, output_loading_info=True)
    for depth in shallow:
        network = depth.removesuffix("num_hidden_layers").removesuffix("_") or "encoder"
        assert any(key.startswith(f"{network}.layers.1.") for key in info["unexpected_keys"])
    _, info = AutoModel.from_pretrained(tmp_path, num_hidden_layers=1, output_loading_info=True)
    assert any("layers.1." in key for key in info["unexpected_keys"])


@pytest.mark.parametrize("method", ["mae", *(pytest.param(name, marks=pytest.mark.slow) for name in METHODS[1:])])
def test_models_compile_without_graph_breaks_when_ids_are_given(method):
    model = make(method).train()
    images = torch.randn(2, 3, *model.config.training_size)
    given = given_back(drawn(model, images))
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(images, **given).loss, model(images, **given).loss)


def test_drop_path_leaves_out_branches_in_train_mode_only_and_keeps_their_mean():
    torch.manual_seed(0)
    model = make("mae", "encoder", drop_path_rate=0.5)
    layer = model.layers[-1].train()
    assert [layer.drop_path_rate for layer in model.layers] == [0, 0.5]
    branch = torch.ones(4000, 2, 3)
    dropped = layer.drop_path(branch)
    assert set(dropped.unique().tolist()) == {0.0, 2.0}
    assert torch.equal(dropped[:, 0, 0], dropped[:, 1, 2])
    assert abs(dropped.mean() - 1) < 0.05
    assert torch.equal(layer.eval().drop_path(branch), branch)


@pytest.mark.parametrize("size", ["tiny", "small", "base", "large", "huge", "giant"])
def test_one_dial_sets_the_published_sizes(size):
    """Parameters of the ViTs of Dosovitskiy et al. and Zhai et al. with their ImageNet head and learned positions."""
    millions = {"tiny": 5.717, "small": 22.051, "base": 86.568, "large": 304.327, "huge": 632.046, "giant": 1012.611}
    config = hf_mim.MAEConfig(size=size, patch_size=14 if size in ("huge", "giant") else 16, num_labels=1000)
    with torch.device("meta"):
        classifier = hf_mim.MAEForImageClassification(config)
    positions = classifier.encoder.embeddings.position_embeddings.table.numel()
    assert round((sum(p.numel() for p in classifier.parameters()) + positions) / 1e6, 3) == millions[size]


def test_decoder_and_predictor_have_the_papers_sizes_at_vit_base_and_large():
    for size in ("base", "large"):
        mae, jepa = hf_mim.MAEConfig(size=size), hf_mim.StopJepaConfig(size=size)
        assert (mae.decoder_hidden_size, mae.decoder_num_hidden_layers, mae.decoder_num_attention_heads) == (512, 8, 16)
        assert jepa.predictor_hidden_size == 384
        assert jepa.predictor_num_hidden_layers == {"base": 6, "large": 12}[size]
        assert jepa.predictor_num_attention_heads == jepa.num_attention_heads
    latent = hf_mim.LatentMIMConfig()
    assert latent.projector_hidden_size == 4096 and latent.training_size == (280, 280)
    assert latent.num_visible((14, 14)) == 20 and mae.num_visible((14, 14)) == 49
