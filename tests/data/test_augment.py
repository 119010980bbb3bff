"""Augmentation against the same thing computed by hand, image by image."""

import numpy as np
import pytest
import torch

from hf_mim.data import DeviceAugment, ImageDataset, WholeImage, channel_statistics, digits, gaussian_blur
from hf_mim.data.augment import IMAGENET_MEAN, IMAGENET_STD, keyed_uniform
from hf_mim.models.pixels import ValueRange


@pytest.fixture
def batch():
    return torch.from_numpy(np.random.RandomState(0).randint(0, 256, (64, 3, 12, 20), dtype=np.uint8))


def plain(**options):
    """Mean 0 and std 1/255, so that the output is in grey levels."""
    return DeviceAugment((0, 0, 0), (1 / 255,) * 3, **{"flip_probability": 0, **options})


def test_normalisation_is_the_mean_and_deviation_of_each_channel(batch):
    expected = (batch.numpy() / 255 - np.reshape(IMAGENET_MEAN, (3, 1, 1))) / np.reshape(IMAGENET_STD, (3, 1, 1))
    augment = DeviceAugment(flip_probability=0)
    for found in (augment(batch), augment.normalize(batch), augment.normalize(batch.float()), augment.eval()(batch)):
        assert found.dtype == torch.float32
        np.testing.assert_allclose(found, expected, atol=2e-6)


def test_normalisation_leaves_its_input_alone_and_is_undone_to_the_bit(batch):
    before, augment = batch.clone(), DeviceAugment()
    floats = batch.float()
    assert torch.equal(augment.denormalize(augment.normalize(floats)).round(), before.float())
    assert torch.equal(floats, before.float()) and torch.equal(batch, before)


def test_each_image_is_flipped_or_left_exactly(batch):
    torch.manual_seed(0)
    before, found = batch.clone(), plain(flip_probability=0.5)(batch).round().to(torch.uint8)
    same = (found == before).flatten(1).all(1)
    flipped = (found == before.flip(-1)).flatten(1).all(1)
    assert (same ^ flipped).all() and 20 < flipped.sum() < 44
    assert torch.equal(batch, before)
    assert torch.equal(plain(flip_probability=1)(batch).round().to(torch.uint8), before.flip(-1))


def test_flip_follows_its_probability():
    ramp = torch.tensor([0, 255], dtype=torch.uint8).expand(4000, 3, 1, 2)
    torch.manual_seed(0)
    assert abs((plain(flip_probability=0.3)(ramp)[:, 0, 0, 0] > 0).float().mean() - 0.3) < 0.03


def test_grayscale_is_the_luminance_in_all_channels(batch):
    torch.manual_seed(0)
    found = plain(grayscale_probability=0.2)(batch).numpy()
    luminance = np.einsum("bchw,c->bhw", batch.numpy().astype(float), [0.299, 0.587, 0.114])
    grey = np.abs(found - luminance[:, None]).max((1, 2, 3)) < 1e-3
    same = np.abs(found - batch.numpy()).max((1, 2, 3)) < 1e-3
    assert (grey ^ same).all() and 5 < grey.sum() < 22


def convolved(image, sigma):
    """A direct convolution of one channel [h, w] in float64, the kernel renormalised at the border."""
    height, width = image.shape
    out = np.empty((height, width))
    for row in range(height):
        for column in range(width):
            squares = (np.arange(height)[:, None] - row) ** 2 + (np.arange(width) - column) ** 2
            kernel = np.exp(-squares / (2 * sigma**2))
            out[row, column] = (kernel * image).sum() / kernel.sum()
    return out


def test_blur_equals_a_direct_convolution_with_each_images_own_sigma(batch):
    sigma = torch.tensor([0.1, 0.7, 1.3, 2.0])
    found = gaussian_blur(batch[:4].float(), sigma).numpy()
    for image in range(4):
        for channel in range(3):
            expected = convolved(batch[image, channel].numpy().astype(float), float(sigma[image]))
            np.testing.assert_allclose(found[image, channel], expected, atol=1e-3)


def test_blurred_images_are_some_with_sigmas_across_the_range():
    """A single white pixel tells sigma: its share after the blur is 1 / (2 pi sigma^2), on a large image."""
    images = torch.zeros(400, 3, 33, 33, dtype=torch.uint8)
    images[:, :, 16, 16] = 255
    torch.manual_seed(0)
    peak = plain(blur_probability=0.5, blur_sigma=(1.0, 2.0))(images)[:, 0, 16, 16] / 255
    assert 160 < (peak < 0.99).sum() < 240
    sigma = (1 / (2 * torch.pi * peak[peak < 0.99])).sqrt()
    assert 0.99 < sigma.min() < 1.1 and 1.9 < sigma.max() < 2.01 and abs(sigma.mean() - 1.5) < 0.06


def test_draws_follow_the_default_generator(batch):
    augment = DeviceAugment(grayscale_probability=0.5, blur_probability=0.5)
    outputs = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        outputs.append(augment(batch))
    assert torch.equal(outputs[0], outputs[1]) and not torch.equal(outputs[0], outputs[2])


