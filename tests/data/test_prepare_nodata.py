"""`hf-mim prepare` on images with pixels without data: no file mixes or loses them, and a run finds them."""

import warnings

import numpy as np
import pytest
import tifffile
from PIL import Image

from hf_mim.cli import main
from hf_mim.data import WholeImage, load_images, prepare_files
from hf_mim.data.crop import load_crop
from hf_mim.data.nodata import tag_nodata, tagged_nodata
from hf_mim.data.prepare import Prepare
from hf_mim.models.pixels import ImageFormatError, ValueRange, crop_image

LOWEST = float(np.finfo(np.float64).min)


def source(folder, array, tag=None, name="a.tif"):
    """A folder with one TIFF."""
    folder.mkdir(parents=True, exist_ok=True)
    extra = [] if tag is None else [(42113, "s", 0, tag, True)]
    layout = dict(planarconfig="contig") if array.ndim == 3 else {}
    tifffile.imwrite(folder / name, array, photometric="minisblack", extratags=extra, **layout)
    return str(folder)


def striped(kind, nodata, value=100, shape=(48, 64)):
    """One value everywhere, and a slanted stripe without data, so that no weight of a resize is a half."""
    y, x = np.mgrid[: shape[0], : shape[1]]
    return np.where(abs(3 * x - 4 * y) < 31, np.float64(nodata), value).astype(kind)


def prepared(tmp_path, folder, **options):
    """(what was counted, name → array of each file, name → its tag)."""
    found = Prepare(folder, str(tmp_path / "out"), **options)(progress=False)
    paths = sorted((tmp_path / "out").rglob("*.tif"))
    return found, {p.name: tifffile.imread(p) for p in paths}, {p.name: tagged_nodata(str(p)) for p in paths}


@pytest.mark.parametrize(
    ("kind", "nodata"),
    [("float32", -9999), ("int16", -32768), ("uint16", 65535), ("uint8", 0), ("int32", -1), ("uint32", 2**32 - 1)]
    + [("uint32", 2**31), ("int64", -(2**63))],
)
@pytest.mark.parametrize("options", [{"tile": 32}, {"short_side": 30}])
def test_the_tag_is_in_every_file_and_a_run_finds_it(tmp_path, kind, nodata, options):
    folder = source(tmp_path / "in", striped(kind, nodata), str(nodata))
    found, arrays, tags = prepared(tmp_path, folder, **options)
    assert set(tags.values()) == {nodata} and len(tags) == (4 if "tile" in options else 1)
    assert all(array.dtype == kind and set(np.unique(array)) <= {nodata, 100} for array in arrays.values())
    assert any((array == nodata).any() for array in arrays.values())
    assert tag_nodata(load_images(tmp_path / "out")) == nodata and not found.untold


@pytest.mark.parametrize(("kind", "nodata"), [("float32", -9999.5), ("uint16", 0), ("uint8", 255)])
def test_a_short_side_is_the_resize_of_the_training(tmp_path, kind, nodata):
    array = np.random.default_rng(0).integers(1, 250, (48, 64, 2)).astype(kind)
    array[striped(kind, 7) == 7] = nodata
    _, arrays, _ = prepared(tmp_path, source(tmp_path / "in", array, str(nodata)), short_side=30)
    about = ValueRange((0.0,), (1.0,), nodata=nodata)
    expected = crop_image(array, WholeImage(), (30, 40), 2, channels_last=True, value_range=about).numpy()
    expected = expected.transpose(1, 2, 0) if kind == "float32" else np.rint(expected.transpose(1, 2, 0))
    np.testing.assert_array_equal(arrays["a.tif"], np.where(np.isnan(expected), nodata, expected).astype(kind))


@pytest.mark.parametrize("options", [{"tile": 32}, {"short_side": 30}, {"short_side": 99}])
def test_a_value_that_int32_cannot_hold_stays_and_the_others_are_trained_on(tmp_path, options):
    """In the value range of the training, on the files that were written."""
    (tmp_path / "in").mkdir()
    array = striped("uint32", 2**32 - 1, value=70_000)
    np.save(tmp_path / "in" / "a.npy", array[..., None])
    _, arrays, tags = prepared(tmp_path, str(tmp_path / "in"), num_channels=1, nodata=float(2**32 - 1), **options)
    assert set(tags.values()) == {2**32 - 1} and all(array.dtype == "uint32" for array in arrays.values())
    about = ValueRange((0.0,), (1.0,), nodata=2**32 - 1)
    for image in load_images(tmp_path / "out")["image"]:
        pixels = load_crop(image, WholeImage(), (16, 16), 1, None, about)
        assert pixels.isnan().any() and set(pixels[~pixels.isnan()].tolist()) == {70_000}
    array[0, 0] = 2**31
    np.save(tmp_path / "in" / "a.npy", array[..., None])
    with pytest.raises(ImageFormatError, match="values above 2147483647 .2147483648."):
        Prepare(str(tmp_path / "in"), str(tmp_path / "no"), num_channels=1, nodata=float(2**32 - 1), tile=32)(False)


