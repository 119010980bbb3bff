"""Samples keyed on (seed, epoch, image), whatever the order and workers; broken images skipped, counted and named."""

import io

import numpy as np
import pytest
import torch
from datasets import Dataset, Features, Value
from datasets import Image as ImageFeature
from torch.utils.data import DataLoader

from hf_mim.data import (
    BrokenImagesError,
    ImageDataset,
    ImageFormatError,
    ImageStream,
    WholeImage,
    check_broken,
    digits,
    load_images,
)


@pytest.fixture(scope="module")
def train():
    return digits()[0].select(range(200))


def collect(images, **options):
    """All pixel values, in the order of the data."""
    loader = DataLoader(images, batch_size=16, **options)
    return torch.cat([batch["pixel_values"] for batch in loader])


def write_folder(folder, picture, count=200, broken=()):
    for number in range(count):
        path = folder / f"{number:03d}.png"
        picture(40, 40, seed=number).save(path)
        if number in broken:
            path.write_bytes(path.read_bytes()[:100])
    return folder


def test_samples_are_uint8_crops_with_their_labels(train):
    images = ImageDataset(train, (24, 40), num_channels=1, labels=True)
    for index in (0, 57):
        sample = images[index]
        assert sample["pixel_values"].shape == (1, 24, 40) and sample["pixel_values"].dtype == torch.uint8
        assert sample["labels"] == train[index]["label"]
    assert set(ImageDataset(train, 32, num_channels=3)[0]) == {"pixel_values"}
    assert ImageDataset(train, 32, num_channels=3)[0]["pixel_values"].shape == (3, 32, 32)


def test_crops_do_not_depend_on_order_batches_or_workers(train):
    images = ImageDataset(train, 16, num_channels=1)
    expected = torch.stack([images[index]["pixel_values"] for index in reversed(range(len(images)))]).flip(0)
    assert torch.equal(collect(images), expected)
    assert torch.equal(collect(images, num_workers=2), expected)
    assert torch.equal(collect(ImageDataset(train, 16, num_channels=1)), expected)
    assert not torch.equal(collect(ImageDataset(train, 16, num_channels=1, seed=1)), expected)


def test_epochs_differ_and_reach_running_workers(train):
    images = ImageDataset(train, 16, num_channels=1)
    loader = DataLoader(images, batch_size=16, num_workers=2, persistent_workers=True)
    epochs = []
    for epoch in (0, 1, 0):
        images.set_epoch(epoch)
        epochs.append(torch.cat([batch["pixel_values"] for batch in loader]))
    assert torch.equal(epochs[0], epochs[2])
    differing = (epochs[0] != epochs[1]).flatten(1).any(1)
    assert differing.float().mean() > 0.95


@pytest.mark.parametrize("num_workers", [0, 2])
def test_streams_give_the_crops_that_their_images_key(train, num_workers):
    """However many workers share the stream, in whatever order, an image gets the same crop; other epochs, others."""

    def crops(num_shards, num_workers, epoch):
        images = ImageStream(train.to_iterable_dataset(num_shards=num_shards), 16, num_channels=1, labels=True)
        images.set_epoch(epoch)
        loader = DataLoader(images, batch_size=16, num_workers=num_workers)
        return {bytes(pixels.numpy()) for batch in loader for pixels in batch["pixel_values"]}

    expected = crops(1, 0, epoch=0)
    assert crops(4, num_workers, epoch=0) == expected and len(expected) > 190
    assert len(crops(4, num_workers, epoch=1) & expected) < 10


def test_ranks_share_a_stream_without_overlap(train):
    stream = ImageStream(train.to_iterable_dataset(num_shards=4), 32, num_channels=1, crop=WholeImage())
    parts = [[bytes(sample["pixel_values"].numpy()) for sample in stream.split(rank, 2)] for rank in (0, 1)]
    assert sorted(parts[0] + parts[1]) == sorted(bytes(sample["pixel_values"].numpy()) for sample in stream)
    assert len(parts[0]) == len(parts[1]) == 100


