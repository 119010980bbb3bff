"""Pictures of a pretraining task show what the model saw and said."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from pictured import drawn, images, viewer
from tiny import METHODS

from hf_mim import methods
from hf_mim.models.masking import gather
from hf_mim.models.pixels import ValueRange
from hf_mim.models.vit import patchify
from hf_mim.visualize import plot_masks, plot_noise, plot_prediction, plot_reconstructions, predictions
from hf_mim.visualize.pictures import plot_overview
from hf_mim.visualize.task import Task

FEATURE_METHODS = [name for name in METHODS if not methods.get(name).predicts_pixels]


@pytest.mark.parametrize("norm_pix_loss", [True, False])
@pytest.mark.parametrize(("dtype", "top"), [(np.uint8, 256), (np.uint16, 4096)])
def test_a_perfect_models_reconstruction_equals_the_image(monkeypatch, norm_pix_loss, dtype, top):
    value_range = None if dtype == np.uint8 else ValueRange((0.0,), (float(top),), "uint16")
    view, rows = viewer(norm_pix_loss=norm_pix_loss, value_range=value_range), drawn(monkeypatch, predictions)
    shown, forward = images(2, dtype=dtype, top=top), view.pretraining.forward

    def oracle(*args, **kwargs):
        true = forward(*args, **kwargs)
        return SimpleNamespace(predictions=true.targets, target_ids=true.target_ids)

    monkeypatch.setattr(view.pretraining, "forward", oracle)
    plot_reconstructions(view, shown)
    np.testing.assert_allclose(rows[0]["prediction and visible patches"][..., :3], rows[0]["original"], atol=2e-3)
    assert np.ptp(rows[0]["original"]) > 0.9


def test_visible_patches_are_the_images_and_the_hidden_ones_predictions(monkeypatch):
    view, rows = viewer(), drawn(monkeypatch, predictions)
    plot_reconstructions(view, images())
    seen, predicted = (rows[0][name] for name in ("what the encoder sees", "prediction of hidden patches"))
    visible = seen[..., 3] > 0
    assert visible.mean() == 0.25 and (visible == (predicted[..., 3] == 0)).all()
    pasted, original = rows[0]["prediction and visible patches"][..., :3], rows[0]["original"]
    np.testing.assert_allclose(pasted[visible], original[visible], atol=1e-5)
    assert np.abs(pasted[~visible] - original[~visible]).mean() > 0.02


def test_a_patch_that_a_pass_leaves_out_is_not_shown_as_visible(monkeypatch):
    """The halves of an odd checkerboard are unequal, so SymMIM neither sees nor predicts one of these 9 patches."""
    view, rows = viewer("sym_mim", image_size=(12, 12)), drawn(monkeypatch, predictions)
    plot_reconstructions(view, images(size=(12, 12)))
    names = "what the encoder sees", "prediction of hidden patches", "prediction and visible patches"
    seen, predicted, both = (rows[0][name][..., 3] > 0 for name in names)
    assert (both == seen | predicted).all() and both.mean() == pytest.approx(8 / 9)


@pytest.mark.parametrize("method", METHODS)
def test_a_painted_mask_reaches_the_model_exactly_as_painted(monkeypatch, method):
    view, asked = viewer(method), {}
    hidden = torch.zeros(4, 6, dtype=torch.bool)
    hidden[1:3, 2:5] = True
    hidden[3, 0] = True
    forward = view.pretraining.forward
    monkeypatch.setattr(
        view.pretraining, "forward", lambda *args, **inputs: asked.update(inputs) or forward(*args, **inputs)
    )
    plot = plot_reconstructions if methods.get(method).predicts_pixels else plot_prediction
    plot(view, images(3), hidden=hidden)
    for image in range(3):
        assert asked["target_ids"][image].flatten().tolist() == hidden.flatten().nonzero().flatten().tolist()
        assert asked["context_ids"][image].tolist() == (~hidden).flatten().nonzero().flatten().tolist()


@pytest.mark.parametrize("hidden", [torch.zeros(4, 6), torch.ones(4, 6), torch.ones(3, 6)])
def test_a_mask_that_hides_all_or_nothing_or_has_another_shape_is_refused(hidden):
    with pytest.raises(ValueError, match="hidden must"):
        Task.make("reconstructions", viewer(), images(), hidden=hidden.bool())


@pytest.mark.parametrize("method", FEATURE_METHODS)
def test_the_map_of_predictions_has_the_cosine_of_each_target_patch(monkeypatch, method):
    view = viewer(method)
    task = Task.make("prediction", view, images(2))
    output = task.predict()
    found, predicted = task.targets().flatten(1), task.by_patch(output.predictions)
    ids, values = output.target_ids.flatten(1), output.predictions.flatten(1, -2)
    for image in range(2):
        assert found[image].nonzero().flatten().tolist() == sorted(set(ids[image].tolist()))
        for patch in set(ids[image].tolist()):  # the mean over the blocks that hold the patch
            torch.testing.assert_close(predicted[image, patch], values[image][ids[image] == patch].mean(dim=0))


@pytest.mark.parametrize("method", FEATURE_METHODS)
def test_a_perfect_prediction_has_cosine_1_and_a_constant_one_0(monkeypatch, method):
    view, scales = viewer(method), []
    forward, maps = view.pretraining.forward, Task.maps
    monkeypatch.setattr(
        Task, "maps", lambda task, values, scale: scales.append((task, values)) or maps(task, values, scale)
    )

    def answer(change):
        def changed(**inputs):
            output = forward(**inputs)
            output.predictions = change(output.targets)
            return output

        monkeypatch.setattr(view.pretraining, "forward", changed)
        plot_prediction(view, images(3))
        task, values = scales.pop()
        return values[task.targets().flatten(1)]

    assert answer(lambda targets: targets).min() > 0.999
    constant = answer(lambda targets: 3 * targets.mean(dim=tuple(range(targets.ndim - 1))).expand_as(targets))
    assert constant.mean().abs() < 0.1


def test_the_nearest_patch_is_never_the_patch_itself(monkeypatch):
    """Two equal images: by features without places, each patch's nearest other one is its copy in the other image."""
    view, rows = viewer("latent_mim", patch_gap=0), drawn(monkeypatch, predictions)
    picture = images(1)[0]
    forward = view.pretraining.forward

    def coloured(**inputs):  # features are the colours themselves
        output = forward(**inputs)
        output.targets = output.predictions = gather(patchify(inputs["pixel_values"], (4, 4)), output.target_ids)
        return output

    monkeypatch.setattr(view.pretraining, "forward", coloured)
    plot_prediction(view, [picture, picture], hidden=torch.arange(24).view(4, 6) % 2 == 0)
    replaced, original = rows[0]["nearest patch to each prediction"], rows[0]["image"]
    np.testing.assert_allclose(replaced[..., :3], original, atol=1e-6)
    alone = view.read([picture])
    plot_prediction(view, [picture], hidden=torch.arange(24).view(4, 6) % 2 == 0)
    assert np.abs(rows[1]["nearest patch to each prediction"][0, ..., :3] - alone.shown()[0]).max() > 0.05


