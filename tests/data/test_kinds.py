"""Every kind of image: what training, evaluation and the image processor see is what the file holds, in its own depth.

The expected pixels are the array that was written.
"""

import io
import struct
import zlib

import imagecodecs
import numpy as np
import pytest
import tifffile
import torch
from datasets import Array3D, Dataset, Features, Value
from datasets import Image as ImageFeature
from PIL import Image

from hf_mim.data import CenterCrop, DeviceAugment, ImageDataset, ValueRange, WholeImage, load_images
from hf_mim.data.decode import BrokenImage, decoding, open_image
from hf_mim.data.processor import image_processor
from hf_mim.models.pixels import ImageFormatError

HEIGHT, WIDTH = 12, 20
SEVEN = dict(photometric="minisblack", planarconfig="contig")


def values(kind: str, bands: int, seed: int = 0) -> np.ndarray:
    """[h, w, bands] of values that use the type: 12 bits of uint16, both signs of int16 and float32."""
    low, high = {"uint8": (0, 256), "uint16": (0, 4096), "int16": (-1024, 3072), "float32": (-30, 5)}[kind]
    draw = np.random.default_rng(seed)
    array = draw.uniform(low, high, (HEIGHT, WIDTH, bands))
    return array.astype(kind) if kind == "float32" else np.floor(array).astype(kind)


def tiff(array, **options) -> bytes:
    file = io.BytesIO()
    if array.shape[-1] == 1:
        array, options = array[..., 0], options | {"planarconfig": None}
    tifffile.imwrite(file, array, **options)
    return file.getvalue()


def planar(array, **options) -> bytes:
    return tiff(np.moveaxis(array, -1, 0).copy(), planarconfig="separate", photometric="minisblack", **options)


def npy(array) -> bytes:
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


def pil(array, form: str, **options) -> bytes:
    file = io.BytesIO()
    Image.fromarray(array[..., 0] if array.shape[2] == 1 else array).save(file, form, **options)
    return file.getvalue()


# name → (writer, types, numbers of bands)
CONTAINERS = {
    "npy": (npy, ["uint8", "uint16", "int16", "float32"], [1, 3, 4, 13]),
    "npy, channels first": (lambda a: npy(np.moveaxis(a, -1, 0)), ["uint8", "uint16", "float32"], [1, 3, 13]),
    "tiff": (lambda a: tiff(a, **SEVEN), ["uint8", "uint16", "int16", "float32"], [1, 2, 3, 4, 13]),
    "tiff rgb": (lambda a: tiff(a, photometric="rgb"), ["uint8", "uint16", "float32"], [3]),
    "planar rgb tiff": (
        lambda a: tiff(np.moveaxis(a, -1, 0).copy(), planarconfig="separate", photometric="rgb"),
        ["uint8", "uint16"],
        [3],
    ),
    "planar tiff": (planar, ["uint8", "uint16", "int16", "float32"], [2, 3, 4, 13]),
    "tiff of a near infrared band": (
        lambda a: tiff(a, photometric="rgb", extrasamples=["unspecified"]),
        ["uint8", "uint16"],
        [4],
    ),
    "lzw tiff": (lambda a: tiff(a, compression="lzw", **SEVEN), ["uint8", "uint16"], [1, 3, 6]),
    "deflate tiff with predictor": (lambda a: tiff(a, compression="zlib", predictor=True, **SEVEN), ["uint16"], [6]),
    "zstd tiff": (lambda a: tiff(a, compression="zstd", **SEVEN), ["uint16", "float32"], [1, 6]),
    "tiled tiff": (lambda a: tiff(a, tile=(16, 16), **SEVEN), ["uint16", "float32"], [1, 5]),
    "big tiff": (lambda a: tiff(a, bigtiff=True, **SEVEN), ["uint8", "uint16"], [1, 3]),
    "big-endian tiff": (lambda a: tiff(a, byteorder=">", **SEVEN), ["uint16", "float32"], [1, 5]),
    "tiff of a page for each band": (
        lambda a: tiff(np.moveaxis(a, -1, 0).copy(), photometric="minisblack"),
        ["uint8", "uint16"],
        [3, 5],
    ),
    "png": (lambda a: pil(a, "PNG"), ["uint8"], [1, 3, 4]),
    "png of 16 bits": (lambda a: imagecodecs.png_encode(a if a.shape[2] > 1 else a[..., 0]), ["uint16"], [1, 3]),
    "lossless webp": (lambda a: pil(a, "WEBP", lossless=True), ["uint8"], [3]),
    "bmp": (lambda a: pil(a, "BMP"), ["uint8"], [1, 3]),
}
KINDS = [(name, kind, bands) for name, (_, kinds, counts) in CONTAINERS.items() for kind in kinds for bands in counts]


