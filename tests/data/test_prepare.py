"""`hf-mim prepare`: what is written is what was read, to the bit; and what does not work is said before it begins."""

import io
import re

import numpy as np
import pytest
import tifffile
import torch
from datasets import Array3D, ClassLabel, Dataset, Features
from datasets import Image as ImageFeature
from PIL import Image

from hf_mim.cli import main
from hf_mim.data import ImageDataset, WholeImage, load_images, prepare_files
from hf_mim.data.decode import open_image
from hf_mim.data.prepare import Prepare, starts
from hf_mim.models.pixels import ImageFormatError, crop_image

HEIGHT, WIDTH = 75, 100


def drawn(kind="uint8", bands=3, height=HEIGHT, width=WIDTH, seed=0):
    values = np.random.RandomState(seed).randint(0, 256 if kind == "uint8" else 60000, (height, width, bands))
    return values.astype(kind) if kind != "float32" else (values / 7 - 3000).astype(kind)


def write(path, array):
    """By the extension, without loss for all but .jpg."""
    path.parent.mkdir(parents=True, exist_ok=True)
    flat = array[..., 0] if array.shape[2] == 1 else array
    if path.suffix == ".npy":
        np.save(path, array)
    elif path.suffix == ".tif":
        tifffile.imwrite(path, flat, photometric="minisblack", planarconfig="contig" if flat.ndim == 3 else None)
    else:
        Image.fromarray(flat).save(path)


def read(path, bands):
    image = open_image(str(path), bands)
    array = np.asarray(image)
    return array if array.ndim == 3 else array[..., None]


def put_together(folder, stem, shape, kind):
    """The image from its tiles, and how often each pixel was covered."""
    image, covered = np.zeros(shape, kind), np.zeros(shape[:2], int)
    side = 32
    for path in folder.glob(f"{stem}_r*"):
        row, column = map(int, re.fullmatch(rf"{stem}_r(\d{{3}})_c(\d{{3}})", path.stem).groups())
        top, left = min(row * side, shape[0] - side), min(column * side, shape[1] - side)
        tile = read(path, shape[2])
        assert tile.dtype == image.dtype and tile.shape == (side, side, shape[2])
        image[top : top + side, left : left + side] = tile
        covered[top : top + side, left : left + side] += 1
    return image, covered


@pytest.mark.parametrize(
    ("name", "kind", "bands", "written"),
    [
        ("a.png", "uint8", 3, ".png"),
        ("a.png", "uint8", 4, ".png"),
        ("a.png", "uint8", 1, ".png"),
        ("a.tif", "uint16", 1, ".tif"),
        ("a.tif", "uint16", 3, ".tif"),
        ("a.tif", "uint16", 13, ".tif"),
        ("a.tif", "uint8", 13, ".tif"),
        ("a.tif", "float32", 2, ".tif"),
        ("a.npy", "float32", 5, ".tif"),
        ("a.npy", "int16", 2, ".tif"),
    ],
)
def test_tiles_put_together_are_the_image_to_the_bit(tmp_path, name, kind, bands, written):
    array = drawn(kind, bands) if kind != "int16" else (drawn("uint16", bands) - 30000).astype("int16")
    write(tmp_path / "in" / "b" / name, array)
    prepared = Prepare(str(tmp_path / "in"), str(tmp_path / "out"), tile=32)(progress=False)
    assert (prepared.files, prepared.images) == ({written: 12}, 1)
    image, covered = put_together(tmp_path / "out" / "b", "a", array.shape, array.dtype)
    np.testing.assert_array_equal(image, array)
    assert covered.min() == 1 and covered.sum() == 12 * 32 * 32


def test_without_tifffile_deep_tiles_are_arrays(tmp_path, monkeypatch):
    array = drawn("uint16", 5)
    write(tmp_path / "in" / "a.npy", array)
    monkeypatch.setattr(prepare_files, "find_spec", lambda name: None)
    assert Prepare(str(tmp_path / "in"), str(tmp_path / "out"), tile=32)(progress=False).files == {".npy": 12}
    np.testing.assert_array_equal(put_together(tmp_path / "out", "a", array.shape, array.dtype)[0], array)


def test_tiles_begin_one_after_the_other_and_the_last_ends_with_the_image():
    assert starts(100, 32) == [0, 32, 64, 68] and starts(96, 32) == [0, 32, 64]
    assert starts(32, 32) == [0] and starts(7, 32) == [0]


def test_an_image_is_cut_upright(tmp_path):
    array, exif = drawn(), Image.Exif()
    exif[0x0112] = 6  # to be turned a quarter to the right
    (tmp_path / "in").mkdir()
    Image.fromarray(array).save(tmp_path / "in" / "a.png", exif=exif)
    Prepare(str(tmp_path / "in"), str(tmp_path / "out"), tile=32)(progress=False)
    upright = np.rot90(array, -1)
    np.testing.assert_array_equal(put_together(tmp_path / "out", "a", upright.shape, "uint8")[0], upright)