@pytest.mark.parametrize("num_workers", [0, 2])
def test_broken_images_are_replaced_counted_and_named(tmp_path, picture, num_workers, caplog):
    folder = write_folder(tmp_path, picture, broken=(3, 77))
    images = ImageDataset(load_images(folder), 40, crop=WholeImage())
    pixels = collect(images, num_workers=num_workers)
    assert len(pixels) == 200
    assert images.num_broken() == 2
    assert images.broken() == [str(folder / "003.png"), str(folder / "077.png")]
    check_broken(images)  # exactly 1 %: goes on
    # Another sound image stands in for each, the same one every time.
    sound = {bytes(image.numpy()) for number, image in enumerate(pixels) if number not in (3, 77)}
    assert bytes(pixels[3].numpy()) in sound and bytes(pixels[77].numpy()) in sound
    assert torch.equal(collect(ImageDataset(load_images(folder), 40, crop=WholeImage())), pixels)
    if num_workers == 0:
        assert sum("003.png" in message for message in caplog.messages) == 2  # once for each of the two datasets


def test_more_than_one_per_cent_broken_stops_and_lists_them(tmp_path, picture):
    folder = write_folder(tmp_path, picture, count=100, broken=(3, 77))
    images = ImageDataset(load_images(folder), 40)
    collect(images, num_workers=2)
    with pytest.raises(BrokenImagesError, match=r"^2 of 100 images .*003\.png, .*077\.png$"):
        check_broken(images)


def encoded_rows(pictures, broken):
    rows = []
    for number, picture in enumerate(pictures):
        buffer = io.BytesIO()
        picture.save(buffer, "PNG")
        data = buffer.getvalue()
        rows.append({"bytes": data[:60] if number in broken else data, "path": f"{number}.png"})
    return Dataset.from_dict({"image": rows}, features=Features(image=ImageFeature()))


@pytest.mark.parametrize("num_workers", [0, 2])
def test_streams_leave_broken_images_out_and_name_them(picture, num_workers):
    dataset = encoded_rows([picture(8, 8, seed) for seed in range(60)], broken=(5, 50))
    images = ImageStream(load_images(dataset, streaming=True), 8)
    assert len(collect(images, num_workers=num_workers)) == 58
    assert images.num_broken() == 2 and sorted(images.broken()) == ["5.png", "50.png"]
    check_broken(images)
    assert int(images._seen.sum()) == 60


def test_a_stream_of_broken_images_stops_by_itself(picture):
    dataset = encoded_rows([picture(8, 8, 0)] + [picture(8, 8, 1)] * 30, broken=range(1, 31))
    images = ImageStream(load_images(dataset, streaming=True), 8)
    with pytest.raises(BrokenImagesError, match="^11 of 1000 images"):
        list(images)


def test_a_dataset_of_broken_images_stops_at_once(tmp_path, picture):
    images = load_images(write_folder(tmp_path, picture, count=10))
    for path in tmp_path.iterdir():
        path.write_bytes(b"")
    with pytest.raises(BrokenImagesError, match="^10 of 10 images"):
        ImageDataset(images, 8)


def test_wrong_arguments_are_refused_before_any_work(train, tmp_path):
    with pytest.raises(ImageFormatError, match="num_channels=10"):
        ImageDataset(train, 32, num_channels=10)
    with pytest.raises(ValueError, match="size"):
        ImageDataset(train, (32, 0))
    with pytest.raises(ValueError, match="num_channels"):
        ImageDataset(train, 32, num_channels=0)
    with pytest.raises(ValueError, match="no column 'label' but image"):
        ImageDataset(train.remove_columns("label"), 32, labels=True)
    with pytest.raises(ValueError, match="no column 'image' but label"):
        ImageStream(train.remove_columns("image").to_iterable_dataset(), 32)
    with pytest.raises(ValueError, match="empty"):
        ImageDataset(train.select([]), 32)


def test_a_dataset_that_decodes_is_taken_too(train):
    decoding = train.cast_column("image", ImageFeature())
    assert torch.equal(ImageDataset(decoding, 32)[5]["pixel_values"], ImageDataset(train, 32)[5]["pixel_values"])


def test_a_missing_label_is_minus_one():
    pixels = np.zeros((2, 8, 8), np.uint8).tolist()
    dataset = Dataset.from_dict({"image": pixels, "label": [3, None]}).cast_column("label", Value("int64"))
    images = ImageDataset(dataset, 8, labels=True)
    assert [images[0]["labels"], images[1]["labels"]] == [3, -1]
