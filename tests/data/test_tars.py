"""Tars as people write them: which members are images, and their labels. Pixels and labels are checked."""

import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
from layouts import TARS, tar_table
from PIL import Image

from hf_mim.data import load_images
from hf_mim.data.damage import DamagedFile
from hf_mim.data.decode import open_image
from hf_mim.data.masks import load_masks
from hf_mim.data.tars import look_into


def content(name: str, value) -> bytes:
    """An image whose pixels are `value`, or what is given, or a JSON file."""
    if isinstance(value, bytes):
        return value
    if name.lower().endswith("json"):
        return json.dumps(value).encode()
    buffer, extension = io.BytesIO(), name.lower().rpartition(".")[2]
    if extension == "npy":
        np.save(buffer, np.full((8, 8, 3), value, np.uint8))
    else:
        kind = {"jpg": "JPEG", "jpeg": "JPEG", "tif": "TIFF"}.get(extension, extension)
        Image.new("L" if "seg" in name else "RGB", (8, 8), value if "seg" in name else (value,) * 3).save(
            buffer, kind, lossless=True
        )
    return buffer.getvalue()


def write_tar(path, files):
    with tarfile.open(path, "w") as tar:
        for name, value in files:
            member = tarfile.TarInfo(name)
            data = content(name, value)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return path


def read(source, **options):
    """[(grey level, label or None)], sorted by the level."""
    images = load_images(source, **options)
    names = images.features["label"].names if hasattr(images.features.get("label"), "names") else None
    rows = []
    for row in images:
        label = row.get("label")
        level = round(float(np.asarray(open_image(row["image"])).mean()))
        rows.append((level, names[label] if names and label >= 0 else label))
    return sorted(rows)


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("kind", TARS)
def test_tars_give_their_images_and_labels(tmp_path, kind, streaming):
    files, whole, streamed = TARS[kind]
    write_tar(tmp_path / "0.tar", files)
    if streaming and streamed is None:
        with pytest.raises(ValueError, match="images in it are masks .in masks/.; load it with streaming=False"):
            load_images(tmp_path, streaming=True)
    else:
        assert read(tmp_path, streaming=streaming) == (whole if not streaming or streamed is ... else streamed)


def test_the_table_of_tars_in_the_docs_is_that_of_the_tests():
    assert len(TARS) >= 15 and tar_table() in (Path(__file__).parents[2] / "docs" / "data.md").read_text()


def test_a_value_of_json_is_the_label_if_it_is_named(tmp_path):
    tar = write_tar(tmp_path / "0.tar", [("a.png", 1), ("a.json", {"y": 4, "label": 1}), ("b.png", 2), ("b.json", {})])
    assert read(tar) == [(1, 1), (2, -1)]
    for streaming in (False, True):
        assert read(tar, labels="y", streaming=streaming) == [(1, 4), (2, -1)]
    assert read(tar, labels="none") == [(1, None), (2, None)]
    with pytest.raises(ValueError, match="labels='z' is not a column; columns: png"):
        read(tar, labels="z")


def test_folders_in_a_tar_are_classes_or_groups_where_the_user_says_so(tmp_path):
    tar = write_tar(tmp_path / "0.tar", [("P1/a.png", 1), ("P1/b.png", 2), ("P2/c.png", 3), ("P2/c.cls", b"7")])
    assert [label for _, label in read(tar)] == [-1, -1, 7]
    assert [label for _, label in read(tar, labels="folder")] == ["P1", "P1", "P2"]
    assert load_images(tar, group="folder")["group"][:] == ["P1", "P1", "P2"]


@pytest.mark.parametrize("streaming", [False, True])
def test_tars_of_different_types_with_the_same_names(tmp_path, streaming):
    write_tar(tmp_path / "0.tar", [("0.jpg", 1), ("0.cls", b"3")])
    write_tar(tmp_path / "1.tar", [("0.png", 2), ("0.cls", b"4"), ("1.webp", 3)])
    assert read(tmp_path, streaming=streaming) == [(1, 3), (2, 4), (3, -1)]


def test_splits_within_a_tar_are_splits(tmp_path):
    files = [("d/train/cat/a.png", 1), ("d/train/dog/a.png", 2), ("d/test/dog/b.png", 3)]
    tar = write_tar(tmp_path / "all.tar", files)
    assert read(tar) == [(1, "cat"), (2, "dog")]
    assert read(tar, split="test") == [(3, "dog")]
    with pytest.raises(ValueError, match="folders in it are splits .*streaming=False"):
        load_images(tar, streaming=True)


def test_a_tar_that_was_changed_is_read_again(tmp_path):
    for level in (1, 2):
        assert read(write_tar(tmp_path / "0.tar", [("a.png", level)])) == [(level, None)]


def test_further_images_of_a_sample_can_be_masks(tmp_path):
    write_tar(tmp_path / "0.tar", [("a.png", 1), ("a.seg.png", 3), ("b.png", 2), ("b.seg.png", 4)])
    masked = load_masks(tmp_path, mask_column="seg.png")
    assert [int(mask.mean()) for mask in masked.read_masks()] == [3, 4]


def test_what_is_left_out_is_told(tmp_path):
    write_tar(tmp_path / "0.tar", [("a.jpg", 1), ("a.png", 2), ("a.cls", b"1")])
    (tmp_path / "x.heic").write_bytes(b"")
    lines = []
    load_images(tmp_path, tell=lines.append)
    assert lines[0].endswith(
        "1 .tar file, 1 images; labels by column cls, numbers (to leave them out: --labels none); "
        "left out: 1 .heic, 1 .png beside other images"
    )


@pytest.mark.parametrize("damage", ["cut", "cut in a header", "overwritten", "gzip"])
def test_a_damaged_tar_is_named(tmp_path, damage):
    tar = write_tar(tmp_path / "bad.tar", [(f"{i}.png", i) for i in range(30)])
    data = tar.read_bytes()
    half = len(data) // 1024 // 2 * 1024
    if damage == "cut":
        data = data[: half + 600]
    elif damage == "cut in a header":
        data = data[: half + 100]
    elif damage == "overwritten":
        data = data[:half] + b"x" * 512 + data[half + 512 :]
    else:
        data = b"\x1f\x8b" + data
    tar.write_bytes(data)
    with pytest.raises(DamagedFile, match="^.*bad.tar is damaged .*; copy or make it again, or leave it out$"):
        look_into([tar])
    with pytest.raises(ValueError, match="bad.tar"):
        load_images(tar)
