"""Layouts of folders that people have: which files are images, of which split and class, and what is left out."""

import os
from collections import Counter
from pathlib import Path

import pytest
from layouts import LAYOUTS, folder_table, spelled_out
from PIL import Image

from hf_mim.data import load_images
from hf_mim.data.classes import why_no_classes
from hf_mim.data.decode import open_image
from hf_mim.data.folders import IMAGE_EXTENSIONS, image_splits, scan, split_of_folder, table_splits
from hf_mim.data.masks import load_masks

DOCS = Path(__file__).parents[2] / "docs" / "data.md"


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_are_understood(layout):
    files, splits, left_out = LAYOUTS[layout]
    found = image_splits(sorted(name for pattern in files.split() for name in spelled_out(pattern)))
    classes = {name: dict(entries) for name, entries in found.splits.items()}
    if len({name for entries in classes.values() for name in entries.values()} - {None}) < 2:  # one class is none
        classes = {name: dict.fromkeys(entries) for name, entries in classes.items()}
    assert classes == {
        split: {path: label for pattern, label in paths.items() for path in spelled_out(pattern)}
        for split, paths in splits.items()
    }
    assert found.left_out == left_out


def test_the_table_of_layouts_in_the_docs_is_that_of_the_tests():
    assert len(LAYOUTS) >= 20 and folder_table() in DOCS.read_text()


def test_folders_that_do_not_look_like_classes_are_none_and_a_note_says_why_and_what_to_do():
    patients = image_splits([f"p{i}/{i}.png" for i in range(30)])
    assert {name for _, name in patients.splits["train"]} == {None}
    assert patients.notes == [
        "the 30 folders (p0, p1, p10 and 27 more) are taken for groups such as patients or scenes, not for classes, "
        "because their names are numbered; if they are classes: --labels folder; to keep each group on one side of a "
        "split: --group folder"
    ]
    classes = [f"{name}/{i}.png" for name in ("cat", "dog") for i in range(10)]
    names = [name for _, name in image_splits(["logo.png", *classes]).splits["train"]]
    assert names == [None] + ["cat"] * 10 + ["dog"] * 10
    scattered = image_splits([*(f"{i}.png" for i in range(20)), *classes])
    assert {name for _, name in scattered.splits["train"]} == {None}
    assert scattered.notes == ["folders are no classes, because 20 images lie outside of them"]
    named = image_splits([f"{name}/{i}.png" for name in "abcdefghijk" for i in range(9)])
    assert "because they hold 9.0 images on average, fewer than 10" in named.notes[0]


def test_folders_are_classes_or_groups_by_their_names_and_sizes():
    def are_classes(names, each: int) -> bool:
        return why_no_classes(Counter({name: each for name in names}), 0) is None

    assert are_classes((f"n{i:08}" for i in range(1000)), 700), "WordNet"
    assert are_classes((f"class_{i}" for i in range(100)), 500)
    assert are_classes((f"{i:03}.{chr(97 + i)}" for i in range(20)), 60), "CUB: numbers before words"
    assert are_classes((f"c{i}" for i in range(10)), 2) and are_classes(map(str, range(10)), 6000)
    assert not are_classes((f"c{i}" for i in range(11)), 6000)
    assert not are_classes((f"sub-{i:02}" for i in range(3)), 300)
    assert not are_classes(("0a1b2c3d", "99887766", "deadbee0"), 300), "ids"
    assert are_classes(("a1", "b2"), 5), "too different to be numbers of one kind"


def test_names_of_folders_tell_splits():
    for name in ("train", "Training", "train2017", "train_images", "training_set", "images_train", "trainset"):
        assert split_of_folder(name) == "train", name
    assert split_of_folder("val_set") == split_of_folder("dev") == "validation"
    for name in ("trains", "contest", "evaluate_me", "strain", "train_masks", "vale", "rain"):
        assert split_of_folder(name) is None, name


