"""Operations against PIL or numpy by hand; draws against their stated distribution."""

import random
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from datasets import Array2D, Dataset, Features, Value
from PIL import Image
from tiny_runs import image_column

from hf_mim.data import CenterCrop, ImageDataset, load_images
from hf_mim.data.randaugment import OPERATIONS, SIGNED, RandAugment, RandAugmentedImages
from hf_mim.evaluation.finetune import training_images
from hf_mim.models.pixels import ImageFormatError

FILL = (10, 120, 200)
WITHOUT_MAGNITUDE = {"auto_contrast", "equalize", "invert"}


@pytest.fixture
def image():
    noise = np.random.RandomState(0).randint(0, 256, (5, 7, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize((40, 30), Image.Resampling.BICUBIC)


def apply(name, image, strength):
    return np.asarray(OPERATIONS[name](image, strength, FILL)).astype(int)


@pytest.mark.parametrize("name", sorted(set(OPERATIONS) - WITHOUT_MAGNITUDE - {"posterize"}))
def test_at_magnitude_0_it_is_the_identity(name, image):
    assert np.array_equal(apply(name, image, 0.0), np.asarray(image))


@pytest.mark.parametrize("name", sorted(set(OPERATIONS) - WITHOUT_MAGNITUDE))
def test_a_larger_magnitude_changes_more(name, image):
    changes = [abs(apply(name, image, strength) - np.asarray(image)).mean() for strength in (0.2, 0.5, 0.9)]
    assert changes == sorted(changes) and changes[0] < changes[2]


@pytest.mark.parametrize("name", sorted(OPERATIONS))
def test_it_works_on_grey_images_at_every_magnitude(name, image):
    for strength in (-1.0, 0.5, 1.0) if name in SIGNED else (0.0, 0.5, 1.0):
        changed = OPERATIONS[name](image.convert("L"), strength, FILL[0])
        assert changed.mode == "L" and changed.size == image.size


def test_pixel_operations_follow_their_formulas(image):
    pixels = np.asarray(image).astype(int)
    assert np.array_equal(apply("invert", image, 0.9), 255 - pixels)
    assert np.array_equal(apply("posterize", image, 0.0), pixels & 0b11110000)
    assert np.array_equal(apply("posterize", image, 0.9), pixels & 0b10000000)
    assert np.array_equal(apply("solarize", image, 0.5), np.where(pixels >= 128, 255 - pixels, pixels))
    assert np.array_equal(apply("solarize_add", image, 0.9), np.where(pixels < 128, pixels + 99, pixels))
    brighter = np.clip(pixels * 1.81, 0, 255)
    assert abs(apply("brightness", image, 0.9) - brighter).max() <= 1
    luminance = np.asarray(image.convert("L")).astype(float)
    grey = np.clip(luminance[..., None] + 0.19 * (pixels - luminance[..., None]), 0, 255)
    assert abs(apply("color", image, -0.9) - grey).max() <= 1
    low, high = pixels.min((0, 1)), pixels.max((0, 1))
    assert abs(apply("auto_contrast", image, 0.9) - (pixels - low) * 255 / (high - low)).max() <= 1


def test_translations_move_by_their_share_of_the_side_and_fill_with_the_mean_colour(image):
    pixels = np.asarray(image).astype(int)
    moved = apply("translate_x", image, 0.5)  # .225 of 40: 9 pixels
    assert np.array_equal(moved[:, :31], pixels[:, 9:]) and (moved[:, 31:] == FILL).all()
    moved = apply("translate_y", image, -1 / 1.5)  # -.3 of 30: 9 pixels
    assert np.array_equal(moved[9:], pixels[:21]) and (moved[:9] == FILL).all()


def test_rotation_turns_by_30_degrees_at_the_end_of_the_scale(image):
    expected = image.rotate(30, Image.Resampling.BICUBIC, fillcolor=FILL)
    assert np.array_equal(apply("rotate", image, 1.0), np.asarray(expected))


def test_shear_moves_rows_in_proportion_to_their_place():
    stripe = np.zeros((40, 100, 3), np.uint8)
    stripe[:, 50] = 255
    sheared = apply("shear_x", Image.fromarray(stripe), 1.0)[..., 0]
    assert np.polyfit(np.arange(40), sheared.argmax(1), 1)[0] == pytest.approx(-0.3, abs=0.01)


def test_operations_and_magnitudes_are_drawn_as_stated():
    drawn = [RandAugment().draw(random.Random(key)) for key in range(6000)]
    counts = Counter(len(operations) for operations in drawn)
    for number, probability in ((0, 0.25), (1, 0.5), (2, 0.25)):
        assert counts[number] / 6000 == pytest.approx(probability, abs=0.025)
    operations = [operation for operations in drawn for operation in operations]
    names = Counter(name for name, _ in operations)
    assert set(names) == set(OPERATIONS) and len(OPERATIONS) == 15
    assert max(names.values()) < 1.3 * min(names.values())
    magnitudes = 10 * np.array([abs(strength) for _, strength in operations])
    assert magnitudes.mean() == pytest.approx(9, abs=0.03) and magnitudes.max() <= 10
    assert magnitudes.std() == pytest.approx(0.49, abs=0.02)  # of .5, clipped at 10
    signs = [strength > 0 for name, strength in operations if name in SIGNED]
    assert np.mean(signs) == pytest.approx(0.5, abs=0.04)
    assert all(strength >= 0 for name, strength in operations if name not in SIGNED)


def test_the_magnitude_without_deviation_is_the_one_given():
    augment = RandAugment(magnitude=4, std=0, num_operations=3, probability=1)
    assert {abs(strength) for _, strength in augment.draw(random.Random(0))} == {0.4}


def samples(seed, epoch, order):
    images = RandAugmentedImages(image_column(12), 24, crop=CenterCrop(), seed=seed, randaugment=RandAugment(fill=FILL))
    images.set_epoch(epoch)
    found = {index: images[index]["pixel_values"] for index in order}
    return torch.stack([found[index] for index in range(12)])


def test_each_image_is_keyed_on_seed_epoch_and_index_whatever_was_drawn_before():
    first = samples(0, 0, range(12))
    assert torch.equal(first, samples(0, 0, reversed(range(12))))
    assert not torch.equal(first, samples(0, 1, range(12))) and not torch.equal(first, samples(1, 0, range(12)))
    assert first.dtype == torch.uint8 and first.shape == (12, 3, 24, 24)


def test_with_no_operation_the_crops_are_those_of_the_plain_dataset():
    plain = ImageDataset(image_column(4), 16, num_channels=1, seed=3)
    augment = RandAugment(num_operations=0, fill=(0,))
    augmented = RandAugmentedImages(image_column(4), 16, num_channels=1, seed=3, randaugment=augment)
    for index in range(4):
        assert torch.equal(plain[index]["pixel_values"], augmented[index]["pixel_values"])


@pytest.mark.parametrize("bad", [{"magnitude": 11}, {"std": -1}, {"num_operations": -1}, {"probability": 2}])
def test_values_out_of_range_are_named(bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        RandAugment(**bad)


def test_other_channel_counts_are_refused():
    with pytest.raises(ValueError, match="1 or 3 channels, not 12; give --randaugment_magnitude 0"):
        RandAugment(fill=(0,) * 12)
    with pytest.raises(ValueError, match="fill must have 1 values"):
        RandAugmentedImages(image_column(2), 16, num_channels=1, randaugment=RandAugment())


def test_deep_images_are_refused_at_once_by_a_message_that_names_the_option():
    pixels = np.arange(2 * 64, dtype=np.uint16).reshape(2, 8, 8) * 100
    features = Features(image=Array2D((8, 8), "uint16"), label=Value("int64"))
    deep = Dataset.from_dict({"image": pixels, "label": [0, 1]}, features)
    encoder = SimpleNamespace(image_size=(8, 8), num_channels=1, mean=[0.5], value_range=None)
    with pytest.raises(ImageFormatError, match="takes 8-bit images without nodata; give --randaugment_magnitude 0"):
        training_images(load_images(deep), encoder)
    assert training_images(load_images(deep), encoder, magnitude=0)[1]["labels"] == 1
