"""DICOM files: the values are those that the file means, whatever its depth, colours and compression."""

import io

import numpy as np
import pytest
from datasets import Dataset, Features
from datasets import Image as ImageFeature
from dicoms import UNCOMPRESSED, dicom
from PIL import Image

pydicom = pytest.importorskip("pydicom", reason="the extra hf-mim[dicom] is not installed")

from hf_mim.data import ImageDataset, WholeImage, load_images  # noqa: E402
from hf_mim.data.crop import image_size  # noqa: E402
from hf_mim.data.decode import BrokenImage, decoding, open_image  # noqa: E402
from hf_mim.data.masks import read_mask_ids  # noqa: E402
from hf_mim.data.nodata import pages_line, tag_nodata, tagged_nodata  # noqa: E402
from hf_mim.data.prepare import Prepare  # noqa: E402
from hf_mim.data.value_range import find_value_range  # noqa: E402
from hf_mim.models.pixels import ImageFormatError  # noqa: E402

RANDOM = np.random.default_rng(0)
DEEP = RANDOM.integers(0, 4096, (24, 32), dtype=np.uint16)
DEEP[0, :2] = 0, 4095
GREY = RANDOM.integers(0, 256, (24, 32), dtype=np.uint8)
COLOUR = np.kron(RANDOM.integers(0, 256, (3, 4, 3), dtype=np.uint8), np.ones((8, 8, 1), np.uint8))
RLE, JPEG, JPEG_LOSSLESS = "1.2.840.10008.1.2.5", "1.2.840.10008.1.2.4.50", "1.2.840.10008.1.2.4.70"
JPEG_LS, JPEG_2000, JPEG_12_BITS = "1.2.840.10008.1.2.4.80", "1.2.840.10008.1.2.4.90", "1.2.840.10008.1.2.4.51"
DEFLATED, MPEG = "1.2.840.10008.1.2.1.99", "1.2.840.10008.1.2.4.102"


def opened(data: bytes, num_channels=None) -> np.ndarray:
    with decoding("a.dcm"):
        return np.asarray(open_image(data, num_channels))


def broken(data: bytes) -> str:
    with pytest.raises(BrokenImage) as error:
        opened(data)
    assert "\n" not in str(error.value)
    return str(error.value)


def refused(data: bytes) -> str:
    with pytest.raises(ImageFormatError) as error:
        opened(data)
    return str(error.value)


# ---- values


@pytest.mark.parametrize(
    ("stored", "bits"), [(DEEP, 12), (DEEP.astype(np.int16), 16), (DEEP.astype(np.int16) - 2048, 12)]
)
def test_ct_is_in_hounsfield_units_in_one_type_whatever_the_scanner_stores(stored, bits):
    found = opened(dicom(stored, bits, RescaleSlope=1, RescaleIntercept=-1024))
    assert found.dtype == np.int16
    np.testing.assert_array_equal(found, stored.astype(int) - 1024)


@pytest.mark.parametrize(
    ("stored", "bits", "slope", "intercept", "kind"),
    [
        (DEEP, 12, 1, 0, "uint16"),
        (DEEP, 12, 2, 5, "uint16"),
        (DEEP, 12, -1, 4095, "uint16"),
        (DEEP, 12, 16, -1, "int64"),
        (DEEP, 12, 0.25, 0, "float32"),
        (GREY, 8, 1, 0, "uint8"),
        (GREY.astype(np.uint16), 8, 1, 0, "uint8"),
        (GREY.astype(np.int8), 8, 1, 0, "int16"),
    ],
)
def test_the_rescale_and_the_depth_give_the_type(stored, bits, slope, intercept, kind):
    found = opened(dicom(stored, bits, RescaleSlope=slope, RescaleIntercept=intercept))
    assert found.dtype == kind
    np.testing.assert_array_equal(found, (stored * float(slope) + intercept).astype(kind))


def test_twelve_bits_stay_and_no_window_cuts_them():
    found = opened(dicom(DEEP, 12, WindowCenter=500, WindowWidth=100))
    assert found.dtype == np.uint16
    np.testing.assert_array_equal(found, DEEP)


@pytest.mark.parametrize(
    ("stored", "bits", "white"), [(GREY, 8, 255), (DEEP, 12, 4095), (DEEP.astype(np.int16) - 2048, 12, -1)]
)
def test_monochrome1_is_inverted_so_that_black_is_the_least(stored, bits, white):
    np.testing.assert_array_equal(opened(dicom(stored, bits, "MONOCHROME1")), white - stored.astype(int))


