"""What images hold, and which sources hold the same."""

import os
import shutil

import numpy as np
import pytest
from datasets import Dataset
from datasets import Image as ImageFeature
from PIL import Image

from hf_mim.data import load_images
from hf_mim.data.contents import count_copies, digests, short_hash, stamps
from hf_mim.data.labelled import load_labelled
from hf_mim.data.sources import same_source


@pytest.fixture
def photos(tmp_path):
    for number in range(12):
        path = tmp_path / "photos" / "ab"[number % 2] / f"{number:02}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((8, 8, 3), number, np.uint8)).save(path)
    return tmp_path / "photos"


def in_a_table(photos, order) -> Dataset:
    rows = [{"bytes": path.read_bytes(), "path": None} for path in sorted(photos.rglob("*.png"))]
    return Dataset.from_dict({"image": [rows[i] for i in order]}).cast_column("image", ImageFeature(decode=False))


def test_equal_bytes_are_equal_in_files_and_in_tables_whatever_they_are_called(photos):
    table = in_a_table(photos, range(12))
    assert (digests(load_images(str(photos))) == digests(table)).all()
    assert len(set(digests(table))) == 12
    assert short_hash(digests(table)) != short_hash(digests(in_a_table(photos, range(11, -1, -1))))


def test_copies_are_counted_among_the_test_images(photos):
    train, test = in_a_table(photos, [0, 1, 2, 3]), in_a_table(photos, [3, 3, 2, 7, 8])
    assert count_copies(digests(train), digests(test)) == 3
    assert count_copies(digests(test), digests(train)) == 2


def test_arrays_have_digests_too_and_a_missing_file_does_not_end_the_run(photos):
    arrays = Dataset.from_dict({"image": [[[1, 2]], [[1, 2]], [[2], [1]]]})
    one, same, other = digests(arrays)
    assert one == same != other and stamps(arrays) is None
    images = load_images(str(photos))
    path, before = photos / "a" / "00.png", stamps(images)
    assert before is not None and before == stamps(images)
    times = path.stat().st_atime_ns, path.stat().st_mtime_ns
    path.write_bytes(path.read_bytes())
    os.utime(path, ns=times)
    assert stamps(images)[0] != before[0]  # size and time are as before, but the file was written
    path.unlink()
    assert len(digests(images)) == 12 and stamps(images) is None


@pytest.mark.parametrize("spelled", ["{0}/", "{0}/../photos", "link", "copy"])
def test_a_source_is_the_same_however_it_is_written_and_so_is_a_copy_of_it(photos, tmp_path, spelled, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "link").symlink_to(photos)
    shutil.copytree(photos, tmp_path / "copy")
    other = spelled.format(photos)
    assert same_source("photos", other)
    train, test = load_labelled("photos", other)
    assert len(train) + len(test) == 12 and test.name.startswith("a held-out fifth")
    assert count_copies(digests(train.images), digests(test.images)) == 0


def test_other_bytes_of_the_same_size_are_another_source(photos, tmp_path):
    shutil.copytree(photos, tmp_path / "copy")
    data = bytearray((tmp_path / "copy" / "a" / "00.png").read_bytes())
    data[-20] ^= 1
    (tmp_path / "copy" / "a" / "00.png").write_bytes(data)
    assert not same_source(photos, tmp_path / "copy")
    assert not same_source(photos, photos / "a") and not same_source("digits", photos)