def dataset(data: bytes) -> Dataset:
    features = Features(image=ImageFeature(decode=False))
    return Dataset.from_dict({"image": [{"bytes": data, "path": None}]}, features=features)


def a_range(kind: str, bands: int) -> ValueRange:
    low, high = {"uint8": (0, 255), "uint16": (0, 4095), "int16": (-1024, 3071), "float32": (-30, 5)}[kind]
    return ValueRange.from_list([low, high] * bands, bands, kind)


@pytest.mark.parametrize(("name", "kind", "bands"), KINDS)
def test_training_sees_the_values_of_the_file(name, kind, bands):
    array = values(kind, bands)
    about = dict(crop=WholeImage(), own_depth=True, value_range=a_range(kind, bands))
    pixels = ImageDataset(dataset(CONTAINERS[name][0](array)), (HEIGHT, WIDTH), bands, **about)[0]["pixel_values"]
    assert pixels.dtype == getattr(torch, kind)
    np.testing.assert_array_equal(pixels.permute(1, 2, 0).numpy(), array)


@pytest.mark.parametrize(("name", "kind", "bands"), KINDS)
def test_the_image_processor_gives_what_training_and_evaluation_see(name, kind, bands):
    """Also where the image is cropped and resized: half a level of 4096 is 1.2e-4 of the range."""
    data, value_range, size = CONTAINERS[name][0](values(kind, bands)), a_range(kind, bands), (8, 8)
    mean, std = [0.4] * bands, [0.3] * bands
    processor = image_processor(size, mean, std, value_range, crop_fraction=1.0)
    given = processor(open_image(data, bands), return_tensors="pt")["pixel_values"]

    about = dict(crop=CenterCrop(), value_range=value_range)
    own = ImageDataset(dataset(data), size, bands, own_depth=True, **about)[0]["pixel_values"]
    trained = DeviceAugment(mean, std, value_range=value_range).eval()(own[None])
    scaled = ImageDataset(dataset(data), size, bands, **about)[0]["pixel_values"]
    evaluated = DeviceAugment(mean, std).eval()(scaled[None])
    torch.testing.assert_close(given, trained, rtol=0, atol=1e-6)
    torch.testing.assert_close(given, evaluated, rtol=0, atol=1e-6)


@pytest.mark.parametrize("kind", ["uint16", "int16", "float32"])
def test_a_resize_keeps_the_depth(kind):
    """A ramp of more levels than 8 bits have stays a ramp, to half a level."""
    ramp = np.linspace(0, 4000, 400).astype(kind)[None].repeat(40, axis=0)[..., None]
    about = dict(crop=WholeImage(), own_depth=True, value_range=ValueRange((0.0,), (4095.0,)))
    pixels = ImageDataset(dataset(npy(ramp)), (20, 200), 1, **about)[0]["pixel_values"][0, 10].numpy()
    expected = ramp[0, :, 0].astype(np.float64).reshape(200, 2).mean(axis=1)
    assert len(np.unique(pixels)) == 200
    assert np.abs(pixels[2:-2] - expected[2:-2]).max() <= 0.51


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("form", ["tiff", "png"])
def test_images_of_16_bits_are_turned_upright_as_those_of_8_bits(form, orientation):
    """PIL turns the picture of 8 bits; the same values, 257 times as large, have to be turned in the same way."""
    array = values("uint8", 3)
    exif = Image.Exif()
    exif[0x0112] = orientation
    file = io.BytesIO()
    if form == "tiff":
        deep = tiff(array * np.uint16(257), photometric="rgb", extratags=[(274, "H", 1, orientation, True)])
        Image.fromarray(array).save(file, "TIFF", tiffinfo={0x0112: orientation})
    else:
        Image.fromarray(array).save(file, "PNG", exif=exif)
        chunk = b"eXIf" + exif.tobytes().removeprefix(b"Exif\0\0")
        chunk = struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", zlib.crc32(chunk))
        plain = imagecodecs.png_encode(array * np.uint16(257))
        deep = plain[:33] + chunk + plain[33:]  # behind the signature and IHDR
    size = (WIDTH, HEIGHT) if orientation > 4 else (HEIGHT, WIDTH)
    about = dict(crop=WholeImage(), own_depth=True)
    found, expected = (
        ImageDataset(dataset(data), size, 3, **about)[0]["pixel_values"] for data in (deep, file.getvalue())
    )
    np.testing.assert_array_equal(found.numpy(), expected.numpy() * np.uint16(257))


