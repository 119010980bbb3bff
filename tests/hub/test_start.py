"""A model that starts from a checkpoint computes what the checkpoint computes."""

import pytest
import torch
from authors import read, save_jepa, save_latent_mim, save_mae
from safetensors.torch import load_file, save_file
from tiny import METHODS, has_target, make_config, make_model
from transformers import (
    Dinov2Config,
    Dinov2Model,
    IJepaConfig,
    IJepaModel,
    ViTConfig,
    ViTMAEConfig,
    ViTMAEModel,
    ViTModel,
)

from hf_mim import methods
from hf_mim.hub.export import export
from hf_mim.hub.fit import fit_channels, fit_patch
from hf_mim.hub.start import Source
from hf_mim.models.target_encoder import online_encoder

SIZES = dict(image_size=24, patch_size=4, hidden_size=32, num_hidden_layers=2, num_attention_heads=2)
# transformers' initial weights are so small that a wrong block would hardly show.
DRAWN = {"intermediate_size": 64, "initializer_range": 0.2}
IMAGES = torch.randn(2, 3, 24, 24, generator=torch.Generator().manual_seed(1))


def started(source: Source, method: str, **changes):
    """A new model with the source's settings and weights, and the line about it."""
    model = methods.get(method).pretraining_class(make_config(method, **source.settings(method) | changes))
    source.check(model.config)
    line = source.fill(model)
    return model.eval(), line


def features(model, images=IMAGES):
    with torch.no_grad():
        return online_encoder(model)(images).last_hidden_state


def saved(model, folder):
    model.save_pretrained(folder)
    return str(folder)


def transformers_model(kind):
    torch.manual_seed(0)
    if kind == "vit_mae":
        return ViTMAEModel(ViTMAEConfig(**SIZES, **DRAWN))
    if kind == "ijepa":
        return IJepaModel(IJepaConfig(**SIZES, **DRAWN))
    if kind == "dinov2":
        return Dinov2Model(Dinov2Config(**SIZES, initializer_range=0.2, mlp_ratio=3))
    return ViTModel(ViTConfig(**SIZES, **DRAWN), add_pooling_layer=False)


def close(ours, theirs):
    assert theirs.std() > 0.1
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)


@pytest.mark.parametrize("method", METHODS)
def test_a_pretraining_checkpoint_of_the_method_gives_all_its_weights(method, tmp_path):
    model = make_model(method, seed=3)
    if has_target(method):
        model.update_target(0.5)  # a target of its own
    model, line = started(Source.read(saved(model, tmp_path)), method)
    assert line.endswith(": all weights are taken over")
    held = load_file(tmp_path / "model.safetensors")
    assert held.keys() == model.state_dict().keys()
    assert all(torch.equal(held[name], x) for name, x in model.state_dict().items())


@pytest.mark.parametrize("kind", ["encoder", "classifier"])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("into", METHODS)
def test_an_encoder_of_ours_becomes_online_and_target_encoder_of_any_method(kind, method, into, tmp_path):
    source = make_model(method, kind, seed=3, use_cls_token=False).eval()
    model, line = started(Source.read(saved(source, tmp_path)), into)
    close(features(model), source.base_model(IMAGES).last_hidden_state)
    for target, online in model.target_pairs() if has_target(into) else ():
        assert all(torch.equal(x, online.state_dict()[name]) for name, x in target.state_dict().items())
    assert "start" in line and not any(f" {name}," in line for name in ("encoder", "target_encoder"))


@pytest.mark.parametrize("kind", ["vit", "vit_mae", "dinov2", "ijepa"])
def test_encoders_of_transformers_give_their_features(kind, tmp_path):
    theirs = transformers_model(kind).eval()
    if kind == "vit_mae":  # transformers leaves its table zero, and shuffles the patches
        theirs.embeddings.position_embeddings.data.normal_()
        arguments = {"noise": torch.arange(36.0).expand(2, -1)}
    else:
        arguments = {}
    source = Source.read(saved(theirs, tmp_path))
    theirs.config.mask_ratio = 0.0
    for method in ("mae", "latent_mim", *(["stop_jepa"] if kind == "ijepa" else [])):
        model, _ = started(source, method)
        with torch.no_grad():
            close(features(model), theirs(IMAGES, **arguments).last_hidden_state)


