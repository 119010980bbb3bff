"""Layouts of folders that people have: which files are images, of which split and class, and what is left out."""

import os

import pytest
from PIL import Image

from hf_mim.data import load_images
from hf_mim.data.decode import open_image
from hf_mim.data.folders import IMAGE_EXTENSIONS, image_splits, scan, split_of_folder, table_splits
from hf_mim.data.masks import load_masks

# Layout → (files, {split: {path: class}}, {what is left out: how many}).
LAYOUTS = {
    "flat": ("1.png 2.png", {"train": {"1.png": None, "2.png": None}}, {}),
    "classes": ("cat/1.png dog/1.png", {"train": {"cat/1.png": "cat", "dog/1.png": "dog"}}, {}),
    "splits of classes": (
        "train/cat/1.png train/dog/1.png test/cat/2.png",
        {"train": {"train/cat/1.png": "cat", "train/dog/1.png": "dog"}, "test": {"test/cat/2.png": "cat"}},
        {},
    ),
    "a picture beside splits": (
        "logo.png train/cat/1.png test/cat/2.png",
        {"train": {"train/cat/1.png": None}, "test": {"test/cat/2.png": None}},
        {"beside the folders of splits": 1},
    ),
    "a picture beside train alone": (
        "logo.png train/cat/1.png",
        {"train": {"train/cat/1.png": None}},
        {"beside the folders of splits": 1},
    ),
    "STL-10": (
        "train/1.png test/2.png unlabeled/3.png",
        {"train": {"train/1.png": None}, "test": {"test/2.png": None}, "unlabeled": {"unlabeled/3.png": None}},
        {},
    ),
    "test beside classes": (
        "cat/1.png dog/1.png test/3.png",
        {"train": {"cat/1.png": "cat", "dog/1.png": "dog"}, "test": {"test/3.png": None}},
        {},
    ),
    "test beside pictures": ("1.png test/2.png", {"train": {"1.png": None}, "test": {"test/2.png": None}}, {}),
    "trains and planes": ("train/1.png plane/1.png", {"train": {"train/1.png": "train", "plane/1.png": "plane"}}, {}),
    "splits within classes": (
        "cat/train/1.png cat/test/2.png dog/train/1.png",
        {"train": {"cat/train/1.png": "cat", "dog/train/1.png": "dog"}, "test": {"cat/test/2.png": "cat"}},
        {},
    ),
    "images and masks": (
        "images/1.png masks/1.png",
        {"train": {"images/1.png": None}},
        {"in masks/": 1},
    ),
    "images, labels and previews": (
        "images/1.png labels/1.png preview/1.png",
        {"train": {"images/1.png": None}},
        {"in labels/": 1, "in preview/": 1},
    ),
    "ADE20K": (
        "images/training/1.jpg images/validation/2.jpg annotations/training/1.png annotations/validation/2.png",
        {"train": {"images/training/1.jpg": None}, "validation": {"images/validation/2.jpg": None}},
        {"in annotations/": 2},
    ),
    "COCO": (
        "train2017/1.jpg val2017/2.jpg annotations/panoptic_train2017/1.png",
        {"train": {"train2017/1.jpg": None}, "validation": {"val2017/2.jpg": None}},
        {"in annotations/": 1},
    ),
    "VOC": (
        "VOC2012/JPEGImages/1.jpg VOC2012/SegmentationClass/1.png VOC2012/SegmentationObject/1.png",
        {"train": {"VOC2012/JPEGImages/1.jpg": None}},
        {"in SegmentationClass/": 1, "in SegmentationObject/": 1},
    ),
    "DAVIS": (
        "JPEGImages/480p/bear/0.jpg JPEGImages/480p/cow/0.jpg Annotations/480p/bear/0.png",
        {"train": {"JPEGImages/480p/bear/0.jpg": "bear", "JPEGImages/480p/cow/0.jpg": "cow"}},
        {"in Annotations/": 1},
    ),
    "Cityscapes": (
        "leftImg8bit/train/ulm/1.png leftImg8bit/val/bonn/2.png gtFine/train/ulm/1.png gtFine/val/bonn/2.png",
        {"train": {"leftImg8bit/train/ulm/1.png": "ulm"}, "validation": {"leftImg8bit/val/bonn/2.png": "bonn"}},
        {"in gtFine/": 2},
    ),
    "CamVid": (
        "train/1.png trainannot/1.png test/2.png testannot/2.png",
        {"train": {"train/1.png": None}, "test": {"test/2.png": None}},
        {"in trainannot/": 1, "in testannot/": 1},
    ),
    "masks of train alone": (
        "train/1.jpg train_masks/1.png",
        {"train": {"train/1.jpg": None}},
        {"in train_masks/": 1},
    ),
    "splits of images and masks": (
        "train/images/1.png train/masks/1.png val/images/2.png val/masks/2.png",
        {"train": {"train/images/1.png": None}, "validation": {"val/images/2.png": None}},
        {"in masks/": 2},
    ),
    "a folder for each image": (
        "a1/images/a1.png a1/masks/7.png b2/images/b2.png b2/masks/8.png",
        {"train": {"a1/images/a1.png": "a1", "b2/images/b2.png": "b2"}},
        {"in masks/": 2},
    ),
    "MVTec AD": (
        "nut/train/good/0.png nut/test/bent/0.png nut/ground_truth/bent/0_mask.png "
        "pill/train/good/0.png pill/test/crack/0.png pill/ground_truth/crack/0_mask.png",
        {
            "train": {"nut/train/good/0.png": "nut", "pill/train/good/0.png": "pill"},
            "test": {"nut/test/bent/0.png": "nut", "pill/test/crack/0.png": "pill"},
        },
        {"in ground_truth/": 2},
    ),
    "masks by name": (
        "benign/1.png benign/1_mask.png benign/1_mask_1.png normal/2.png normal/2_mask.png",
        {"train": {"benign/1.png": "benign", "normal/2.png": "normal"}},
        {"masks by their names": 3},
    ),
    "masks beside pictures": ("1.png masks/1.png", {"train": {"1.png": None}}, {"in masks/": 1}),
    "masks beside a folder of the same names": (
        "photos/1.jpg photos/2.jpg mask/1.png mask/2.png",
        {"train": {"photos/1.jpg": None, "photos/2.jpg": None}},
        {"in mask/": 2},
    ),
    "masks that are classes": (
        "with_mask/1.png without_mask/2.png",
        {"train": {"with_mask/1.png": "with_mask", "without_mask/2.png": "without_mask"}},
        {},
    ),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_are_understood(layout):
    files, splits, left_out = LAYOUTS[layout]
    found = image_splits(sorted(files.split()))
    classes = {name: dict(entries) for name, entries in found.splits.items()}
    if len({name for entries in classes.values() for name in entries.values()} - {None}) < 2:  # one class is none
        classes = {name: dict.fromkeys(entries) for name, entries in classes.items()}
    assert classes == splits
    assert found.left_out == left_out


def test_many_folders_of_one_image_and_scattered_pictures_are_no_classes():
    patients = image_splits([f"p{i}/{i}.png" for i in range(30)])
    assert {name for _, name in patients.splits["train"]} == {None}
    assert patients.notes == ["the 30 folders are no classes, because they hold less than 2 images each"]
    classes = [f"{name}/{i}.png" for name in ("cat", "dog") for i in range(10)]
    names = [name for _, name in image_splits(["logo.png", *classes]).splits["train"]]
    assert names == [None] + ["cat"] * 10 + ["dog"] * 10
    scattered = image_splits([*(f"{i}.png" for i in range(20)), *classes])
    assert {name for _, name in scattered.splits["train"]} == {None}
    assert scattered.notes == ["folders are no classes, because 20 images lie outside of them"]


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
        (tmp_path / "images" / f"{number}.HEIC").write_bytes(b"")
    (tmp_path / "labels.csv").write_text("")
    for _ in range(2):
        assert len(load_images(tmp_path)) == 1
    (record,) = caplog.records
    told = "split train: 1 images (1 .png) is taken; left out: 1 .csv, 3 .heic, 1 in masks/"
    assert told in record.getMessage() and str(tmp_path) in record.getMessage()


def test_a_line_tells_what_is_taken(tmp_path, caplog):
    draw(tmp_path, "train/cat/1.png", "train/dog/1.png", "test/cat/2.png", "unlabeled/3.png", "logo.png")
    lines = []
    load_images(tmp_path, tell=lines.append)
    assert lines == [
        f"source {tmp_path.name!r}, split train: 2 images (2 .png); 2 classes: cat, dog; splits by the folders test, "
        "train; other splits: test (1), unlabeled (1); left out: 1 beside the folders of splits"
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