@pytest.mark.parametrize(
    ("name", "kind", "bands"), [("a.png", "uint8", 3), ("a.tif", "uint16", 13), ("a.npy", "float32", 2)]
)
def test_a_short_side_is_the_packages_own_resize(tmp_path, name, kind, bands):
    array = drawn(kind, bands)
    write(tmp_path / "in" / name, array)
    Prepare(str(tmp_path / "in"), str(tmp_path / "out"), short_side=30)(progress=False)
    (path,) = (tmp_path / "out").iterdir()
    expected = crop_image(array, WholeImage(), (30, 40), bands, channels_last=True).permute(1, 2, 0).numpy()
    np.testing.assert_array_equal(read(path, bands), expected)


def test_jpegs_stay_jpegs_and_small_ones_stay_as_they_are(tmp_path, picture):
    (tmp_path / "in").mkdir()
    for name, sides in (("large", (200, 150)), ("small", (60, 40))):
        picture(*sides).save(tmp_path / "in" / f"{name}.jpg", quality=90)
    prepared = Prepare(str(tmp_path / "in"), str(tmp_path / "out"), short_side=75)(progress=False)
    assert (prepared.files, prepared.small) == ({".jpg": 2}, 1)
    small, large = (tmp_path / "out" / f"{name}.jpg" for name in ("small", "large"))
    assert small.read_bytes() == (tmp_path / "in" / "small.jpg").read_bytes()
    expected = crop_image(Image.open(tmp_path / "in" / "large.jpg"), WholeImage(), (75, 100), 3).numpy()
    assert np.abs(np.asarray(Image.open(large)).transpose(2, 0, 1).astype(int) - expected).mean() < 2


def classes_of(folder, split):
    images = load_images(folder, split)
    names = images.features["label"].names
    return {
        (names[row["label"]], re.sub(r"^\d{6}_|_r\d+_c\d+", "", row["image"]["path"].split("/")[-1])) for row in images
    }


def test_folders_of_classes_and_splits_stay_and_masks_are_left_out(tmp_path):
    root = tmp_path / "in"
    for split, numbers in (("train", range(6)), ("test", range(6, 10))):
        for number in numbers:
            write(root / split / ("cat" if number % 2 else "dog") / f"{number}.png", drawn(seed=number))
    prepared = Prepare(str(root), str(tmp_path / "out"), tile=50, num_workers=2)(progress=False)
    assert prepared.files == {".png": 40}
    for split in ("train", "test"):
        assert classes_of(root, split) == classes_of(tmp_path / "out", split)
    masked = tmp_path / "masked"
    for number in range(3):
        write(masked / "images" / f"{number}.png", drawn(seed=number))
        write(masked / "masks" / f"{number}.png", drawn(bands=1, seed=number))
    prepared = Prepare(str(masked), str(tmp_path / "plain"), tile=50)(progress=False)
    assert prepared.left_out == {"in masks/": 3} and prepared.files == {".png": 12}
    assert not list((tmp_path / "plain").rglob("masks"))


def encoded(array) -> bytes:
    file = io.BytesIO()
    Image.fromarray(array).save(file, "PNG")
    return file.getvalue()


def test_tables_get_a_folder_for_each_split_and_class(tmp_path):
    features = Features(image=ImageFeature(), label=ClassLabel(names=["cat", "a/b"]))
    for split, numbers in (("train", range(4)), ("test", range(4, 6))):
        rows = {"image": [{"bytes": encoded(drawn(seed=n)), "path": f"{n}.png"} for n in numbers]}
        rows["label"] = [n % 2 for n in numbers]
        (tmp_path / "in").mkdir(exist_ok=True)
        Dataset.from_dict(rows, features).to_parquet(tmp_path / "in" / f"{split}.parquet")
    Prepare(str(tmp_path / "in"), str(tmp_path / "out"), tile=50)(progress=False)
    found = {str(path.parent.relative_to(tmp_path / "out")) for path in (tmp_path / "out").rglob("*.png")}
    assert found == {"train/cat", "train/a_b", "test/cat", "test/a_b"}
    assert classes_of(tmp_path / "out", "test") == {("cat", "4.png"), ("a_b", "5.png")}
    tile = read(tmp_path / "out" / "train" / "cat" / "000002_2_r000_c000.png", 3)
    np.testing.assert_array_equal(tile, drawn(seed=2)[:50, :50])