@pytest.mark.parametrize("to", ["transformers", "timm"])
def test_our_exports_to_other_libraries_are_sources(to, tmp_path):
    encoder = make_model("mae", "encoder", seed=3).eval()
    export(saved(encoder, tmp_path / "ours"), tmp_path / "theirs", to)
    model, _ = started(Source.read(str(tmp_path / "theirs")), "latent_mim")
    close(features(model), encoder(IMAGES).last_hidden_state)


def test_files_of_the_authors_are_sources(tmp_path, monkeypatch):
    monkeypatch.setattr("hf_mim.hub.sizes.PUBLISHED_HEADS", {48: 3})  # the fixtures have widths of no paper
    monkeypatch.setattr("hf_mim.hub.sizes.PUBLISHED_DECODER_HEADS", {32: 4, 48: 4})
    for name, save, into, wanted in (
        ("mae", save_mae, "mae", "features_unmasked"),
        ("ijepa", save_jepa, "ijepa", "features_target"),
        ("latent_mim", save_latent_mim, "mae", None),
    ):
        config, t, weights = read(name)
        source = Source.read(str(save(tmp_path / f"{name}.pth", weights)))
        model, _ = started(source, into)
        theirs = source.model.base_model(t["pixel_values"]).last_hidden_state if wanted is None else t[wanted]
        with torch.no_grad():
            ours = model.base_model(t["pixel_values"]).last_hidden_state
        torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=0)


def test_a_jepa_that_is_continued_with_noise_keeps_its_weights_and_gets_the_noise(tmp_path):
    source = Source.read(saved(make_model("stop_jepa", position_noise_std=0.0), tmp_path))
    assert source.settings("ijepa")["position_noise_std"] == 0
    assert "position_noise_std" not in source.settings("stop_jepa")


# ---- other sizes


def test_another_grid_resizes_the_positions_as_the_encoder_itself_does(tmp_path):
    for method in METHODS:
        source = make_model(method, seed=3).eval()
        model, line = started(Source.read(saved(source, tmp_path / method)), method, image_size=[32, 40])
        images = torch.randn(2, 3, 32, 40)
        close(features(model, images), features(source, images).detach())
        assert line.endswith(": all weights are taken over; grid 6×6 → 8×10")


@pytest.mark.parametrize("channels", [1, 2, 10])
def test_an_image_whose_channels_are_all_alike_gives_the_same_features_with_any_number_of_channels(channels, tmp_path):
    source = make_model("mae", seed=3).eval()
    model, line = started(Source.read(saved(source, tmp_path)), "mae", num_channels=channels)
    one = torch.randn(2, 1, 24, 24)  # gray, but not constant
    close(features(model, one.expand(-1, channels, -1, -1)), features(source, one.expand(-1, 3, -1, -1)).detach())
    assert line.endswith(f": decoder.head starts fresh; channels 3 → {channels}")


def test_new_channels_keep_the_expected_activation():
    filters = torch.randn(64, 3, 4, 4)
    for channels in (1, 7):
        new = fit_channels(filters, channels)
        assert new.shape == (64, channels, 4, 4)
        level = torch.full((4, 4), 0.7)
        torch.testing.assert_close((new * level).sum((1, 2, 3)), (filters * level).sum((1, 2, 3)))


@pytest.mark.parametrize("patch", [(8, 8), (6, 4), (2, 2), (3, 5)])
def test_a_constant_image_gives_the_same_features_with_another_patch_size_and_other_channels(patch, tmp_path):
    source = make_model("mae", seed=3).eval()
    size = [6 * side for side in patch]  # the same grid
    model, line = started(
        Source.read(saved(source, tmp_path)), "mae", image_size=size, patch_size=list(patch), num_channels=2
    )
    for level in (-1.5, 0.3, 2.0):
        old = features(source, torch.full((1, 3, 24, 24), level)).detach()
        close(features(model, torch.full((1, 2, *size), level)), old)
    assert f"patch 4×4 → {patch[0]}×{patch[1]}; channels 3 → 2" in line


