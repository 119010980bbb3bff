"""Every kind of image becomes the channels asked for; the expected pixels are worked out by hand."""

import io
import struct
import sys
import zlib

import numpy as np
import pytest
import tifffile
import torch
from PIL import Image

from hf_mim.data.crop import WholeImage, crop_rng, load_crop
from hf_mim.data.decode import BrokenImage, decoding
from hf_mim.models.pixels import ImageFormatError, ValueRange, as_pixels, scale_pixels, to_channels

COLOUR = np.array([[[250, 10, 30], [0, 200, 100]], [[5, 6, 7], [90, 90, 240]]], dtype=np.uint8)
GREY = np.array([[0, 100], [180, 255]], dtype=np.uint8)
ALPHA = np.array([[255, 0], [128, 10]], dtype=np.uint8)
LUMINANCE = np.rint(COLOUR @ [0.299, 0.587, 0.114]).astype(np.uint8)
DEEP = np.array([[0, 55], [2494, 65535]], dtype=np.uint16)
DEEP_LUMINANCE = np.rint((COLOUR * 257.0) @ [0.299, 0.587, 0.114]).astype(np.uint16)
FLOATS = np.array([[-30.5, 0], [1e-4, 5]], dtype=np.float32)


def encoded(image, kind="PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def saved(array) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


def pixels(value, num_channels, size=(2, 2)):
    """[h, w, C]"""
    return load_crop(value, WholeImage(), size, num_channels, crop_rng(0, 0, 0)).permute(1, 2, 0).numpy()


def grey3(grey):
    return np.repeat(np.asarray(grey)[..., None], 3, axis=2)


def palette(transparent=False):
    image = Image.fromarray(np.array([[0, 1], [2, 3]], dtype=np.uint8), "P")
    image.putpalette(COLOUR.reshape(-1).tolist())
    return encoded(image, transparency=bytes([0, 255, 128, 255])) if transparent else encoded(image)


CASES = {
    "L to 3": (encoded(Image.fromarray(GREY)), 3, grey3(GREY)),
    "L to 1": (encoded(Image.fromarray(GREY)), 1, GREY[..., None]),
    "RGB to 3": (encoded(Image.fromarray(COLOUR)), 3, COLOUR),
    "RGB to 1": (encoded(Image.fromarray(COLOUR)), 1, LUMINANCE[..., None]),
    "LA to 3": (encoded(Image.fromarray(np.dstack([GREY, ALPHA]), "LA")), 3, grey3(GREY)),
    "LA to 2": (
        encoded(Image.fromarray(np.dstack([GREY, GREY * 0 + 255]), "LA")),
        2,
        np.dstack([GREY, GREY * 0 + 255]),
    ),
    "RGBA to 3": (encoded(Image.fromarray(np.dstack([COLOUR, ALPHA]))), 3, COLOUR),
    "RGBA to 1": (encoded(Image.fromarray(np.dstack([COLOUR, ALPHA]))), 1, LUMINANCE[..., None]),
    "RGBA to 4": (encoded(Image.fromarray(np.dstack([COLOUR, ALPHA]))), 4, np.dstack([COLOUR, ALPHA])),
    "P to 3": (palette(), 3, COLOUR),
    "P with transparency to 3": (palette(transparent=True), 3, COLOUR),
    "P to 1": (palette(), 1, LUMINANCE[..., None]),
    "1 to 3": (encoded(Image.fromarray(GREY > 120)), 3, grey3((GREY > 120) * np.uint8(255))),
    "1 to 1": (encoded(Image.fromarray(GREY > 120)), 1, (GREY > 120)[..., None] * np.uint8(255)),
    "I;16 to 3": (encoded(Image.fromarray(DEEP)), 3, grey3(DEEP)),
    "I;16 to 1": (encoded(Image.fromarray(DEEP)), 1, DEEP[..., None]),
    "I;16B to 1": (encoded(Image.fromarray(DEEP.astype(">u2")), "TIFF"), 1, DEEP[..., None]),
    "I to 1": (encoded(Image.fromarray(DEEP.astype(np.int32) - 9), "TIFF"), 1, DEEP[..., None].astype(np.int32) - 9),
    "F to 3": (encoded(Image.fromarray(FLOATS), "TIFF"), 3, grey3(FLOATS)),
    "npy [h, w] to 3": (saved(GREY), 3, grey3(GREY)),
    "npy [h, w, 3] to 1": (saved(COLOUR), 1, LUMINANCE[..., None]),
    "npy [h, w, 3] of float64": (saved(COLOUR / 255), 3, (COLOUR / 255).astype(np.float32)),
    "npy [h, w, 3] of uint16 to 1": (saved(COLOUR * np.uint16(257)), 1, DEEP_LUMINANCE[..., None]),
    "npy [h, w, 1] to 3": (saved(GREY[..., None]), 3, grey3(GREY)),
    "npy of bools": (saved(GREY > 120), 1, (GREY > 120)[..., None] * np.uint8(255)),
    "npy of big-endian uint16": (saved(DEEP.astype(">u2")), 1, DEEP[..., None]),
    "npy of int16": (saved(DEEP.astype(np.int16) - 300), 1, DEEP[..., None].astype(np.int16) - np.int16(300)),
    "npy of int8": (saved(GREY.astype(np.int8)), 1, GREY[..., None].astype(np.int8).astype(np.int16)),
    "npy of float16": (saved(FLOATS.astype(np.float16)), 1, FLOATS.astype(np.float16)[..., None].astype(np.float32)),
    "a nested list": (COLOUR.tolist(), 3, COLOUR.astype(np.int32)),
    "a PIL image": (Image.fromarray(COLOUR), 3, COLOUR),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.filterwarnings("error")
def test_every_mode_becomes_the_channels_asked_for(case):
    value, num_channels, expected = CASES[case]
    found = pixels(value, num_channels)
    assert found.dtype == np.asarray(expected).dtype and found.shape == (2, 2, num_channels)
    assert np.abs(found.astype(np.float64) - expected).max() <= (1 if "to 1" in case else 0)  # luminance is rounded


def test_cmyk_becomes_rgb():
    """Ink c, m, y over black k: red is (255 - c)(255 - k) / 255."""
    ink = np.full((2, 2, 4), [0, 128, 255, 51], dtype=np.uint8)
    expected = [255 * 204 / 255, 127 * 204 / 255, 0]
    for kind in ("TIFF", "JPEG"):
        assert np.abs(pixels(encoded(Image.fromarray(ink, "CMYK"), kind), 3) - expected).max() <= 4


@pytest.mark.parametrize("layout", ["hwc", "chw"])
def test_arrays_of_ten_bands_keep_them_in_order(layout):
    bands = np.random.RandomState(0).randint(0, 256, (6, 5, 10), dtype=np.uint8)
    value = saved(bands if layout == "hwc" else bands.transpose(2, 0, 1))
    np.testing.assert_array_equal(pixels(value, 10, size=(6, 5)), bands)


def tiff(bands, order="<", planar=1, compression=1, predictor=1, rows_per_strip=4) -> bytes:
    """A TIFF of many bands, written by hand from its specification."""
    height, width, count = bands.shape
    data = bands.astype(bands.dtype.newbyteorder(order))
    planes = [data] if planar == 1 else [data[..., band : band + 1] for band in range(count)]
    strips = []
    for plane in planes:
        if predictor == 2:
            plane = np.concatenate([plane[:, :1], plane[:, 1:] - plane[:, :-1]], axis=1).astype(data.dtype)
        for row in range(0, height, rows_per_strip):
            strip = plane[row : row + rows_per_strip].tobytes()
            strips.append(zlib.compress(strip) if compression == 8 else strip)
    offsets = np.cumsum([8] + [len(strip) for strip in strips]).tolist()
    tags = {256: width, 257: height, 258: [8 * bands.dtype.itemsize] * count, 259: compression, 262: 1}
    tags |= {273: offsets[:-1], 277: count, 278: rows_per_strip, 279: [len(strip) for strip in strips], 284: planar}
    tags |= {317: predictor, 339: [{"u": 1, "i": 2, "f": 3}[bands.dtype.kind]] * count}
    start = offsets[-1]
    directory, rest = struct.pack(order + "H", len(tags)), b""
    for tag, values in tags.items():
        packed = np.ravel(values).astype(order + "u4").tobytes()  # all as type 4, LONG
        if len(packed) > 4:  # more than fits the entry is written behind the directory, which ends with four zeros
            place = start + 2 + 12 * len(tags) + 4 + len(rest)
            packed, rest = struct.pack(order + "I", place), rest + packed
        directory += struct.pack(order + "HHI", tag, 4, np.size(values)) + packed
    header = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(order + "I", start)
    return header + b"".join(strips) + directory + bytes(4) + rest


@pytest.mark.parametrize("order", "<>")
@pytest.mark.parametrize("planar, compression, predictor", [(1, 1, 1), (2, 1, 1), (1, 8, 1), (2, 8, 2), (1, 8, 2)])
def test_tiffs_of_many_bands_are_read(order, planar, compression, predictor):
    bands = np.random.RandomState(0).randint(0, 256, (6, 5, 10)).astype(np.uint16) * 257
    value = tiff(bands, order, planar, compression, predictor)
    np.testing.assert_array_equal(pixels(value, 10, size=(6, 5)), bands)


def test_tiffs_of_many_bands_in_8_bits_and_floats_are_read():
    bands = np.random.RandomState(0).randint(0, 256, (6, 5, 7)).astype(np.uint8)
    np.testing.assert_array_equal(pixels(tiff(bands), 7, size=(6, 5)), bands)
    floats = bands.astype(np.float32) / 255
    np.testing.assert_array_equal(pixels(tiff(floats), 7, size=(6, 5)), floats)


def test_tiled_tiffs_of_many_bands_are_read_and_without_tifffile_an_error_says_what_to_install(monkeypatch):
    bands, file = np.random.RandomState(0).randint(0, 256, (20, 24, 6)).astype(np.uint8), io.BytesIO()
    tifffile.imwrite(file, bands, tile=(16, 16), photometric="minisblack", planarconfig="contig")
    np.testing.assert_array_equal(pixels(file.getvalue(), 6, size=(20, 24)), bands)
    monkeypatch.setitem(sys.modules, "tifffile", None)
    with pytest.raises(ImageFormatError, match=r"pip install hf-mim\[tiff\]"):
        pixels(file.getvalue(), 6)


@pytest.mark.parametrize(
    "value, num_channels", [(saved(np.zeros((8, 8, 4), np.uint8)), 3), (encoded(Image.fromarray(COLOUR)), 10)]
)
def test_channels_that_cannot_match_are_refused_by_name(value, num_channels):
    with pytest.raises(ImageFormatError, match=f"^it.png: num_channels={num_channels}, but the image has [34]"):
        with decoding("it.png"):
            pixels(value, num_channels)


@pytest.mark.parametrize(
    "values, expected",
    [
        (np.uint16([[0, 257], [25700, 65535]]), [[0, 1], [100, 255]]),
        (np.float32([[0, 0.1], [0.5, 1]]), [[0, 25.5], [127.5, 255]]),
        (np.int32([[0, 7], [200, 255]]), [[0, 7], [200, 255]]),
    ],
)
def test_without_a_value_range_values_are_scaled_from_the_whole_range_of_their_type(values, expected):
    found = scale_pixels(torch.from_numpy(values)[None], None)
    assert found.dtype == torch.float32
    np.testing.assert_allclose(found[0], expected, rtol=1e-6)


@pytest.mark.parametrize("values", [[-1.0, 0.5], [0, 1.05], np.int16([0, 5]), [0, 256], [-1, 0]])
def test_values_that_their_type_does_not_have_are_refused_and_a_range_is_proposed(values):
    pixels = torch.as_tensor(as_pixels(np.array(values)))[None, None]
    with pytest.raises(ImageFormatError, match="; give value_range, such as"):
        scale_pixels(pixels, None)


@pytest.mark.parametrize("values", [[1j, 0], ["a", "b"], [0, 2**40]])
def test_arrays_that_are_no_pixels_are_refused(values):
    with pytest.raises(ImageFormatError):
        as_pixels(np.array(values))


def test_a_value_range_scales_each_band_and_clips():
    bands = torch.tensor([[-30.0, 5, 9], [0, 4095, 2047.5]]).view(2, 1, 3)
    found = scale_pixels(bands, ValueRange.from_list([-30, 5, 0, 4095], 2))
    np.testing.assert_allclose(found[:, 0], [[0, 255, 255], [0, 255, 127.5]], rtol=1e-6)
    with pytest.raises(ImageFormatError, match="the image is float32, and the value range .* was measured on uint16"):
        scale_pixels(bands, ValueRange.from_list([0, 4095], 2, "uint16"))


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_values_that_are_not_finite_are_the_users_to_explain(value):
    image = np.full((4, 4), 0.5, np.float32)
    image[1, 2] = value
    with pytest.raises(ImageFormatError, match="^a.npy: has values that are not finite; pretrain with --nodata nan"):
        with decoding("a.npy"):
            pixels(saved(image), 1)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_honoured(picture, kind, orientation):
    """The stored picture is the upright one turned back; loading gives the upright one, cropped where it should be."""
    upright = picture(48, 32)
    turn = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}  # PIL's transpositions that undo the orientation
    stored = upright.transpose(Image.Transpose(turn[orientation])) if orientation > 1 else upright
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"JPEG": {"quality": 100, "subsampling": 0}, "WEBP": {"lossless": True}}.get(kind, {})
    options |= {"tiffinfo": {0x0112: orientation}} if kind == "TIFF" else {"exif": exif}
    value = encoded(stored, kind, **options)

    class Corner:
        exact = True

        def box(self, width, height, size, rng):
            assert (width, height) == (48, 32)
            return 4, 2, 24, 12

    found = load_crop(value, Corner(), (10, 20), 3, crop_rng(0, 0, 0)).permute(1, 2, 0).numpy().astype(int)
    expected = np.asarray(upright).astype(int)[2:12, 4:24]
    assert np.abs(found - expected).mean() < 1


