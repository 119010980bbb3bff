"""Formats of more than 8 bits keep them, or are refused: nothing is cut to 8 bits in silence."""

import io
import struct
import sys

import imagecodecs
import numpy as np
import pytest
from PIL import Image, features

import hf_mim
from hf_mim.data.crop import WholeImage, crop_rng, load_crop
from hf_mim.data.decode import BrokenImage, decoding, open_image
from hf_mim.models.pixels import ImageFormatError, ValueRange, to_channels

COLOUR = np.random.default_rng(5).integers(0, 1024, (6, 10, 3), dtype=np.uint16)
GREY = COLOUR[..., 0]
needs_avif = pytest.mark.skipif(not features.check("avif"), reason="Pillow was built without AVIF")


def pnm(kind: int, array, most: int, comment=b"") -> bytes:
    head = b"P%d\n%s%d %d\n%d\n" % (kind, comment, array.shape[1], array.shape[0], most)
    if kind > 3:
        return head + array.astype(">u2").tobytes()
    return head + " ".join(map(str, array.ravel().tolist())).encode() + b"\n"


@pytest.mark.parametrize("most", [256, 1023, 4095, 65535])
@pytest.mark.parametrize(("kind", "array"), [(2, GREY), (3, COLOUR), (5, GREY), (6, COLOUR)])
def test_pnm_gives_the_stored_values(kind, array, most):
    array = np.minimum(array, most)
    for comment in (b"", b"# made by hand 9 9\n"):
        found = open_image(pnm(kind, array, most, comment))
        assert found.dtype == np.uint16
        np.testing.assert_array_equal(found, array)


def test_pnm_of_8_bits_is_pillows_and_a_damaged_one_is_broken():
    data = b"P5 10 6 255\n" + (GREY % 256).astype(np.uint8).tobytes()
    np.testing.assert_array_equal(np.asarray(open_image(data)), GREY % 256)
    for data in (pnm(6, COLOUR, 4095)[:-2], pnm(3, COLOUR, 1000), pnm(2, GREY, 1023)[:-9]):
        with pytest.raises(BrokenImage, match="^a.ppm: "), decoding("a.ppm"):
            open_image(data)


@needs_avif
@pytest.mark.parametrize("bits", [10, 12])
def test_avif_keeps_10_and_12_bits(bits, monkeypatch):
    for array in (COLOUR, GREY, np.dstack([COLOUR, GREY])):
        data = imagecodecs.avif_encode(array << (bits - 10), level=100, bitspersample=bits)
        found = open_image(data, 3)
        assert found.dtype == np.uint16
        np.testing.assert_array_equal(found, (array if array.ndim == 2 else array[..., :3]) << (bits - 10))
    monkeypatch.setitem(sys.modules, "imagecodecs", None)
    with pytest.raises(ImageFormatError, match=r"an AVIF of 10 or 12 bits needs imagecodecs: pip install hf-mim\[tiff"):
        open_image(data, 3)


@needs_avif
def test_avif_of_8_bits_is_pillows():
    array = (COLOUR >> 2).astype(np.uint8)
    image = open_image(imagecodecs.avif_encode(array, level=100), 3)
    assert isinstance(image, Image.Image)
    np.testing.assert_array_equal(np.asarray(image.convert("RGB")), array)


@pytest.mark.parametrize("bits", [10, 12, 16])
def test_jpeg_2000_of_one_channel_gives_the_stored_values(bits):
    data = imagecodecs.jpeg2k_encode(GREY, bitspersample=bits, reversible=True, level=0)
    found = load_crop(data, WholeImage(), GREY.shape, 1, crop_rng(0, 0, 0))[0].numpy()
    np.testing.assert_array_equal(found, GREY)


@pytest.mark.parametrize("array", [COLOUR, GREY.astype(np.int16) - 500])
def test_other_jpeg_2000_of_16_bits_is_refused(array):
    with pytest.raises(ImageFormatError, match="a JPEG 2000 image of more than 8 bits must have one channel"):
        open_image(imagecodecs.jpeg2k_encode(array, reversible=True, level=0))


def test_sgi_of_16_bits_is_refused_and_of_8_bits_is_read():
    for size, array in ((1, (GREY >> 2).astype(np.uint8)), (2, GREY)):
        head = struct.pack(">HBBHHHHII", 474, 0, size, 2, 10, 6, 1, 0, 1023).ljust(512, b"\0")
        data = head + array[::-1].astype(f">u{size}").tobytes()
        if size == 1:
            np.testing.assert_array_equal(np.asarray(open_image(data)), array)
            continue
        with pytest.raises(ImageFormatError, match="an SGI image of 16 bits, which Pillow would cut to 8"):
            open_image(data)


