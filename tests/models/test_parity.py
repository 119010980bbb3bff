"""Every number that the authors' code gave on seeded weights, from our public API (tests/fixtures/README.md)."""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

import hf_mim
from hf_mim.hub import key_tables

FIXTURES = Path(__file__).parents[1] / "fixtures"


def read(name):
    with safe_open(FIXTURES / f"{name}.safetensors", "pt") as file:
        config = json.loads(file.metadata()["config"])
        tensors = {key: file.get_tensor(key) for key in file.keys()}
    return config, tensors, {k[2:]: v for k, v in tensors.items() if k.startswith("w.")}


def load(model, weights):
    """Load every weight, and nothing but what is not saved may be missing."""
    missing, unexpected = model.load_state_dict(weights, strict=False)
    assert not unexpected and set(missing) <= {"similarity_target.value"}
    return model.eval()


def encoder_sizes(config):
    return {
        "patch_size": config["patch_size"],
        "hidden_size": config["hidden_size"],
        "num_hidden_layers": config["depth"],
        "num_attention_heads": config["heads"],
        "layer_norm_eps": config["layer_norm_eps"],
    }


def decoder_sizes(config, name="decoder"):
    return {
        f"{name}_hidden_size": config[f"{name}_hidden_size"],
        f"{name}_num_hidden_layers": config[f"{name}_depth"],
        f"{name}_num_attention_heads": config[f"{name}_heads"],
    }


def close(ours, theirs):
    torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=0)


def close_relative(ours, theirs, tolerance):
    """Relative to the tensor's largest entry."""
    assert (ours - theirs).abs().max() <= tolerance * theirs.abs().max()


def check_loss_and_patch_gradient(model, loss, theirs, conv_gradient):
    close_relative(loss.detach(), theirs.squeeze(), 1e-5)
    model.zero_grad()
    loss.backward()
    gradient = model.encoder.embeddings.projection.weight.grad
    if conv_gradient.ndim == 4:
        conv_gradient = conv_gradient.permute(0, 2, 3, 1).flatten(1)
    close_relative(gradient, conv_gradient, 1e-4)


@pytest.fixture(scope="module")
def mae():
    config, t, weights = read("mae")
    config = hf_mim.MAEConfig(
        image_size=config["image_size"],
        mask_ratio=config["mask_ratio"],
        **encoder_sizes(config),
        **decoder_sizes(config),
    )
    return load(hf_mim.MAEForPreTraining(config), key_tables.to_ours(weights, key_tables.MAE)), t


def test_mae_keeps_and_masks_the_same_patches(mae):
    model, t = mae
    output = model(t["pixel_values"], noise=t["noise"])
    mask = torch.ones_like(t["mask"]).scatter(1, output.context_ids, 0)
    assert torch.equal(mask, t["mask"])
    assert torch.equal(torch.zeros_like(mask).scatter(1, output.target_ids, 1), t["mask"])
    close(model.encoder(t["pixel_values"], patch_ids=output.context_ids).last_hidden_state, t["latent_visible"])


def test_mae_predicts_the_same_pixels(mae):
    model, t = mae
    output = model(t["pixel_values"], noise=t["noise"])
    theirs = t["pred"].gather(1, output.target_ids[..., None].expand(-1, -1, t["pred"].shape[-1]))
    close(output.predictions, theirs)


@pytest.mark.parametrize("norm_pix", [False, True])
def test_mae_loss_and_gradient_are_the_same(mae, norm_pix):
    model, t = mae
    model.config.norm_pix_loss = norm_pix
    name = str(norm_pix).lower()
    loss = model(t["pixel_values"], noise=t["noise"]).loss
    check_loss_and_patch_gradient(model, loss, t[f"loss_norm_pix_{name}"], t[f"grad_patch_norm_pix_{name}"])


