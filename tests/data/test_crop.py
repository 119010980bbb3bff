"""Boxes against their definition, crops against PIL by hand."""

import io

import numpy as np
import pytest
import torch
from PIL import Image

from hf_mim.data import CenterCrop, RandomCrop, WholeImage, load_images
from hf_mim.data.crop import crop_rng, load_crop
from hf_mim.models.pixels import draft_reduction


def boxes(crop, width, height, size, count=4000):
    """[count, 4]"""
    return np.array([crop.box(width, height, size, crop_rng(0, 0, key)) for key in range(count)])


def sides(found):
    return found[:, 2] - found[:, 0], found[:, 3] - found[:, 1]


def plain(image, box, size):
    """Full decode, crop, bicubic resize with antialiasing: int [3, h, w]."""
    cropped = image.convert("RGB").crop(box).resize(size[::-1], Image.Resampling.BICUBIC)
    return np.asarray(cropped).transpose(2, 0, 1).astype(int)


def test_area_and_aspect_follow_their_ranges():
    """On a large square image nearly every first try fits: area is uniform, aspect log-uniform, as asked."""
    w, h = sides(boxes(RandomCrop(scale=(0.2, 0.6), ratio=(3 / 4, 4 / 3)), 1000, 1000, (224, 224)))
    area, aspect = w * h / 1e6, np.log(w / h) / np.log(4 / 3)
    assert area.min() > 0.199 and area.max() < 0.601
    assert abs(area.mean() - 0.4) < 0.006 and abs(area.std() - 0.4 / 12**0.5) < 0.004
    assert abs(aspect).max() < 1.01
    assert abs(aspect.mean()) < 0.03 and abs(aspect.std() - 2 / 12**0.5) < 0.02


def test_places_are_uniform_and_reach_every_border():
    found = boxes(RandomCrop(scale=(0.25, 0.25), ratio=(1, 1)), 20, 20, (8, 8))
    assert set(zip(*sides(found), strict=True)) == {(10, 10)}
    for places in (found[:, 0], found[:, 1]):
        counts = np.bincount(places, minlength=11)
        assert len(counts) == 11 and counts.min() > 290 and counts.max() < 440  # 364 expected, deviation 18


def test_an_image_too_narrow_for_the_ratio_gives_its_centre():
    """Ten tries fail; then the largest box within the ratio, as torchvision's."""
    assert set(map(tuple, boxes(RandomCrop(scale=(1, 1)), 400, 100, (8, 8), 50))) == {(134, 0, 267, 100)}
    assert set(map(tuple, boxes(RandomCrop(scale=(1, 1)), 100, 400, (8, 8), 50))) == {(0, 134, 100, 267)}


def test_ratio_is_relative_to_a_rectangular_target():
    w, h = sides(boxes(RandomCrop(scale=(0.1, 0.3)), 1000, 1000, (100, 200)))
    aspect = w / h
    assert aspect.min() > 2 * 0.74 and aspect.max() < 2 * 1.35
    assert abs(np.log(aspect / 2).mean()) < 0.01


def test_boxes_stay_inside_tiny_images():
    for width, height in ((1, 1), (1, 7), (3, 2), (5, 500)):
        found = boxes(RandomCrop(), width, height, (32, 32), 200)
        assert found.min() >= 0 and (found[:, 2] <= width).all() and (found[:, 3] <= height).all()
        assert min(map(min, sides(found))) >= 1


def test_centre_crops_are_centred_with_the_aspect_of_the_target():
    rng = crop_rng(0, 0, 0)
    assert CenterCrop().box(400, 300, (224, 224), rng) == (50, 0, 350, 300)
    assert CenterCrop(0.5).box(400, 300, (224, 224), rng) == (125, 75, 275, 225)
    assert CenterCrop().box(400, 300, (100, 200), rng) == (0, 50, 400, 250)
    assert WholeImage().box(400, 300, (224, 224), rng) == (0, 0, 400, 300)


def test_the_same_key_gives_the_same_box_and_any_other_key_another():
    def box(seed, epoch, key):
        return RandomCrop().box(1000, 800, (32, 32), crop_rng(seed, epoch, key))

    assert box(1, 2, 3) == box(1, 2, 3)
    assert len({box(1, 2, 3), box(0, 2, 3), box(1, 0, 3), box(1, 2, 0), box(12, 3, 3), box(1, 23, 3)}) == 6


