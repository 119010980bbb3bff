"""Pixels without data: from the file to the batch, what stands in their place reaches nothing."""

import io
import zipfile

import numpy as np
import pytest
import tifffile
import torch
from datasets import Dataset, Features
from datasets import Image as ImageFeature
from PIL import Image
from test_value_range import draw, images, npy

from hf_mim.data import DeviceAugment, ImageDataset, RandomCrop, ValueRange, WholeImage, channel_statistics, decode
from hf_mim.data.decode import BrokenImage, decoding, open_image
from hf_mim.data.nodata import count_missing, tag_nodata, tagged_nodata
from hf_mim.data.value_range import find_value_range
from hf_mim.models.nodata import resize_valid
from hf_mim.models.pixels import ImageFormatError, crop_image

NAN = float("nan")
UNIT = ValueRange((0.0,), (1.0,), nodata=NAN)


def dataset(files, names="{}.tif") -> Dataset:
    rows = [{"bytes": data, "path": names.format(number)} for number, data in enumerate(files)]
    return Dataset.from_dict({"image": rows}, features=Features(image=ImageFeature(decode=False)))


def with_stripe(arrays, value, every=2):
    """The same arrays; every second one has a stripe of the value, a quarter of its width."""
    arrays = [array.copy() for array in arrays]
    for array in arrays[::every]:
        array[:, 4:8] = value
    return arrays


def tiff(array, tag=None, **options) -> bytes:
    file = io.BytesIO()
    extra = [] if tag is None else [(42113, "s", 0, tag, True)]
    tifffile.imwrite(file, array, photometric="minisblack", extratags=extra, **options)
    return file.getvalue()


# ---- resizing


@pytest.mark.parametrize("width", [8, 7, 5])
def test_a_pixel_of_a_resized_image_is_nodata_if_less_than_half_of_its_weight_is_valid(width):
    """By the weights of the bicubic kernel (a = -.5), worked out by hand. 16 columns to 8 has exact halves."""

    def kernel(x):
        x, a = abs(x) * width / 16, -0.5
        near = (a + 2) * x**3 - (a + 3) * x**2 + 1
        return near if x < 1 else a * (x**3 - 5 * x**2 + 8 * x - 4) if x < 2 else 0.0

    row = np.arange(16.0) + 3
    for first_missing in range(4, 12):
        known = np.arange(16) < first_missing
        expected = []
        for centre in (np.arange(width) + 0.5) * 16 / width:
            weights = np.array([kernel(place + 0.5 - centre) for place in range(16)])
            weights /= weights.sum()
            share = weights[known].sum()
            expected.append((weights * row)[known].sum() / share if share > 0.4999 else np.nan)
        pixels = torch.from_numpy(np.where(known, row, np.nan)).float().expand(1, 2, 16).clone()
        found = resize_valid(pixels, (2, width))[0, 0].numpy()
        np.testing.assert_array_equal(np.isnan(found), np.isnan(expected))
        np.testing.assert_allclose(found, np.clip(expected, 3, row[known].max()), rtol=1e-5)


def test_a_resize_does_not_bleed_nodata_into_its_neighbours():
    constant = torch.full((2, 24, 40), 7.0)
    constant[0, :, 10:17] = NAN
    found = resize_valid(constant, (9, 13))
    assert (found[1] == 7).all() and found[0].isnan().any() and not found[0].isnan().all()
    np.testing.assert_allclose(found[0][~found[0].isnan()], 7, rtol=1e-5)


@pytest.mark.parametrize("size", [(16, 16), (8, 12), (23, 31)])
@pytest.mark.parametrize(("kind", "nodata"), [("float32", -9999.0), ("uint16", 7.0), ("uint8", 0.0), ("float32", NAN)])
def test_what_stands_in_place_of_data_changes_nothing_to_the_bit(kind, nodata, size):
    """The same image with its pixels missing in two ways gives the same batch and mask, through every augmentation."""
    (array,) = draw(10, 250, kind, bands=3, count=1)
    value_range = ValueRange((0.0,), (255.0,), kind, nodata)
    augment = DeviceAugment((0.5,) * 3, (0.2,) * 3, 0.5, 0.5, 1.0, (0.5, 2.0), value_range)
    (holes,) = with_stripe([array], nodata)
    others = holes.astype("float32")
    others[:, 4:8] = np.float32("inf")
    outputs = []
    for pixels, about in ((holes, value_range), (others, ValueRange((0.0,), (255.0,), "float32", NAN))):
        pixels = crop_image(pixels, WholeImage(), size, 3, value_range=about)
        outputs.append(augment.with_valid(pixels.expand(16, -1, -1, -1), torch.arange(16)))
    assert torch.equal(outputs[0][0], outputs[1][0]) and torch.equal(outputs[0][1], outputs[1][1])
    batch, valid = outputs[0]
    assert not valid.all() and valid.any() and (batch[~valid] == 0).all() and batch.isfinite().all()


