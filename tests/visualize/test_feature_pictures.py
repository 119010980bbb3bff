"""Pictures of features show the features."""

import numpy as np
import pytest
import torch
from pictured import drawn, images, viewer

from hf_mim.visualize import (
    features,
    neighbours,
    plot_attention,
    plot_clusters,
    plot_map,
    plot_nearest,
    plot_pca,
    plot_prediction,
    plot_reconstructions,
    plot_similarity,
)
from hf_mim.visualize.features import ENDS, pca_colors, place_share
from hf_mim.visualize.pictures import plot_overview


def known_tokens(width=16):
    """Tokens `[2, 24, D]` that are known colours on three orthogonal directions, of falling variance."""
    random = torch.Generator().manual_seed(0)
    values = torch.randn(48, 3, generator=random)
    values = torch.linalg.qr(values - values.mean(dim=0))[0]  # uncorrelated, so that these are the components
    basis = torch.linalg.qr(torch.randn(width, width, generator=random))[0][:3]
    basis = basis * basis.gather(1, basis.abs().argmax(dim=1, keepdim=True)).sign()
    low, high = np.percentile(values, ENDS, axis=0)
    colors = ((values.numpy() - low) / (high - low)).clip(0, 1)
    tokens = values * torch.tensor([4.0, 2.0, 1.0]) @ basis + 3.0
    return torch.from_numpy(colors).float().unflatten(0, (2, 24)), tokens.unflatten(0, (2, 24))


def test_the_pca_of_tokens_with_a_known_basis_gives_the_known_colours():
    colors, tokens = known_tokens()
    torch.testing.assert_close(pca_colors(tokens), colors, atol=1e-4, rtol=0)


def test_all_images_share_one_basis():
    _, tokens = known_tokens()
    swapped = pca_colors(tokens.flip(0)).flip(0)
    torch.testing.assert_close(pca_colors(tokens), swapped, atol=1e-4, rtol=0)
    assert not torch.allclose(pca_colors(tokens[:1])[0], pca_colors(tokens)[0], atol=0.02)


def test_the_foreground_alone_gets_colours():
    _, tokens = known_tokens()
    tokens[:, :6] += 40  # a few patches that differ from all others in the same way
    colors = pca_colors(tokens, foreground=0.5)
    assert colors[:, :6].isfinite().all() and colors[:, 6:].isnan().all()
    with pytest.raises(ValueError, match="leaves"):
        pca_colors(tokens[:, :7], foreground=0.999)


def test_the_share_of_the_place_is_0_for_noise_and_1_for_features_of_the_place_alone():
    noise = torch.randn(8, 24, 16, generator=torch.Generator().manual_seed(0))
    assert place_share(noise) < 0.05
    assert place_share(noise[:1].expand(8, -1, -1)) == pytest.approx(1)
    assert place_share(noise + noise[:1]) == pytest.approx(0.5, abs=0.1)


def note_of(figure):
    return figure.drawn[2]


@pytest.mark.parametrize("plot", [plot_pca, plot_similarity, plot_clusters])
def test_a_picture_says_how_much_of_it_is_the_place_and_of_one_image_that_it_cannot_be_told(plot, monkeypatch):
    view = viewer()
    same = torch.randn(1, 24, 8, generator=torch.Generator().manual_seed(0)).expand(3, -1, -1)
    monkeypatch.setattr(type(view), "tokens", lambda self, shown: same[: len(shown)])
    assert "The place of a patch alone explains 100% " in note_of(plot(view, images(3)))
    one = note_of(plot(view, images(1)))
    assert "one image cannot tell" in one and "%" not in one and "these images" not in one


def test_without_position_features_of_the_place_alone_show_nothing(monkeypatch):
    view, rows = viewer(), drawn(monkeypatch, features)
    same = torch.randn(1, 24, 8, generator=torch.Generator().manual_seed(0)).expand(3, -1, -1)
    monkeypatch.setattr(type(view), "tokens", lambda self, shown: same)
    plot_pca(view, images(3), position=False)
    assert np.ptp(rows[0]["principal components"][..., :3]) == 0
    with pytest.raises(ValueError, match="position false needs two images"):
        plot_pca(view, images(1), position=False)


def test_similarity_is_1_at_the_marked_patch_and_the_cosine_elsewhere(monkeypatch):
    view, found = viewer(), []
    on_patches = features.on_patches
    monkeypatch.setattr(features, "on_patches", lambda values, *rest: found.append(values) or on_patches(values, *rest))
    plot_similarity(view, images(2), patch=(2, 3))
    tokens = view.tokens(view.read(images(2)))
    expected = torch.nn.functional.cosine_similarity(tokens, tokens[0, 1 * 6 + 2], dim=-1)
    torch.testing.assert_close(found[0], expected)
    assert found[0][0, 8] == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("patch", [(0, 1), (5, 1), (1, 7), (2,)])
def test_a_patch_outside_of_the_grid_is_refused(patch):
    with pytest.raises(ValueError, match=r"patch must be row,column in 1\.\.4 and 1\.\.6"):
        plot_similarity(viewer(), images(1), patch=patch)


