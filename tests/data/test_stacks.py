"""Images of several parts: columns and folders become the channels of one image."""

import numpy as np
import pytest
from datasets import Array2D, Dataset, Features
from datasets import Image as ImageFeature
from PIL import Image

from hf_mim.data import ImageDataset, ImageStream, channel_statistics, load_images
from hf_mim.data.crop import WholeImage
from hf_mim.data.decode import header_size, image_name, open_image
from hf_mim.data.masks import load_masks
from hf_mim.data.nodata import tag_nodata
from hf_mim.data.stacks import files_of_parts, image_parts, parts_of
from hf_mim.data.value_range import find_value_range
from hf_mim.models.pixels import EIGHT_BITS, ImageFormatError, ValueRange


def pixels(seed, channels=3, size=(12, 16), dtype=np.uint8):
    shape = size if channels == 1 else (*size, channels)
    return np.random.default_rng(seed).integers(0, np.iinfo(dtype).max, shape).astype(dtype)


@pytest.fixture
def folder(tmp_path):
    """Two classes of two images, each with RGB and infrared, in a folder for each."""
    for number in range(4):
        for name, channels, extension in (("rgb", 3, "png"), ("ir", 1, "tif")):
            path = tmp_path / name / "cat dog".split()[number % 2] / f"{number}.{extension}"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels(10 * channels + number, channels)).save(path)
    return tmp_path


def expected(number):
    return np.concatenate([pixels(30 + number), pixels(10 + number, 1)[..., None]], axis=2)


def whole(images, num_channels=4, **options):
    dataset = ImageDataset(images, (12, 16), num_channels, crop=WholeImage(), **options)
    return [sample["pixel_values"].permute(1, 2, 0).numpy() for sample in dataset]


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
    """Six images of 8-bit RGB and 12-bit infrared in 16 bits."""
    for number in range(6):
        for name, array in (("rgb", pixels(number)), ("ir", pixels(60 + number, 1, dtype=np.uint16) >> 4)):
            (tmp_path / name).mkdir(exist_ok=True)
            np.save(tmp_path / name / f"{number}.npy", array)
    return tmp_path


def raw(folder, number):
    rgb, ir = (np.load(folder / name / f"{number}.npy") for name in ("rgb", "ir"))
    return np.concatenate([rgb, ir[..., None]], axis=2, dtype=np.float64)


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


# ---- images that lack a part

NAN = ValueRange((0.0,), (255.0,), "uint8", float("nan"))


def test_without_missing_modality_the_error_names_a_few_files(folder):
    for number in (1, 2, 3):
        (folder / "ir" / "cat dog".split()[number % 2] / f"{number}.tif").unlink()
    with pytest.raises(ValueError, match="rgb/cat/2.png, rgb/dog/1.png, rgb/dog/3.png have no file .* 3 of 4 images"):
        load_images(folder, image_column="rgb,ir")
    (folder / "ir/cat/0.tif").unlink()
    for missing in ("error", "zero"):
        with pytest.raises(ValueError, match="there is no image in a folder ir, which image_column names"):
            load_images(folder, image_column=image_parts("rgb,ir", missing))


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("source", ["folder", "table"])
def test_a_missing_part_is_without_data_and_the_others_are_as_before(folder, source, streaming):
    column, where = image_parts("rgb,ir", "zero"), folder
    if source == "folder":
        (folder / "ir/dog/1.tif").unlink()
    else:
        rows = {name: [str(path) for path in sorted((folder / name).rglob("*.*"))] for name in ("rgb", "ir")}
        rows["ir"][2] = None
        where = folder / "table.parquet"
        Dataset.from_dict(rows, Features(rgb=ImageFeature(), ir=ImageFeature())).to_parquet(where)
    images = load_images(where, image_column=column, streaming=streaming)
    kind = ImageStream if streaming else ImageDataset
    samples = kind(images, (12, 16), 4, crop=WholeImage(), value_range=NAN)
    found = [sample["pixel_values"].permute(1, 2, 0).numpy() for sample in samples]
    for array, number in zip(found, (0, 2, 1, 3), strict=True):
        right = expected(number).astype(float)
        right[..., 3] = np.nan if number == 1 else right[..., 3]
        np.testing.assert_array_equal(array, right)