def test_arrays_of_a_saved_dataset_keep_their_depth(tmp_path):
    arrays = [drawn("uint16", 5, 40, 50, seed) for seed in range(3)]
    Dataset.from_dict({"image": arrays}, Features(image=Array3D((40, 50, 5), "uint16"))).save_to_disk(tmp_path / "in")
    prepared = Prepare(str(tmp_path / "in"), str(tmp_path / "out"), tile=40)(progress=False)
    assert prepared.files == {".tif": 6}
    np.testing.assert_array_equal(read(tmp_path / "out" / "000001_r000_c001.tif", 5), arrays[1][:, 10:])


def test_what_was_written_is_trained_on_as_the_original(tmp_path):
    """13 bands of 16 bits: a tile that covers the image gives the pixels of the image."""
    array = drawn("uint16", 13, 32, 32)
    write(tmp_path / "in" / "a.tif", array)
    Prepare(str(tmp_path / "in"), str(tmp_path / "out"), tile=32)(progress=False)
    one, other = (
        ImageDataset(load_images(tmp_path / where), 32, 13, WholeImage(), own_depth=True)[0]["pixel_values"]
        for where in ("in", "out")
    )
    assert torch.equal(one, other)


def test_files_of_one_name_do_not_replace_each_other(tmp_path):
    for name, seed in (("a.png", 0), ("a.bmp", 1)):
        write(tmp_path / "in" / name, drawn(seed=seed))
    assert Prepare(str(tmp_path / "in"), str(tmp_path / "out"), tile=100)(progress=False).files == {".png": 2}
    np.testing.assert_array_equal(read(tmp_path / "out" / "a_bmp_r000_c000.png", 3), drawn(seed=1))


def test_one_image_file_is_a_source(tmp_path):
    write(tmp_path / "scene.tif", drawn("uint16", 4))
    assert Prepare(str(tmp_path / "scene.tif"), str(tmp_path / "out"), tile=50)(progress=False).files == {".tif": 4}


def test_broken_images_are_counted_and_named(tmp_path, capsys):
    write(tmp_path / "in" / "a.png", drawn())
    (tmp_path / "in" / "b.png").write_bytes(b"no image")
    assert main(["prepare", str(tmp_path / "in"), str(tmp_path / "out"), "--tile", "50", "--num_workers", "0"]) == 0
    printed = capsys.readouterr().out
    assert "holds 4 tiles (4 .png) of 1 images." in printed and "1 images cannot be decoded: b.png: not an" in printed
    assert f"hf-mim pretrain --dataset {tmp_path / 'out'} --image_size 48 --crop_pixels 48" in printed


def test_an_image_that_needs_an_option_ends_it_and_nothing_is_left(tmp_path, capsys, monkeypatch):
    pages = np.moveaxis(drawn("uint16", 5), -1, 0).copy()
    (tmp_path / "in").mkdir()
    tifffile.imwrite(tmp_path / "in" / "a.tif", pages, photometric="minisblack")
    with pytest.raises(ImageFormatError, match="a.tif: a TIFF of 5 pages: give --num_channels 5 if they are bands"):
        Prepare(str(tmp_path / "in"), str(tmp_path / "out"), tile=32, num_workers=1)(progress=False)
    assert [path.name for path in tmp_path.iterdir()] == ["in"]
    Prepare(str(tmp_path / "in"), str(tmp_path / "out"), tile=32, num_channels=5)(progress=False)
    image, _ = put_together(tmp_path / "out", "a", (HEIGHT, WIDTH, 5), "uint16")
    np.testing.assert_array_equal(image, np.moveaxis(pages, 0, -1))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("in out", "give one of --tile and --short_side, such as --tile 256, not none"),
        ("in out --tile 8 --short_side 8", "give one of --tile and --short_side, such as --tile 256, not both"),
        ("in out --tile 0", "tile must be at least 1, not 0"),
        ("in out --tile x", "tile must be a whole number, not 'x'"),
        ("in full --tile 8", "DEST must be a new folder, and full holds something already"),
        ("in in/out --tile 8", "DEST must lie outside of SOURCE, and in/out lies in in"),
        ("full/in full --tile 8", "DEST must be a new folder, and full holds something already"),
        ("nothing_here out --tile 8", "source 'nothing_here'"),
        ("empty out --tile 8", "source 'empty' holds no images"),
    ],
)
def test_what_cannot_work_is_refused_in_one_line_before_anything_is_written(
    tmp_path, monkeypatch, capsys, words, message
):
    monkeypatch.chdir(tmp_path)
    for folder in ("in", "full/in"):
        write(tmp_path / folder / "a.png", drawn())
    (tmp_path / "empty").mkdir()
    before = sorted(tmp_path.rglob("*"))
    assert main(["prepare", *words.split()]) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("Retrying")]
    assert line.startswith("error: ") and message in line
    assert sorted(tmp_path.rglob("*")) == before