def test_a_word_in_the_name_of_a_table_tells_a_split_only_if_all_have_one():
    assert table_splits(["a-train-0.tar", "a-val-0.tar"])[0] == {
        "train": ["a-train-0.tar"],
        "validation": ["a-val-0.tar"],
    }
    assert table_splits(["test.parquet", "x.parquet"])[0] == {"test": ["test.parquet"], "train": ["x.parquet"]}
    assert table_splits(["val/0.tar", "x/0.tar"])[0] == {"validation": ["val/0.tar"], "train": ["x/0.tar"]}
    assert table_splits(["a_train.parquet", "a_test.parquet", "b.parquet"])[0] == {
        "train": ["a_train.parquet", "a_test.parquet", "b.parquet"]
    }, "one name without a word makes the others no splits"
    splits, notes = table_splits(["crash_test_1.tar", "field_2.tar"])
    assert splits == {"train": ["crash_test_1.tar", "field_2.tar"]}
    assert notes == ["crash_test_1.tar counts as training data, because other files name no split"]


def draw(folder, *names):
    for number, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (8, 8), number).save(folder / name)


def test_pipes_and_broken_links_are_not_opened_and_counted(tmp_path):
    draw(tmp_path, "a/1.png", "2.png")
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "broken.png").symlink_to("nowhere")
    (tmp_path / "good.png").symlink_to("2.png")
    (tmp_path / "loop").symlink_to(tmp_path)
    (tmp_path / "notes").write_text("")
    found, left_out = scan(tmp_path, IMAGE_EXTENSIONS)
    assert found == ["2.png", "good.png", "a/1.png"]
    assert left_out == {"no regular files (pipes, devices, broken links)": 2, "files without an extension": 1}
    assert len(load_images(tmp_path)) == 3


def test_what_is_left_out_is_told_once(tmp_path, caplog):
    draw(tmp_path, "images/1.png", "masks/1.png")
    for number in range(3):
        (tmp_path / "images" / f"{number}.CR2").write_bytes(b"")
    (tmp_path / "labels.csv").write_text("")
    for _ in range(2):
        assert len(load_images(tmp_path)) == 1
    (record,) = caplog.records
    told = "split train: 1 images (1 .png) is taken; left out: 3 .cr2, 1 .csv, 1 in masks/"
    assert told in record.getMessage() and str(tmp_path) in record.getMessage()


def test_a_line_tells_what_is_taken(tmp_path, caplog):
    draw(tmp_path, "train/cat/1.png", "train/dog/1.png", "test/cat/2.png", "unlabeled/3.png", "logo.png")
    lines = []
    load_images(tmp_path, tell=lines.append)
    assert lines == [
        f"source {tmp_path.name!r}, split train: 2 images (2 .png); labels by class folders, 2 classes: cat, dog (to "
        "leave them out: --labels none); splits by the folders test, train; other splits: test (1), unlabeled (1); "
        "left out: 1 beside the folders of splits"
    ]
    assert not caplog.records


def test_names_that_are_not_utf8_are_names_like_others(tmp_path):
    draw(tmp_path, "a/1.png", "a/2.png", "b/1.png")
    folder = os.fsencode(tmp_path)
    os.rename(folder + b"/a/2.png", folder + b"/a/caf\xe9.png")
    os.rename(folder + b"/b", folder + b"/\xfcber")
    images = load_images(tmp_path)
    assert images.features["label"].names == ["\\xfcber", "a"]
    names = [os.path.relpath(row["image"]["path"], tmp_path) for row in images]
    assert names == ["a/1.png", "a/caf\\xe9.png", "\\xfcber/1.png"]
    levels = [open_image(row["image"]).getpixel((0, 0)) for row in images]
    assert levels == [0, 1, 2] and images["label"][:] == [1, 1, 0]
    Image.new("L", (8, 8), 9).save(folder + b"/a/caf\xe9.png", "png")
    os.utime(folder + b"/a/caf\xe9.png", (1, 1))
    assert open_image(load_images(tmp_path)[1]["image"]).getpixel((0, 0)) == 9  # no old copy from a cache
    draw(tmp_path / "m", "images/1.png", "masks/1.png")
    for part in (b"images", b"masks"):
        os.rename(folder + b"/m/" + part + b"/1.png", folder + b"/m/" + part + b"/\xe9.png")
    masked = load_masks(tmp_path / "m")
    assert masked.read_mask(0).max() == 1 and open_image(masked.images[0]["image"]).getpixel((0, 0)) == 0
