"""Images from a cache: the crops, keys and replacements are those of a worker that decodes each image anew."""

import io
from concurrent.futures import ThreadPoolExecutor

import datasets
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from tiny import make_model
from tiny_runs import arguments, assert_same_weights, image_column

from hf_mim.cli import main
from hf_mim.data import (
    DeviceAugment,
    ImageDataset,
    ImageFormatError,
    ImageStream,
    NativeCrop,
    RandomCrop,
    ValueRange,
    cached,
)
from hf_mim.data.cached import CachedImages, crop_boxes, load_cache, make_cache
from hf_mim.data.dataset import BrokenImagesError, collate
from hf_mim.pretraining.image_cache import cached_images
from hf_mim.pretraining.trainer import MIMTrainer

SIZES = [(64, 48), (40, 70), (33, 31), (20, 20)]  # (width, height)


def column(pictures, form="PNG", **options):
    """What load_images gives for these PIL images."""
    rows = []
    for index, picture in enumerate(pictures):
        picture.save(file := io.BytesIO(), form, **options)
        rows.append({"bytes": file.getvalue(), "path": f"{index}.{form.lower()}"})
    return datasets.Dataset.from_dict({"image": rows}).cast_column("image", datasets.Image(decode=False))


@pytest.fixture
def photos(picture):
    return column([picture(*size, seed) for seed, size in enumerate(SIZES * 3)])


@pytest.fixture
def own_place(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_MIM_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "decoded_images"


def caches(place):
    return [path for path in place.glob("*") if path.is_dir()]


def with_cache(images, folder=None):
    return CachedImages(images, make_cache(images, folder, "key", lambda line: None)).identify()


def cropped(images, indices):
    return images.crops(images.__getitems__(indices))


@pytest.mark.parametrize("channels", [3, 1])
@pytest.mark.parametrize(
    ("size", "crop"),
    [(24, RandomCrop()), ((32, 48), RandomCrop((0.05, 0.3))), (80, RandomCrop()), (16, NativeCrop(18))],
)
def test_crops_keys_and_names_are_those_of_a_worker(photos, size, crop, channels):
    images = ImageDataset(photos, size, channels, crop, seed=3).identify()
    from_cache, indices = with_cache(images), list(range(len(photos)))
    for epoch in (0, 1):
        images.set_epoch(epoch)  # the view follows
        theirs, ours = collate(images.__getitems__(indices)), from_cache.__getitems__(indices)
        assert ours["name"] == theirs["name"] and torch.equal(ours["augment_key"], theirs["augment_key"])
        difference = (from_cache.crops(ours).int() - theirs["pixel_values"].int()).abs()
        assert difference.max() <= 2 and difference.float().mean() < 0.02  # torch has weights of 16 bits, and ours 32


def test_crops_of_reduced_jpegs_are_within_a_grey_level_on_average(picture):
    photos = column([picture(400, 300, seed) for seed in range(8)], "JPEG", quality=95)
    images, indices = ImageDataset(photos, 32, crop=RandomCrop((0.8, 1))).identify(), list(range(8))
    theirs = collate(images.__getitems__(indices))["pixel_values"]
    assert (cropped(with_cache(images), indices).int() - theirs.int()).abs().float().mean() < 1


def test_turned_images_are_upright_in_the_cache(picture):
    exif = Image.Exif()
    exif[0x0112] = 6
    images = ImageDataset(column([picture(60, 30)], "PNG", exif=exif), 24).identify()
    theirs = collate(images.__getitems__([0]))["pixel_values"]
    assert (cropped(with_cache(images), [0]).int() - theirs.int()).abs().max() <= 1


def test_a_box_is_resized_as_torch_resizes_it():
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (5, 3, 40, 56), dtype=torch.uint8, generator=generator)
    boxes = torch.tensor([[0, 0, 56, 40], [3, 5, 4, 6], [10, 2, 50, 39], [55, 0, 56, 40], [20, 20, 36, 36]])
    ours = crop_boxes(pixels.transpose(1, 2).contiguous(), boxes, (16, 24))
    for crop, image, (left, top, right, bottom) in zip(ours, pixels, boxes.tolist(), strict=True):
        expected = F.interpolate(image[None, :, top:bottom, left:right], (16, 24), mode="bicubic", antialias=True)[0]
        assert (crop.int() - expected.int()).abs().max() <= 1