def test_monochrome1_is_inverted_within_the_stored_range_before_the_rescale():
    found = opened(dicom(DEEP, 12, "MONOCHROME1", RescaleSlope=2, RescaleIntercept=-10000))
    np.testing.assert_array_equal(found, 2 * (4095 - DEEP.astype(int)) - 10000)


def test_a_modality_table_gives_the_units():
    table = pydicom.Dataset()
    table.LUTDescriptor, table.LUTData = [4096, 0, 16], list(range(4095, -1, -1))
    for name, letters in (("LUTDescriptor", "US"), ("LUTData", "US")):
        table[name].VR = letters
    np.testing.assert_array_equal(opened(dicom(DEEP, 12, ModalityLUTSequence=[table])), 4095 - DEEP)


def test_floats_stay_floats():
    data = pydicom.dcmread(io.BytesIO(dicom(DEEP.astype(np.uint32), 32, RescaleSlope=2, RescaleIntercept=1)))
    data.FloatPixelData = (DEEP / 4096).astype("<f4").tobytes()
    for name in ("PixelData", "BitsStored", "HighBit", "PixelRepresentation"):
        delattr(data, name)
    file = io.BytesIO()
    data.save_as(file)
    found = opened(file.getvalue())
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, DEEP / 2048 + 1)


# ---- colours


def test_colours_of_every_kind_are_rgb():
    ycbcr = np.asarray(Image.fromarray(COLOUR).convert("YCbCr"))
    luts = {}
    for place, name in enumerate(("Red", "Green", "Blue")):
        luts[f"{name}PaletteColorLookupTableDescriptor"] = [256, 0, 16]
        luts[f"{name}PaletteColorLookupTableData"] = ((np.arange(256) * (place + 1) % 256) << 8).astype("<u2").tobytes()
    palette = dicom(GREY, 8, "PALETTE COLOR", **luts)
    np.testing.assert_array_equal(opened(dicom(COLOUR, 8, "RGB")), COLOUR)
    assert np.abs(opened(dicom(ycbcr, 8, "YBR_FULL")).astype(int) - COLOUR).max() <= 2
    np.testing.assert_array_equal(opened(palette), np.stack([GREY, GREY * 2, GREY * 3], -1))
    np.testing.assert_array_equal(read_mask_ids(palette), GREY)
    np.testing.assert_array_equal(opened(dicom(COLOUR.astype(np.uint16) * 16, 12, "RGB")), COLOUR.astype(int) * 16)


def test_segmented_palettes_are_refused_because_a_few_bytes_of_them_hold_gigabytes():
    data = dicom(GREY, 8, "PALETTE COLOR", SegmentedRedPaletteColorLookupTableData=b"\x01\0\xff\xff\0\0")
    assert "segmented palette" in refused(data)


# ---- compression


def compressed(name: str) -> tuple[np.ndarray, bytes]:
    """(the values, the file)."""
    codecs = pytest.importorskip("imagecodecs", reason="it makes the compressed files")
    if name == "JPEG":
        ycbcr = {"photometric": "YBR_FULL_422", "syntax": JPEG}
        return COLOUR, dicom(COLOUR, 8, frames=[codecs.jpeg_encode(COLOUR, level=100, subsampling="444")], **ycbcr)
    if name == "RLE":
        data = pydicom.dcmread(io.BytesIO(dicom(DEEP, 12)))
        data.compress(RLE, encoding_plugin="pydicom")
        file = io.BytesIO()
        data.save_as(file)
        return DEEP, file.getvalue()
    frame, syntax = {
        "lossless JPEG": (lambda: codecs.ljpeg_encode(DEEP, bitspersample=12), JPEG_LOSSLESS),
        "JPEG-LS": (lambda: codecs.jpegls_encode(DEEP), JPEG_LS),
        "JPEG 2000": (
            lambda: codecs.jpeg2k_encode(DEEP, codecformat="j2k", bitspersample=12, reversible=True, level=0),
            JPEG_2000,
        ),
    }[name]
    return DEEP, dicom(DEEP, 16 if name == "JPEG-LS" else 12, syntax=syntax, frames=[frame()])


@pytest.mark.parametrize("name", ["JPEG", "RLE", "lossless JPEG", "JPEG-LS", "JPEG 2000"])
def test_compressed_values_are_those_of_the_file(name):
    values, data = compressed(name)
    assert np.abs(opened(data).astype(int) - values).max() <= (3 if name == "JPEG" else 0)


@pytest.mark.parametrize(("syntax", "told"), [(MPEG, "save it uncompressed"), (JPEG_12_BITS, "pylibjpeg-libjpeg")])
def test_a_compression_that_is_not_read_is_named(syntax, told):
    assert told in refused(dicom(DEEP, 12, syntax=syntax, frames=[b"\0" * 10]))