def test_mae_unmasked_features_are_the_same(mae):
    model, t = mae
    close(model.encoder(t["pixel_values"]).last_hidden_state, t["features_unmasked"])


@pytest.fixture(scope="module", params=["ijepa", "stop"])
def jepa(request):
    config, t, weights = read(request.param)
    noise_std = config["noise_std"] or 0.0
    ours = hf_mim.StopJepaConfig(
        image_size=config["image_size"],
        position_noise_std=noise_std,
        use_mask_token=noise_std == 0,
        **encoder_sizes(config),
        **decoder_sizes(config, "predictor"),
    )
    if request.param == "stop":
        for key in key_tables.STOP_UNREAD:
            weights.pop(key)
    table = {"ijepa": key_tables.I_JEPA, "stop": key_tables.STOP}[request.param]
    return load(hf_mim.StopJepaForPreTraining(ours), key_tables.to_ours(weights, table)), t


def jepa_forward(model, t):
    given = {k: t[k] for k in ("context_ids", "target_ids", "position_noise") if k in t}
    return model(t["pixel_values"], **given)


def test_jepa_features_are_the_same(jepa):
    model, t = jepa
    close(model.target_encoder(t["pixel_values"]).last_hidden_state, t["features_target"])
    close(model.encoder(t["pixel_values"], patch_ids=t["context_ids"]).last_hidden_state, t["context_features"])


@pytest.mark.parametrize("name", ["targets", "predictions"])
def test_jepa_targets_and_predictions_are_the_same(jepa, name):
    model, t = jepa
    ours = jepa_forward(model, t)[name]
    close(ours.transpose(0, 1).flatten(0, 1), t[name])  # theirs is block-major


def test_jepa_loss_and_gradient_are_the_same(jepa):
    model, t = jepa
    check_loss_and_patch_gradient(model, jepa_forward(model, t).loss, t["loss"], t["grad_patch"])


def latent_mim_model(**changes):
    config, t, weights = read("latent_mim")
    side = config["grid_size"] * config["patch_size"]
    ours = hf_mim.LatentMIMConfig(
        **dict(
            image_size=side,
            patch_gap=config["patch_gap"],
            mask_ratio=1 - config["num_visible"] / config["grid_size"] ** 2,
            projector_hidden_size=config["projector_hidden_size"],
            temperature=config["temperature"],
            similarity_weight=config["similarity_coefficient"],
            similarity_start=config["similarity_target"],
            similarity_end=config["similarity_target"],
            **encoder_sizes(config),
            **decoder_sizes(config),
        )
        | changes
    )
    weights = key_tables.to_ours(weights, key_tables.LATENT_MIM)
    return load(hf_mim.LatentMIMForPreTraining(ours), weights), t


def latent_mim_forward(model, t):
    return model(
        t["pixel_values"],
        context_ids=t["visible_ids"],
        target_ids=t["masked_ids"],
        patch_offsets=torch.stack([t["offset_rows"], t["offset_cols"]], dim=-1),
    )


def test_latent_mim_cuts_the_same_patches():
    model, t = latent_mim_model()
    patches, grid, _ = model.draw(t["pixel_values"], torch.stack([t["offset_rows"], t["offset_cols"]], dim=-1))
    assert grid == (6, 6) and torch.equal(patches, t["patches"])


def test_latent_mim_visible_and_masked_patches_follow_the_noise():
    model, t = latent_mim_model()
    output = model(t["pixel_values"], noise=t["shuffle_noise"])
    assert torch.equal(output.context_ids, t["visible_ids"])
    assert torch.equal(output.target_ids.sort().values, t["masked_ids"].sort().values)