def test_a_broken_image_is_replaced_by_the_same_other():
    images = ImageDataset(image_column(300, broken=[7, 8]), size=12).identify()
    from_cache = with_cache(images)
    assert from_cache.broken_indices() == [7, 8] and from_cache.num_broken() == 2
    theirs, ours = collate(images.__getitems__([7, 8, 9])), from_cache.__getitems__([7, 8, 9])
    assert ours["name"] == theirs["name"] and torch.equal(ours["augment_key"], theirs["augment_key"])
    assert (from_cache.crops(ours).int() - theirs["pixel_values"].int()).abs().max() <= 1


def test_too_many_broken_images_leave_no_cache(tmp_path):
    images = ImageDataset(image_column(20, broken=[7]), size=12)
    with pytest.raises(BrokenImagesError, match="1 of 20 images"):
        with_cache(images, tmp_path / "cache")
    assert not list(tmp_path.iterdir())


def test_the_cache_of_a_run_is_made_once_and_used_again(photos, own_place, monkeypatch):
    lines, images = [], ImageDataset(photos, 24).identify()
    first = cached_images(images, True, lines.append)
    (folder,) = caches(own_place)
    assert lines == [f"cache: 12 images are decoded once, 0 MiB in {folder}"]
    monkeypatch.setattr(cached, "load_crop", lambda *args: pytest.fail("decoded again"))
    second = cached_images(images, True, lines.append)
    assert torch.equal(cropped(first, [0, 5]), cropped(second, [0, 5])) and len(lines) == 1


def test_of_runs_that_begin_at_once_one_decodes_for_all(photos, own_place):
    lines = []

    def begin(_):
        return cropped(cached_images(ImageDataset(photos, 24), True, lines.append), [0, 5])

    with ThreadPoolExecutor(4) as pool:
        first, *others = pool.map(begin, range(4))
    assert all(torch.equal(first, other) for other in others) and len(lines) == 1


def test_other_images_get_a_cache_of_their_own(photos, picture, own_place):
    cached_images(ImageDataset(photos, 24), True, print)
    cached_images(ImageDataset(column([picture(*size, seed=9) for size in SIZES * 3]), 24), True, print)
    cached_images(ImageDataset(photos, 24, 1), True, print)
    assert len(caches(own_place)) == 3


@pytest.mark.parametrize("damage", ["pixel", "cut", "record"])
def test_a_damaged_cache_is_made_again(photos, own_place, damage):
    images = ImageDataset(photos, 24)
    expected = cropped(cached_images(images, True, print), [0, 5])
    (folder,) = caches(own_place)
    data = bytearray((folder / "pixels.npy").read_bytes())
    if damage == "record":
        (folder / "about.json").write_text('{"key": ')
    else:
        data[200] ^= 1
        (folder / "pixels.npy").write_bytes(data[:-9] if damage == "cut" else data)
    assert load_cache(folder, folder.name) is None
    assert torch.equal(cropped(cached_images(images, True, print), [0, 5]), expected)


def test_without_a_home_the_cache_is_in_memory(photos, monkeypatch, tmp_path):
    monkeypatch.setattr("hf_mim.pretraining.image_cache.default_cache", lambda: None)
    lines = []
    assert len(cached_images(ImageDataset(photos, 24), True, lines.append)) == 12
    assert lines == ["cache: 12 images are decoded once, 0 MiB in memory"]