def test_the_spread_over_noise_is_larger_for_larger_noise(monkeypatch):
    spreads = []
    maps = Task.maps
    monkeypatch.setattr(Task, "maps", lambda task, values, scale: spreads.append(values) or maps(task, values, scale))
    for std in (0.01, 1.0):
        plot_noise(viewer("stop_jepa", position_noise_std=std), images(2), draws=4)
    assert 0 < 10 * spreads[0].mean() < spreads[1].mean()
    with pytest.raises(ValueError, match="noise needs a model with noise"):
        plot_noise(viewer("stop_jepa", position_noise_std=0.0), images(1))


@pytest.mark.parametrize("method", METHODS)
def test_masks_are_shown_as_drawn_with_their_frequency(monkeypatch, method):
    view, rows = viewer(method), drawn(monkeypatch, predictions)
    shares = []
    on_patches = predictions.on_patches
    monkeypatch.setattr(
        predictions, "on_patches", lambda values, *rest: shares.append(values) or on_patches(values, *rest)
    )
    plot_masks(view, images(), draws=3)
    seen, predicted = shares[0]
    assert rows[0]["seen by the encoder"].shape[0] == 3
    if method in ("mae", "latent_mim"):  # every patch is one or the other, a quarter is seen
        torch.testing.assert_close(seen + predicted, torch.ones(24))
        assert abs(seen.mean() - 0.25) < 0.01 and (seen - 0.25).abs().max() < 0.1
    else:
        assert ((seen + predicted) <= 1).all() and predicted.min() > 0