def test_a_pixel_with_data_does_not_get_the_value_by_rounding(tmp_path):
    """Between 4 and 6, a resize gives 5 nearly everywhere; 5 stands for no data."""
    array = np.where(np.indices((64, 64)).sum(axis=0) % 2, 4, 6).astype("uint16")
    _, arrays, tags = prepared(tmp_path, source(tmp_path / "in", array, "5"), short_side=16)
    assert set(tags.values()) == {5} and set(np.unique(arrays["a.tif"])) == {4, 6}


@pytest.mark.parametrize("options", [{"tile": 32}, {"short_side": 30}, {"short_side": 99}])
def test_a_value_that_float32_cannot_hold_becomes_nan_with_a_tag_that_says_so(tmp_path, options):
    folder = source(tmp_path / "in", striped("float64", LOWEST), repr(LOWEST))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        _, arrays, tags = prepared(tmp_path, folder, **options)
    assert all(tag != tag for tag in tags.values())
    assert all(array.dtype == "float32" and not np.isinf(array).any() for array in arrays.values())
    assert any(np.isnan(array).any() for array in arrays.values())


def test_nan_is_masked_by_a_short_side_and_the_command_says_how_to_train(tmp_path, capsys):
    folder = source(tmp_path / "in", striped("float32", np.nan))
    assert main(["prepare", folder, str(tmp_path / "out"), "--short_side", "30"]) == 0
    array = tifffile.imread(tmp_path / "out" / "a.tif")
    assert np.isnan(array).any() and set(np.unique(array[~np.isnan(array)])) == {100}
    told = capsys.readouterr().out.splitlines()
    assert "Pixels without data, of which the files have no tag: nan in 1 images." in told
    assert told[-1].endswith(" --nodata nan")


def test_arrays_have_no_tag_so_the_command_names_the_value(tmp_path, capsys, monkeypatch):
    folder = tmp_path / "in"
    folder.mkdir()
    np.save(folder / "a.npy", striped("float32", -9999)[..., None].repeat(2, axis=2))
    monkeypatch.setattr(prepare_files, "find_spec", lambda name: None)
    assert main(["prepare", str(folder), str(tmp_path / "out"), "--tile", "32", "--nodata", "-9999"]) == 0
    assert capsys.readouterr().out.rstrip().endswith("--num_channels 2 --image_size 32 --crop_pixels 32 --nodata -9999")


def test_a_given_value_gets_into_the_files_and_overrules_their_tags(tmp_path):
    folder = source(tmp_path / "in", striped("uint16", 9), "0")
    for number, (given, tag) in enumerate([(9, 9), ("none", None), (float("nan"), None), (None, 0)]):
        for options in ({"tile": 32}, {"short_side": 99}):  # the second one copies files that need no change
            place = tmp_path / f"{number}{len(options)}{next(iter(options))}"
            _, _, tags = prepared(place, folder, nodata=given, **options)
            assert set(tags.values()) == {tag}


@pytest.mark.parametrize(("mode", "channels"), [("L", 1), ("LA", 1), ("RGB", 3), ("RGBA", 3)])
def test_pictures_with_a_value_keep_it_and_their_alpha_is_no_band(tmp_path, mode, channels):
    (tmp_path / "in").mkdir()
    bands = len(Image.new(mode, (1, 1)).getbands())
    array = np.random.default_rng(0).integers(0, 255, (48, 64, bands), dtype=np.uint8)
    Image.fromarray(array[..., 0] if bands == 1 else array).save(tmp_path / "in" / "a.png")
    found, _, tags = prepared(tmp_path, str(tmp_path / "in"), tile=48, nodata=0)
    assert found.channels == {channels: 1} and set(tags.values()) == {0}
    written = Image.open(tmp_path / "out" / "a_r000_c000.tif")
    assert written.mode == mode
    np.testing.assert_array_equal(np.asarray(written).reshape(48, 48, bands), array[:, :48])


def test_mistakes_are_one_line_and_nothing_is_written(tmp_path, capsys):
    folder = source(tmp_path / "in", striped("uint16", 9))
    for given, message in (
        ("-9999", r"a.tif: nodata must be a whole number in 0..65,535 for an image of uint16, not -9999"),
        ("foo", "nodata must be a number or none, not 'foo'"),
        ("inf", "nodata must be a number or nan, which stands for inf too, not inf"),
    ):
        assert main(["prepare", folder, str(tmp_path / "out"), "--tile", "32", "--nodata", given]) == 2
        assert capsys.readouterr().err.splitlines()[-1] == f"error: {message}" and not (tmp_path / "out").exists()
    with pytest.raises(ImageFormatError):
        Prepare(folder, str(tmp_path / "out"), tile=32, nodata=0.5)(progress=False)
