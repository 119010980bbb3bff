"""An endless stream gives each image once a pass, and goes on exactly where it stood."""

import itertools

import pytest
from tiny_runs import image_column
from torch.utils.data import DataLoader

from hf_mim.data import ImageStream
from hf_mim.data.dataset import collate
from hf_mim.data.stream import EndlessStream

BATCH = 3


def make_stream(shuffled, broken=(4,)):
    images = image_column(23, broken=broken).to_iterable_dataset(num_shards=4)
    images = images.shuffle(seed=0, buffer_size=6) if shuffled else images
    return ImageStream(images, size=24).identify()


def batches(stream, workers, count, start=None):
    """The first batches, and the state after each."""
    endless = EndlessStream(stream, BATCH, workers, start)
    loader = DataLoader(endless, BATCH, collate_fn=collate, num_workers=workers)
    found, states = [], []
    for batch in itertools.islice(loader, endless.skipped_batches, endless.skipped_batches + count):
        found.append((batch["name"], batch["augment_key"].tolist(), batch["pixel_values"].sum().item()))
        states.append(endless.state(len(found)))
    return found, states


@pytest.mark.parametrize("shuffled", [False, True], ids=["in order", "shuffled"])
@pytest.mark.parametrize("workers", [0, 3])
def test_a_stream_goes_on_from_any_batch_as_if_it_had_never_stopped(shuffled, workers):
    straight, states = batches(make_stream(shuffled), workers, 20)
    assert len({name for names, _, _ in straight for name in names}) == 22  # and more than one pass of each worker
    for done in (1, 5, 11):
        resumed, later = batches(make_stream(shuffled), workers, 20 - done, states[done - 1])
        assert resumed == straight[done:]
        assert later[-1] == states[-1]
    twice, _ = batches(make_stream(shuffled), workers, 4, later[3])  # resumed after a resume
    assert twice == straight[15:19]


def test_each_pass_gives_every_image_once_in_another_order_and_crop():
    found, _ = batches(make_stream(shuffled=True, broken=()), 0, 23)
    names = [name for names, _, _ in found for name in names]
    passes = [names[23 * i : 23 * (i + 1)] for i in range(3)]
    assert all(len(set(each)) == 23 for each in passes) and len(set(map(tuple, passes))) == 3
    keys = dict.fromkeys(key for _, keys, _ in found for key in keys)
    assert len(keys) == len(names)  # another key in each pass


def test_keys_and_crops_do_not_depend_on_the_number_of_workers():
    def of_each_image(workers):
        found, _ = batches(make_stream(shuffled=False, broken=()), workers, 7)
        return dict(pair for names, keys, _ in found for pair in zip(names, keys, strict=True))

    alone, three = of_each_image(0), of_each_image(3)
    common = alone.keys() & three.keys()
    assert len(common) > 10 and all(alone[name] == three[name] for name in common)


def test_a_shard_without_images_is_an_error_and_no_endless_loop():
    images = image_column(4).to_iterable_dataset(num_shards=2).filter(lambda row: row["image"]["path"] > "1.png")
    with pytest.raises(ValueError, match="^train_dataset has a shard without images"):
        next(iter(EndlessStream(ImageStream(images.filter(lambda row: False), size=24), BATCH, 0)))


def test_places_are_known_for_as_long_as_a_run_lasts():
    endless = EndlessStream(make_stream(False), 1, 0)
    iterator = iter(endless)
    for count in range(1, 200):
        next(iterator)
        ((epoch, position),) = endless.state(count)["places"]
        given = (count - 1) % 22 + 1  # of 23 images; the fifth is broken
        assert epoch == (count - 1) // 22 and position - given in (0, 1)
        assert epoch or position == given + (given > 4)
