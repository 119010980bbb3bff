"""HEIC and JPEG XL, what is said where an extra is missing, and tags of GeoTIFF that change nothing."""

import io
import sys

import numpy as np
import pytest
from PIL import Image

from hf_mim.data import load_images
from hf_mim.data.decode import BrokenImage, decoding, header_size, open_image
from hf_mim.models.pixels import ImageFormatError

RANDOM = np.random.default_rng(0)
COLOUR = np.kron(RANDOM.integers(0, 256, (3, 4, 3), dtype=np.uint8), np.ones((16, 16, 1), np.uint8))
ALPHA = np.dstack([COLOUR, COLOUR[..., 0]])


def opened(data: bytes, num_channels=None) -> np.ndarray:
    with decoding("a"):
        return np.asarray(open_image(data, num_channels))


# ---- HEIC


@pytest.fixture
def heic():
    """heic(array, bits, **options) → the bytes of a lossless file."""
    pillow_heif = pytest.importorskip("pillow_heif", reason="the extra hf-mim[heif] is not installed")

    def encoded(array, bits=8, **options) -> bytes:
        mode = {2: "L", 3: "RGB" if array.shape[-1] == 3 else "RGBA"}[array.ndim]
        data = (array.astype(np.uint16) << (16 - bits) if bits > 8 else array).tobytes()
        picture = pillow_heif.from_bytes(f"{mode};16" if bits > 8 else mode, array.shape[1::-1], data)
        pillow_heif.options.SAVE_HDR_TO_12_BIT = bits == 12
        picture.save(file := io.BytesIO(), quality=-1, chroma=444, matrix_coefficients=0, **options)
        return file.getvalue()

    return encoded


@pytest.mark.parametrize("bits", [8, 10, 12])
def test_heic_is_read_in_the_depth_of_the_file(heic, bits):
    array = (COLOUR.astype(np.uint16) * 257) >> (16 - bits)
    found = opened(heic(array.astype(np.uint8) if bits == 8 else array, bits))
    assert found.dtype == (np.uint8 if bits == 8 else np.uint16)
    np.testing.assert_array_equal(found, array)


def test_heic_is_upright_and_its_alpha_is_that_of_other_pictures(heic):
    exif = Image.Exif()
    exif[0x0112] = 6
    data = heic(COLOUR, exif=exif.tobytes())
    np.testing.assert_array_equal(opened(data), np.rot90(COLOUR, -1))
    assert header_size(data) == (48, 64)
    assert opened(heic(ALPHA)).shape == (48, 64, 4)
    deep = heic(ALPHA.astype(np.uint16) * 4, 10)
    assert opened(deep, 3).shape == (48, 64, 3) and opened(deep, 4).shape == (48, 64, 4)


def test_a_damaged_heic_is_broken_and_a_large_one_refused(heic, monkeypatch):
    data = heic(COLOUR)
    for part in (data[:60], data[: len(data) // 2], data[:-200]):
        with pytest.raises(BrokenImage):
            opened(part)
    monkeypatch.setenv("HF_MIM_MAX_IMAGE_PIXELS", "3071")
    with pytest.raises(ImageFormatError, match="64 x 48 pixels are more than max_image_pixels=3071"):
        opened(data)


# ---- JPEG XL


def jpegxl(array, **options) -> bytes:
    codecs = pytest.importorskip("imagecodecs", reason="the extra hf-mim[tiff] is not installed")
    return codecs.jpegxl_encode(array, lossless=True, **options)


@pytest.mark.parametrize("container", [False, True])
@pytest.mark.parametrize("kind", ["uint8", "uint16", "float32"])
def test_jpeg_xl_is_read_in_the_depth_of_the_file(kind, container):
    array = COLOUR if kind == "uint8" else COLOUR.astype(kind) * 257 if kind == "uint16" else COLOUR.astype(kind) / 255
    found = opened(jpegxl(array, usecontainer=container))
    assert found.dtype == kind
    np.testing.assert_array_equal(found, array)


@pytest.mark.parametrize(
    "size", [(8, 8), (48, 64), (64, 48), (7, 1001), (300, 9000), (2000, 2000), (256, 128), (9, 16)]
)
@pytest.mark.parametrize("container", [False, True])
def test_the_size_of_a_jpeg_xl_is_known_before_it_is_decoded(size, container, monkeypatch):
    data = jpegxl(np.zeros(size, np.uint8), usecontainer=container, effort=1)
    monkeypatch.setenv("HF_MIM_MAX_IMAGE_PIXELS", "1")
    monkeypatch.setattr("imagecodecs.jpegxl_decode", lambda *args, **kwargs: pytest.fail("it was decoded"))
    with pytest.raises(ImageFormatError, match=f"^a: {size[1]} x {size[0]} pixels are more"):
        opened(data)


def test_a_damaged_jpeg_xl_is_broken_and_an_animation_gives_its_first_picture():
    data = jpegxl(RANDOM.integers(0, 256, (32, 32, 3), dtype=np.uint8))
    for part in (data[:40], data[: len(data) // 2]):
        with pytest.raises(BrokenImage):
            opened(part)
    frames = np.stack([COLOUR, COLOUR // 2])
    np.testing.assert_array_equal(opened(jpegxl(frames)), COLOUR)


# ---- without extras


@pytest.mark.parametrize(
    ("name", "data", "told"),
    [
        ("a.dcm", bytes(128) + b"DICM" + bytes(20), "a DICOM file needs pydicom: pip install hf-mim[dicom]"),
        ("a.heic", b"\0\0\0\x18ftypheic" + bytes(20), "a HEIC file needs pillow-heif: pip install hf-mim[heif]"),
        ("a.jxl", b"\xff\n" + bytes(20), "a JPEG XL file needs imagecodecs: pip install hf-mim[tiff]"),
    ],
)
def test_a_missing_extra_is_one_line_that_names_the_file_and_the_command(name, data, told, tmp_path, monkeypatch):
    for module in ("pydicom", "pillow_heif", "imagecodecs"):
        monkeypatch.setitem(sys.modules, module, None)
    (tmp_path / name).write_bytes(data)
    with pytest.raises(ImageFormatError) as error:
        load_images(tmp_path)
    assert str(error.value) == f"{tmp_path / name}: {told}"


# ---- GeoTIFF


def test_the_tags_of_a_geotiff_change_no_pixel_but_for_nodata():
    tifffile = pytest.importorskip("tifffile", reason="the extra hf-mim[tiff] is not installed")
    array = RANDOM.normal(size=(16, 16)).astype(np.float32)
    scale, tiepoint, keys = (33550, 12, 3, (10.0, 10.0, 0.0)), (33922, 12, 6, (0.0,) * 6), (34735, 3, 4, (1, 1, 0, 0))
    metadata = (42112, 2, 0, '<GDALMetadata><Item name="SCALE" sample="0" role="scale">5</Item></GDALMetadata>')
    tags = [tag + (True,) for tag in (scale, tiepoint, keys, metadata)]
    for more in ({}, {"planarconfig": "contig"}):
        bands = np.stack([array] * 5, -1) if more else array
        tifffile.imwrite(file := io.BytesIO(), bands, photometric="minisblack", extratags=tags, **more)
        np.testing.assert_array_equal(opened(file.getvalue(), 5 if more else 1), bands)