# ---- the device


def test_flips_move_the_mask_with_the_pixels_and_a_blur_takes_the_mean_of_the_valid_ones():
    pixels = torch.rand(64, 1, 6, 10) * 255
    pixels[..., :3] = NAN
    flipped, valid = DeviceAugment((0,), (1 / 255,), 0.5, nodata=True).with_valid(pixels)
    left = (~valid[:, 0, 0, 0]).nonzero().flatten()
    assert 16 < len(left) < 48
    assert torch.equal(valid[left], ~pixels[left].isnan()) and (valid.sum((1, 2, 3)) == 6 * 7).all()
    constant = torch.where(pixels.isnan(), NAN, 200.0)
    augment = DeviceAugment((0,), (1 / 255,), 0, 0, 1.0, (1.0, 2.0), nodata=True)
    blurred, valid = augment.with_valid(constant)
    np.testing.assert_allclose(blurred[valid], 200, rtol=1e-5)
    assert torch.equal(valid, ~constant.isnan()) and (blurred[~valid] == 0).all()


def test_without_nodata_there_is_no_mask():
    assert DeviceAugment().with_valid(torch.zeros(2, 3, 4, 4, dtype=torch.uint8))[1] is None


# ---- measuring


@pytest.mark.parametrize(
    ("kind", "low", "high", "nodata"), [("float32", -30, 5, -9999.0), ("uint16", 9, 2000, 65535.0)]
)
def test_range_mean_and_deviation_are_those_of_the_valid_pixels(kind, low, high, nodata):
    arrays = draw(low, high, kind, count=10)
    about = dict(own_depth=True, value_range=ValueRange((0.0,), (1.0,), nodata=nodata))
    files = dataset([npy(array) for array in with_stripe(arrays, nodata)], "{}.npy")
    data = ImageDataset(files, 16, 1, WholeImage(), **about)
    found, lines, missing = find_value_range(data, None, 1)
    left = [np.delete(array, np.s_[4:8], axis=1) if number % 2 == 0 else array for number, array in enumerate(arrays)]
    ends = np.quantile(np.concatenate([array.ravel() for array in left]), [0.001, 0.999])
    assert found.nodata == nodata and found.pixel_type == kind
    if kind == "float32":
        np.testing.assert_allclose(found.as_list(), ends, atol=0.1)
    else:
        assert found.as_list() == [0, 2047]
    assert missing == f"12.5 % of the pixels, in 5 of 10 images ({nodata:.0f})"
    assert lines.splitlines()[1] == f"nodata: {missing}"
    mean, std = channel_statistics(data.in_range(found))
    low, high = found.low[0], found.high[0]
    scaled = (np.concatenate([array.ravel() for array in left]).astype(np.float64) - low) / (high - low)
    np.testing.assert_allclose([mean[0], std[0]], [np.clip(scaled, 0, 1).mean(), np.clip(scaled, 0, 1).std()], 1e-3)


def test_nan_without_the_option_is_one_line_that_names_the_file_and_the_option():
    arrays = with_stripe(draw(-30, 5, "float32"), NAN, every=8)
    with pytest.raises(ImageFormatError, match="^0.npy: has values that are not finite; pretrain with --nodata nan"):
        find_value_range(images(arrays, 1), None, 1)


@pytest.mark.parametrize("nodata", [300.0, -1.0, 0.5])
def test_a_number_that_the_type_has_not_is_refused(nodata):
    about = dict(own_depth=True, value_range=ValueRange((0.0,), (1.0,), nodata=nodata))
    data = ImageDataset(dataset([tiff(draw(1, 255, "uint8")[0][..., 0])]), 16, 1, WholeImage(), **about)
    with pytest.raises(
        ValueError, match=r"^nodata must be a whole number in 0\.\.255 for images of uint8 \(0.tif\), not"
    ):
        find_value_range(data, None, 1)