def test_larger_patches_answer_to_a_resized_image_as_the_old_ones_to_the_image():
    filters, images = torch.randn(8, 3, 4, 4), torch.randn(5, 3, 4, 4)
    larger = torch.nn.functional.interpolate(images, size=(7, 9), mode="bilinear", antialias=True)
    new = fit_patch(filters, (7, 9)).float()
    expected = torch.einsum("dcij,bcij->bd", filters, images)
    torch.testing.assert_close(torch.einsum("dcij,bcij->bd", new, larger), expected, atol=1e-4, rtol=0)


def test_smaller_patches_are_the_least_squares_solution_over_white_noise_and_a_constant():
    filters = torch.randn(8, 3, 6, 6, dtype=torch.float64)
    new = fit_patch(filters, (4, 4))
    basis = torch.eye(36, dtype=torch.float64).reshape(36, 1, 6, 6)
    resize = torch.nn.functional.interpolate(basis, size=(4, 4), mode="bilinear", antialias=True).flatten(1)  # [36, 16]
    best = torch.linalg.lstsq(resize, filters.reshape(24, 36).T).solution.T
    added = new.reshape(24, 16) - best
    torch.testing.assert_close(added, added[:, :1].expand(-1, 16))  # one number for each filter, for constant patches
    torch.testing.assert_close(new.sum((2, 3)), filters.sum((2, 3)))


# ---- what does not fit


def foreign(tmp_path, part):
    model = Dinov2Model(Dinov2Config(**SIZES, use_swiglu_ffn=part == "SwiGLU"))
    model.save_pretrained(tmp_path)
    if part == "RoPE":
        text = (tmp_path / "config.json").read_text()
        (tmp_path / "config.json").write_text(text.replace('"dinov2"', '"dinov3_vit"'))
    if part == "a distillation token":
        state = load_file(tmp_path / "model.safetensors")
        save_file(state | {"dist_token": torch.zeros(1, 1, 32)}, tmp_path / "model.safetensors")
    return str(tmp_path)


@pytest.mark.parametrize("part", ["SwiGLU", "RoPE", "a distillation token"])
def test_what_our_encoders_do_not_have_is_refused_by_name(part, tmp_path):
    with pytest.raises(ValueError, match=rf"^init_from: .* has {part}.* no encoder here has") as error:
        Source.read(foreign(tmp_path, part))
    assert "\n" not in str(error.value)


def test_settings_that_do_not_fit_are_named_with_the_tensors_and_what_would_fit(tmp_path):
    source = Source.read(saved(make_model("mae"), tmp_path))
    with pytest.raises(ValueError) as error:
        source.check(make_config("mae", hidden_size=64, use_cls_token=False))
    assert str(error.value) == (
        f"init_from {tmp_path} does not fit the settings: embeddings.cls_token (1×1×32, needed none), "
        "embeddings.projection.bias (32, needed 64), layers.0.norm1.weight (32, needed 64) and 25 more; "
        "--hidden_size 32 --intermediate_size 128 --use_cls_token true would fit, or leave out size and these settings"
    )
    with pytest.raises(ValueError, match="though its tensors do; --num_attention_heads 2 would fit"):
        source.check(make_config("mae", num_attention_heads=4))


def test_a_cls_token_is_no_start_for_a_method_without_one(tmp_path):
    with pytest.raises(ValueError, match="CLS token, and method stop_jepa takes none .use_cls_token.*--target_from"):
        Source.read(saved(make_model("mae"), tmp_path)).settings("stop_jepa")


@pytest.mark.parametrize("name", ["no/such/folder", "empty", "text.pth"])
def test_what_is_no_checkpoint_is_one_line(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.pth").write_text("no weights")
    with pytest.raises(ValueError, match="^init_from: ") as error:
        Source.read(name)
    assert "\n" not in str(error.value)
