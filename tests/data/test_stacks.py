"""Images of several parts: columns and folders become the channels of one image."""

import numpy as np
import pytest
from datasets import Array2D, Dataset, Features
from datasets import Image as ImageFeature
from PIL import Image
from stacked import expected, pixels, raw, save_deep_parts, save_two_parts, whole

from hf_mim.data import ImageDataset, ImageStream, load_images
from hf_mim.data.crop import WholeImage
from hf_mim.data.decode import header_size, image_name, open_image
from hf_mim.data.nodata import tag_nodata
from hf_mim.data.stacks import files_of_parts, parts_of
from hf_mim.data.value_range import find_value_range
from hf_mim.models.pixels import ImageFormatError, ValueRange


@pytest.fixture
def folder(tmp_path):
    save_two_parts(tmp_path)
    return tmp_path


def test_files_of_two_folders_are_stacked_by_their_names_with_the_classes_of_the_rest(folder):
    images = load_images(folder, image_column="rgb,ir")
    assert images.features["label"].names == ["cat", "dog"] and images["label"][:] == [0, 0, 1, 1]
    for stacked, number in zip(whole(images), (0, 2, 1, 3), strict=True):
        assert np.array_equal(stacked, expected(number))
    assert image_name(images[0]["image"], "").endswith("rgb/cat/0.png")
    assert header_size(images[0]["image"]) == (16, 12)
    paths = {"rgb:": str(folder / "rgb/cat/0.png"), "ir:": np.asarray(Image.open(folder / "ir/cat/0.tif"))}
    assert np.array_equal(open_image(paths), expected(0))
    turned = load_images(folder, image_column="ir, rgb")
    assert np.array_equal(whole(turned)[0], np.roll(expected(0), 1, axis=2))


def test_columns_of_a_table_are_stacked_in_whole_and_in_streams(folder, tmp_path):
    rows = {name: [str(path) for path in sorted((folder / name).rglob("*.*"))] for name in ("rgb", "ir")}
    features = Features({"rgb": ImageFeature(), "ir": ImageFeature()})
    Dataset.from_dict(rows, features).add_column("label", [0, 0, 1, 1]).to_parquet(tmp_path / "train.parquet")
    images = load_images(tmp_path / "train.parquet", image_column="rgb,ir")
    assert images["label"][:] == [0, 0, 1, 1]
    assert np.array_equal(whole(images)[0], expected(0))
    stream = load_images(tmp_path / "train.parquet", image_column="rgb,ir", streaming=True)
    streamed = ImageStream(stream, (12, 16), 4, crop=WholeImage())
    found = [sample["pixel_values"].permute(1, 2, 0).numpy() for _, sample in streamed.read(0)]
    assert len(found) == 4 and all(np.array_equal(a, b) for a, b in zip(found, whole(images), strict=True))


def test_a_column_of_the_name_image_can_be_a_part_and_a_name_can_have_a_comma(folder):
    rows = {"image": [str(folder / "rgb/cat/0.png")], "ir": [str(folder / "ir/cat/0.tif")]}
    images = load_images(
        Dataset.from_dict(rows, Features(image=ImageFeature(), ir=ImageFeature())), image_column="image,ir"
    )
    assert images.column_names == ["image"] and np.array_equal(whole(images)[0], expected(0))
    named = Dataset.from_dict({"rgb, 8 bit": rows["image"]}, Features({"rgb, 8 bit": ImageFeature()}))
    assert np.array_equal(whole(load_images(named, image_column="rgb, 8 bit"), 3)[0], pixels(30))


def test_crops_take_the_same_place_of_each_part(tmp_path):
    for name in ("rgb", "ir"):
        (tmp_path / name).mkdir()
    grey = pixels(0, 1, size=(60, 80))
    Image.fromarray(np.stack([grey] * 3, axis=2)).save(tmp_path / "rgb/0.png")
    Image.fromarray(grey).save(tmp_path / "ir/0.png")
    sample = ImageDataset(load_images(tmp_path, image_column="rgb,ir"), 24, 4)[0]["pixel_values"]
    assert all((channel == sample[0]).all() for channel in sample) and sample.float().std() > 1