def test_nan_on_whole_numbers_says_that_there_are_none():
    about = dict(own_depth=True, value_range=ValueRange((0.0,), (1.0,), nodata=NAN))
    data = ImageDataset(dataset([tiff(draw(1, 255, "uint8")[0][..., 0])]), 16, 1, WholeImage(), **about)
    value_range, line, _ = find_value_range(data, None, 1)
    assert value_range is None and line.startswith("nodata: none, because whole numbers are never NaN")


# ---- images without any data


def test_images_without_data_are_left_out_and_counted_and_a_set_of_them_is_refused():
    good, empty = npy(np.full((8, 8), 0.5, np.float32)), npy(np.full((8, 8), np.nan, np.float32))
    data = ImageDataset(dataset([good, empty, empty, good]), 8, 1, WholeImage(), value_range=UNIT)
    assert all((data[index]["pixel_values"] == 127.5).all() for index in range(4))
    assert data.num_empty() == 2 and data.num_broken() == 0 and data.broken() == []
    kept = ImageDataset(dataset([good, empty]), 8, 1, WholeImage(), value_range=UNIT, keep_empty=True)
    assert kept[1]["pixel_values"].isnan().all() and kept.num_empty() == 0
    with pytest.raises(ImageFormatError, match="^3 images hold no data"):
        ImageDataset(dataset([empty] * 3), 8, 1, WholeImage(), value_range=UNIT)


# ---- GDAL's tag


@pytest.mark.parametrize("options", [{}, {"bigtiff": True}, {"byteorder": ">"}, {"bigtiff": True, "byteorder": ">"}])
@pytest.mark.parametrize(
    ("kind", "tag", "expected"),
    [
        ("float32", "-9999", -9999.0),
        ("float32", "nan", NAN),
        ("float32", "-3.4028234663852886e+38 ", float(np.finfo(np.float32).min)),
        ("uint8", "0", 0.0),
        ("int16", "-32768", -32768.0),
        ("uint16", "-9999", None),  # GDAL ignores what the type cannot hold
        ("uint8", "nan", None),
        ("float32", "none", None),
        ("float32", None, None),
    ],
)
@pytest.mark.parametrize("bands", [1, 3])
def test_the_tag_is_read_from_any_tiff(tmp_path, kind, tag, expected, options, bands):
    array = np.zeros((8, 8) if bands == 1 else (8, 8, 3), kind)
    data = tiff(array, tag, **options | ({} if bands == 1 else {"planarconfig": "contig"}))
    path = tmp_path / "a.tif"
    path.write_bytes(data)
    for value in (data, str(path), {"bytes": data, "path": None}, {"bytes": None, "path": str(path)}):
        found = tagged_nodata(value)
        assert found == expected or found != found and expected != expected, (found, expected)


def test_tags_that_differ_are_refused_and_files_without_one_have_none():
    arrays = [array[..., 0] for array in draw(0, 1, "float32")]
    assert tag_nodata(dataset([tiff(array) for array in arrays])) is None
    assert tag_nodata(dataset([npy(array) for array in arrays])) is None
    assert tag_nodata(dataset([tiff(array, "-9999" if n % 2 else None) for n, array in enumerate(arrays)])) == -9999
    with pytest.raises(ImageFormatError, match=r"several values in their GDAL_NODATA tags, .*-1 \(.*--nodata"):
        tag_nodata(dataset([tiff(array, "-9999" if n % 2 else "-1") for n, array in enumerate(arrays)]))


def test_a_tag_that_the_start_has_not_seen_is_an_error_that_names_the_file():
    data = ImageDataset(dataset([tiff(draw(0, 1, "float32")[0][..., 0], "-9999")]), 16, 1, own_depth=True).check_tags()
    with pytest.raises(ImageFormatError, match="^0.tif: its GDAL_NODATA tag is -9999, and the run has begun with none"):
        data[0]


