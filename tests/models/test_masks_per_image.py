"""Several masks per image for one pass of the target encoder."""

import pytest
import torch
from passes import drawn, given_back, make
from tiny import METHODS, fields

from hf_mim.models.losses import info_nce
from hf_mim.models.masking import gather

WITH_TARGET_PASS = [method for method in METHODS if "masks_per_image" in fields(method)]
PLAIN = {"stop_jepa": {"noise_on": "both"}, "sym_mim": {"mask_pattern": "random"}}


def several(method, count=3, **changes):
    return make(method, masks_per_image=count, **PLAIN[method] | changes)


def images(count=4):
    return torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def one_mask(masks, number, count):
    """The masks of a pass → those of each image's mask `number`. What is there once per image stays."""
    return {k: v if k == "target_context_ids" else v.unflatten(0, (-1, count))[:, number] for k, v in masks.items()}


@pytest.mark.parametrize("method", WITH_TARGET_PASS)
def test_the_loss_is_the_mean_of_the_losses_of_each_mask(method):
    model, reconstruction = several(method).train(), method == "sym_mim"
    together = drawn(model, images())
    masks = given_back(together)
    assert together.context_ids.shape[0] == together.predictions.shape[0] == 12
    parts = [model(images(), **one_mask(masks, number, 3)) for number in range(3)]
    if reconstruction:  # the contrast is standardised over all masks of a batch
        loss, losses = together.metrics["reconstruction"], [part.metrics["reconstruction"] for part in parts]
    else:
        loss, losses = together.loss, [part.loss for part in parts]
    torch.testing.assert_close(loss, torch.stack(losses).mean(), rtol=1e-5, atol=0)
    for number, part in enumerate(parts):
        torch.testing.assert_close(together.targets.unflatten(0, (-1, 3))[:, number], part.targets)
        torch.testing.assert_close(together.predictions.unflatten(0, (-1, 3))[:, number], part.predictions)


@pytest.mark.parametrize("method", WITH_TARGET_PASS)
def test_the_target_encoder_sees_each_image_once_and_the_encoder_each_mask(method):
    model, seen = several(method).train(), {}
    for name in ("encoder", "target_encoder"):
        first = getattr(model, name).layers[0]
        first.register_forward_pre_hook(lambda module, args, name=name: seen.setdefault(name, []).append(len(args[0])))
    drawn(model, images())
    assert seen == {"encoder": [12], "target_encoder": [4]}


@pytest.mark.parametrize("method", WITH_TARGET_PASS)
def test_in_evaluation_mode_and_in_pictures_there_is_one_mask(method):
    model = several(method)
    assert len(drawn(model.eval(), images()).context_ids) == 4
    if hasattr(model, "reconstruct"):
        filled, mask = model.train().reconstruct(images())
        assert filled.shape == (4, 3, 32, 32) and mask.shape == (4, 1, 32, 32)


@pytest.mark.parametrize("method", WITH_TARGET_PASS)
def test_images_without_data_do_not_count_with_several_masks(method):
    model, kept = several(method).train(), images()
    masks = given_back(drawn(model, kept))
    valid = torch.ones(4, 3, 32, 32, dtype=torch.bool)
    valid[1] = False
    loss = model(kept * valid, valid_pixels=valid, **masks).metrics["error_over_constant"]
    rest = {k: v.unflatten(0, (4, -1))[[0, 2, 3]].flatten(0, 1) for k, v in masks.items()}
    expected = model(kept[[0, 2, 3]], **rest).metrics["error_over_constant"]
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=0)


def test_two_checkerboards_of_an_image_predict_each_place_once():
    for phase in ("random", "fixed"):
        model = several("sym_mim", 2, mask_pattern="checkerboard", mask_phase=phase).train()
        masks = given_back(drawn(model, images()))
        places = masks["target_ids"].unflatten(0, (4, 2)).flatten(1).sort(dim=1).values
        assert torch.equal(places, torch.arange(64).expand(4, -1))


def test_each_query_has_the_key_of_its_image(monkeypatch):
    seen = []

    def spy(*words):
        seen.extend(words)
        return info_nce(*words)

    monkeypatch.setattr("hf_mim.models.modeling_sym_mim.info_nce", spy)
    output = drawn(several("sym_mim").train(), images())
    queries, keys = seen[:2]
    assert queries.shape[0] == 12 and keys.shape[0] == 4
    expected = torch.stack([info_nce(queries[i : i + 1], keys, 0.2, i // 3) for i in range(12)]).mean()
    torch.testing.assert_close(output.metrics["contrast"], expected)


def test_picks_of_several_rows_are_those_of_each_image():
    tokens = torch.randn(3, 10, 2)
    ids = torch.randint(10, (6, 4))
    expected = torch.stack([tokens[row // 2][ids[row]] for row in range(6)])
    assert torch.equal(gather(tokens, ids), expected)
    with pytest.raises(ValueError, match="ids must have one row for each of 3 images, or several, got 4 rows"):
        gather(tokens, ids[:4])


@pytest.mark.parametrize(
    ("method", "settings", "line"),
    [
        ("stop_jepa", {"masks_per_image": 0}, "masks_per_image must be at least 1, not 0"),
        ("sym_mim", {"masks_per_image": 2, "contrast_weight": 0}, "masks_per_image must be 1 with contrast_weight 0"),
        ("sym_mim", {"masks_per_image": 3}, "masks_per_image must be 1 or 2 with mask_pattern 'checkerboard'"),
        ("mae", {"masks_per_image": 2}, "masks_per_image is an argument of stop_jepa, sym_mim, not of method mae"),
    ],
)
def test_wrong_numbers_of_masks_are_refused_in_one_line(method, settings, line):
    from hf_mim.pretraining.recipe import Recipe

    with pytest.raises(ValueError, match=f"^{line}"):
        Recipe.resolve({"method": method, "dataset": "digits"} | settings).config()