def test_latent_mim_encoders_predictions_and_targets_are_the_same():
    model, t = latent_mim_model()
    output = latent_mim_forward(model, t)
    close(output.predictions, t["predictions"][:, 1:])
    close(output.targets, t["target_out"][:, 1:])
    for encoder, projector, ids, theirs in (
        (model.encoder, model.projector, t["visible_ids"], t["encoder_out"]),
        (model.target_encoder, model.target_projector, t["masked_ids"], t["target_out"]),
    ):
        patches = t["patches"].gather(1, ids[..., None].expand(-1, -1, t["patches"].shape[-1]))
        close(projector(encoder.encode(patches, (6, 6), ids)), theirs)


def test_latent_mim_loss_gradient_and_similarities_are_the_same():
    model, t = latent_mim_model()
    output = latent_mim_forward(model, t)
    check_loss_and_patch_gradient(model, output.loss, t["loss"], t["grad_patch"])
    for ours, theirs in (("predictions", "pred"), ("visible", "vis"), ("targets", "trg")):
        close_relative(output.metrics[f"similarity_{ours}"], t[f"m.avg_sim_{theirs}"].squeeze(), 1e-5)


@pytest.mark.parametrize(
    ("loss_type", "theirs"), [("patch_discrimination", "loss_infonce_patches_only"), ("norm_l2", "loss_norm_l2_only")]
)
def test_latent_mim_losses_alone_are_the_same(loss_type, theirs):
    model, t = latent_mim_model(loss_type=loss_type, similarity_weight=0)
    output = latent_mim_forward(model, t)
    close_relative(output.loss.detach(), t[theirs].squeeze(), 1e-5)


def test_latent_mim_features_without_gaps_are_the_same():
    model, t = latent_mim_model()
    output = model.encoder(t["image_nogap"], output_hidden_states=True)
    close(output.hidden_states[-1], t["features_before_norm"])
    close(output.last_hidden_state, t["features_after_norm"])
    close(model.projector(output.last_hidden_state), t["features_after_head"])


CLASSIFIERS = {
    "logits_global_pool": ("MAE_MEAN_CLASSIFIER", dict(pooling="mean", pool_before_norm=True), ("norm.", "head.0")),
    "logits_cls": ("MAE_CLS_CLASSIFIER", dict(pooling="cls"), ("fc_norm.", "head.0")),
    "logits_linear_probe": ("MAE_LINEAR_PROBE", dict(pooling="cls", head_batch_norm=True), ("fc_norm.",)),
}


@pytest.mark.parametrize("logits", CLASSIFIERS)
def test_mae_classifiers_give_the_same_logits(logits):
    config, t, weights = read("mae_classifiers")
    table, options, not_in_this_file = CLASSIFIERS[logits]
    weights = {k: v for k, v in weights.items() if not k.startswith(not_in_this_file)}
    if logits == "logits_linear_probe":
        weights = {
            k.replace("head.weight", "head.1.weight").replace("head.bias", "head.1.bias"): v for k, v in weights.items()
        }
    ours = hf_mim.MAEConfig(
        image_size=config["image_size"], num_labels=config["num_labels"], **encoder_sizes(config), **options
    )
    model = hf_mim.MAEForImageClassification(ours)
    load(model, key_tables.to_ours(weights, getattr(key_tables, table)))
    close(model(t["pixel_values"]).logits, t[logits])


@pytest.mark.parametrize(
    ("name", "table", "patch_size"),
    [("mae", "MAE", 8), ("ijepa", "I_JEPA", 8), ("latent_mim", "LATENT_MIM", 4)],
)
def test_key_tables_read_backwards_give_the_file_back(name, table, patch_size):
    _, _, weights = read(name)
    table = getattr(key_tables, table)
    back = key_tables.to_theirs(key_tables.to_ours(weights, table), table, (patch_size, patch_size))
    assert back.keys() == weights.keys()
    assert all(torch.equal(back[k], weights[k]) for k in weights)


def test_a_key_that_a_table_does_not_know_is_an_error_that_names_it():
    _, _, weights = read("stop")
    with pytest.raises(ValueError, match="does not know: predictor.mask_token"):
        key_tables.to_ours(weights, key_tables.STOP)