@pytest.mark.parametrize("method", METHODS)
def test_pictures_are_equal_from_run_to_run_and_draw_nothing_from_the_callers_random_numbers(method):
    plot = plot_reconstructions if methods.get(method).predicts_pixels else plot_prediction
    torch.manual_seed(1)
    first = plot(viewer(method), images())._repr_png_()
    torch.manual_seed(2)
    shown = viewer(method)
    state = torch.get_rng_state()
    assert plot(shown, images())._repr_png_() == first
    assert torch.equal(torch.get_rng_state(), state)


def test_a_picture_that_a_model_cannot_give_is_refused():
    with pytest.raises(ValueError, match="reconstructions needs a method that predicts pixels"):
        plot_reconstructions(viewer("latent_mim"), images())
    with pytest.raises(ValueError, match="prediction needs a method that predicts features"):
        plot_prediction(viewer("mae"), images())
    alone = viewer("mae")
    alone.pretraining = None
    for plot in (plot_reconstructions, plot_prediction, plot_masks, plot_noise, plot_overview):
        with pytest.raises(ValueError, match="needs the whole pretraining model, and tiny is an encoder alone"):
            plot(alone, images())


def test_each_modality_is_drawn_by_its_own_bands_and_masks():
    of_two = viewer("interactive_mim", num_channels=3, modalities={"luma": 1, "chroma": 2})
    title, rows, note = plot_reconstructions(of_two, images(2)).drawn[:3]
    task = Task.make("reconstructions", of_two, images(2))
    assert "75%" in title and "Shown bands: luma 1; chroma 2." in note
    assert [row.label for row in rows[::3]] == ["luma", "chroma"]
    for number, (whole, seen, predicted) in enumerate((rows[:3], rows[3:])):
        shown = task.view.of_bands([number + 1])
        hidden = task.patches(task.masks["target_ids"][:, number])
        for index, pixels in enumerate(shown.shown()):
            np.testing.assert_array_equal(whole.pictures[index], pixels)
            opaque = ~task.pixels_of(hidden)[index].numpy()
            np.testing.assert_array_equal(seen.pictures[index][..., 3], opaque)
            assert predicted.pictures[index][..., 3].all()
            np.testing.assert_allclose(predicted.pictures[index][opaque][:, :3], pixels[opaque], atol=1e-6)


def test_a_mask_by_hand_hides_the_same_patches_of_each_modality():
    of_two = viewer("interactive_mim", num_channels=3, modalities={"luma": 1, "chroma": 2})
    hidden = torch.zeros(of_two.grid, dtype=torch.bool)
    hidden[0] = True
    rows, note = plot_reconstructions(of_two, images(1), hidden=hidden).drawn[1:3]
    assert "mask of its own" not in note
    np.testing.assert_array_equal(rows[1].pictures[0][..., 3], rows[4].pictures[0][..., 3])


def test_the_note_on_modalities_says_what_violet_is_where_one_lacks_data():
    of_two = viewer("interactive_mim", num_channels=3, modalities={"luma": 1, "chroma": 2})
    whole = Task.make("reconstructions", of_two, images(1))
    pixels, gone = whole.reconstruct()
    assert "Violet" not in predictions._rows_of_modalities(whole, pixels, gone)[1]
    whole.view.pixels[:, 1] = torch.nan
    assert predictions._rows_of_modalities(whole, pixels, gone)[1].endswith(" Violet: no data.")
