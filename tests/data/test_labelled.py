"""Labelled splits: which images, with labels of one meaning."""

import pytest
from datasets import ClassLabel, Dataset, Features, Value
from datasets import Image as ImageFeature
from PIL import Image

from hf_mim.data.embedded import png
from hf_mim.data.labelled import LabelledImages, check_classes, load_labelled


def folder_of_classes(path, counts: dict):
    """A folder of class folders; an image's grey level is its class's, which its name tells."""
    for name, count in counts.items():
        (path / name).mkdir(parents=True)
        for number in range(count):
            Image.new("L", (8, 8), 10 * len(name)).save(path / name / f"{number}.png")
    return path


def rows(labels, names=None) -> Dataset:
    feature = ClassLabel(names=names) if names else Value("int64")
    features = Features(image=ImageFeature(decode=False), label=feature)
    images = [{"bytes": f"{index}".encode(), "path": None} for index in range(len(labels))]
    return Dataset.from_dict({"image": images, "label": labels}, features=features)


def test_the_test_split_of_a_source_is_found():
    train, test = load_labelled("digits")
    assert (len(train), len(test)) == (1437, 360)
    assert train.describe() == {"source": "digits, split train", "images": 1437}
    assert test.name == "digits, split test"


def test_without_a_test_split_a_fifth_of_each_class_is_held_out_and_does_not_train(tmp_path):
    source = folder_of_classes(tmp_path / "pictures", {"cat": 20, "horse": 30, "rare": 2, "single": 1})
    train, test = load_labelled(source)
    assert train.read_labels().bincount().tolist() == [16, 24, 1, 1]
    assert test.read_labels().bincount(minlength=4).tolist() == [4, 6, 1, 0]
    paths = [{row["path"] for row in split.images["image"]} for split in (train, test)]
    assert not paths[0] & paths[1]
    again = load_labelled(source)[1]
    assert [row["path"] for row in again.images["image"]] == [row["path"] for row in test.images["image"]]


def test_classes_of_two_sources_are_matched_by_name_not_by_number(tmp_path):
    one = folder_of_classes(tmp_path / "one", {"ant": 3, "bee": 3, "cow": 3})
    two = folder_of_classes(tmp_path / "two", {"bee": 2, "cow": 2})  # there, bee is 0 and cow 1
    train, test = load_labelled(one, two)
    assert train.class_names == test.class_names == ["ant", "bee", "cow"]
    assert test.read_labels().tolist() == [1, 1, 2, 2]


def test_a_test_class_that_training_lacks_is_an_error(tmp_path):
    one = folder_of_classes(tmp_path / "one", {"ant": 3, "bee": 3})
    two = folder_of_classes(tmp_path / "two", {"bee": 2, "wasp": 2})
    with pytest.raises(ValueError, match="classes that the training images lack: wasp; add images of them or remove"):
        load_labelled(one, two)
    with pytest.raises(ValueError, match="classes that the training images lack: 7"):
        check_classes(LabelledImages(rows([0, 1])), LabelledImages(rows([1, 7])))


def test_images_without_a_label_are_left_out(tmp_path):
    folder_of_classes(tmp_path / "p", {"a": 1})
    image = {"bytes": (tmp_path / "p" / "a" / "0.png").read_bytes(), "path": None}
    data = Dataset.from_dict({"image": [image] * 8, "label": [0, 1, None, 1, -1, 0, 1, 0]})
    for split in ("train", "test"):
        data.to_parquet(tmp_path / f"{split}.parquet")
    train, test = load_labelled(tmp_path)
    assert train.read_labels().tolist() == test.read_labels().tolist() == [0, 1, 1, 0, 1, 0]


def test_no_labels_and_one_class_are_errors(tmp_path):
    folder_of_classes(tmp_path / "flat", {"only": 4})
    with pytest.raises(ValueError, match="has no labels in split train; give --labels COLUMN"):
        load_labelled(tmp_path / "flat")
    with pytest.raises(ValueError, match="must be of two classes at least, not of 1"):
        check_classes(LabelledImages(rows([3, 3])), LabelledImages(rows([3])))


def test_the_training_images_cannot_be_the_test_images(tmp_path):
    source = folder_of_classes(tmp_path / "pictures", {"cat": 20, "horse": 30})
    for test_source in (None, "digits"):
        with pytest.raises(ValueError, match="test_split must be another split than train, which trains"):
            load_labelled("digits", test_source, test_split="train")
    train, test = load_labelled(source, source)  # the same folder: a fifth is held out, as without
    assert len(train) == 40 and len(test) == 10


def test_the_same_folder_is_known_under_other_names(tmp_path, monkeypatch):
    source = folder_of_classes(tmp_path / "pictures", {"cat": 20, "horse": 30})
    (tmp_path / "link").symlink_to(source)
    monkeypatch.chdir(tmp_path)
    for other in ("pictures/", "./pictures", "pictures/../pictures", tmp_path / "link"):
        train, test = load_labelled("pictures", other)
        assert (len(train), len(test)) == (40, 10)
        with pytest.raises(ValueError, match="test_split must be another split than train"):
            load_labelled("pictures", other, test_split="train")


def test_a_folder_within_the_training_images_is_no_test(tmp_path):
    source = folder_of_classes(tmp_path / "pictures" / "a", {"cat": 2, "horse": 3})
    folder_of_classes(tmp_path / "pictures" / "b", {"cat": 1, "horse": 1})
    with pytest.raises(
        ValueError, match="5 of the 5 test images are training images too .*; give other images as test"
    ):
        load_labelled(tmp_path / "pictures", source)


def test_two_datasets_in_memory_are_told_apart():
    one, other = rows([0, 1] * 10), rows([1, 0] * 10)
    one, other = (
        data.map(lambda row: {"image": {"bytes": png(Image.new("L", (8, 8))), "path": None}}) for data in (one, other)
    )
    train, test = load_labelled(one, other)
    assert (len(train), len(test)) == (20, 20)
    train, test = load_labelled(one, one)
    assert (len(train), len(test)) == (16, 4)


def test_a_test_split_that_cannot_be_read_is_an_error(tmp_path):
    rows([0, 1] * 5).to_parquet(tmp_path / "train.parquet")
    (tmp_path / "test.parquet").write_bytes(b"no parquet")
    with pytest.raises(ValueError, match="test.parquet|source"):
        load_labelled(tmp_path)


def test_too_few_images_to_hold_any_out_are_an_error(tmp_path):
    source = folder_of_classes(tmp_path / "pictures", {"cat": 1, "horse": 1})
    with pytest.raises(ValueError, match="two images or more"):
        load_labelled(source)


def test_a_named_test_split_that_is_missing_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="split 'validation' is not in source 'digits'; it has test, train"):
        load_labelled("digits", test_split="validation")
    with pytest.raises(ValueError, match="does not exist"):
        load_labelled("digits", tmp_path / "missing here")