def test_dds_of_more_than_8_bits_is_refused_and_of_8_bits_is_read():
    file = io.BytesIO()
    Image.fromarray((COLOUR >> 2).astype(np.uint8)).save(file, "DDS")
    data = bytearray(file.getvalue())
    np.testing.assert_array_equal(np.asarray(open_image(bytes(data))), COLOUR >> 2)
    masks, floats = data.copy(), data.copy()
    masks[88:104] = struct.pack("<4I", 32, 0x3FF00000, 0xFFC00, 0x3FF)
    masks += bytes(60)
    floats[80:88] = struct.pack("<I4s", 4, b"DX10")
    floats[128:] = struct.pack("<5I", 95, 3, 0, 1, 0) + bytes(96)
    for changed in (masks, floats):
        with pytest.raises(ImageFormatError, match="a DDS image of more than 8 bits, which Pillow would cut to 8"):
            open_image(bytes(changed))


@pytest.mark.parametrize(("kind", "nodata"), [("uint32", 2**32 - 1), ("int64", -(2**63)), ("uint32", 7)])
def test_nodata_beyond_int32_is_blanked_before_the_rest_is_checked(kind, nodata):
    array = np.arange(60).reshape(6, 10).astype(kind)
    array[2, 3:5] = nodata
    found = to_channels(array, 1, value_range=ValueRange((0.0,), (99.0,), "int32", float(nodata)))[..., 0]
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found, np.where(array == nodata, np.nan, array.astype(np.float32)))
    array[0, 0] = 2**31
    with pytest.raises(ImageFormatError, match=r"has values above 2147483647 \(2147483648\), which do not fit int32"):
        to_channels(array, 1, value_range=ValueRange((0.0,), (99.0,), "int32", float(nodata)))


def test_values_beyond_int32_are_refused_by_the_right_side():
    with pytest.raises(ImageFormatError, match="above 2147483647 .4294967295.*if .* give --nodata 4294967295"):
        to_channels(np.full((4, 4), 2**32 - 1, np.uint32), 1)
    with pytest.raises(ImageFormatError, match="below -2147483648 .-3000000000."):
        to_channels(np.full((4, 4), -3_000_000_000), 1)


def test_an_array_of_text_is_refused_as_such_whatever_its_channels():
    with pytest.raises(ImageFormatError, match="an array image must be numeric, not <U3"):
        to_channels(np.full((4, 4, 2), "abc"), 3)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_open_image_gives_every_file_upright(tmp_path, orientation):
    import tifffile

    base = np.arange(60, dtype=np.uint16).reshape(6, 10) * 4
    turn = {1: lambda x: x, 2: np.fliplr, 3: lambda x: np.rot90(x, 2), 4: np.flipud, 5: np.transpose}
    turn |= {6: lambda x: np.rot90(x, -1), 7: lambda x: np.rot90(x, 2).T, 8: np.rot90}
    exif = Image.Exif()
    exif[0x0112] = orientation
    tifffile.imwrite(tmp_path / "a.tif", base, extratags=[(274, "H", 1, orientation, True)])
    Image.fromarray(base).save(tmp_path / "b.png", exif=exif)
    Image.fromarray(base.astype(np.uint8)).save(tmp_path / "c.png", exif=exif)
    tifffile.imwrite(tmp_path / "d.tif", np.stack([base] * 5), extratags=[(274, "H", 1, orientation, True)])
    for name in ("a.tif", "b.png", "c.png"):
        np.testing.assert_array_equal(np.asarray(hf_mim.open_image(tmp_path / name, 1)), turn[orientation](base))
    pages = hf_mim.open_image(tmp_path / "d.tif", num_channels=5)
    np.testing.assert_array_equal(pages, np.stack([turn[orientation](base)] * 5, axis=-1))


def test_open_image_names_the_file_in_its_errors(tmp_path):
    with pytest.raises(FileNotFoundError):
        hf_mim.open_image(tmp_path / "none.png")
    (tmp_path / "a.png").write_text("<html>")
    with pytest.raises(BrokenImage, match="a.png: not an image"):
        hf_mim.open_image(tmp_path / "a.png")
