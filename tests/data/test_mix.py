"""Mixing against the formulas written out image by image; erasing against its stated shares."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from hf_mim.data.mix import (
    MixAugment,
    cutmix,
    cutmix_box,
    mixup,
    random_erase,
    soft_targets,
    weight_outside,
)

MEAN, STD = [0.4, 0.5, 0.6], [0.2, 0.25, 0.3]


def normalized(images):
    mean, std = (torch.tensor(x).view(1, 3, 1, 1) for x in (MEAN, STD))
    return (images.float() / 255 - mean) / std


class Logits(nn.Module):
    """A classifier that keeps what it was given."""

    def forward(self, pixel_values, **kwargs):
        self.seen, self.kwargs = pixel_values, kwargs
        return {"logits": pixel_values.flatten(1)[:, :7]}


def test_mixup_is_the_weighted_mean_of_an_image_and_its_neighbour():
    images = torch.randn(5, 3, 4, 6)
    mixed = mixup(images, 0.3)
    for i in range(5):
        torch.testing.assert_close(mixed[i], 0.3 * images[i] + 0.7 * images[i - 1])


def test_cutmix_pastes_the_neighbours_box_and_lambda_is_the_share_of_own_pixels():
    images = torch.arange(4.0).view(4, 1, 1, 1).expand(4, 2, 9, 11)
    for seed, weight in enumerate(np.linspace(0, 1, 50)):
        torch.manual_seed(seed)
        box = cutmix_box(9, 11, float(weight))
        mixed = cutmix(images, box)
        for i in range(4):
            assert set(mixed[i].unique().tolist()) <= {float(i), float((i - 1) % 4)}
            own = (mixed[i, 0] == i).double().mean().item()
            assert own == pytest.approx(weight_outside(box, 9, 11), abs=1e-12)


def test_cutmix_boxes_inside_the_image_have_the_area_asked_for_and_every_pixel_is_reached():
    torch.manual_seed(0)
    hits = torch.zeros(40, 80)
    for _ in range(500):
        left, top, right, bottom = cutmix_box(40, 80, 0.75)  # sides halved
        hits[top:bottom, left:right] += 1
        if top > 0 and bottom < 40 and left > 0 and right < 80:
            assert bottom - top == 20 and right - left == 40
    assert hits.min() > 0


def test_soft_targets_are_smoothed_then_mixed_with_the_neighbours():
    labels, smoothing, weight = torch.tensor([2, 0, 2, 1]), 0.1, 0.3
    targets = soft_targets(labels, 4, smoothing, weight)
    for i in range(4):
        for k in range(4):
            own, other = (0.1 / 4 + (0.9 if k == labels[j] else 0) for j in (i, i - 1))
            assert targets[i, k].item() == pytest.approx(0.3 * own + 0.7 * other, abs=1e-6)


def test_random_erase_touches_the_stated_share_of_images_and_area():
    torch.manual_seed(0)
    images = torch.full((4000, 1, 32, 32), 7.0)
    changed = random_erase(images, 0.25) != 7
    erased = changed.flatten(1).any(1)
    assert erased.double().mean().item() == pytest.approx(0.25, abs=4 * math.sqrt(0.25 * 0.75 / 4000))
    rectangles = changed[erased][:, 0]
    rows, columns = rectangles.any(2), rectangles.any(1)
    assert torch.equal(rectangles, rows[:, :, None] & columns[:, None, :])  # each is a rectangle, erased in full
    area = rectangles.double().mean((1, 2))
    assert area.min() > 0.012 and area.max() < 0.36  # .02 to 1/3, sides rounded to pixels
    assert area.mean().item() == pytest.approx((0.02 + 1 / 3) / 2, abs=0.015)
    ratio = (rows.sum(1) / columns.sum(1)).log()
    assert abs(ratio.mean()) < 0.1 and ratio.abs().max() < math.log(1 / 0.3) + 0.4


def test_erased_pixels_are_unit_noise_and_the_others_stay():
    torch.manual_seed(0)
    noise = random_erase(torch.full((2000, 3, 16, 16), 99.0), 1.0)
    noise = noise[noise != 99]
    assert abs(noise.mean()) < 0.01 and abs(noise.std() - 1) < 0.01
    assert torch.equal(random_erase(images := torch.randn(8, 3, 16, 16), 0.0), images)


def test_mean_of_lambda_and_share_of_cutmix_are_those_of_the_recipe():
    torch.manual_seed(0)
    augment = MixAugment(MEAN, STD, mixup=0.8, cutmix=1.0, random_erase=0.0, flip=0.0)
    images = torch.randint(0, 256, (2, 3, 16, 16), dtype=torch.uint8)
    own, pasted, mixup_weights = normalized(images), 0, []
    for _ in range(1500):
        mixed = augment(images)
        if ((mixed - own).abs().amax((0, 1)) < 1e-5).any() or augment.weight == 0:
            pasted += 1
        else:
            mixup_weights.append(augment.weight)
    assert pasted / 1500 == pytest.approx(0.5, abs=0.06)
    weights = torch.tensor(mixup_weights)
    assert weights.mean().item() == pytest.approx(0.5, abs=0.05)
    assert weights.var().item() == pytest.approx(1 / (4 * (2 * 0.8 + 1)), abs=0.012)  # of Beta(.8, .8)


def test_without_randomness_training_is_only_normalisation_and_cross_entropy():
    augment = MixAugment(MEAN, STD, 0, 0, 0, 0, flip=0)
    images, labels = torch.randint(0, 256, (4, 3, 8, 8), dtype=torch.uint8), torch.tensor([1, 2, 0, 6])
    torch.testing.assert_close(augment(images), normalized(images))
    logits = torch.randn(4, 7)
    torch.testing.assert_close(augment.loss({"logits": logits}, labels), F.cross_entropy(logits, labels))


def test_the_loss_belongs_to_the_mixture_that_the_model_saw():
    augment, model = MixAugment(MEAN, STD, mixup=0.8, cutmix=0, random_erase=0, flip=0), Logits()
    augment.attach(model, option=3)
    images, labels = torch.randint(0, 256, (4, 3, 8, 8), dtype=torch.uint8), torch.tensor([1, 2, 0, 6])
    outputs, own = model(pixel_values=images), normalized(images)
    weight = ((model.seen - own.roll(1, 0)) / (own - own.roll(1, 0)))[..., 3, 3].nanmedian()  # λ, from the pixels
    targets = 0.9 * F.one_hot(labels, 7) + 0.1 / 7
    targets = weight * targets + (1 - weight) * targets.roll(1, 0)
    expected = -(targets * outputs["logits"].log_softmax(-1)).sum(-1)
    assert 0 < weight < 1 and model.kwargs == {"option": 3}
    torch.testing.assert_close(augment.loss(outputs, labels), expected.mean())
    torch.testing.assert_close(augment.loss(outputs, labels, num_items_in_batch=torch.tensor(16)), expected.sum() / 16)


def test_in_eval_mode_images_are_normalised_and_targets_hard_even_after_a_mixed_batch():
    augment, model = MixAugment(MEAN, STD), Logits()
    handle = augment.attach(model)
    images, labels = torch.randint(0, 256, (4, 3, 8, 8), dtype=torch.uint8), torch.tensor([1, 2, 0, 6])
    model.train()(pixel_values=images)
    outputs = model.eval()(pixel_values=images)
    torch.testing.assert_close(model.seen, normalized(images))
    torch.testing.assert_close(augment.loss(outputs, labels), F.cross_entropy(outputs["logits"], labels))
    handle.remove()
    model(pixel_values=images)
    assert model.seen.dtype == torch.uint8


class Told(Logits):
    """It also takes where images have data."""

    def forward(self, pixel_values, valid_pixels=None):
        self.valid = valid_pixels
        return super().forward(pixel_values)


@pytest.mark.parametrize("mixing", [{"mixup": 1.0, "cutmix": 0}, {"mixup": 0, "cutmix": 1.0}], ids=["mixup", "cutmix"])
def test_a_mixture_has_data_where_one_of_its_images_has(mixing):
    torch.manual_seed(2)
    images = torch.randint(0, 256, (4, 3, 8, 8)).float()
    images[:2, 2] = torch.nan  # the first two lack a channel, so that only the second has a neighbour without it
    augment = MixAugment(MEAN, STD, **mixing, random_erase=0, nodata=True)
    augment.attach(model := Told())
    model.train()(pixel_values=images)
    assert model.seen.isfinite().all() and model.valid[:, :2].all() and model.valid[3].all()
    assert not model.valid[1, 2].any() and 0 < 1 - augment.weight
    if "cutmix" in mixing and mixing["cutmix"]:  # the box of the first is from the last image, that of the third not
        for row, share in ((0, 1 - augment.weight), (2, augment.weight)):
            assert model.valid[row, 2].float().mean() == pytest.approx(share)
    else:
        assert model.valid[[0, 2]].all()
    model.eval()(pixel_values=images)
    assert torch.equal(model.valid, ~images.isnan()) and (model.seen[:2, 2] == 0).all()
    augment.attach(plain := Logits())
    plain(pixel_values=images)
    assert plain.seen.isfinite().all() and "valid_pixels" not in plain.kwargs


def test_same_generator_state_same_batch():
    images = torch.randint(0, 256, (6, 3, 16, 16), dtype=torch.uint8)
    results = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        results.append(MixAugment(MEAN, STD)(images))
    assert torch.equal(results[0], results[1]) and not torch.equal(results[0], results[2])


@pytest.mark.parametrize(
    "bad", [{"mixup": -1}, {"cutmix": float("nan")}, {"label_smoothing": 1}, {"random_erase": 2}, {"flip": -1}]
)
def test_values_out_of_range_are_named(bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        MixAugment(MEAN, STD, **bad)