def test_mean_and_std_ignore_what_is_missing(folder):
    (folder / "ir/dog/1.tif").unlink()
    images = load_images(folder, image_column=image_parts("rgb,ir", "zero"))
    mean, std = channel_statistics(ImageDataset(images, (12, 16), 4, crop=WholeImage(), value_range=NAN))
    for channel, numbers in ((0, range(4)), (3, (0, 2, 3))):
        values = np.stack([expected(number)[..., channel] for number in numbers]) / 255
        assert mean[channel] == pytest.approx(values.mean()) and std[channel] == pytest.approx(values.std())


def test_an_image_that_lacks_the_deep_part_has_the_type_of_the_others(deep):
    (deep / "ir/1.npy").unlink()
    images = load_images(deep, image_column=image_parts("rgb,ir", "zero"))
    start = ValueRange((0.0,), (1.0,), nodata=float("nan"))
    crops = ImageDataset(images, (12, 16), 4, crop=WholeImage(), own_depth=True, value_range=start)
    value_range, line, missing = find_value_range(crops, None, 4, lacking=True)
    assert value_range.as_list()[-2:] == [0, 4095] and value_range.pixel_type == "3 uint8 + 1 uint16"
    assert missing.startswith("4.2 % of the pixels, in 1 of 6 images")  # a quarter of an image
    array = whole(images, value_range=value_range)[1]
    assert np.isnan(array[..., 3]).all()
    np.testing.assert_allclose(array[..., :3], np.load(deep / "rgb/1.npy"))


def test_an_image_that_lacks_a_part_needs_a_range_with_nodata(folder):
    (folder / "ir/cat/0.tif").unlink()
    images = load_images(folder, image_column=image_parts("rgb,ir", "zero"))
    with pytest.raises(ImageFormatError, match="a part of the image is missing, and only a model"):
        whole(images, value_range=EIGHT_BITS)


def test_an_image_without_any_part_is_broken(folder):
    rows = {"rgb": [str(folder / "rgb/cat/0.png"), None], "ir": [str(folder / "ir/cat/0.tif"), None]}
    rows = Dataset.from_dict(rows, Features(rgb=ImageFeature(), ir=ImageFeature()))
    images = load_images(rows, image_column=image_parts("rgb,ir", "zero"))
    samples = ImageDataset(images, (12, 16), 4, crop=WholeImage(), value_range=NAN)
    list(samples)
    assert samples.broken_indices() == [1]


def test_with_two_missing_parts_the_column_has_to_say_how_many_channels_each_has(tmp_path):
    for name in ("rgb", "ir", "radar"):
        (tmp_path / name).mkdir()
        Image.fromarray(pixels(0, 3 if name == "rgb" else 1)).save(tmp_path / name / "0.png")
    Image.fromarray(pixels(1)).save(tmp_path / "rgb/1.png")
    images = load_images(tmp_path, image_column=image_parts("rgb,ir,radar", "zero"))
    with pytest.raises(ImageFormatError, match="rgb/1.png: the row holds no ir and no radar; image_column must say"):
        whole(images, 5, value_range=NAN)
    images = load_images(tmp_path, image_column=image_parts("rgb:3,ir:1,radar:1", "zero"))
    assert np.isnan(whole(images, 5, value_range=NAN)[1][..., 3:]).all()


@pytest.mark.parametrize(
    ("column", "missing", "message"),
    [
        (
            "image",
            "zero",
            "missing_modality zero needs the parts of an image as image_column, such as rgb,ir, not image",
        ),
        ("rgb,ir", "mean", "missing_modality must be one of error, zero, not 'mean'"),
    ],
)
def test_missing_parts_of_an_image_without_parts_are_refused(column, missing, message):
    with pytest.raises(ValueError, match=message):
        image_parts(column, missing)


def test_images_of_parts_have_masks(deep):
    rows = {name: [str(deep / name / f"{number}.npy") for number in range(3)] for name in ("rgb", "ir")}
    rows["ir"][1], masks = None, [Image.fromarray(pixels(number, 1)) for number in range(3)]
    features = Features(rgb=ImageFeature(), ir=ImageFeature(), mask=ImageFeature())
    table = Dataset.from_dict(rows | {"mask": masks}, features)
    found = load_masks(table, image_column=image_parts("rgb,ir", "zero"))
    assert found.sizes == [(12, 16)] * 3
    assert open_image(found.images[0]["image"], 4).shape == (12, 16, 4)