def test_eval_only_normalises(batch):
    more = dict(vertical_flip_probability=1, rotate90=True, color_jitter=1)
    augment = DeviceAugment(flip_probability=1, grayscale_probability=1, blur_probability=1, **more).eval()
    assert torch.equal(augment(batch), augment.normalize(batch))


def test_blur_keeps_float32_under_autocast(batch):
    images, sigma = batch[:2].float(), torch.tensor([1.0, 2.0])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(gaussian_blur(images, sigma), gaussian_blur(images.clone(), sigma))
        found = gaussian_blur(images, sigma)
    assert torch.equal(found, gaussian_blur(images, sigma)) and found.dtype == torch.float32


@pytest.mark.parametrize("channels", [1, 10])
def test_other_channel_counts_are_flipped_blurred_and_normalised(channels):
    images = torch.randint(0, 256, (4, channels, 8, 12), dtype=torch.uint8)
    mean = [0.1 * (channel + 1) for channel in range(channels)]
    augment = DeviceAugment(mean, [0.5] * channels, flip_probability=1, blur_probability=1)
    assert augment(images).shape == images.shape
    expected = (images.float() / 255 - torch.tensor(mean).view(-1, 1, 1)) / 0.5
    torch.testing.assert_close(augment.normalize(images), expected)
    with pytest.raises(ValueError, match=f"{channels} channels, but pixel_values has 3"):
        augment(torch.zeros(1, 3, 8, 8, dtype=torch.uint8))


# ---- images without an up


def left_where(found, before, how):
    """bool [B]: where the image [C, h, w] is what numpy makes of it by `how`."""
    expected = np.stack([how(image) for image in before.numpy()])
    return torch.from_numpy((found.round().numpy() == expected).all((1, 2, 3)))


@pytest.mark.parametrize("kind", [torch.uint8, torch.float32])
def test_images_are_turned_as_numpys_rot90_each_quarter_as_often(kind):
    images = torch.from_numpy(np.random.RandomState(0).randint(0, 256, (4000, 2, 3, 3), dtype=np.uint8)).to(kind)
    augment = DeviceAugment((0, 0), (1 / 255,) * 2, flip_probability=0, rotate90=True)
    before, found = images.clone(), augment(images, torch.arange(4000))
    shares = [left_where(found, before, lambda x, k=k: np.rot90(x, k, (1, 2))).float().mean() for k in range(4)]
    assert sum(shares) == pytest.approx(1) and all(abs(share - 0.25) < 0.03 for share in shares)
    assert torch.equal(images, before)


def test_turns_and_flips_together_are_turned_then_flipped_each_by_its_own_draw(batch):
    images, keys = batch[:, :, :, :12], torch.arange(64) * 7919
    options = dict(rotate90=True, flip_probability=0.5, vertical_flip_probability=0.5)
    alone = [plain(**{name: value})(images, keys) for name, value in options.items()]
    quarters = torch.stack([left_where(alone[0], images, lambda x, k=k: np.rot90(x, k, (1, 2))) for k in range(4)])
    across, upside_down = ((x.round() != images).flatten(1).any(1) for x in alone[1:])
    expected = []
    for image, k, h, v in zip(images.numpy(), quarters.int().argmax(0), across, upside_down, strict=True):
        image = np.rot90(image, int(k), (1, 2))
        image = np.flip(image, 1) if v else image
        expected.append(np.flip(image, 2) if h else image)
    np.testing.assert_array_equal(plain(**options)(images, keys).round().numpy(), np.stack(expected))


def test_an_upside_down_flip_follows_its_probability_and_is_exact(batch):
    found = plain(vertical_flip_probability=0.3)(batch.repeat(50, 1, 1, 1), torch.arange(3200))
    flipped = left_where(found, batch.repeat(50, 1, 1, 1), lambda x: x[:, ::-1])
    same = left_where(found, batch.repeat(50, 1, 1, 1), lambda x: x)
    assert (flipped ^ same).all() and abs(flipped.float().mean() - 0.3) < 0.03


def test_jitter_is_a_gain_around_the_mean_and_an_offset_for_each_image_and_channel():
    """A channel with the three values m - d, m, m + d tells its gain and offset."""
    strength, mean, levels = 0.2, (0.4, 0.5, 0.6, 0.45, 0.55), 0.1
    images = torch.tensor(mean)[None, :, None, None] + levels * torch.tensor([-1.0, 0.0, 1.0])
    images = 255 * images.expand(3000, 5, 1, 3)
    augment = DeviceAugment(mean, (1.0,) * 5, flip_probability=0, color_jitter=strength)
    found = augment(images, torch.arange(3000))[:, :, 0]  # x / 255 - mean
    offset, gain = found[..., 1], (found[..., 2] - found[..., 0]) / (2 * levels)
    torch.testing.assert_close(found[..., 0], offset - gain * levels, atol=1e-5, rtol=0)
    for draws, centre in ((gain, 1), (offset, 0)):
        assert (draws - centre).abs().max() <= strength + 1e-5
        assert abs(draws.mean() - centre) < 0.01 and abs(draws.std() - strength / 3**0.5) < 0.005
    drawn = torch.cat([gain, offset], dim=1).T
    assert (torch.corrcoef(drawn) - torch.eye(10)).abs().max() < 0.08  # 4 standard errors
    assert plain(color_jitter=1)(torch.zeros(50, 3, 2, 2, dtype=torch.uint8)).min() == 0  # clipped