def test_a_grey_picture_that_is_stored_as_colour_gets_the_channels_that_are_asked_for(folder):
    for path in (folder / "ir").rglob("*.tif"):
        grey = Image.open(path)
        path.unlink()
        grey.convert("RGB").save(path.with_suffix(".png"))
    assert np.array_equal(whole(load_images(folder, image_column="rgb:3,ir:1"))[0], expected(0))
    with pytest.raises(
        ImageFormatError, match=r"num_channels=4, but the image has rgb 3 \+ ir 3 = 6 channels.*rgb:3,ir:1"
    ):
        whole(load_images(folder, image_column="rgb,ir"))


def test_deep_parts_keep_their_depth(tmp_path):
    for name, seed in (("left", 1), ("right", 2)):
        (tmp_path / name).mkdir()
        np.save(tmp_path / name / "a.npy", pixels(seed, 2, dtype=np.uint16))
    value = load_images(tmp_path, image_column="left,right")[0]["image"]
    opened = open_image(value, 4)
    assert opened.dtype == np.uint16
    assert np.array_equal(
        opened, np.concatenate([pixels(1, 2, dtype=np.uint16), pixels(2, 2, dtype=np.uint16)], axis=2)
    )


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (pixels(0, 1, size=(12, 20)), "rgb is 16×12 and ir is 20×12: the parts of an image must have one size"),
    ],
)
def test_parts_that_do_not_fit_are_named(tmp_path, other, message):
    for name, array in (("rgb", pixels(0)), ("ir", other)):
        (tmp_path / name).mkdir()
        np.save(tmp_path / name / "a.npy", array)
    with pytest.raises(ImageFormatError, match=message):
        load_images(tmp_path, image_column="rgb,ir")


def test_folders_whose_names_do_not_match_are_refused_with_the_file_that_lacks_a_part(folder):
    (folder / "ir/cat/2.tif").rename(folder / "ir/cat/3.tif")
    with pytest.raises(
        ValueError, match=r"ir/cat/3.tif has no file of the same name in a folder rgb; 2 of 5 .*missing_modality zero"
    ):
        load_images(folder, image_column="rgb,ir")
    (folder / "ir/cat/3.tif").rename(folder / "ir/cat/2.tif")
    Image.fromarray(pixels(0)).save(folder / "rgb/cat/2.bmp")
    with pytest.raises(ValueError, match="rgb/cat/2.bmp and rgb/cat/2.png are two files of one image"):
        load_images(folder, image_column="rgb,ir")


def test_a_row_without_a_part_is_a_broken_image_that_is_named(folder):
    rows = {"rgb": [str(folder / "rgb/cat/0.png")] * 2, "ir": [str(folder / "ir/cat/0.tif"), None]}
    images = load_images(
        Dataset.from_dict(rows, Features(rgb=ImageFeature(), ir=ImageFeature())), image_column="rgb,ir"
    )
    with pytest.raises(ImageFormatError, match="the row holds no ir"):
        whole(images)


def test_what_lies_outside_of_the_folders_is_left_out_and_splits_are_found(tmp_path):
    paths = [f"{split}/{part}/{n}.png" for split in ("train", "val") for part in ("rgb", "ir") for n in range(2)]
    images, left_out = files_of_parts([*paths, "overview.png"], "rgb,ir")
    assert images["val/1.png"] == {"rgb": "val/rgb/1.png", "ir": "val/ir/1.png"} and len(images) == 4
    assert left_out == {"outside of the folders rgb, ir": 1}
    for path in paths:
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels(0, 1)).save(tmp_path / path)
    assert len(load_images(tmp_path, "validation", image_column="rgb,ir")) == 2


