"""Tars as people write them: which members are images, and their labels. Pixels and labels are checked."""

import io
import json
import tarfile

import numpy as np
import pytest
from PIL import Image

from hf_mim.data import load_images
from hf_mim.data.decode import open_image
from hf_mim.data.masks import load_masks
from hf_mim.data.tars import DamagedTar, look_into


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


# What a tar holds → [(grey level, label)] without a stream, and in a stream.
TARS = {
    "numbers": ([("a.png", 1), ("a.cls", b"5"), ("b.png", 2), ("b.cls", b"7\n")], [(1, 5), (2, 7)], ...),
    "names": (
        [("a.png", 1), ("a.cls", b"dog"), ("b.png", 2), ("b.cls", b"cat")],
        [(1, "dog"), (2, "cat")],
        [(1, None), (2, None)],
    ),
    "a label is missing": ([("a.png", 1), ("b.png", 2), ("b.cls", b"3")], [(1, -1), (2, 3)], ...),
    "JSON": (
        [("a.jpg", 1), ("a.json", {"label": 3, "by": "me"}), ("b.jpg", 2), ("b.json", {"label": 0})],
        [(1, 3), (2, 0)],
        ...,
    ),
    "JSON without a label": ([("a.jpg", 1), ("a.json", {"by": "me"})], [(1, None)], ...),
    "damaged JSON": ([("a.jpg", 1), ("a.json", b"{")], [(1, None)], ...),
    "booleans": (
        [("a.jpg", 1), ("a.json", {"label": True}), ("b.jpg", 2), ("b.json", {"label": False})],
        [(1, 1), (2, 0)],
        ...,
    ),
    "mixed types in any case": (
        [("a.JPG", 1), ("b.jpeg", 2), ("c.PNG", 3), ("d.webp", 4), ("e.tif", 5), ("f.npy", 6)],
        [(i, None) for i in range(1, 7)],
        ...,
    ),
    "class folders": (
        [("./cat/a.png", 1), ("./dog/a.png", 2)],
        [(1, "cat"), (2, "dog")],
        [(1, None), (2, None)],
    ),
    "dots in names": (
        [("x.1.png", 1), ("x.1.cls", b"4"), ("x.2.png", 2), ("x.2.cls", b"6")],
        [(1, 4), (2, 6)],
        ...,
    ),
    "masks beside": ([("a.png", 1), ("a.seg.png", 200), ("b.png", 2), ("b.seg.png", 200)], [(1, None), (2, None)], ...),
    "mask of the same name": ([("a.jpg", 1), ("a.png", 200)], [(1, None)], ...),
    "macOS": (
        [("._a.png", b"x"), ("a.png", 1), ("__MACOSX/a.png", b"x"), (".hidden/b.png", b"x")],
        [(1, None)],
        ...,
    ),
    "other files": ([("README.md", b"hi"), ("a.png", 1), ("a.txt", b"a cat")], [(1, None)], ...),
    "folders of masks": (
        [("images/a.png", 1), ("images/b.png", 2), ("masks/a.png", 200)],
        [(1, None), (2, None)],
        None,
    ),
}


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
    assert lines[0].endswith("1 .tar file, 1 images; labels are numbers; left out: 1 .heic, 1 .png beside other images")


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
    with pytest.raises(DamagedTar, match="^.*bad.tar is damaged .*; copy or make it again, or leave it out$"):
        look_into([tar])
    with pytest.raises(ValueError, match="bad.tar"):
        load_images(tar)