@pytest.mark.parametrize("size", [(24, 24), (16, 40), (90, 30)])
def test_crops_equal_plain_ones_within_a_grey_level(picture, size):
    image = picture(131, 97)
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    for key in range(20):
        box = RandomCrop().box(131, 97, size, crop_rng(0, 0, key))
        found = load_crop(buffer.getvalue(), RandomCrop(), size, 3, crop_rng(0, 0, key))
        assert found.dtype == torch.uint8 and found.shape == (3, *size) and found.is_contiguous()
        assert np.abs(found.numpy() - plain(image, box, size)).mean() < 0.5


def test_the_whole_image_equals_what_the_image_processor_makes(picture):
    from transformers import ViTImageProcessor

    image = picture(97, 131)
    size = {"height": 32, "width": 48}
    processor = ViTImageProcessor(size=size, resample=Image.Resampling.BICUBIC, do_normalize=False, do_rescale=False)
    expected = np.asarray(processor(image)["pixel_values"][0]).astype(int)
    found = load_crop(image, WholeImage(), (32, 48), 3, crop_rng(0, 0, 0))
    assert np.abs(found.numpy() - expected).mean() < 0.5


def test_ten_bands_are_cropped_each_as_a_grey_image():
    bands = np.random.RandomState(0).randint(0, 256, (40, 50, 10), dtype=np.uint8)
    box = RandomCrop().box(50, 40, (16, 24), crop_rng(0, 0, 7))
    found = load_crop(bands, RandomCrop(), (16, 24), 10, crop_rng(0, 0, 7)).numpy()
    for band in range(10):
        expected = Image.fromarray(bands[..., band]).crop(box).resize((24, 16), Image.Resampling.BICUBIC)
        assert np.abs(found[band].astype(int) - np.asarray(expected)).mean() < 0.5


def test_draft_leaves_more_pixels_than_the_crop_needs():
    assert draft_reduction((0, 0, 671, 2000), (224, 224)) == 1
    assert draft_reduction((0, 0, 672, 672), (224, 224)) == 2
    assert draft_reduction((10, 10, 10 + 8 * 336, 10 + 9 * 336), (224, 224)) == 8


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("size", [32, 64, 96, 224])
def test_crops_of_photographs_equal_plain_ones(shared_data, size, channels):
    """Within 1 grey level where the JPEG was decoded in full, 4 where at a fraction (`draft`)."""
    errors = {False: [0.0], True: [0.0]}
    for key, row in enumerate(load_images(shared_data / "jpeg_fullsize")):
        image = Image.open(row["image"]["path"])
        box = RandomCrop().box(*image.size, (size, size), crop_rng(3, 0, key))
        found = load_crop(row["image"], RandomCrop(), (size, size), channels, crop_rng(3, 0, key)).numpy()
        if channels == 1:
            expected = np.asarray(image.convert("L").crop(box).resize((size, size), Image.Resampling.BICUBIC))[None]
        else:
            expected = plain(image, box, (size, size))
        drafted = draft_reduction(box, (size, size)) > 1
        errors[drafted].append(np.abs(found.astype(int) - expected.astype(int)).mean())
    assert len(errors[True]) > (1 if size < 224 else 0)
    assert max(errors[False]) < 1 and max(errors[True]) < 4


def test_evaluation_crops_are_never_drafted(picture):
    buffer = io.BytesIO()
    picture(800, 600).save(buffer, "JPEG", quality=95)
    image = Image.open(io.BytesIO(buffer.getvalue()))
    for crop, box in ((WholeImage(), (0, 0, 800, 600)), (CenterCrop(), (100, 0, 700, 600))):
        found = load_crop(buffer.getvalue(), crop, (32, 32), 3, crop_rng(0, 0, 0)).numpy()
        assert np.abs(found - plain(image, box, (32, 32))).mean() < 0.2


@pytest.mark.parametrize(
    "make, words",
    [
        (lambda: RandomCrop(scale=(0.5, 0.2)), "scale"),
        (lambda: RandomCrop(scale=(0.5, 1.2)), "scale"),
        (lambda: RandomCrop(ratio=(0, 1)), "ratio"),
        (lambda: CenterCrop(1.5), "fraction"),
    ],
)
def test_impossible_crops_are_refused_by_name(make, words):
    with pytest.raises(ValueError, match=words):
        make()