@pytest.mark.parametrize(
    ("text", "parts"),
    [("image", {}), (None, {}), ("rgb,ir", {"rgb": None, "ir": None}), ("rgb:3, ir:1", {"rgb": 3, "ir": 1})],
)
def test_image_column_names_one_column_or_the_parts(text, parts):
    assert parts_of(text) == parts


@pytest.mark.parametrize("text", ["rgb,", "rgb,rgb", "rgb:0,ir", "rgb:x,ir", ",", "rgb:3"])
def test_a_text_that_names_no_parts_is_refused(text):
    with pytest.raises(ValueError, match="image_column must be a column, or the parts of an image"):
        parts_of(text)


def test_the_tags_of_the_parts_tell_which_pixels_have_no_data(tmp_path):
    tifffile = pytest.importorskip("tifffile")

    def written(**tags):
        for name, tag in tags.items():
            (tmp_path / name).mkdir(exist_ok=True)
            extra = [] if tag is None else [(42113, "s", 0, tag, True)]
            tifffile.imwrite(tmp_path / name / "a.tif", pixels(0, 1, dtype=np.uint16), extratags=extra)
        return load_images(tmp_path, image_column="radar,height")

    assert tag_nodata(written(radar="7", height="7")) == 7 and tag_nodata(written(radar=None, height=None)) is None
    images = written(radar=None, height="7")
    with pytest.raises(ImageFormatError, match=r"\(radar none, height 7\); give the one .*--nodata 7"):
        tag_nodata(images)


def test_columns_that_are_not_there_or_hold_arrays_are_refused(folder):
    rows = Dataset.from_dict({"rgb": [str(folder / "rgb/cat/0.png")]}, Features(rgb=ImageFeature()))
    with pytest.raises(ValueError, match="image_column='ir' is not a column; columns: rgb"):
        load_images(rows, image_column="rgb,ir")
    arrays = Dataset.from_dict(
        {"rgb": [str(folder / "rgb/cat/0.png")], "ir": [pixels(0, 1).tolist()]},
        Features(rgb=ImageFeature(), ir=Array2D((12, 16), "uint8")),
    )
    with pytest.raises(ValueError, match="image_column='ir' must hold encoded images"):
        load_images(arrays, image_column="rgb,ir")


# ---- parts of different depth


@pytest.fixture
def deep(tmp_path):
    save_deep_parts(tmp_path)
    return tmp_path


def test_parts_of_several_depths_keep_their_values_and_get_a_range_each(deep):
    images = load_images(deep, image_column="rgb,ir")
    opened = open_image(images[0]["image"], 4)
    assert opened.dtype == np.uint16 and np.array_equal(opened, raw(deep, 0))
    crops = ImageDataset(images, (12, 16), 4, crop=WholeImage(), own_depth=True)
    value_range, line, _ = find_value_range(crops, None, 4)
    assert value_range.as_list() == [0, 255, 0, 255, 0, 255, 0, 4095]
    assert value_range.pixel_type == "3 uint8 + 1 uint16" and line.startswith("pixels: 3 uint8 + 1 uint16, ")
    scaled = whole(images, value_range=value_range)[3]
    np.testing.assert_allclose(scaled, raw(deep, 3) * [1, 1, 1, 255 / 4095], rtol=1e-5)


def test_an_image_with_a_part_of_another_depth_is_refused(deep):
    np.save(deep / "rgb/5.npy", pixels(5, dtype=np.uint16))
    images = load_images(deep, image_column="rgb,ir")
    measured = ValueRange((0,) * 4, (255, 255, 255, 4095), "3 uint8 + 1 uint16")
    with pytest.raises(ImageFormatError, match=r"5.npy: the image is uint16, .* measured on 3 uint8 \+ 1 uint16"):
        whole(images, value_range=measured)
    crops = ImageDataset(images, (12, 16), 4, crop=WholeImage(), own_depth=True)
    with pytest.raises(ImageFormatError, match="several depths, .*3 uint8"):
        find_value_range(crops, None, 4)