def deep():
    array = np.arange(40 * 40, dtype=np.uint16).reshape(40, 40)
    return ImageDataset(column([Image.fromarray(array)]), 24, 1, own_depth=True)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (deep, ImageFormatError, "0.png: is of uint16: a cache holds 8-bit images; leave cache_images away"),
        (
            lambda: ImageDataset(image_column(2), 24, value_range=ValueRange((0,), (255,), nodata=0)),
            ValueError,
            "cache_images must be false for images with nodata",
        ),
        (
            lambda: ImageStream(image_column(2).to_iterable_dataset(), 24),
            ValueError,
            "cache_images must be false with streaming",
        ),
    ],
    ids=["16 bits", "nodata", "stream"],
)
def test_what_a_cache_cannot_hold_is_refused_in_one_line(make, error, message, own_place):
    with pytest.raises(error, match=message) as raised:
        cached_images(make(), True, print)
    assert "\n" not in str(raised.value) and not caches(own_place)


def test_a_cache_without_room_is_refused_before_work(photos, tmp_path, monkeypatch):
    monkeypatch.setattr(cached, "free_space", lambda folder: 1000)
    with pytest.raises(ValueError, match="cache_images must be false: .* `hf-mim prepare SOURCE DEST --short_side N"):
        with_cache(ImageDataset(photos, 24), tmp_path / "cache")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("crop", [RandomCrop(), NativeCrop(20)])
def test_resume_is_exact_with_a_cache(tmp_path, crop):
    def run(**kwargs):
        images = with_cache(ImageDataset(image_column(20), size=24, crop=crop))  # 5 steps an epoch
        args = arguments(tmp_path, max_steps=9, save_strategy="steps", save_steps=7)
        trainer = MIMTrainer(make_model("mae"), args, images, augment=DeviceAugment(grayscale_probability=0.5))
        trainer.train(**kwargs)
        return trainer.model

    assert_same_weights(run(), run(resume_from_checkpoint=str(tmp_path / "checkpoint-7")))


def test_training_with_and_without_a_cache_takes_the_same_images(tmp_path):
    def losses(wrap):
        images = wrap(ImageDataset(image_column(20), size=24))
        args = arguments(tmp_path, logging_steps=1)
        torch.manual_seed(0)
        trainer = MIMTrainer(make_model("mae"), args, images, augment=DeviceAugment())
        trainer.train()
        return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]

    assert losses(with_cache) == pytest.approx(losses(lambda images: images), abs=2e-3)


SMALL = "--hidden_size 16 --num_hidden_layers 1 --num_attention_heads 2 --image_size 32 --max_steps 2 --use_cpu".split()
SMALL += "--decoder_hidden_size 16 --decoder_num_hidden_layers 1 --decoder_num_attention_heads 2".split()


def test_the_commands_make_and_use_a_cache(tmp_path, picture, own_place, capsys):
    (tmp_path / "photos").mkdir()
    for seed in range(70):
        picture(40, 40, seed).save(tmp_path / "photos" / f"{seed}.png")
    assert main(["cache", str(tmp_path / "photos"), str(tmp_path / "decoded")]) == 0
    command = capsys.readouterr().out.splitlines()[-1].strip()
    assert command == f"hf-mim pretrain --dataset {tmp_path}/photos --cache_images {tmp_path}/decoded"
    run = [*command.split()[1:], *SMALL, "--output_dir", str(tmp_path / "run")]
    assert main(run) == 0 and not own_place.exists()
    recipe = (tmp_path / "run" / "recipe.yaml").read_text()
    assert "cache_images: decoded\n" in recipe and "dataloader_num_workers: 0\n" in recipe
    (tmp_path / "photos" / "0.png").unlink()
    capsys.readouterr()
    assert main([*run[:-1], str(tmp_path / "other")]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: cache_images must be true, or a cache of the images of dataset in 3 channels")
    assert not (tmp_path / "other").exists()
    assert main(["cache", str(tmp_path / "photos"), str(tmp_path / "decoded")]) == 2
    assert "DEST must be a new folder" in capsys.readouterr().err