@pytest.mark.parametrize(
    "damage", ["empty", "half a JPEG", "half a PNG", "text", "half an npy", "no file", "null", "half a tiff"]
)
def test_damaged_images_are_broken_and_named(picture, damage):
    jpeg, png = encoded(picture(), "JPEG"), encoded(picture())
    value = {
        "empty": b"",
        "half a JPEG": jpeg[: len(jpeg) // 2],
        "half a PNG": png[: len(png) // 2],
        "text": b"<html>404 not found</html>",
        "half an npy": saved(COLOUR)[:-5],
        "no file": {"bytes": None, "path": "/nowhere/it.jpg"},
        "null": None,
        "half a tiff": tiff(np.zeros((6, 5, 10), np.uint8))[:150],
    }[damage]
    with pytest.raises(BrokenImage, match="^it.jpg: [^\n]+$"):
        with decoding("it.jpg"):
            pixels(value, 3)


@pytest.mark.parametrize(("mode", "count"), [("RGB", 4), ("L", 4), ("CMYK", 4), ("L", 2), ("P", 2)])
def test_no_band_is_made_up_for_a_picture_without_alpha(mode, count):
    image = Image.fromarray(COLOUR).convert(mode)
    with pytest.raises(ImageFormatError, match=f"num_channels={count}, but the image has .* and no alpha; save it"):
        to_channels(image, count)


def test_the_alpha_of_a_palette_is_kept():
    image = Image.fromarray(np.dstack([COLOUR, ALPHA])).quantize(4)
    assert image.mode == "P" and "transparency" not in image.info  # as of a TGA file
    np.testing.assert_array_equal(np.asarray(to_channels(image, 4)), np.asarray(image.convert("RGBA")))