def test_alpha_is_left_out_only_where_the_file_says_so():
    for kind in ("uint8", "uint16"):
        array = values(kind, 4)
        data = tiff(array, photometric="rgb", extrasamples=["unassalpha"])
        about = dict(crop=WholeImage(), own_depth=True, value_range=a_range(kind, 3))
        pixels = ImageDataset(dataset(data), (HEIGHT, WIDTH), 3, **about)[0]["pixel_values"]
        np.testing.assert_array_equal(pixels.permute(1, 2, 0).numpy(), array[..., :3])
        data = tiff(array, photometric="rgb", extrasamples=["unspecified"])
        with pytest.raises(ImageFormatError, match="num_channels=3, but the image has 4"):
            ImageDataset(dataset(data), (HEIGHT, WIDTH), 3, **about)


def test_an_image_of_another_depth_than_the_range_was_measured_on_is_refused():
    with pytest.raises(ImageFormatError, match="image 0: the image is uint8, and the value range .* on uint16"):
        ImageDataset(dataset(pil(values("uint8", 3), "PNG")), 8, 3, value_range=a_range("uint16", 3))


def test_an_array_that_can_be_read_in_two_ways_is_refused():
    with pytest.raises(ImageFormatError, match=r"\[3, 20, 3\] can be \[h, w, C\] or \[C, h, w\]"):
        ImageDataset(dataset(npy(np.zeros((3, 20, 3), np.uint8))), 8, 3)


def test_too_many_pixels_are_no_damage_and_the_option_is_named(monkeypatch):
    monkeypatch.setenv("HF_MIM_MAX_IMAGE_PIXELS", "100")
    for data in (pil(values("uint8", 3), "PNG"), tiff(values("uint16", 5), **SEVEN)):
        with pytest.raises(ImageFormatError, match="20 x 12 pixels are more than .*--max_image_pixels 240"):
            ImageDataset(dataset(data), 8, 3)


def test_postscript_is_no_image():
    data = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 32 32\n%%EndComments\nshowpage\n"
    with pytest.raises(BrokenImage, match="^a.png: not an image, or of an unknown format"), decoding("a.png"):
        open_image(data)


@pytest.mark.parametrize(("bands", "num_channels"), [(3, 3), (4, 4), (13, 13), (3, 1)])
def test_rows_that_became_the_pages_of_a_tiff_are_refused_with_the_cure(tmp_path, bands, num_channels):
    array = values("float32", bands)
    tifffile.imwrite(tmp_path / "a.tif", array, photometric="minisblack")
    assert len(tifffile.TiffFile(tmp_path / "a.tif").pages) == HEIGHT
    data = (tmp_path / "a.tif").read_bytes()
    with pytest.raises(
        ImageFormatError, match=f"{HEIGHT} pages of {WIDTH} x {bands}: each is a row of an image"
    ) as error:
        open_image(data, num_channels)
    cure = str(error.value).partition("write the array with ")[2]
    eval(cure, {"tifffile": tifffile, "array": array, "path": tmp_path / "b.tif"})
    np.testing.assert_array_equal(open_image((tmp_path / "b.tif").read_bytes(), bands), array)
    stack = np.stack([values("uint16", 1)[..., 0]] * 40)  # pages of the usual shape are none
    assert open_image(tiff_of_pages(stack), 3).shape == (HEIGHT, WIDTH, 1)


def tiff_of_pages(stack) -> bytes:
    file = io.BytesIO()
    tifffile.imwrite(file, stack, photometric="minisblack")
    return file.getvalue()


def test_array_columns_keep_their_type(tmp_path):
    for kind in ("uint8", "uint16", "float32"):
        arrays = [values(kind, 3, seed) for seed in range(4)]
        features = Features(image=Array3D((HEIGHT, WIDTH, 3), kind), label=Value("int64"))
        Dataset.from_dict({"image": arrays, "label": [0, 1, 0, 1]}, features).save_to_disk(tmp_path / kind)
        about = dict(crop=WholeImage(), own_depth=True, value_range=a_range(kind, 3), labels=True)
        sample = ImageDataset(load_images(tmp_path / kind), (HEIGHT, WIDTH), 3, **about)[3]
        np.testing.assert_array_equal(sample["pixel_values"].permute(1, 2, 0).numpy(), arrays[3])
        assert sample["labels"] == 1
