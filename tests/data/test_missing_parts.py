"""Images that lack a part (`missing_modality`)."""

import shutil

import numpy as np
import pytest
from datasets import Dataset, Features
from datasets import Image as ImageFeature
from PIL import Image
from stacked import expected, pixels, save_deep_parts, save_two_parts, whole

from hf_mim.data import ImageDataset, ImageStream, channel_statistics, load_images
from hf_mim.data.crop import WholeImage
from hf_mim.data.decode import open_image
from hf_mim.data.masks import load_masks
from hf_mim.data.stacks import image_parts
from hf_mim.data.value_range import find_value_range
from hf_mim.models.pixels import EIGHT_BITS, ImageFormatError, ValueRange
from hf_mim.pretraining.final_results import load_split
from hf_mim.pretraining.recipe import RunArguments

NAN = ValueRange((0.0,), (255.0,), "uint8", float("nan"))


@pytest.fixture
def folder(tmp_path):
    save_two_parts(tmp_path)
    return tmp_path


@pytest.fixture
def deep(tmp_path):
    save_deep_parts(tmp_path)
    return tmp_path


def test_without_missing_modality_the_error_names_a_few_files(folder):
    for number in (1, 2, 3):
        (folder / "ir" / "cat dog".split()[number % 2] / f"{number}.tif").unlink()
    with pytest.raises(ValueError, match="rgb/cat/2.png, rgb/dog/1.png, rgb/dog/3.png have no file .* 3 of 4 images"):
        load_images(folder, image_column="rgb,ir")
    (folder / "ir/cat/0.tif").unlink()
    with pytest.raises(ValueError, match="there is no image in a folder ir, which image_column names"):
        load_images(folder, image_column="rgb,ir")


def test_a_part_that_no_image_has_is_missing_in_each(folder):
    """As in a test set of another instrument. A pretraining refuses it: there would be nothing to learn from."""
    shutil.rmtree(folder / "ir")
    images = load_images(folder, image_column=image_parts("rgb,ir", "zero"))
    assert len(images) == 4 and all([*value.values()][1] is None for value in images["image"])
    run = RunArguments(dataset=str(folder), image_column="rgb,ir", missing_modality="zero")
    with pytest.raises(ValueError, match="^dataset must have images in each folder .* split train has none in ir"):
        load_split(run, "dataset", "train")
    run.test_dataset = str(folder)
    assert len(load_split(run, "test_dataset", "train")[0]) == 4


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