def test_clusters_are_the_groups_of_the_tokens(monkeypatch):
    view, rows = viewer(), drawn(monkeypatch, features)
    group = torch.arange(24) % 3
    tokens = torch.eye(3)[group] + 0.01 * torch.randn(2, 24, 3, generator=torch.Generator().manual_seed(0))
    monkeypatch.setattr(type(view), "tokens", lambda self, shown: tokens)
    plot_clusters(view, images(2), clusters=3)
    colors = rows[0]["group of each patch"][:, ::4, ::4].reshape(2, 24, 3)
    assert len(np.unique(colors.reshape(-1, 3), axis=0)) == 3
    for image in colors:
        for number in range(3):
            assert len(np.unique(image[group == number], axis=0)) == 1
    with pytest.raises(ValueError, match=r"clusters must lie in 2\.\.7"):
        plot_clusters(view, images(2), clusters=8)


@pytest.mark.parametrize("patch", [None, (2, 3)])
def test_attention_is_that_of_the_last_layer(monkeypatch, patch):
    view, found = viewer(), []
    on_patches = features.on_patches
    monkeypatch.setattr(features, "on_patches", lambda values, *rest: found.append(values) or on_patches(values, *rest))
    plot_attention(view, images(2), patch)
    assert view.encoder.model.config._attn_implementation == "sdpa"
    view.encoder.model.set_attn_implementation("eager")
    weights = view.encoder.model(
        view.encoder.preprocess(view.read(images(2)).pixels), output_attentions=True
    ).attentions[-1]
    query = 0 if patch is None else 1 + 1 * 6 + 2
    mean = weights.mean(dim=1)[:, query, 1:]
    torch.testing.assert_close(found[0], mean / mean.amax(dim=1, keepdim=True), atol=1e-5, rtol=0)
    assert len(found) == 3  # the mean, and each of two heads


def test_attention_of_a_model_without_a_cls_token_is_that_of_a_patch():
    plot_attention(viewer(use_cls_token=False), images(1))


def test_the_nearest_image_is_the_copy(monkeypatch):
    view, rows = viewer(), drawn(monkeypatch, neighbours)
    shown = images(4)
    assert "nearest of the other 4," in note_of(plot_nearest(view, [*shown, shown[1]], count=2))
    np.testing.assert_array_equal(rows[0]["image 2"][1], rows[0]["image 5"][0])
    plot_nearest(view, shown[:1], gallery=shown[::-1], count=3)
    np.testing.assert_array_equal(rows[1]["image 1"][1], rows[1]["image 1"][0])
    with pytest.raises(ValueError, match="two images"):
        plot_nearest(view, shown[:1])


def test_on_the_map_images_with_like_features_are_neighbours(monkeypatch):
    from matplotlib.axes import Axes

    found, scatter = [], Axes.scatter
    monkeypatch.setattr(Axes, "scatter", lambda axes, *xy, **more: found.append(xy) or scatter(axes, *xy, **more))
    random = np.random.default_rng(0)
    labels = np.arange(60) % 3
    points = np.eye(3)[labels] + 0.05 * random.standard_normal((60, 3))
    plot_map(points, labels=labels.tolist())
    places = np.stack(found[0], axis=1)
    distance = np.linalg.norm(places[:, None] - places, axis=2) + 9 * np.eye(60)
    assert (labels[distance.argmin(axis=1)] == labels).mean() > 0.95
    found.clear()
    figure = plot_map(points, images(60), labels.tolist(), ["a", "b$", "c"])
    thumbnails = sum(len(axes.images) for axes in figure.axes)
    assert thumbnails and len(found[0][0]) == 60 - thumbnails  # no point beside its thumbnail
    assert figure._repr_png_() == plot_map(points, images(60), labels.tolist(), ["a", "b$", "c"])._repr_png_()
    with pytest.raises(ValueError, match="5 images at least"):
        plot_map(points[:4])


@pytest.mark.parametrize("plot", [plot_pca, plot_similarity, plot_clusters, plot_attention, plot_nearest])
@pytest.mark.parametrize("channels", [1, 13])
def test_pictures_of_features_are_made_of_any_channels_and_equal_from_run_to_run(plot, channels):
    first, second = (plot(viewer(num_channels=channels), images(3, channels))._repr_png_() for _ in range(2))
    assert first == second and first.startswith(b"\x89PNG")


def test_features_that_are_not_finite_are_refused():
    view = viewer()
    next(view.encoder.model.parameters()).data.fill_(torch.nan)
    with pytest.raises(ValueError, match="not finite"):
        plot_pca(view, images(1))


@pytest.mark.parametrize("method", ["mae", "latent_mim"])
def test_an_overview_has_the_rows_of_the_task_and_of_the_features_for_the_same_images(method):
    model, few = viewer(method), images(2)
    plot_task = plot_reconstructions if model.predicts_pixels else plot_prediction
    rows = plot_overview(model, few, seed=2, position=False).drawn[1]
    expected = [*plot_task(model, few, seed=2).drawn[1], plot_pca(model, few, position=False).drawn[1][-1]]
    assert [row.label for row in rows] == [row.label for row in expected]
    for row, right in zip(rows, expected, strict=True):
        assert np.array_equal(np.stack(row.pictures), np.stack(right.pictures), equal_nan=True)