# ---- frames


@pytest.fixture
def folder(tmp_path):
    """A file of three frames of their own slopes, a file of one, and one whose name is a number."""
    stack = np.stack([DEEP, DEEP // 2, DEEP // 3])
    groups = []
    for slope in (1, 2, 3):
        group, rescale = pydicom.Dataset(), pydicom.Dataset()
        rescale.RescaleSlope, rescale.RescaleIntercept = slope, -1024
        group.PixelValueTransformationSequence = [rescale]
        groups.append(group)
    (tmp_path / "scan.dcm").write_bytes(dicom(stack, 12, PerFrameFunctionalGroupsSequence=groups))
    (tmp_path / "one.DCM").write_bytes(dicom(DEEP, 12, RescaleSlope=1, RescaleIntercept=-1024))
    (tmp_path / "1.2.840.77").write_bytes(dicom(DEEP // 4, 12, RescaleSlope=1, RescaleIntercept=-1024))
    (tmp_path / "DICOMDIR").write_bytes(bytes(128) + b"DICM")
    (tmp_path / "README").write_text("not an image")
    return tmp_path


def test_the_frames_of_a_file_are_images_of_their_own(folder):
    lines = []
    images = load_images(folder, tell=lines.append)
    names = [image["path"].removeprefix(f"{folder}/") for image in images["image"]]
    assert names == ["1.2.840.77", "one.DCM", "scan.dcm/0001", "scan.dcm/0002", "scan.dcm/0003"]
    assert "5 images (3 .dcm, some of several frames)" in lines[0] and "2 files without an extension" in lines[0]
    assert load_images(folder, group="file")["group"][:] == ["1.2.840.77", "one.DCM"] + ["scan.dcm"] * 3
    assert "to keep them on one side of a split: --group file" in lines[0]
    for number in (1, 2, 3):
        expected = number * (DEEP // number).astype(int) - 1024
        np.testing.assert_array_equal(opened(images[number + 1]["image"]), expected)
    assert image_size(images[4]["image"], 1) == (32, 24)
    assert pages_line(images, 1) is None


def test_a_table_of_files_of_several_frames_says_that_the_first_is_the_image(folder):
    rows = [{"bytes": (folder / name).read_bytes(), "path": None} for name in ("1.2.840.77", "one.DCM", "scan.dcm")]
    images = Dataset.from_dict({"image": rows}, features=Features(image=ImageFeature(decode=False)))
    assert pages_line(images, 1) == (
        "frames: the first of 3 frames is the image, in 1 of 3 DICOM files of the sample; each frame of a file in a "
        "folder is an image"
    )


def test_a_run_measures_the_range_in_units(folder):
    crops = ImageDataset(load_images(folder), (24, 32), 1, WholeImage(), own_depth=True)
    value_range, line, _ = find_value_range(crops, None, 1)
    assert value_range.pixel_type == "int16" and line.startswith("pixels: int16, -1,024..3,071 over 5 images")


def test_prepare_writes_a_file_for_each_frame_and_no_patient(folder, tmp_path_factory):
    tifffile = pytest.importorskip("tifffile")
    dest = tmp_path_factory.mktemp("prepared") / "tiles"
    Prepare(str(folder), str(dest), tile=24, nodata="none")(progress=False)
    names = sorted(path.name for path in dest.iterdir())
    assert names[4:6] == ["scan_0001_r000_c000.tif", "scan_0001_r000_c001.tif"] and len(names) == 10
    found = tifffile.imread(dest / "scan_0002_r000_c000.tif")
    np.testing.assert_array_equal(found, 2 * (DEEP // 2)[:, :24].astype(int) - 1024)
    assert not any(b"Doe" in path.read_bytes() for path in dest.iterdir())


# ---- pixels without data


@pytest.mark.parametrize(
    ("tags", "expected"),
    [
        ({}, None),
        ({"PixelPaddingValue": -2000}, -3024),
        ({"PixelPaddingValue": -2000, "PixelPaddingRangeLimit": -1990}, -3024),
        ({"PixelPaddingValue": -2000, "PhotometricInterpretation": "MONOCHROME1"}, 1999 - 1024),
        ({"PixelPaddingValue": -2000, "BitsStored": 11}, None),  # no pixel can have it
    ],
)
def test_the_padding_value_is_that_of_pixels_without_data(tags, expected):
    stored = DEEP.astype(np.int16)
    stored[:4], stored[4] = -2000, -1995
    if "BitsStored" in tags:
        stored = stored % 1024
    data = dicom(stored, tags.pop("BitsStored", 16), RescaleSlope=1, RescaleIntercept=-1024, **tags)
    assert tagged_nodata(data) == expected
    if expected is not None:
        assert (opened(data) == expected).sum() == 32 * (5 if "PixelPaddingRangeLimit" in tags else 4)


def test_padding_values_that_differ_are_refused_by_their_name(tmp_path):
    for number, value in enumerate((0, 4000)):
        (tmp_path / f"{number}.dcm").write_bytes(dicom(DEEP, 12, PixelPaddingValue=value))
    with pytest.raises(ImageFormatError, match="several values in their PixelPaddingValues, .*--nodata"):
        tag_nodata(load_images(tmp_path))


# ---- damage and bombs


def test_damaged_files_and_files_without_an_image_are_broken():
    good = dicom(DEEP, 12)
    for data in (good[: len(good) // 2], good[:140], bytes(128) + b"DICM" + bytes(400)):
        assert broken(data).startswith("a.dcm: ")
    report = pydicom.dcmread(io.BytesIO(good))
    for name in ("Rows", "Columns", "PixelData"):
        delattr(report, name)
    report.Modality = "SR"
    file = io.BytesIO()
    report.save_as(file)
    assert broken(file.getvalue()) == "a.dcm: a DICOM file without pixels (modality SR)"
    assert "no frame" in broken(dicom(DEEP, 12, NumberOfFrames=-1))
    assert "2 samples" in broken(dicom(np.stack([DEEP] * 2), 12, SamplesPerPixel=2, NumberOfFrames=1))
    for tags in ({"PixelData": None}, {"PhotometricInterpretation": None}, {"RescaleSlope": 0}, {"BitsStored": 60000}):
        broken(dicom(DEEP, 12, **tags))


def test_a_broken_file_in_a_folder_is_left_out_and_named(tmp_path):
    for number in range(3):
        (tmp_path / f"{number}.dcm").write_bytes(dicom(DEEP, 12))
    (tmp_path / "9.dcm").write_bytes(dicom(np.stack([DEEP] * 4), 12)[:-500])
    data = ImageDataset(load_images(tmp_path), 8, 1, WholeImage(), own_depth=True)
    data[3]
    assert len(data) == 4 and data.broken() == [str(tmp_path / "9.dcm")]


def test_a_header_that_claims_too_much_is_refused_before_anything_is_decoded(tmp_path, monkeypatch):
    monkeypatch.setattr(pydicom.pixels, "pixel_array", lambda *args, **kwargs: pytest.fail("it was decoded"))
    big = {"Rows": 65535, "Columns": 65535}
    assert "its header says 1 frame of 65535 x 65535, and the file ends before" in broken(dicom(DEEP, 12, **big))
    assert "--max_image_pixels" in refused(dicom(DEEP, 12, syntax=JPEG_LOSSLESS, frames=[b"\0\0"], **big))
    for frames in ((), [bytes(10)]):
        syntax = RLE if frames else UNCOMPRESSED
        data = dicom(DEEP, 12, syntax=syntax, frames=frames, NumberOfFrames=2**31 - 1)
        (tmp_path / f"{len(frames)}.dcm").write_bytes(data)
    with pytest.raises(
        ValueError, match="no image that can be read: .*2147483647 frames of 32 x 24, and the file ends"
    ):
        load_images(tmp_path)
    assert "Deflated" in refused(dicom(DEEP, 12, syntax=DEFLATED))


@pytest.mark.parametrize(
    ("name", "mark", "skip", "size"),
    [
        ("lossless JPEG", b"\xff\xc3", 5, (24, 32)),
        ("JPEG-LS", b"\xff\xf7", 5, (24, 32)),
        ("JPEG", b"\xff\xc0", 5, (24, 32)),
        ("JPEG 2000", b"\xff\x4f\xff\x51", 8, (0, 32)),
    ],
)
def test_a_compressed_frame_that_is_larger_than_its_header_says_is_never_decoded(name, mark, skip, size, monkeypatch):
    data = compressed(name)[1]
    opened(data)
    at = data.index(mark) + skip
    monkeypatch.setattr(pydicom.pixels, "pixel_array", lambda *args, **kwargs: pytest.fail("it was decoded"))
    assert tuple(data[at : at + 4]) == (size[0] >> 8, size[0] & 255, size[1] >> 8, size[1] & 255)
    assert "its header says otherwise" in broken(data[:at] + b"\xff\xf0\xff\xf0" + data[at + 4 :])