def test_pixels_without_data_are_counted_in_whole_images_and_each_is_decoded_once(monkeypatch):
    arrays = [np.full((40, 60), 7, np.float32) + n for n in range(6)]
    arrays[1][:, :6], arrays[3][0, 0] = -9999, -9999
    opened = []
    source = dataset([tiff(array) for array in arrays])
    data = ImageDataset(source, 8, 1, RandomCrop((0.05, 0.05)), own_depth=True)
    data = data.in_range(ValueRange((0.0,), (1.0,), nodata=-9999.0), own_depth=True)
    decoded = decode._open_bytes
    monkeypatch.setattr(decode, "_open_bytes", lambda *given: opened.append(given) or decoded(*given))
    _, lines, _ = find_value_range(data, None, 1)
    share = 100 * (40 * 6 + 1) / (6 * 40 * 60)
    assert f"nodata: {share:.1f} % of the pixels, in 2 of 6 images (-9999)" in lines
    assert len(opened) == 6 + 6  # to see the types; to count and to measure


@pytest.mark.parametrize("turn", [1, 6])
def test_pixels_without_data_are_counted_in_pictures_too(turn):
    array = np.full((6, 10, 3), 9, np.uint8)
    array[:2] = 0
    exif, file = Image.Exif(), io.BytesIO()
    exif[0x112] = turn
    Image.fromarray(array).save(file, "PNG", exif=exif)
    value_range = ValueRange((0.0,), (255.0,), "uint8", 0.0)
    assert count_missing(Image.open(file), 3, value_range) == count_missing(array, 3, value_range) == (60, 180)


# ---- colour


def test_a_colour_whose_band_has_no_data_has_no_luminance():
    colour = np.full((2, 2, 3), [100, 150, 200], np.uint8)
    colour[0, 1, 2] = 0
    about = ValueRange((0.0,), (255.0,), "uint8", 0.0)
    file = io.BytesIO()
    Image.fromarray(colour).save(file, "PNG")
    for image in (colour, Image.open(file)):
        (grey,) = crop_image(image, WholeImage(), (2, 2), 1, value_range=about)
        np.testing.assert_allclose(grey, [[140.75, np.nan], [140.75, 140.75]], rtol=1e-6)
        three = crop_image(image, WholeImage(), (2, 2), 3, value_range=about)
        assert three.isnan().sum() == 1 and three[2, 0, 1].isnan()


# ---- .npz


def npz(**arrays) -> bytes:
    file = io.BytesIO()
    np.savez_compressed(file, **arrays)
    return file.getvalue()


def test_npz_files_are_images():
    image, other = np.arange(12, dtype=np.uint16).reshape(3, 4), np.zeros((2, 2))
    for data in (npz(a=image), npz(image=image, mask=other), npz(arr_0=image, arr_1=other)):
        np.testing.assert_array_equal(open_image(data), image)
    with pytest.raises(ImageFormatError, match="a.npz: the .npz file holds several arrays, .*b.*c.*call the one"):
        with decoding("a.npz"):
            open_image(npz(b=image, c=other))


def forged(shape: str, content: bytes) -> bytes:
    header = f"{{'descr': '<f8', 'fortran_order': False, 'shape': {shape}, }}".encode()
    header += b" " * (63 - (len(header) + 10) % 64) + b"\n"
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a.npy", b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header + content)
    return file.getvalue()


def test_a_npz_that_claims_too_much_is_told_from_a_bomb_and_neither_is_allocated(monkeypatch):
    monkeypatch.setattr(np.lib.format, "read_array", lambda *args, **kwargs: pytest.fail("it was read"))
    with pytest.raises(BrokenImage, match="the file ends before"), decoding("a.npz"):
        open_image(forged("(1000000, 1000000, 3)", bytes(64)))
    monkeypatch.setenv("HF_MIM_MAX_IMAGE_PIXELS", "1000")
    bomb = forged("(2000, 1000)", bytes(16_000_000))
    assert len(bomb) < 20_000
    with pytest.raises(ImageFormatError, match="1000 x 2000 pixels are more than max_image_pixels=1000"):
        open_image(bomb, 1)
    with pytest.raises(ImageFormatError, match="an array image must be"):
        open_image(forged("(30, 30, 30)", bytes(8 * 27_000)), 1)


@pytest.mark.parametrize("data", [npz(), npz(a=np.array([{}])), npz(a=np.zeros(9))[:-30], b"PK\x03\x04 no archive"])
def test_a_damaged_npz_is_a_broken_image(data):
    with pytest.raises(BrokenImage), decoding("a.npz"):
        open_image(data)