def test_jitter_comes_after_the_value_range():
    deep, keys = torch.randint(0, 4096, (8, 2, 6, 6)).to(torch.float32), torch.arange(8)
    augment = DeviceAugment((0.5,) * 2, (0.3,) * 2, color_jitter=0.3, value_range=ValueRange((0.0,), (4095.0,)))
    scaled = DeviceAugment((0.5,) * 2, (0.3,) * 2, color_jitter=0.3)(deep * (255 / 4095), keys)
    torch.testing.assert_close(augment(deep.to(torch.uint16), keys), scaled)


def test_only_square_images_are_turned(batch):
    with pytest.raises(ValueError, match="rotate90 needs square images, not 12 x 20"):
        plain(rotate90=True)(batch)


def test_impossible_augmentation_is_refused_by_name():
    for options, word in (
        (dict(flip_probability=2), "flip_probability"),
        (dict(blur_probability=-1), "blur_probability"),
        (dict(blur_sigma=(0, 1)), "blur_sigma"),
        (dict(vertical_flip_probability=2), "vertical_flip_probability"),
        (dict(color_jitter=-0.1), "color_jitter"),
        (dict(mean=(0.5,), std=(0.5, 0.5)), "mean and std"),
        (dict(mean=(0.5,), std=(0,)), "std"),
        (dict(mean=(0.5,) * 10, std=(0.5,) * 10, grayscale_probability=0.2), "grayscale_probability"),
    ):
        with pytest.raises(ValueError, match=word):
            DeviceAugment(**options)


def test_channel_statistics_are_those_of_the_pixels():
    images = ImageDataset(digits()[1], 32, num_channels=1, crop=WholeImage())
    pixels = np.stack([images[index]["pixel_values"].numpy() for index in range(len(images))]) / 255
    mean, std = channel_statistics(images, num_images=10_000)
    np.testing.assert_allclose([mean[0], std[0]], [pixels.mean(), pixels.std()], rtol=1e-9)
    sampled = channel_statistics(images, num_images=100, seed=1)
    assert sampled == channel_statistics(images, num_images=100, seed=1) != channel_statistics(images, 100, seed=2)
    assert abs(sampled[0][0] - pixels.mean()) < 0.02


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_the_device_is_never_waited_for(batch):
    more = dict(vertical_flip_probability=0.5, rotate90=True, color_jitter=0.2)
    augment = DeviceAugment(grayscale_probability=0.2, blur_probability=0.5, **more).cuda()
    batch = batch[..., :12].cuda()
    torch.cuda.set_sync_debug_mode("error")
    try:
        augment(batch)
        augment(batch, torch.arange(len(batch), device="cuda"))
    finally:
        torch.cuda.set_sync_debug_mode("default")


# ---- keys


def splitmix64(state: int) -> int:
    """The finaliser, as Steele, Lea and Flood write it, on Python's integers."""
    mask = (1 << 64) - 1
    z = state & mask
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
    return z ^ (z >> 31)


def test_keyed_numbers_are_those_of_splitmix64():
    keys = [0, 1, -1, 2**62 + 12345, -(2**63)]
    several = keyed_uniform(torch.tensor(keys)[:, None], torch.arange(40))
    for stream in range(40):
        expected = [(splitmix64(key + 0x9E3779B97F4A7C15 * (stream + 1)) >> 40) / 2**24 for key in keys]
        assert keyed_uniform(torch.tensor(keys), stream).tolist() == several[:, stream].tolist() == expected


def test_keyed_numbers_are_uniform_and_streams_independent():
    keys = torch.arange(100_000)  # neighbours, the worst case
    first, second = keyed_uniform(keys, 0), keyed_uniform(keys, 1)
    for numbers in (first, second):
        assert 0 <= numbers.min() and numbers.max() < 1
        counts = torch.histc(numbers, 20, 0, 1)
        assert ((counts - 5000).square() / 5000).sum() < 45  # chi-squared, 19 degrees of freedom: p = .0007
    for other in (second, first.roll(1)):
        assert torch.corrcoef(torch.stack([first, other]))[0, 1].abs() < 0.013  # 4 standard errors


def test_what_is_done_to_an_image_follows_from_its_key_alone():
    more = dict(vertical_flip_probability=0.5, rotate90=True, color_jitter=0.2)
    augment = DeviceAugment(grayscale_probability=0.5, blur_probability=0.5, **more)
    images = torch.randint(0, 256, (8, 3, 12, 12), dtype=torch.uint8)
    keys = torch.arange(8) * 7919
    together = augment(images, keys)
    torch.manual_seed(1)
    order = torch.randperm(8)
    assert augment(images[order], keys[order]).equal(together[order])
    assert augment(images[3:4], keys[3:4]).equal(together[3:4])
    assert not augment(images, keys + 1).equal(together)
